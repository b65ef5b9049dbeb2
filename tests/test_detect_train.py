"""Rounds end to end on a few small images: what is carried on, what is kept as the best, what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from detect_train import train, validation
from tests.labeled_set import write_example, write_label, write_set
from tests.test_detect_model import moco, resnet
from tests.test_events import in_metrics, picture_steps, scalars
from utils import attempts, checkpoint, checkpoint_files, coco, engine, goodput
from utils.errors import DivergedError, InputError, Stopped
from utils.files import sha256
from utils.paths import RunDir

SMALL = [
    "model.backbone=resnet18", "model.norm=train", "model.min_size=[64]", "model.max_size=96",
    "model.anchor_sizes=[8, 16, 32, 64, 96]", "model.proposals_train=50", "model.proposals_test=50",
    "model.box_batch_size=32", "optim.warmup_steps=0", "batch_size=4", "workers=0", "log_every=1",
    "device=cpu", "precision=float32",
]  # fmt: skip
EPOCH_LINE = re.compile(
    r"Epoch Stats \[(\d+)\] - Loss Avg: \d+\.\d{6}, Loss Median: \d+\.\d{6}, "
    r"Validation AP: \d\.\d{6}, Is Best: (True|False)"
)


def round_arguments(run: Path, data: Path, epochs: int, *more: str, lr: float = 0.01) -> list[str]:
    flags = ["--run-dir", str(run), "--dataset-root", str(data), "--epochs", str(epochs), "--lr", str(lr)]
    return [*flags, *SMALL, *more]


def fine_tune(*run: Any, **how: Any) -> dict[str, Any]:
    """Args: run, how: see `round_arguments`."""
    return train.main(round_arguments(*run, **how))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("labeled"))


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    """What the first round prints."""
    return io.StringIO()


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory, data: Path, printed: io.StringIO) -> tuple[Path, dict[str, Any]]:
    """A first round of two epochs of two steps, and what it returned."""
    run = tmp_path_factory.mktemp("chain") / "r1"
    with contextlib.redirect_stdout(printed):
        return run, fine_tune(run, data, 2)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in RunDir(run).metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def last_of(result: dict[str, Any]) -> dict[str, Any]:
    return checkpoint.read(result["outputs"]["last"])


def after(result: dict[str, Any], best: Path | None = None) -> list[str]:
    """The inputs of the next round."""
    return [f"init={result['outputs']['last']}", f"best={best or result['outputs']['best']}"]


def best_with(ap: float, result: dict[str, Any], path: Path) -> Path:
    """The best checkpoint of a round, with another AP in it."""
    checkpoint.write(path, {**checkpoint.read(result["outputs"]["best"]), "best": ap})
    return path


def test_a_round_leaves_checkpoints_metrics_and_labels(r1: tuple[Path, dict[str, Any]]) -> None:
    run, result = r1
    assert result["epochs"] == 2
    assert result["outputs"] == {
        "last": run / "checkpoints/checkpoint_0001.pth",
        "best": run / "checkpoints/best.pth",
    }
    steps = records(run, "train")
    assert [(line["epoch"], line["step"], line["lr"]) for line in steps] == [
        (0, 1, 0.01),
        (0, 2, 0.01),
        (1, 3, 0.01),
        (1, 4, 0.01),
    ]
    for line in steps:
        parts = sum(value for name, value in line.items() if name.startswith("loss_"))
        assert line["loss"] == pytest.approx(parts, rel=1e-5) and 0 < line["loss"] < 10
    validations = records(run, "val")
    assert [(line["epoch"], line["step"]) for line in validations] == [(0, 2), (1, 4)]
    assert all(set(coco.METRICS) <= set(line) for line in validations)
    assert scalars(run) == in_metrics(run) and picture_steps(run, "detections") == [2, 4]
    assert result["metrics"]["best_AP"] == max(line["AP"] for line in validations)
    saved = last_of(result)
    assert saved["kind"] == "detector" and saved["classes"] == ["cat", "dog"] and saved["step"] == 4
    assert saved["architecture"]["num_classes"] == 3 and saved["architecture"]["norm"] == "train"
    assert {path.name for path in (run.parent / "labels").glob("*.index")} == {"training.index", "validation.index"}
    spent = goodput.stage(RunDir(run), None)
    parts = {"start-up", "staging", "labels", "data wait", "compute", "validation", "saving"}
    assert (spent.seconds.keys(), spent.problems, spent.restarts) == (parts, (), 0)


def test_the_line_of_an_epoch(r1: tuple[Path, dict[str, Any]], printed: io.StringIO) -> None:
    found = [EPOCH_LINE.fullmatch(line) for line in printed.getvalue().splitlines() if "Epoch Stats" in line]
    best = [str(line["best"]) for line in records(r1[0], "val")]
    assert [match and match.groups() for match in found] == [("0", "True"), ("1", best[1])]
    summary = r1[1]["metrics"]
    losses = [line["loss"] for line in records(r1[0], "train") if line["epoch"] == 1]
    assert summary["loss_avg"] == pytest.approx(sum(losses) / 2)
    assert f"Loss Avg: {summary['loss_avg']:.6f}, Loss Median: {summary['loss_median']:.6f}" in printed.getvalue()


def test_a_finished_round_is_not_trained_again(
    r1: tuple[Path, dict[str, Any]], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, result = r1
    before = sha256(result["outputs"]["last"])
    assert fine_tune(run, data / "gone", 2) == result
    assert sha256(result["outputs"]["last"]) == before and "Epoch Stats" not in capsys.readouterr().out


def test_a_resumed_round_ends_as_if_never_stopped(tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path) -> None:
    fine_tune(tmp_path / "run", data, 1)
    resumed, whole = last_of(fine_tune(tmp_path / "run", data, 2)), last_of(r1[1])
    assert resumed["step"] == whole["step"] == 4 and resumed["best"] == whole["best"]
    for name, value in whole["model"].items():
        assert torch.equal(resumed["model"][name], value), name
    kept = {"epoch", "step", "loss", "lr"}
    assert [{name: line[name] for name in kept} for line in records(tmp_path / "run", "train")] == [
        {name: line[name] for name in kept} for line in records(r1[0], "train")
    ]


def test_the_next_round_carries_the_optimizer_and_takes_its_own_rate(
    tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    fit = engine.fit

    def observed(state: engine.TrainState, *arguments: Any, **options: Any) -> None:
        begun.append({"optimizer": state.optimizer.state_dict(), "epoch": state.epoch, "start_step": state.start_step})
        momentum = [group["momentum_buffer"].clone() for group in begun[0]["optimizer"]["state"].values()]
        begun[0]["momentum"] = momentum
        fit(state, *arguments, **options)

    monkeypatch.setattr(engine, "fit", observed)
    words = [*after(r1[1]), "optim.warmup_steps=1", "optim.weight_decay=0.5"]
    result = fine_tune(tmp_path / "r2", data, 3, *words, lr=0.001)
    r1_last, r2_last = last_of(r1[1]), last_of(result)
    stored = [group["momentum_buffer"] for group in r1_last["optimizer"]["state"].values()]
    assert len(stored) > 50
    assert all(map(torch.equal, begun[0]["momentum"], stored))
    assert (begun[0]["epoch"], begun[0]["start_step"]) == (2, 4)
    assert [(line["epoch"], line["step"], line["lr"]) for line in records(tmp_path / "r2", "train")] == [
        (2, 5, 0.0005), (2, 6, 0.001),
    ]  # fmt: skip
    (group,) = r2_last["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.001, 0.5, 0.9)
    assert result["outputs"]["last"].name == "checkpoint_0002.pth" and result["epochs"] == 3
    assert (r2_last["epochs_done"], r2_last["step"], r2_last["start_step"]) == (3, 6, 4)


def test_the_best_of_an_earlier_round_stays_until_it_is_beaten(
    tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path
) -> None:
    best = best_with(0.99, r1[1], tmp_path / "r1_best.pth")
    result = fine_tune(tmp_path / "r2", data, 3, *after(r1[1], best))
    assert sha256(result["outputs"]["best"]) == sha256(best)
    assert result["metrics"]["best_AP"] == 0.99 and last_of(result)["best"] == 0.99
    best = best_with(-1.0, r1[1], tmp_path / "r1_worst.pth")
    result = fine_tune(tmp_path / "other", data, 3, *after(r1[1], best))
    assert sha256(result["outputs"]["best"]) == sha256(result["outputs"]["last"]) != sha256(best)
    assert checkpoint.read(best)["best"] == -1.0  # the earlier round's own file is untouched


def test_without_a_best_the_round_has_its_own(tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path) -> None:
    result = fine_tune(tmp_path / "r2", data, 3, "--resume", str(r1[1]["outputs"]["last"]))
    assert sha256(result["outputs"]["best"]) == sha256(result["outputs"]["last"])
    assert last_of(result)["start_step"] == 4


def test_never_resume_keeps_the_old_checkpoints_aside(tmp_path: Path, data: Path) -> None:
    before = last_of(fine_tune(tmp_path / "run", data, 1))
    again = fine_tune(tmp_path / "run", data, 1, "--resume", "never", "seed=1")
    assert not torch.equal(
        last_of(again)["model"]["backbone.body.conv1.weight"], before["model"]["backbone.body.conv1.weight"]
    )
    aside = checkpoint.read(tmp_path / "run" / "checkpoints.1" / "checkpoint_0000.pth")
    assert torch.equal(aside["model"]["backbone.body.conv1.weight"], before["model"]["backbone.body.conv1.weight"])
    assert [line["step"] for line in records(tmp_path / "run", "train")] == [1, 2]


@pytest.mark.parametrize("layout", ["exported", "moco"])
def test_a_round_starts_from_a_backbone_that_may_go_away(tmp_path: Path, data: Path, layout: str) -> None:
    encoder = resnet()
    torch.save(moco(encoder) if layout == "moco" else encoder.state_dict(), tmp_path / "backbone.pth")
    words = ["--bp", str(tmp_path / "backbone.pth"), "model.norm=frozen", "model.trainable_layers=3"]
    result = fine_tune(tmp_path / "r1", data, 1, *words, lr=1e-6)
    body = {name: value for name, value in last_of(result)["model"].items() if name.startswith("backbone.body.")}
    for name in ("conv1.weight", "bn1.running_mean", "layer4.1.bn2.running_var", "layer4.1.bn2.weight"):
        assert torch.equal(body[f"backbone.body.{name}"], encoder.state_dict()[name]), name
    (tmp_path / "backbone.pth").unlink()
    assert fine_tune(tmp_path / "r1", data, 2, *words, lr=1e-6)["epochs"] == 2


def refused(run: Path, data: Path, epochs: int, words: Sequence[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fine_tune(run, data, epochs, *words)
    assert not RunDir(run).checkpoints.exists()


def test_what_is_refused_before_training(tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path) -> None:
    torch.save(resnet().state_dict(), tmp_path / "backbone.pth")
    run, init = tmp_path / "run", after(r1[1])
    refused(run, data, 2, init, "epochs=2: the 2 of the rounds before count too")
    refused(run, data, 3, [*init, "model.norm=sync"], "another detector: norm 'train' there, 'sync' here")
    refused(run, data, 3, [f"init={tmp_path / 'backbone.pth'}"], "not a checkpoint of this project.*--bp")
    refused(run, data, 3, [f"init={tmp_path / 'nothing.pth'}"], "nothing.pth: no such file")
    refused(run, data, 3, ["--bp", str(tmp_path / "nothing.pth")], "nothing.pth: no such file")
    refused(run, data, 3, ["--batch-size", "9"], "batch_size=9 is more than the 8 training images")
    refused(run, data / "gone", 3, [], "gone: not found")
    (tmp_path / "classes.txt").write_text("cat\ndog\neel\n")
    refused(
        run,
        data,
        3,
        [*init, f"data.classes={tmp_path / 'classes.txt'}"],
        "num_classes 3 there, 4 here; classes",
    )


def test_unusable_labels_end_it_or_are_left_out(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data")
    write_label(data / "training", 4, bboxes=[[5, 5, 5, 9]], labels=["cat"])
    (data / "validation" / "labels" / "30002.yml").unlink()
    refused(tmp_path / "run", data, 1, [], r"2 unusable(.|\n)*training/labels/4.yml(.|\n)*validation/images/30002")
    result = fine_tune(tmp_path / "run", data, 1, "data.on_error=skip")
    assert result["epochs"] == 1 and result["metrics"]["loss_avg"] < 10


def test_a_validation_split_without_boxes_is_refused(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data", validation=0)
    write_example(data / "validation", 30001, [], [])
    refused(tmp_path / "run", data, 1, [], "no box in the validation split")


def test_a_diverged_epoch_is_not_saved(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DivergedError, match="not finite a"):
        fine_tune(tmp_path / "run", data, 20, lr=1e6)
    for path in checkpoint_files.everything(RunDir(tmp_path / "run").checkpoints):
        assert all(value.isfinite().all() for value in checkpoint.read(path)["model"].values())


def test_a_kill_between_saving_the_best_and_naming_it_loses_nothing(
    tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path
) -> None:
    run, _ = r1
    shutil.copytree(run, tmp_path / "run")
    checkpoints = RunDir(tmp_path / "run").checkpoints
    newest = checkpoint_files.newest(checkpoints)
    assert newest
    checkpoint.write(newest, {**checkpoint.read(newest), "is_best": True})
    checkpoint_files.record(newest, sha256(newest))
    (checkpoints / "best.pth").unlink()
    outputs = fine_tune(tmp_path / "run", data, 2)["outputs"]
    assert sha256(outputs["best"]) == sha256(outputs["last"]) and checkpoint_files.verify(outputs["best"])


def test_a_stop_in_a_validation_keeps_the_epoch_and_validates_again(
    tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, result = r1
    predict = validation.predict

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR2)
        return predict(*arguments, **options)

    monkeypatch.setattr(validation, "predict", signalled)
    with pytest.raises(Stopped, match="stopped by SIGUSR2 after 1 of 1 batches"):
        fine_tune(tmp_path / "run", data, 2)
    assert records(tmp_path / "run", "val") == []
    newest = checkpoint_files.newest(RunDir(tmp_path / "run").checkpoints)
    assert newest and newest.name == "checkpoint_0000_00000002.pth"
    ((stopped,), _) = attempts.read(RunDir(tmp_path / "run"))
    assert 0 < stopped.seconds["validation"] == pytest.approx(stopped.unsaved["validation"])
    assert not stopped.unsaved.keys() - {"validation"}, "the steps are saved"
    monkeypatch.setattr(validation, "predict", predict)
    resumed = fine_tune(tmp_path / "run", data, 2)
    assert resumed["metrics"] == result["metrics"]
    assert records(tmp_path / "run", "val") == records(run, "val")
    weights = [last_of(ended)["model"] for ended in (result, resumed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_best_that_is_lost_is_no_best(tmp_path: Path, r1: tuple[Path, dict[str, Any]], data: Path) -> None:
    run, _ = r1
    shutil.copytree(run, tmp_path / "run")
    checkpoints = RunDir(tmp_path / "run").checkpoints
    newest = checkpoint_files.newest(checkpoints)
    assert newest
    checkpoint.write(newest, {**checkpoint.read(newest), "is_best": False, "best": 1.0})
    checkpoint_files.record(newest, sha256(newest))
    (checkpoints / "best.pth").unlink()
    done = fine_tune(tmp_path / "run", data, 3)
    assert done["metrics"]["best_AP"] == done["metrics"]["AP"] and sha256(done["outputs"]["best"])
