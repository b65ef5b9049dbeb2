"""Pretraining end to end on a few generated images: resume, export, configuration."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ssl_train import export, train
from ssl_train.config import DEFAULT, Config, parse
from ssl_train.model import MoCo
from tests.test_events import in_metrics, picture_steps, scalars
from utils import checkpoint, config, metrics
from utils.errors import InputError, exit_code
from utils.paths import RunDir

SMALL = [
    "model.arch=resnet18", "model.dim=16", "model.queue=10", "augment.image_size=32", "batch_size=4",
    "workers=0", "log_every=2", "device=cpu", "precision=float32", "optim.lr=0.05",
]  # fmt: skip


def write_images(folder: Path, count: int = 14) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def pretrain(run: Path, data: Path, *words: str, epochs: int = 2) -> dict[str, Any]:
    flags = ["--run-dir", str(run), "--dataset-root", str(data), "--epochs", str(epochs)]
    return train.main([*flags, *SMALL, *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("ssl") / "images")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, dict[str, Any]]:
    """A run of two epochs that nothing disturbed, and what it returned."""
    run = tmp_path_factory.mktemp("ssl") / "whole"
    return run, pretrain(run, data)


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in RunDir(run).metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in metrics.TIMES} for line in lines]


def test_a_run_writes_what_the_next_stage_needs(whole: tuple[Path, dict[str, Any]]) -> None:
    run, result = whole
    last, backbone = run / "checkpoints" / "checkpoint_0001.pth", run / "backbone.pth"
    assert result["outputs"] == {"last": last, "backbone": backbone} and result["epochs"] == 2
    written = [record for record in records(run) if record["kind"] == "train"]
    assert [record["step"] for record in written] == [2, 3, 5, 6]
    epochs = [record for record in records(run) if record["kind"] == "epoch"]
    assert [record["loss_avg"] for record in epochs][1] == result["metrics"]["loss"]
    assert {"train_log.csv", "hyperparam.csv", "times"} < {path.name for path in run.iterdir()}
    assert scalars(run) == in_metrics(run) and picture_steps(run, "views") == [1, 4]
    assert [record["lr"] for record in written] == pytest.approx([0.05, 0.05, 0.025, 0.025])
    second = [written[2]["loss"], written[2]["loss"], written[3]["loss"]]  # two steps and one
    assert result["metrics"]["loss"] == pytest.approx(np.mean(second), rel=1e-5)
    assert all(math.isfinite(record["loss"]) for record in written)
    assert all(0 <= record["top1"] <= record["top5"] <= 100 for record in written)
    saved = checkpoint.load(last, "moco", "?")
    assert saved["model"]["pointer"].item() == 24 % 10
    resnet = torchvision.models.resnet18(weights=None)
    resnet.fc = torch.nn.Identity()
    resnet.load_state_dict(checkpoint.read(backbone), strict=True)
    MoCo(**saved["architecture"]).load_state_dict(saved["model"])
    for name, tensor in resnet.state_dict().items():
        assert torch.equal(tensor, saved["model"][f"query_encoder.{name}"]), name
    assert not torch.equal(resnet.conv1.weight, saved["model"]["key_encoder.conv1.weight"])


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    run = tmp_path / "killed"
    shutil.copytree(whole[0], run)
    (run / "checkpoints" / "checkpoint_0001.pth").unlink()
    (run / "backbone.pth").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    result = pretrain(run, data)
    assert result["metrics"] == whole[1]["metrics"]
    assert records(run) == records(whole[0])
    assert scalars(run) == in_metrics(run) and picture_steps(run, "views") == [1, 4]
    saved = whole[0] / "checkpoints"
    first, last = (checkpoint.load(saved / f"checkpoint_000{epoch}.pth", "moco", "?") for epoch in (0, 1))
    resumed = checkpoint.load(result["outputs"]["last"], "moco", "?")
    for name, tensor in last["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
        assert name == "pointer" or not torch.equal(tensor, first["model"][name]), f"{name} was never trained"
    for key, state in last["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], resumed["optimizer"]["state"][key]["momentum_buffer"])
    assert torch.equal(
        checkpoint.read(run / "backbone.pth")["conv1.weight"],
        checkpoint.read(whole[0] / "backbone.pth")["conv1.weight"],
    )


def test_a_finished_run_is_not_trained_again_and_needs_no_data(
    tmp_path: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    run = tmp_path / "done"
    shutil.copytree(whole[0], run)
    (run / "backbone.pth").unlink()
    result = pretrain(run, tmp_path / "gone")
    assert result["metrics"] == whole[1]["metrics"] and result["epochs"] == 2
    assert result["outputs"]["last"].read_bytes() == whole[1]["outputs"]["last"].read_bytes()
    assert (run / "backbone.pth").read_bytes() == (whole[0] / "backbone.pth").read_bytes()


def test_wrong_data_and_wrong_checkpoints_end_with_code_2(
    tmp_path: Path, data: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    (tmp_path / "empty").mkdir()
    last = whole[1]["outputs"]["last"]
    for folder, words, message in (
        (tmp_path / "empty", [], "no PNG or JPEG"),
        (tmp_path / "none", [], "none: not found"),
        (data, ["batch_size=16", "model.queue=16"], "batch_size=16 is more than the 14 training images"),
        (
            data,
            [f"resume={last}", "model.queue=12"],
            "the checkpoint's model is .*'queue': 10.*this run's .*'queue': 12",
        ),
        (data, [f"resume={whole[0] / 'backbone.pth'}"], "not a checkpoint of this project"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            pretrain(tmp_path / "run", folder, *words)
        assert exit_code(caught.value) == 2


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_the_export_is_a_whole_torchvision_resnet(arch: str) -> None:
    weights = MoCo(arch=arch, dim=4, queue=4, momentum=0.9, temperature=0.2).state_dict()
    resnet = torchvision.models.get_model(arch, weights=None)
    resnet.fc = torch.nn.Identity()
    assert resnet.load_state_dict(export.backbone(weights, arch), strict=True).missing_keys == []


def test_an_export_that_is_not_complete_is_refused_by_key() -> None:
    weights = MoCo(arch="resnet18", dim=4, queue=4, momentum=0.9, temperature=0.2).state_dict()
    moved, cut = "query_encoder.layer3.0.bn1.running_var", "query_encoder.conv1.weight"
    for wrong, complaint in (
        ({key: value for key, value in weights.items() if key != moved}, "missing: layer3.0.bn1.running_var"),
        ({**weights, "query_encoder.extra": weights[moved]}, "left over: extra"),
        ({**weights, cut: weights[cut][:1]}, "of another shape: conv1.weight"),
    ):
        with pytest.raises(InputError) as caught:
            export.backbone(wrong, "resnet18")
        assert str(caught.value) == f"the query encoder is not a whole resnet18: {complaint}"


def test_export_from_the_command_line(tmp_path: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    export.main([str(whole[1]["outputs"]["last"]), str(tmp_path / "out" / "backbone.pth")])
    assert (tmp_path / "out" / "backbone.pth").read_bytes() == (whole[0] / "backbone.pth").read_bytes()
    with pytest.raises(InputError, match=r"backbone\.pth: not a checkpoint .*give a checkpoint of ssl_train"):
        export.main([str(whole[0] / "backbone.pth"), str(tmp_path / "again.pth")])


def told(*words: str, file: Path = DEFAULT) -> Config:
    return parse(["--config", str(file), "--run-dir", "x", "--dataset-root", "y", *words])


@pytest.mark.parametrize("file", sorted(DEFAULT.parent.glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_configuration_loads_and_reads_back(file: Path, tmp_path: Path) -> None:
    cfg = told(file=file)
    (tmp_path / "again.yaml").write_text(config.to_yaml(cfg))
    assert config.load(Config, tmp_path / "again.yaml") == cfg


def test_the_default_is_the_reference_recipe() -> None:
    cfg = config.to_dict(told())
    assert cfg["model"] == {
        "arch": "resnet50", "dim": 128, "queue": 65536, "momentum": 0.999, "temperature": 0.2, "bn_groups": 1,
    }  # fmt: skip
    assert cfg["optim"] == {"lr": 0.015, "momentum": 0.9, "weight_decay": 1e-4}
    assert (cfg["epochs"], cfg["batch_size"]) == (100, 128)
    assert cfg["augment"] == {
        "backend": "opencv", "image_size": 224, "crop_scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1],
        "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5, "blur_sigma": [0.1, 2.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "complaints"),
    [
        (["model.queue=127"], ["model.queue=127: at least batch_size=128"]),
        (["model.bn_groups=3"], ["model.bn_groups=3: at least 1, and batch_size=128 a multiple of it"]),
        (
            ["--epochs", "0", "--lr", "0", "--workers", "-1", "model.temperature=0", "model.momentum=1"],
            ["epochs=0", "optim.lr=0.0", "workers=-1", "model.temperature=0.0", "model.momentum=1.0"],
        ),
        (
            ["augment.crop_scale=[0.5]", "augment.jitter=[0.4,0,0,0.6]", "augment.blur_sigma=[2,1]"],
            [
                "augment.crop_scale=[0.5]",
                "augment.jitter=[0.4, 0.0, 0.0, 0.6]",
                "augment.blur_sigma=[2.0, 1.0]",
            ],
        ),
        (["augment.blur_p=1.1", "augment.image_size=31"], ["augment.blur_p=1.1", "augment.image_size=31"]),
        (["model.arch=resnet19"], ["expected one of resnet18, resnet34, resnet50, resnet101, resnet152"]),
        (["model.tempreature=1"], ["did you mean 'model.temperature'"]),
    ],
)
def test_all_wrong_values_are_named_at_once(words: Sequence[str], complaints: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        told(*words)
    assert [complaint for complaint in complaints if complaint not in str(caught.value)] == []


def test_the_quick_test_is_six_steps_of_one_epoch(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", 40)
    result = pretrain(tmp_path / "run", data, "--test", "true", epochs=9)
    assert result["epochs"] == 1
    assert [line["step"] for line in records(tmp_path / "run") if line["kind"] == "train"] == [2, 4, 6]
