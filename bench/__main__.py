"""Run every benchmark but the longest, or those named, each in a process: python -m bench [augment moco_step ...]

What they print is also written to bench/results/<date>_<name>.txt. Exit code 1 when one misses a goal.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = ("__init__", "__main__", "measure", "operators")
LONG = ("detectors",)  # only when named


def main(names: list[str]) -> int:
    scripts = sorted(file.stem for file in HERE.glob("*.py") if file.stem not in HELPERS)
    if unknown := sorted(set(names) - set(scripts)):
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(scripts)}", file=sys.stderr)
        return 2
    missed = []
    for name in names or [name for name in scripts if name not in LONG]:
        done = subprocess.run([sys.executable, "-m", f"bench.{name}"], stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            missed.append(name)
        if not done.returncode or "  MISSED" in done.stdout:
            (HERE / "results" / f"{datetime.date.today()}_{name}.txt").write_text(done.stdout)
    if missed:
        print(f"missed a goal, or failed: {', '.join(missed)}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
