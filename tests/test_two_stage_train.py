"""Both parts by their program: what they leave, that they learn, and that an interruption changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from detect_train.two_stage import train
from detect_train.two_stage.config import DEFAULT, parse
from evaluate import report
from evaluate import run as evaluate
from tests.labeled_set import write_set
from tests.rank_weights import ended_with
from tests.test_detect_model import resnet
from tests.test_detect_train import last_of, records
from tests.test_events import picture_steps
from utils import checkpoint, checkpoint_files
from utils.errors import InputError, Stopped
from utils.files import sha256
from utils.paths import RunDir

CONFIGS = DEFAULT.parent
SMALL = [
    "model.backbone=resnet18", "model.side=64", "model.width=8", "model.proposals=8", "model.crop_side=32",
    "model.samples=6", "optim.warmup_steps=2", "batch_size=4", "workers=0", "log_every=1", "device=cpu",
    "precision=float32", "checkpoint.every_minutes=0", "validate_every=100",
]  # fmt: skip


def part(name: str, run: Path, data: Path, *words: str) -> dict[str, Any]:
    config = ["--config", str(CONFIGS / f"{name}.yaml"), "--run-dir", str(run), "--dataset-root", str(data)]
    return train.main([*config, *SMALL, *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "backbone.pth"
    torch.save(resnet().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory, data: Path, backbone: Path) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("chain") / "unet"
    words = ["--bp", str(backbone), "iterations.pre=3", "iterations.main=57", "--lr", "0.02"]
    return run, part("unet", run, data, *words)


@pytest.fixture(scope="module")
def detector(unet: tuple[Path, dict[str, Any]], data: Path, backbone: Path) -> tuple[Path, dict[str, Any]]:
    run = unet[0].with_name("classify")
    words = ["--bp", str(backbone), f"unet={unet[1]['outputs']['last']}", "iterations.pre=3", "iterations.main=57"]
    return run, part("classify", run, data, *words)


def test_the_unet_learns_to_find_what_there_is(unet: tuple[Path, dict[str, Any]]) -> None:
    run, result = unet
    assert list(result["outputs"]) == ["last"]
    (validation,) = records(run, "val")
    assert validation["step"] == 60 and validation["recall"] == result["metrics"]["recall"] > 0.8
    assert len(validation["recall_per_class"]) == 2 and min(validation["recall_per_class"].values()) > 0.5
    assert picture_steps(run, "detections") == [60]
    steps = records(run, "train")
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    saved = last_of(result)
    assert saved["kind"] == "unet" and saved["architecture"]["head"] == "unet" and not saved["batch"]


def test_the_classifier_makes_a_detector_of_it_that_can_be_evaluated(
    detector: tuple[Path, dict[str, Any]], unet: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    _, result = detector
    assert result["metrics"]["AP50"] > 0.6
    best = checkpoint.read(result["outputs"]["best"])
    before = last_of(unet[1])["model"]
    assert all(torch.equal(best["model"][f"unet.{name}"], value) for name, value in before.items())
    words = ["--run-dir", str(tmp_path), "--dataset-root", str(data), "batch_size=2", "workers=0", "device=cpu"]
    evaluated = evaluate.main([*words, "--checkpoint-path", str(result["outputs"]["best"])])
    found = report.parse(evaluated["outputs"]["report"].read_text(), "report")
    assert found and found["architecture"]["head"] == "two_stage" and found["images"] == 3
    assert found["stats"] == pytest.approx({name: result["metrics"][name] for name in found["stats"]}, abs=1e-3)


@pytest.mark.parametrize("name", ["unet", "classify"])
def test_the_resnet_waits_until_the_rest_can_use_it(
    name: str, tmp_path: Path, unet: tuple[Path, dict[str, Any]], data: Path, backbone: Path
) -> None:
    words = ["--bp", str(backbone)] + ([f"unet={unet[1]['outputs']['last']}"] if name == "classify" else [])
    words += ["iterations.pre=2", "iterations.main=1"]
    given = torch.load(backbone, weights_only=True)
    prefix = "backbone.body." if name == "unet" else "classifier.backbone.body."
    saved = last_of(part(name, tmp_path / "run", data, *words))["model"]
    held = checkpoint.read(tmp_path / "run/checkpoints/checkpoint_0000.pth")["model"]
    for weight in ("conv1.weight", "bn1.weight", "layer4.1.conv2.weight"):
        assert torch.equal(held[prefix + weight], given[weight])
        assert not torch.equal(saved[prefix + weight], given[weight])
    assert not torch.equal(held[prefix + "bn1.running_mean"], given["bn1.running_mean"])


def interrupted_at(call: int, loss: Any) -> Any:
    """`train`'s maker of a loss whose `call`th step is asked to be the last."""

    def make(*arguments: Any) -> Any:
        compute, calls = loss(*arguments), []

        def step(batch: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGUSR2)
            return compute(batch)

        return step

    return make


@pytest.mark.parametrize(("name", "loss"), [("unet", "unet_loss"), ("classify", "classifier_loss")])
def test_an_interrupted_part_ends_as_if_never_stopped(
    name: str,
    loss: str,
    tmp_path: Path,
    unet: tuple[Path, dict[str, Any]],
    data: Path,
    backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--bp", str(backbone)] + ([f"unet={unet[1]['outputs']['last']}"] if name == "classify" else [])
    words += ["--test", "true"]
    whole = part(name, tmp_path / "whole", data, *words)
    assert last_of(whole)["step"] == 6
    for calls in (1, 4):  # while the ResNet is held; and then in the last step, before its validation
        with monkeypatch.context() as patched:
            patched.setattr(train, loss, interrupted_at(calls, getattr(train, loss)))
            with pytest.raises(Stopped):
                part(name, tmp_path / "cut", data, *words)
    newest = checkpoint_files.newest(RunDir(tmp_path / "cut").checkpoints)
    assert newest and checkpoint.read(newest)["step"] == 5
    with monkeypatch.context() as patched:
        patched.setattr(train, loss, interrupted_at(1, getattr(train, loss)))
        with pytest.raises(Stopped):
            part(name, tmp_path / "cut", data, *words)
    resumed = part(name, tmp_path / "cut", data, *words)
    ours, theirs = last_of(resumed), last_of(whole)
    for key, value in theirs["model"].items():
        assert torch.equal(ours["model"][key], value), key
    assert resumed["metrics"] == whole["metrics"] and ours["resumes"] == 3 and not ours["inexact"]
    kept = ("epoch", "step", "loss", "lr")
    assert [[line[key] for key in kept] for line in records(tmp_path / "cut", "train")] == [
        [line[key] for key in kept] for line in records(tmp_path / "whole", "train")
    ]
    before = sha256(resumed["outputs"]["last"])
    assert part(name, tmp_path / "cut", data / "gone", *words) == resumed, "done is not done again"
    assert sha256(resumed["outputs"]["last"]) == before


def test_validation_is_seldom_and_last(tmp_path: Path, data: Path) -> None:
    part("unet", tmp_path / "run", data, "iterations.pre=0", "iterations.main=7", "validate_every=2")
    assert [line["step"] for line in records(tmp_path / "run", "val")] == [4, 7]


@pytest.mark.parametrize("name", ["unet", "classify"])
def test_every_shipped_configuration_loads(name: str) -> None:
    given = ["--run-dir", "run", "--dataset-root", "data", "--bp", "b.pth"] + ["unet=u.pth"] * (name == "classify")
    found = [parse(["--config", str(path), *given]) for path in sorted(CONFIGS.glob(f"*{name}.yaml"))]
    assert len(found) == 3 and all(cfg.part == name and not cfg.quick for cfg in found)


@pytest.mark.parametrize("prefix", ["", "small_", "demo_"])
def test_both_parts_are_of_one_model(prefix: str) -> None:
    given = ["--run-dir", "run", "--dataset-root", "data", "--bp", "b.pth"]
    first = parse(["--config", str(CONFIGS / f"{prefix}unet.yaml"), *given])
    second = parse(["--config", str(CONFIGS / f"{prefix}classify.yaml"), *given, "unet=u.pth"])
    assert first.model == second.model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "iterations.pre=1000: would keep random weights; give backbone"),
        (["--bp", "b.pth", "unet=u.pth"], "part=unet: takes no unet"),
        (["--bp", "b.pth", "part=classify"], "part=classify: needs unet"),
        (["--bp", "b.pth", "model.side=100"], "model.side=100: a multiple of 32"),
        (["--bp", "b.pth", "model.proposals=20"], "model.samples=32: at least 2 and at most proposals=20"),
        (["--bp", "b.pth", "model.side=32"], "model.proposals=100: side=32 has 64 places for them"),
        (["--bp", "b.pth", "epochs=3"], "epochs=3: set iterations.main"),
        (["--bp", "b.pth", "iterations.main=0"], "iterations.main=0: at least 1"),
    ],
)
def test_what_cannot_work_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(["--run-dir", "run", "--dataset-root", "data", *words])


def test_another_unet_is_refused(tmp_path: Path, unet: tuple[Path, dict[str, Any]], data: Path, backbone: Path) -> None:
    words = ["--bp", str(backbone), f"unet={unet[1]['outputs']['last']}"]
    with pytest.raises(InputError, match="is another one: width 8 there, 16 here"):
        part("classify", tmp_path / "run", data, *words, "model.width=16")
    with pytest.raises(InputError, match="a unet checkpoint, not a detector"):
        part("classify", tmp_path / "run", data, *words, "--resume", str(unet[1]["outputs"]["last"]))


@pytest.mark.parametrize("name", ["unet", "classify"])
def test_two_ranks_train_one_model(
    name: str, tmp_path: Path, unet: tuple[Path, dict[str, Any]], data: Path, backbone: Path
) -> None:
    words = ["--run-dir", tmp_path / "run", "--dataset-root", data, "--bp", backbone, "--test", "true", *SMALL]
    words += [f"unet={unet[1]['outputs']['last']}"] if name == "classify" else []
    config = ["--config", CONFIGS / f"{name}.yaml"]
    first, second = ended_with(tmp_path, "detect_train.two_stage.train", *config, *words)
    assert (tmp_path / "stdout").read_text().count("Epoch Stats [2]") == 1
    assert first["step"] == second["step"] == 6 and first["metrics"] == second["metrics"]
    assert all(torch.equal(second["model"][key], value) for key, value in first["model"].items())
    newest = checkpoint_files.newest(RunDir(tmp_path / "run").checkpoints)
    assert newest and checkpoint.read(newest)["conditions"]["world_size"] == 2
    assert len(records(tmp_path / "run", "train")) == 6
