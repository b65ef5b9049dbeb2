"""A training program as ranks run it; what each of them ended with is saved, to be compared.

torchrun ... -m tests.rank_weights FOLDER MODULE ARGUMENTS...
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.ranks import torchrun
from utils import engine


def ended_with(folder: Path, module: str, *words: object) -> list[dict[str, Any]]:
    """`model`, `metrics` and `step` of each of two ranks; `folder/stdout` is what they printed."""
    done = torchrun(2, "-m", "tests.rank_weights", folder, module, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    return [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]


def main(folder: Path, module: str, *words: str) -> None:
    ended: list[engine.TrainState] = []
    fit = engine.fit

    def observed(state: engine.TrainState, *arguments: Any, **options: Any) -> None:
        fit(state, *arguments, **options)
        ended.append(state)

    engine.fit = observed
    result = importlib.import_module(module).main(words)
    found = {"model": ended[0].model.state_dict(), "metrics": result["metrics"], "step": ended[0].step}
    torch.save(found, folder / f"rank{os.environ['RANK']}.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
