"""Rounds of the dense detector through the same programs as Faster R-CNN's: resumed, evaluated, refused, chained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detect_train import config, reading
from detect_train.inference import predict
from detect_train.model import from_checkpoint
from evaluate import config as evaluation
from evaluate import report, run
from tests import ranks
from tests.labeled_set import write_set
from tests.rank_weights import ended_with
from tests.test_detect_model import resnet
from tests.test_detect_train import fine_tune, last_of, records, refused, round_arguments
from utils import checkpoint, labels
from utils.errors import DivergedError, InputError
from utils.paths import ROOT, RunDir
from utils.sample_data import Sample, make
from utils.tree import Folder

DENSE = ["model.head=dense", "model.score_threshold=0"]
NEEDED = ["--run-dir", "run", "--dataset-root", "data", "--bp", "backbone.pth"]
NO_XLA = r"device=xla: Faster R-CNN .*; use model\.head=dense, or jobs/two_stage\.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, dict[str, Any]]:
    """A first round of two epochs of two steps, and what it returned."""
    run = tmp_path_factory.mktemp("dense") / "r1"
    return run, fine_tune(run, data, 2, *DENSE)


def evaluated(run_dir: Path, checkpoint: Path, data: Path) -> list[str]:
    words = ["--run-dir", run_dir, "--checkpoint-path", checkpoint, "--dataset-root", data, "--workers", "0"]
    return [*map(str, words), "device=cpu", "precision=float32"]


def test_a_round_and_its_evaluation(tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path) -> None:
    run_dir, result = r1
    assert [line["step"] for line in records(run_dir, "train")] == [1, 2, 3, 4]
    for line in records(run_dir, "train"):
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert len(parts) == 3 and line["loss"] == pytest.approx(sum(parts), rel=1e-5)
    saved = last_of(result)
    assert saved["architecture"]["head"] == "dense" and not saved["architecture"].keys() & config.UNUSED["dense"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    finished = run.main(evaluated(tmp_path, result["outputs"]["best"], data))
    torch.set_num_threads(threads)
    written = report.parse(finished["outputs"]["report"].read_text(), "report")
    assert written is not None and written["images"] == 3
    assert written["architecture"] == json.loads(json.dumps(saved["architecture"]))
    assert written["stats"] == finished["metrics"]


def test_a_resumed_round_ends_as_if_never_stopped(tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path) -> None:
    fine_tune(tmp_path / "run", data, 1, *DENSE)
    resumed, whole = last_of(fine_tune(tmp_path / "run", data, 2, *DENSE)), last_of(r1[1])
    assert (resumed["step"], resumed["best"], resumed["inexact"]) == (4, whole["best"], [])
    for name, value in whole["model"].items():
        assert torch.equal(resumed["model"][name], value), name


def test_the_next_round_goes_on_and_no_other_head_does(
    tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path
) -> None:
    outputs = r1[1]["outputs"]
    init = [f"init={outputs['last']}", f"best={outputs['best']}"]
    result = fine_tune(tmp_path / "r2", data, 3, *DENSE, *init, "model.max_size=64", lr=0.001)
    assert (result["epochs"], last_of(result)["step"], last_of(result)["start_step"]) == (3, 6, 4)
    refused(tmp_path / "rcnn", data, 3, init, "another detector: head 'dense' there, 'rcnn' here")
    old = checkpoint.read(outputs["last"])
    old["architecture"] = {**old["architecture"], **{key: 1 for key in config.UNUSED["dense"]}}
    del old["architecture"]["head"]  # as before there was another
    checkpoint.write(tmp_path / "old.pth", old)
    refused(tmp_path / "old", data, 3, [*DENSE, f"init={tmp_path / 'old.pth'}"], "head 'rcnn' there, 'dense' here")


def test_every_image_is_detected_in_once(tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path) -> None:
    """By two ranks and by one, in batches of two and of one, of which some are filled up."""
    model, classes = from_checkpoint(last_of(r1[1]))
    index = labels.load(Folder(data), "training", classes=classes, on_error="error", cache=tmp_path / "cache.index")
    examples = reading.of(model).examples(index, flip=False)
    how: dict[str, Any] = {"workers": 0, "device": torch.device("cpu"), "precision": "float32"}
    together, alone = (predict(model, examples, batch_size=size, **how) for size in (3, 1))  # 8 images
    assert sorted(set(together[:, 0])) == index.ids.tolist() and len(together) == len(alone)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-3, atol=1e-3)


def test_two_ranks_train_and_evaluate(tmp_path: Path, data: Path) -> None:
    first, second = ended_with(tmp_path, "detect_train.train", *round_arguments(tmp_path / "run", data, 1, *DENSE))
    assert (tmp_path / "stdout").read_text().count("Epoch Stats [0]") == 1
    assert first["step"] == second["step"] == 2 and first["metrics"] == second["metrics"]
    assert all(torch.equal(second["model"][name], value) for name, value in first["model"].items())
    best = RunDir(tmp_path / "run").checkpoints / "best.pth"
    answer = ranks.torchrun(2, "-m", "evaluate.run", *evaluated(tmp_path / "two", best, data))
    assert answer.returncode == 0, answer.stderr[-3000:]
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (together["world_size"], together["images"]) == (2, 3)
    alone = run.main(evaluated(tmp_path / "one", best, data))["metrics"]
    assert together["stats"] == pytest.approx(alone, abs=1e-12)


@pytest.mark.parametrize("layer", ["backbone.body.conv1", "head.classes", "head.sides", "head.centerness"])
def test_scores_and_boxes_that_are_not_finite_are_an_error(
    tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path, layer: str
) -> None:
    model, classes = from_checkpoint(last_of(r1[1]))
    torch.nn.init.constant_(model.get_submodule(layer).weight, 3e38)
    index = labels.load(Folder(data), "validation", classes=classes, on_error="error", cache=tmp_path / "cache.index")
    how: dict[str, Any] = {"workers": 0, "device": torch.device("cpu"), "precision": "float32"}
    with pytest.raises(DivergedError, match="scores or boxes are not finite"):
        predict(model, reading.of(model).examples(index, flip=False), batch_size=2, **how)


def test_a_backbone_is_loaded_into_it(tmp_path: Path, data: Path) -> None:
    encoder = resnet()
    torch.save(encoder.state_dict(), tmp_path / "backbone.pth")
    words = ["--bp", str(tmp_path / "backbone.pth"), "model.norm=frozen", "model.trainable_layers=3", *DENSE]
    saved = last_of(fine_tune(tmp_path / "r1", data, 1, *words, lr=1e-6))["model"]
    for name in ("conv1.weight", "bn1.running_mean", "layer4.1.bn2.running_var"):
        assert torch.equal(saved[f"backbone.body.{name}"], encoder.state_dict()[name]), name


def test_faster_rcnn_is_refused_where_each_shape_is_compiled() -> None:
    with pytest.raises(InputError, match=NO_XLA):
        config.parse([*NEEDED, "device=xla"])
    assert config.parse([*NEEDED, "device=xla", "model.head=dense", "model.max_size=1024"]).device == "xla"
    with pytest.raises(InputError, match="max_size=1333: the side of head=dense's squares is a multiple of 32"):
        config.parse([*NEEDED, "model.head=dense"])
    with pytest.raises(InputError, match=r"anchor_sizes=.* from small to large"):
        config.parse([*NEEDED, "model.head=dense", "model.max_size=1024", "model.anchor_sizes=[8, 16, 32, 64, 64]"])


def test_the_refusal_is_one_line_and_needs_no_torch() -> None:
    program = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('detect_train.train', {}, '__main__')"
    answer = ranks.run([sys.executable, "-c", program, *NEEDED, "device=xla"])
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.startswith("ERROR 2: device=xla: ") and answer.stderr.count("\n") == 1


def test_a_checkpoint_of_faster_rcnn_is_refused_there(tmp_path: Path, data: Path) -> None:
    best = fine_tune(tmp_path / "rcnn", data, 1)["outputs"]["best"]
    content = checkpoint.read(best)
    assert content["architecture"].pop("head") == "rcnn"  # old ones have none
    checkpoint.write(tmp_path / "old.pth", content)
    for path in (best, tmp_path / "old.pth"):
        cfg = evaluation.parse([*evaluated(tmp_path / "eval", path, data), "device=xla"])
        with pytest.raises(InputError, match=f"{path.name}: {NO_XLA}"):
            run.evaluate(cfg, RunDir(tmp_path / "eval"), torch.device("cpu"))


def test_the_demo_s_chain(tmp_path: Path) -> None:
    """From generated archives to the report, an epoch a stage on a few small pictures."""
    for name in ("jobs", "slurm", "utils", "ssl_train", "detect_train", "evaluate"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    make(tmp_path / "data", Sample(unlabeled=64, training=8, validation=3, size=64))
    words = [f"data.{name}={tmp_path / 'data' / name}.sqsh" for name in ("unlabeled", "labeled")]
    words += ["model.max_size=64", "model.min_size=[64]", "workers=0", "pretrain.epochs=1", "pretrain.model.queue=32"]
    words += [f"r{n}.epochs={n}" for n in (1, 2, 3)]
    launch = ["jobs/launch.py", "--chain", "--file", "jobs/demo_dense.yaml", "--cluster", "local"]
    answer = ranks.run([sys.executable, tmp_path / launch[0], *launch[1:], *words], {"PYTHONPATH": ""}, timeout=600)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    metrics = json.loads((tmp_path / "runs" / "demo_dense" / "eval" / "metrics.json").read_text())
    assert metrics["architecture"]["head"] == "dense" and metrics["images"] == 3
