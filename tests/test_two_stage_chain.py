"""The chain of the two-stage detector on a handful of generated images, all of it in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import launch, stages
from jobs.arguments import parse
from utils import paths, sample_data
from utils.paths import ROOT, RunDir

FILE = ROOT / "jobs/demo_two_stage.yaml"
TINY = [
    "encoder.epochs=1", "encoder.batch_size=16", "encoder.model.queue=32", "encoder.augment.image_size=32",
    "model.side=64", "model.proposals=16", "model.samples=8", "quick=true", "unet.batch_size=4",
    "classify.batch_size=4", "workers=0",
]  # fmt: skip


def test_two_archives_become_a_two_stage_detector_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_data.make(tmp_path, sample_data.Sample(unlabeled=32, training=12, validation=4, size=64))
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(ROOT)  # the launcher goes there
    data = [f"data.{name}={tmp_path / name}.sqsh" for name in ("unlabeled", "labeled")]
    arguments = parse("", ["--chain", "--cluster", "debug", "--file", str(FILE), *data, *TINY])
    chain = stages.load(arguments.file)
    launch.launch(chain, arguments)
    run_dirs = {stage: RunDir(tmp_path / "runs/demo_two_stage" / stage) for stage in chain.stages}
    markers = {stage: json.loads(run_dir.state.read_text()) for stage, run_dir in run_dirs.items()}
    assert list(markers) == ["encoder", "unet", "classify", "eval"]
    assert {marker["status"] for marker in markers.values()} == {"done"}
    sources = {key: each["from"] for key, each in markers["classify"]["inputs"].items()}
    assert sources == {"backbone": "encoder.backbone", "unet": "unet.last"}
    report = json.loads(run_dirs["eval"].report_json.read_text())
    assert report["architecture"]["head"] == "two_stage" and report["images"] == 4
    assert report["sha256"] == markers["classify"]["outputs"]["best"]["sha256"]
