"""Both detectors of fixed shapes by their programs on XLA's CPU device: few graphs, the CPU's report."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests import ranks
from tests.test_detect_train import SMALL as ROUND
from tests.test_two_stage_train import CONFIGS, backbone, data
from tests.test_two_stage_train import SMALL as PART
from utils import checkpoint_files
from utils.paths import RunDir

__all__ = ["backbone", "data"]  # fixtures
pytest.importorskip("torch_xla", reason="torch_xla has an environment of its own: make install-tpu")


def program(module: str, run: Path, data: Path, *words: object) -> str:
    argv = [sys.executable, "-m", module, f"--run-dir={run}", f"--dataset-root={data}", *words]
    ended = ranks.run(argv, ranks.XLA, timeout=1200)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout


def compiled(output: str) -> list[tuple[int, int]]:
    """(step, graphs until then), whenever a training step has compiled one."""
    return [(int(step), int(count)) for step, count in re.findall(r"step (\d+): XLA has compiled (\d+)", output)]


def steps(run: Path) -> int:
    lines = map(json.loads, RunDir(run).metrics.read_text().splitlines())
    return max(line["step"] for line in lines if line["kind"] == "train")


def last(run: Path) -> Path:
    newest = checkpoint_files.newest(RunDir(run).checkpoints)
    assert newest
    return newest


def reported(run: Path) -> dict[str, float]:
    return json.loads(RunDir(run).report_json.read_text())["stats"]


def test_a_round_of_the_dense_detector(tmp_path: Path, data: Path, backbone: Path) -> None:
    words = [*ROUND, "model.head=dense", f"backbone={backbone}", "device=xla", "batch_size=2", "log_every=8"]
    run = tmp_path / "r1"
    output = program("detect_train.train", run, data, *words, "epochs=6")
    assert steps(run) == 24
    assert compiled(output) == [(1, 1), (2, 2)]
    for device in ("cpu", "xla"):
        given = [f"checkpoint={last(run)}", f"device={device}", "workers=0", "precision=float32"]
        program("evaluate.run", tmp_path / device, data, *given)
    assert reported(tmp_path / "xla") == pytest.approx(reported(tmp_path / "cpu"), abs=1e-3)


def test_the_two_stages(tmp_path: Path, data: Path, backbone: Path) -> None:
    words = [*PART, f"backbone={backbone}", "device=xla", "batch_size=2", "log_every=8"]
    words += ["iterations.pre=6", "iterations.main=18"]
    unet, detector = tmp_path / "unet", tmp_path / "classify"
    graphs = [(1, 1), (2, 2), (7, 3)]  # from the seventh on the ResNet learns too
    output = program("detect_train.two_stage.train", unet, data, f"--config={CONFIGS / 'unet.yaml'}", *words)
    assert (steps(unet), compiled(output)) == (24, graphs)
    words += [f"--config={CONFIGS / 'classify.yaml'}", f"unet={last(unet)}"]
    output = program("detect_train.two_stage.train", detector, data, *words)
    assert (steps(detector), compiled(output)) == (24, graphs)
    for device in ("cpu", "xla"):
        given = [f"checkpoint={last(detector)}", f"device={device}", "workers=0", "precision=float32"]
        program("evaluate.run", tmp_path / device, data, *given)
    assert reported(tmp_path / "xla") == pytest.approx(reported(tmp_path / "cpu"), abs=1e-3)


def test_faster_rcnn_is_refused(tmp_path: Path, data: Path, backbone: Path) -> None:
    argv = ["-m", "detect_train.train", f"--run-dir={tmp_path / 'r1'}", f"--dataset-root={data}", f"--bp={backbone}"]
    ended = ranks.run([sys.executable, *argv, "device=xla"], ranks.XLA)
    assert ended.returncode == 2
    assert re.fullmatch(r"ERROR 2: .*model\.head=dense.*two_stage.*\n", ended.stderr)
