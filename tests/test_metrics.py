"""What is written while a model trains: rates, the time left, averages, CSV, and where the time went."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import ssl_train.config
from tests.test_engine import Numbers, new_state, records, restored, train
from utils import checkpoint_files, config, engine, env, files, goodput, hooks, metrics_csv, timeline
from utils.metrics import MetricsWriter, read
from utils.paths import RunDir

ALONE = env.World(0, 1, 0, 1, "single")


class Clock:
    now = 0.0

    def spend(self, seconds: float) -> float:
        self.now += seconds
        return 0.05  # a learning rate


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Reading an example takes a second; nothing else takes time by itself."""
    clock, read_one = Clock(), Numbers.__getitem__

    def slowly(self: Numbers, index: int) -> torch.Tensor:
        clock.spend(1)
        return read_one(self, index)

    monkeypatch.setattr(timeline, "clock", lambda: clock.now)
    monkeypatch.setattr(time, "time", lambda: 1e9 + clock.now)
    monkeypatch.setattr(timeline, "_timeline", timeline.Timeline(0.0))
    monkeypatch.setattr(Numbers, "__getitem__", slowly)
    return clock


class Validation(hooks.Hook):
    """Takes five seconds."""

    def __init__(self, clock: Clock, run: Path) -> None:
        self.clock, self.writer = clock, MetricsWriter(RunDir(run), epoch=0, step=0)
        self.writer.started = True  # LogMetrics has begun the file

    def before_end(self, state: engine.TrainState) -> None:
        self.clock.spend(5)
        if state.epoch:
            self.writer.write("val", epoch=state.epoch, step=state.step, AP=0.5, best=True, per_class={"cat": 1})
        timeline.done("validation")


def test_rates_and_the_time_left_are_those_of_the_run(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 epochs of 3 steps of 4 examples: a step takes 4 s to read and 2 s to compute, the third one 8 s."""
    run_dir = RunDir(tmp_path)
    monkeypatch.setattr(hooks.LogMetrics, "check_weights", lambda *_: clock.spend(1))  # after an epoch, and at a save
    clock.spend(7)
    with timeline.kept(run_dir, ALONE, "cpu"):
        rate = lambda epoch, step: clock.spend(8 if step == 2 else 2)  # noqa: E731
        train(new_state(), tmp_path, 2, schedule=rate, validate=Validation(clock, tmp_path))
    trained = [record for record in read(run_dir.metrics) if record["kind"] == "train"]
    assert [(line["step"], line["steps"]) for line in trained] == [(2, 6), (3, 6), (5, 6), (6, 6)]
    # from the end of the first step on, after 6 s; the second epoch begins after 31 s
    assert [line["left_s"] for line in trained] == pytest.approx([6 * 4, 18 / 2 * 3, (43 - 6) / 4, 0])
    assert [line["data_wait"] for line in trained] == pytest.approx([8 / 12, 4 / 12, 8 / 12, 4 / 6])
    assert [line["images_per_s"] for line in trained] == pytest.approx([8 / 12, 4 / 12, 8 / 12, 4 / 6])
    epochs = [record for record in read(run_dir.metrics) if record["kind"] == "epoch"]
    assert [(line["epoch"], line["step"], line["seconds"]) for line in epochs] == [(0, 3, 25), (1, 6, 19)]
    assert [line["data_wait"] for line in epochs] == pytest.approx([12 / 25, 12 / 19])
    assert [line["images_per_s"] for line in epochs] == pytest.approx([12 / 25, 12 / 19])
    first = (2 * trained[0]["square"] + trained[1]["square"]) / 3
    assert epochs[0]["square_avg"] == pytest.approx(first) and epochs[0]["lr"] == 0.05
    spent = goodput.stage(run_dir, None)
    assert spent.seconds == {"start-up": 7, "data wait": 24, "compute": 22, "validation": 10}
    assert (spent.wall, spent.problems) == (63, ())


def test_real_time_adds_up_and_a_checkpoint_leaves_nothing_unsaved(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with timeline.kept(run_dir, ALONE, "cpu"):
        train(new_state(), tmp_path, 2, every_steps=1)
    (file,) = run_dir.times.iterdir()
    times = json.loads(file.read_text())
    assert times["unsaved"].keys() <= {"compute"} and sum(times["unsaved"].values()) < times["seconds"]["compute"]
    assert times["seconds"].keys() == {"start-up", "data wait", "compute", "saving"}
    assert min(times["seconds"].values()) > 0
    assert goodput.stage(run_dir, None).problems == ()


def test_a_wait_while_the_device_computes_is_none() -> None:
    class Event:
        def __init__(self, is_over: bool) -> None:
            self.query = lambda: is_over

    waits = [engine._waited(cast(Any, event)) for event in (None, Event(True), Event(False))]
    assert waits == ["data wait", "data wait", "compute"]


def test_a_run_that_ended_with_an_epochs_last_step_goes_on_without_a_pace(tmp_path: Path) -> None:
    train(new_state(), tmp_path, 1, every_steps=3)
    within = checkpoint_files.everything(tmp_path / "checkpoints")[0]
    state = restored(within)
    assert state.batch == 3
    train(state, tmp_path, 1)
    *_, last, epoch = read(tmp_path / "metrics.jsonl")
    assert (last["step"], last["steps"], last["left_s"], last["images_per_s"]) == (3, 3, None, 0)
    assert (epoch["kind"], epoch["step"], epoch["images_per_s"]) == ("epoch", 3, 0)


def test_an_epoch_whose_validation_is_done_again_is_written_once(tmp_path: Path) -> None:
    def run(epoch: int, step: int, *kinds: str) -> list[tuple[str, int, int]]:
        writer = MetricsWriter(RunDir(tmp_path), epoch=epoch, step=step)
        for kind in kinds:
            writer.write(kind, epoch=1, step=8)
        return [(record["kind"], record["epoch"], record["step"]) for record in read(writer.run_dir.metrics)]

    files.write_text(tmp_path / "metrics.jsonl", '{"kind": "epoch", "epoch": 0, "step": 4}\n')
    before = run(1, 4, "train", "epoch")
    assert before == [("epoch", 0, 4), ("train", 1, 8), ("epoch", 1, 8)]
    assert run(1, 8, "epoch", "val") == [*before, ("val", 1, 8)]


def test_train_log_has_a_line_an_epoch(tmp_path: Path, clock: Clock) -> None:
    run_dir = RunDir(tmp_path)
    how: dict[str, Any] = {"schedule": lambda *_: clock.spend(2), "validate": Validation(clock, tmp_path)}
    train(new_state(), tmp_path, 1, **how)
    assert len(run_dir.train_log.read_text().splitlines()) == 2
    state = restored(tmp_path / "checkpoints" / "checkpoint_0000.pth")
    train(state, tmp_path, 2, **how)
    with open(run_dir.train_log, newline="") as file:
        first, second = csv.DictReader(file)
    averages = ["loss_avg", "square_avg", "size_avg", "loss_median"]
    assert list(first) == ["epoch", "step", *averages, "lr", "images_per_s", "data_wait", "seconds", "AP"]
    assert (first["epoch"], second["epoch"], second["step"], second["seconds"]) == ("0", "1", "6", "18.0")
    assert (first["AP"], second["AP"]) == ("", "0.5")
    written = records(tmp_path, "epoch")[1]
    assert [float(second[name]) for name in averages] == [written[name] for name in averages]


def test_hyperparam_has_every_key(tmp_path: Path) -> None:
    cfg = ssl_train.config.parse(["--run-dir", "a, b", "--dataset-root", "images"])
    metrics_csv.write_settings(RunDir(tmp_path), cfg)
    with open(tmp_path / "hyperparam.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["key", "value"] and [key for key, _ in rows] == [key for key, _ in config.leaves(type(cfg))]
    known = dict(rows)
    assert (known["run_dir"], known["data.cache"], known["quick"]) == ("a, b", "null", "false")
    assert known["augment.crop_scale"] == json.dumps(list(cfg.augment.crop_scale))
    assert float(known["optim.lr"]) == cfg.optim.lr
