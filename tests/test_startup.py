"""What starts quickly: no torch for `--help`, a wrong configuration or a launch; the phases until the first step."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import Checkout
from utils import ahead, files, metrics
from utils.errors import InputError
from utils.paths import ROOT, RunDir

PROGRAMS = [
    ["jobs/launch.py"],
    ["-m", "jobs.worker"],
    ["-m", "ssl_train.train"],
    ["-m", "detect_train.train"],
    ["-m", "evaluate.run"],
    ["-m", "evaluate.report"],
]
SLOW = {"torch", "torchvision", "numpy", "PIL", "cv2", "submitit", "pycocotools", "hotcoco"}


def imported(argv: list[str], cwd: Path = ROOT) -> tuple[int, set[str], str]:
    """The exit code of a program, the top-level modules it imported, and what it printed."""
    environ = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *argv], cwd=cwd, env=environ, capture_output=True, text=True
    )
    found = re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE)
    assert "argparse" in found
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time: ")]
    return done.returncode, {name.partition(".")[0] for name in found}, done.stdout + "\n".join(errors)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda argv: argv[-1])
def test_help_imports_nothing_slow(program: list[str]) -> None:
    code, modules, output = imported([*program, "--help"])
    assert code == 0
    assert output.startswith("usage: ")
    assert not modules & SLOW


@pytest.mark.parametrize("program", ["ssl_train.train", "detect_train.train", "evaluate.run"])
def test_a_wrong_configuration_is_told_once_and_at_once(program: str) -> None:
    code, modules, output = imported(["-m", program, "workers=minus", "no.such.key=1"])
    assert code == 2
    assert output.count("no.such.key") == 1
    assert not modules & SLOW


def test_a_chain_is_checked_and_shown_without_the_programs_libraries(tmp_path: Path) -> None:
    words = ["--file", "tests/standin/chain.yaml", "--chain", "--cluster", "local", "--dry-run"]
    code, modules, output = imported(["jobs/launch.py", *words], Checkout(tmp_path).root)
    assert code == 0, output
    assert output.count("jobs.worker") == 5
    assert not modules & SLOW


def test_the_worker_refuses_before_it_imports_the_program(tmp_path: Path) -> None:
    here = Checkout(tmp_path)
    argv = ["-m", "jobs.worker", "r1", "--file", "tests/standin/chain.yaml"]
    code, modules, output = imported(argv, here.root)
    assert (code, "parent pretrain is not done: todo" in output) == (2, True), output
    assert not modules & SLOW
    assert here.state("r1")["status"] == "failed"


def test_the_first_step_tells_the_phases_once() -> None:
    code = """
from utils import log, timeline
log.setup(0, log.Path("/dev/null"))
began = timeline._started()
assert 0 <= timeline.clock() - began < 600, began
now = iter(began + seconds for seconds in (1, 3, 3.5, 6, 6.25, 9, 9))
timeline.clock = lambda: next(now)
for phase in ("imports", "data", "model", "data"):
    timeline.done("start-up", phase)
timeline.first_step(); timeline.done("start-up", "data"); timeline.first_step()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.endswith("first step after 6.2 s: imports 1.0, data 4.5, model 0.5, first step 0.2")


def test_a_hash_begun_before_is_the_files_own_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 5_000_000)
    ahead.begin([file])
    assert ahead.sha256(file) == hashlib.sha256(b"a" * 5_000_000).hexdigest()
    before = file.stat()
    file.write_bytes(b"b" * 5_000_000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # clocks of file systems are coarse
    assert ahead.sha256(file) == hashlib.sha256(b"b" * 5_000_000).hexdigest()
    files.write_text(file, "c")
    assert ahead.sha256(file) == hashlib.sha256(b"c").hexdigest()


def test_newest_metrics_are_those_of_all_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics.newest(path) == {}
    writer = metrics.MetricsWriter(RunDir(tmp_path), epoch=0, step=0)
    for epoch in range(3):
        for step in range(1, 4):
            writer.write("train", epoch=epoch, step=3 * epoch + step, loss=1 / (3 * epoch + step))
        if epoch < 2:
            writer.write("val", epoch=epoch, step=3 * epoch + 3, AP=epoch / 10)
    merged = {key: value for record in metrics.read(path) for key, value in record.items()}
    assert metrics.newest(path) == merged == {"kind": "train", "epoch": 2, "step": 9, "loss": 1 / 9, "AP": 0.1}
    with open(path, "a") as file:
        file.write('{"kind": "train", "epo')  # torn by a kill
    assert metrics.newest(path) == merged
    with open(path, "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: a line is damaged"):
        metrics.newest(path)
