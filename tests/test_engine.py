"""The training loop with its hooks and checkpoints, on a model small enough to follow by hand."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from utils import checkpoint, checkpoint_files, engine, hooks, loader, log, optim, resume, saving, stop
from utils.device import place
from utils.errors import CheckpointError, DivergedError, InputError, Stopped
from utils.metrics import TIMES, MetricsWriter, read
from utils.paths import RunDir
from utils.shared_config import Checkpoint

SEED = 3
CONDITIONS = {"world_size": 1, "batch_size": 4, "seed": SEED, "data": "twelve", "threads": 1}


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    """12 points whose noise is drawn when they are read, as an augmentation's is."""

    def __len__(self) -> int:
        return 12

    def ahead(self, indices: list[int]) -> None:
        pass

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)]) / 12 + 0.1 * torch.rand(1)


def new_state() -> engine.TrainState:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    return engine.TrainState(model, optim.sgd(model, lr=0.1, momentum=0.9, weight_decay=1e-4))


def train(
    state: engine.TrainState,
    run: Path,
    epochs: int,
    *,
    schedule: optim.Schedule | None = None,
    poison: int = -1,
    every_steps: int = 0,
    every_minutes: float = 0,
    validate: hooks.Hook | None = None,
) -> engine.TrainState:
    """Train on the CPU, writing metrics and checkpoints to `run`; the loss of step `poison` is not finite."""

    def loss_fn(batch: torch.Tensor) -> tuple[engine.Scalars, engine.Scalars]:
        error = (state.model(batch) - 2 * batch).square().mean()
        return {"square": error * (float("nan") if state.step == poison else 1)}, {"size": torch.tensor(len(batch))}

    batches = loader.GlobalBatches(12, 4, SEED)
    made = loader.make(
        loader.Seeded(Numbers(), SEED), batches, workers=0, device=torch.device("cpu"), collate=torch.stack
    )
    run_dir = RunDir(run)
    when = Checkpoint(every_steps=every_steps, every_minutes=every_minutes)
    writer = MetricsWriter(run_dir, epoch=state.epoch, step=state.step - state.batch % 2)
    metrics = hooks.LogMetrics(writer, every=2, batch_size=4, files=lambda *at: [f"{at}.png"])
    engine.fit(
        state,
        made,
        loss_fn,
        [
            metrics,
            *([validate] if validate else []),
            saving.SaveCheckpoints(run_dir, payload, when, metrics),
        ],
        epochs=epochs,
        schedule=schedule or optim.constant(0.05, 0, 0),
        seed=SEED,
        device=torch.device("cpu"),
        precision="float32",
    )
    return state


def payload(state: engine.TrainState) -> dict[str, object]:
    return checkpoint.payload("toy", state=state, architecture={}, config={}, conditions=CONDITIONS)


def restored(path: Path, *, same_round: bool = True, allow: bool = False, **now: object) -> engine.TrainState:
    state, saved = new_state(), checkpoint.load(path, "toy", "?")
    resume.restore(state, saved, same_round=same_round, conditions=CONDITIONS | now, allow_world_change=allow)
    return state


def records(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """What was written about training, without what depends on the time and on how many steps were planned then."""
    kept = [record for record in read(run / "metrics.jsonl") if record["kind"] in (kinds or ("train", "epoch"))]
    return [{name: value for name, value in record.items() if name not in (*TIMES, "steps")} for record in kept]


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = train(new_state(), tmp_path / "whole", 3)
    train(new_state(), tmp_path / "cut", 1)
    start, own = resume.starting_point("auto", None, RunDir(tmp_path / "cut").checkpoints, 0)
    assert own and start
    resumed = train(restored(start), tmp_path / "cut", 3)
    assert resumed.step == whole.step == 9
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_metrics_written_after_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    train(new_state(), tmp_path, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 7, "torn')
    train(restored(tmp_path / "checkpoints" / "checkpoint_0000.pth"), tmp_path, 2)
    steps = [(record["kind"], record["step"]) for record in records(tmp_path)]
    assert steps == [("train", 2), ("train", 3), ("epoch", 3), ("train", 5), ("train", 6), ("epoch", 6)]


def test_a_loss_that_is_not_finite_stops_with_its_step_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 5 \(epoch 1\).*square=nan"):
        train(new_state(), tmp_path, 3, poison=4)
    assert [path.name for path in checkpoint_files.everything(tmp_path / "checkpoints")] == ["checkpoint_0000.pth"]


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    state = new_state()
    for epoch in range(5):
        state.epoch, state.is_best = epoch + 1, epoch == 1
        checkpoint.save(RunDir(tmp_path), payload(state))
    kept = ["best.pth", "checkpoint_0003.pth", "checkpoint_0004.pth"]
    directory = tmp_path / "checkpoints"
    listed = sorted(path.name for path in directory.iterdir())
    assert listed == sorted([*kept, *(f"{name}.sha256" for name in kept)])
    assert checkpoint.load(directory / "best.pth", "toy", "?")["epochs_done"] == 2
    assert all(checkpoint_files.verify(directory / name) for name in kept)


def test_a_new_round_goes_on_with_its_own_rate_and_warm_up(tmp_path: Path) -> None:
    first = train(new_state(), tmp_path / "r1", 2, schedule=optim.constant(0.1, 0, 0))
    state = restored(tmp_path / "r1" / "checkpoints" / "checkpoint_0001.pth", same_round=False)
    assert (state.epoch, state.step, state.start_step) == (2, 6, 6)
    momentum = [entry["momentum_buffer"] for entry in first.optimizer.state.values()]
    carried = [entry["momentum_buffer"] for entry in state.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, carried, strict=True)) and momentum[0].abs().sum() > 0
    train(state, tmp_path / "r2", 3, schedule=optim.constant(0.01, 3, state.start_step))
    rates = [record["lr"] for record in records(tmp_path / "r2", "train")]
    assert rates == pytest.approx([0.005, 0.0075])


def test_cosine_is_constant_in_an_epoch_and_ends_near_zero() -> None:
    schedule = optim.cosine(0.4, 4)
    assert [round(schedule(epoch, 99), 6) for epoch in range(4)] == [0.4, 0.341421, 0.2, 0.058579]


def test_the_start_is_own_newest_then_the_round_before_then_nothing(tmp_path: Path) -> None:
    own, parent = tmp_path / "r2", tmp_path / "r1" / "checkpoint_0022.pth"
    checkpoint.write(parent, payload(new_state()))
    assert resume.starting_point("auto", None, own, 0) == (None, False)
    assert resume.starting_point("auto", str(parent), own, 0) == (parent, False)
    newest = own / "checkpoint_10000.pth"
    for path in (own / "checkpoint_9999.pth", newest):
        checkpoint.write(path, payload(new_state()))
    assert resume.starting_point("auto", str(parent), own, 0) == (newest, True)
    assert resume.starting_point("never", str(parent), own, 0) == (parent, False)
    assert resume.starting_point("never", str(parent), own, 1) == (newest, True), "a requeue must not start again"
    assert resume.starting_point(str(parent), None, own, 0) == (parent, False)
    assert resume.starting_point(str(parent), None, own, 1) == (newest, True), "a requeue must not start again"
    with pytest.raises(InputError, match=r"gone\.pth: no such file"):
        resume.starting_point(str(tmp_path / "gone.pth"), None, own, 0)


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


def test_files_that_are_no_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"evil": Payload()}, tmp_path / "evil.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text(json.dumps({"a": 1}))
    checkpoint.write(tmp_path / "other.pth", {**payload(new_state()), "kind": "moco"})
    for name, message in (
        ("evil.pth", "not a readable weights file"),
        ("plain.pth", "not a checkpoint of this project"),
        ("list.pth", "holds a list"),
        ("text.pth", "not a readable weights file"),
        ("other.pth", "a moco checkpoint, not a toy; train it"),
        ("no.pth", "no such file"),
    ):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            checkpoint.load(tmp_path / name, "toy", "train it")


def test_another_history_s_checkpoints_are_set_aside_not_counted(tmp_path: Path) -> None:
    state, run_dir = new_state(), RunDir(tmp_path)
    directory = run_dir.checkpoints
    for epoch in (7, 8):
        state.epoch, state.is_best = epoch, epoch == 7
        checkpoint.save(run_dir, payload(state))
    seventh = checkpoint.load(directory / "best.pth", "toy", "?")
    resume.make_room(directory, seventh)
    files = ["best.pth", "best.pth.sha256", "checkpoint_0006.pth", "checkpoint_0006.pth.sha256"]
    assert sorted(path.name for path in directory.iterdir()) == files
    aside = tmp_path / "checkpoints.1" / "checkpoint_0007.pth"
    assert aside.exists() and checkpoint_files.verify(aside)
    state.epoch = 9
    checkpoint.save(run_dir, payload(state))
    (directory / "best.pth").write_bytes(b"")  # and with it checkpoint_0006.pth, the same file
    checkpoint.write(directory / "checkpoint_0005.pth", seventh)
    resume.make_room(directory, {**seventh, "epochs_done": 6})
    assert [path.name for path in directory.iterdir()] == ["checkpoint_0005.pth"], "nor is it the best of this history"
    resume.make_room(directory, None)
    assert not list(directory.iterdir()) and (tmp_path / "checkpoints.3" / "checkpoint_0005.pth").exists()


def test_a_checkpoint_every_few_steps_goes_on_within_the_epoch(tmp_path: Path) -> None:
    whole = train(new_state(), tmp_path / "whole", 2)
    train(new_state(), tmp_path / "cut", 1, every_steps=2)
    directory = tmp_path / "cut" / "checkpoints"
    assert [path.name for path in checkpoint_files.everything(directory)] == [
        "checkpoint_0000_00000002.pth",
        "checkpoint_0000.pth",
    ]
    state = restored(directory / "checkpoint_0000_00000002.pth")
    assert (state.epoch, state.batch, state.step, len(state.rows), state.resumes) == (0, 2, 2, 2, 1)
    resumed = train(state, tmp_path / "cut", 2)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert resumed.summary == whole.summary, "averages are of the whole epoch"


def test_a_checkpoint_every_few_minutes(tmp_path: Path) -> None:
    for every, saved in ((1e-9, "checkpoint_0000_00000002.pth"), (60, None)):
        with pytest.raises(DivergedError):
            train(new_state(), tmp_path / str(every), 1, poison=2, every_minutes=every)
        newest = checkpoint_files.newest(tmp_path / str(every) / "checkpoints")
        assert (newest.name if newest else None) == saved


def test_a_stop_is_saved_at_the_end_of_the_step(tmp_path: Path) -> None:
    def stopped_at(step: int) -> optim.Schedule:
        def rate(epoch: int, now: int) -> float:
            if now == step:
                os.kill(os.getpid(), signal.SIGUSR2)
            return 0.05

        return rate

    whole = train(new_state(), tmp_path / "whole", 2, schedule=lambda epoch, step: 0.05)
    state = new_state()
    for step, names in ((1, ["checkpoint_0000_00000002.pth"]), (2, ["checkpoint_0000_00000003.pth"])):
        with (
            stop.listening(),
            pytest.raises(Stopped, match=rf"stopped by SIGUSR2 after step {step + 1}, which is saved"),
        ):
            train(state, tmp_path / "cut", 2, schedule=stopped_at(step))
        newest = checkpoint_files.everything(tmp_path / "cut" / "checkpoints")[-1:]
        assert [path.name for path in newest] == names
        state = restored(newest[0])
    assert state.batch == 3 and not [r for r in read(tmp_path / "cut" / "metrics.jsonl") if r["epoch"]]
    resumed = train(state, tmp_path / "cut", 2, schedule=lambda epoch, step: 0.05)  # from the end of an epoch's batches
    assert resumed.resumes == 2 and resumed.summary == whole.summary
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "zeroed", "flipped"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    train(new_state(), tmp_path, 3)
    directory = tmp_path / "checkpoints"
    before, newest = checkpoint_files.everything(directory)
    content = newest.read_bytes()
    weights = content.index(checkpoint.read(newest)["model"]["0.weight"].numpy().tobytes())
    newest.write_bytes(
        {
            "cut": content[:-100],
            "zeroed": bytes(len(content)),
            "flipped": content[:weights] + bytes([content[weights] ^ 1]) + content[weights + 1 :],
        }[damage]
    )
    log.logger.addHandler(caplog.handler)
    assert resume.starting_point("auto", None, directory, 0) == (before, True)
    log.logger.removeHandler(caplog.handler)
    assert f"{newest}: damaged" in caplog.text and f"going on from the one before: {before}" in caplog.text
    before.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"all checkpoints are damaged \(checkpoint_0002.pth, checkpoint_0001.pth\)"
    ):
        resume.starting_point("auto", "init.pth", directory, 0)
    with pytest.raises(CheckpointError, match=r"best\.pth: damaged"):  # the same file as the newest
        (directory / "best.pth").write_bytes(b"")
        (directory / "best.pth.sha256").write_text(f"{'0' * 64}  best.pth\n")
        resume.starting_point(str(directory / "best.pth"), None, directory, 0)


def test_a_checkpoint_whose_hash_was_lost_must_be_readable(tmp_path: Path) -> None:
    train(new_state(), tmp_path, 2)
    directory = tmp_path / "checkpoints"
    for path in directory.glob("*.sha256"):
        path.unlink()
    before, newest = checkpoint_files.everything(directory)
    assert resume.newest_whole(directory) == newest
    newest.write_bytes(newest.read_bytes()[:-100])
    assert resume.newest_whole(directory) == before


def test_the_newest_is_the_furthest_whatever_the_clocks_say(tmp_path: Path) -> None:
    for name in (
        "checkpoint_0009.pth",
        "checkpoint_0010_00000123.pth",
        "checkpoint_0010_00000124.pth",
        "checkpoint_0010.pth",
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, -len(name) - int(name[12:15])))
    assert checkpoint_files.newest(tmp_path) == tmp_path / "checkpoint_0010.pth"
    (tmp_path / "checkpoint_0010.pth").unlink()
    assert checkpoint_files.newest(tmp_path) == tmp_path / "checkpoint_0010_00000124.pth"


def test_a_read_only_checkpoint_is_another_stage_s_and_stays(tmp_path: Path) -> None:
    state = new_state()
    for epoch in range(4):
        state.epoch = epoch + 1
        path = checkpoint.save(RunDir(tmp_path), payload(state))
        if epoch == 0:
            path.chmod(0o400)
    names = [path.name for path in checkpoint_files.everything(tmp_path / "checkpoints")]
    assert names == ["checkpoint_0000.pth", "checkpoint_0002.pth", "checkpoint_0003.pth"]


def test_going_on_under_other_conditions_is_refused_or_noted(tmp_path: Path) -> None:
    train(new_state(), tmp_path, 1, every_steps=2)
    within, after = checkpoint_files.everything(tmp_path / "checkpoints")
    for path in (within, after):
        with pytest.raises(InputError, match="is of 1 ranks, this run has 2: start as many, or set allow_world_change"):
            restored(path, world_size=2)
    with pytest.raises(
        InputError, match="saved 2 batches into epoch 0, where these must stay: batch_size 4 -> 8; data"
    ):
        restored(within, batch_size=8, data="thirteen")
    assert restored(after, world_size=2, same_round=False).inexact == []
    assert restored(after, batch_size=8).inexact == ["after step 3: batch_size 4 -> 8"]
    assert restored(within).inexact == []
    with pytest.raises(InputError, match="saved 2 batches into epoch 0: go on in its own run directory"):
        restored(within, same_round=False)
    state = restored(after, world_size=2, threads=3, allow=True)
    assert state.inexact == ["after step 3: world_size 1 -> 2", "after step 3: threads 1 -> 3"]
    checkpoint.write(tmp_path / "on.pth", payload(state))
    assert restored(tmp_path / "on.pth", same_round=False).inexact == state.inexact, "a later round knows"


def test_momenta_of_another_memory_format_are_taken_by_place() -> None:
    torch.manual_seed(SEED)
    images, old = torch.rand(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
    new = place(copy.deepcopy(old), torch.device("cpu"))
    rules = [optim.sgd(model, lr=0.1, momentum=0.9, weight_decay=0.0) for model in (old, new)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    step(old, rules[0])
    new.load_state_dict(old.state_dict())
    rules[1].load_state_dict(rules[0].state_dict())
    step(old, rules[0])
    step(new, rules[1])
    torch.testing.assert_close(new.weight, old.weight)
