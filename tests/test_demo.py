"""`make demo`, as a newcomer types it: a clone, two archives, a detector that finds things, nothing done twice."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.clone import clone, make
from utils.paths import ROOT

ENOUGH = 0.50  # AP50 on the demo's validation split


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    here = clone(tmp_path_factory.mktemp("demo"))
    return here, make(here, "demo")


def test_two_archives_become_a_detector_and_its_table(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    here, done = demo
    assert done.returncode == 0, done.stdout[-3000:]
    table = re.findall(r"^ Average (?:Precision|Recall) +\(A[PR]\) @\[.*\] = (-?\d\.\d{3})$", done.stdout, re.MULTILINE)
    assert len(table) == 24, "once when it is evaluated, once at the end"
    assert float(table[13]) >= ENOUGH
    metrics = json.loads((here / "runs/demo/eval/metrics.json").read_text())
    assert f"{metrics['stats']['AP50']:.3f}" == table[13]
    page = here / "runs/demo/report.html"
    assert f"\nchain page: {page}\n" in done.stdout
    assert table[13] in page.read_text() and "data:image/jpeg" in page.read_text()
    shown = re.findall(r"^\w+ \w+: (/\S+)$", done.stdout, re.MULTILINE)
    assert shown and all(Path(path).is_file() for path in shown)


def test_a_second_time_nothing_is_trained_again(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    here, _ = demo

    def written() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (here / "runs/demo").rglob("*.pth")}

    before = written()
    again = make(here, "demo")
    assert again.returncode == 0, again.stdout[-3000:]
    assert again.stdout.count("done") >= 5 and "epoch 0" not in again.stdout
    assert written() == before and before
    assert "Average Precision" in again.stdout


def test_the_demo_is_what_the_readme_says() -> None:
    assert "```bash\nmake demo\nmake test\n```" in (ROOT / "README.md").read_text()
