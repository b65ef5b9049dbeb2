"""Pretraining on XLA's CPU device: the losses of plain torch, two graphs a run, exact resume, ranks."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tests.test_ssl_train import write_images
from utils import checkpoint, checkpoint_files, device, env, metrics
from utils.compiles import WatchCompiles
from utils.engine import TrainState
from utils.errors import RelayError
from utils.paths import RunDir

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-tpu runs it in .venv-tpu")

XLA_RUN = [sys.executable, "-m", "utils.xla_run"]
# A high temperature and a low rate: else rounding grows a hundredfold in 20 steps, as it does between two orders of
# summation of plain torch.
SMALL = [
    "model.arch=resnet18", "model.dim=16", "model.queue=24", "model.temperature=5.0", "augment.image_size=32",
    "batch_size=8", "workers=1", "log_every=1", "optim.lr=0.00001", "precision=float32",
]  # fmt: skip


def command(run: Path, data: Path, epochs: int, *words: str) -> list[str]:
    given = [f"--run-dir={run}", f"--dataset-root={data}", f"--epochs={epochs}"]
    return ["-m", "tests.thin_pretraining", *given, *SMALL, *words]


def pretrain(launcher: list[str], *given: Any) -> str:
    ended = ranks.run([*launcher, *command(*given)], ranks.XLA, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(RunDir(run).metrics) if line["kind"] == "train"]


def tensors(run: Path, *parts: str) -> dict[str, torch.Tensor]:
    newest = checkpoint_files.newest(RunDir(run).checkpoints)
    assert newest
    saved = checkpoint.read(newest)
    momenta = {str(number): state["momentum_buffer"] for number, state in saved["optimizer"]["state"].items()}
    return {**saved["model"], **momenta}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("xla") / "images", 80)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Two epochs of ten steps on XLA, in a process that torch_xla spawned."""
    run = tmp_path_factory.mktemp("xla") / "whole"
    output = pretrain(XLA_RUN, run, data, 2, "device=xla")
    assert "XLA CPU" in output
    return run


def test_reports_name_the_device() -> None:
    assert device.describe(device.pick("xla", env.world())) == "XLA CPU"


def test_losses_equal_those_of_plain_torch(tmp_path: Path, data: Path, whole: Path) -> None:
    pretrain([sys.executable], tmp_path / "cpu", data, 2, "device=cpu")
    ours, plain = losses(whole), losses(tmp_path / "cpu")
    assert len(ours) == 20
    assert ours == pytest.approx(plain, abs=1e-5)
    assert max(plain) - min(plain) > 0.01  # it is not that nothing happens


def test_resumed_run_is_the_same_run(tmp_path: Path, data: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    checkpoint_files.newest(RunDir(tmp_path / "run").checkpoints).unlink()  # type: ignore[union-attr]
    pretrain([sys.executable], tmp_path / "run", data, 2, "device=xla", "workers=0")  # no launcher: one device
    assert losses(tmp_path / "run") == losses(whole)
    ours, theirs = tensors(tmp_path / "run"), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_200_steps_compile_two_graphs(tmp_path: Path, data: Path) -> None:
    words = ("device=xla", "batch_size=2", "optim.lr=0.001", "augment.backend=device")
    output = pretrain([sys.executable], tmp_path / "run", data, 5, *words)
    assert len(losses(tmp_path / "run")) == 200
    compiled = [(int(step), int(count)) for step, count in re.findall(r"step (\d+): XLA has compiled (\d+)", output)]
    assert compiled == [(1, 1), (2, 2)]  # the first step has no momentum to sum


def test_two_ranks_hold_the_same_weights(tmp_path: Path, data: Path) -> None:
    """By torchrun and gloo: XLA's CPU devices have no collectives of their own."""
    given = (tmp_path / "xla", data, 1, "device=xla"), (tmp_path / "cpu", data, 1, "device=cpu")
    for each in given:
        ended = ranks.torchrun(2, *command(*each), "deterministic=true", environ=ranks.XLA, timeout=900)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    # each rank normalises over 4 images: rounding grows faster than over 8
    assert losses(tmp_path / "xla") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-4)
    assert len(losses(tmp_path / "xla")) == 10


def test_a_signal_to_the_launcher_stops_every_rank_with_its_work_saved(tmp_path: Path, data: Path) -> None:
    argv = [*XLA_RUN, *command(tmp_path, data, 1000, "device=xla", "batch_size=2")]
    environ = ranks.environment(ranks.XLA)
    with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if "step 2: XLA has compiled" in line:
                os.kill(process.pid, signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+)", rest)
    assert stopped and tensors(tmp_path)
    assert f"{int(stopped[1]):08d}.pth" in "".join(file.name for file in RunDir(tmp_path).checkpoints.iterdir())


def test_exit_code_of_a_rank_is_that_of_the_launcher(tmp_path: Path, data: Path) -> None:
    (data.parent / "bad").mkdir()
    (data.parent / "bad" / "0.png").write_bytes(b"no image")
    argv = [*XLA_RUN, *command(tmp_path, data.parent / "bad", 1, "device=xla", "batch_size=1")]
    ended = ranks.run(argv, ranks.XLA, timeout=900)
    assert ended.returncode == 2
    assert "0.png" in ended.stderr


@pytest.mark.parametrize(("every", "steps", "last"), [(1, 12, 9), (5, 60, 41), (5, 40, None)])
def test_a_count_of_graphs_that_keeps_growing_is_an_error(every: int, steps: int, last: int | None) -> None:
    """Also when most steps have a graph already."""
    watch, state = WatchCompiles(), TrainState(torch.nn.Identity(), torch.optim.SGD([torch.zeros(1)]))
    chip, side = device.pick("xla", env.world()), 1000 * steps + every  # no shape of another case
    endless = pytest.raises(RelayError, match=f"does not settle.* {last}: a shape") if last else nullcontext()
    with endless:
        for step in range(steps):
            grown = torch.zeros(side + step // every, device=chip)
            grown += 1
            device.on_host(grown)
            state.step += 1
            watch.after_step(state, {})
    assert state.step == (last or steps)


IDLE = """
import os, signal, sys
print("rank", os.getpid(), flush=True)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
while True:
    signal.sigwait([signal.SIGTERM, signal.SIGUSR1])
"""


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "idle.py").write_text(IDLE)
    environ = ranks.environment(ranks.XLA)
    environ["PYTHONPATH"] += f":{tmp_path}"
    with subprocess.Popen([*XLA_RUN, "-m", "idle"], env=environ, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        pid = int(next(line for line in launcher.stdout if line.startswith("rank")).split()[1])
        rank = os.pidfd_open(pid)
        launcher.kill()
        try:
            assert select.select([rank], [], [], 60)[0], "it is there still"
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(rank, signal.SIGKILL)
            os.close(rank)


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused_before_a_step(tmp_path: Path, data: Path) -> None:
    ended = ranks.torchrun(2, *command(tmp_path, data, 1, "device=xla", "batch_size=7"))
    assert ended.stderr.count("ERROR 2: batch_size=7 does not divide by 2 ranks; use a multiple of them\n") >= 1
    assert "saved" not in ended.stdout and "XLA has compiled" not in ended.stdout
