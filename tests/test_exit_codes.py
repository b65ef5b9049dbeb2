"""The documented exit codes, each from a real command: 0, 2, 3, 4 and 75."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.checkout import Checkout
from tests.labeled_set import write_set
from tests.ranks import run
from tests.test_detect_train import SMALL as SMALL_DETECTOR
from tests.test_ssl_train import SMALL as SMALL_PRETRAINING
from tests.test_ssl_train import write_images
from utils import checkpoint_files
from utils.paths import RunDir


def ends(code: int, cause: str, *command: object, **environ: str) -> str:
    """Run a module; it must end with `code` and, unless that is 0, with one line. Returns what it printed."""
    done = run([sys.executable, "-m", *command], environ)
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert f"\nERROR {code}: {cause}" in f"\n{done.stderr}" and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    elif how == "zeros":
        content[:] = bytes(len(content))
    else:
        content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_pretraining(tmp_path: Path) -> None:
    data, run_dir = write_images(tmp_path / "images"), RunDir(tmp_path / "run")
    common = ["--config", "ssl_train/configs/demo.yaml", "--dataset-root", data, *SMALL_PRETRAINING]
    command = ["ssl_train.train", "--run-dir", run_dir.path, *common]
    ends(2, "command line: unknown key 'model.quue'", *command, "model.quue=3")
    ends(2, f"{tmp_path / 'gone'}", *command, "--dataset-root", tmp_path / "gone")
    assert not run_dir.checkpoints.exists()
    ends(0, "", *command, "--epochs", "2")
    first, last = checkpoint_files.everything(run_dir.checkpoints)
    ends(4, "loss is not finite at step", *command, "--epochs", "4", "--lr", "1e30")
    damage(last, "flip")
    output = ends(0, "", *command, "--epochs", "2")  # from the one before, which it names
    assert f"{last}: damaged" in output and f"going on from the one before: {first}" in output
    for file, how in zip(checkpoint_files.everything(run_dir.checkpoints), ("cut", "zeros"), strict=True):
        damage(file, how)
    before = {path: path.read_bytes() for path in run_dir.checkpoints.iterdir()}
    ends(3, f"{run_dir.checkpoints}: ", *command, "--epochs", "3")
    assert {path: path.read_bytes() for path in run_dir.checkpoints.iterdir()} == before  # not begun from nothing
    ends(75, "half of torchrun's variables are set", *command, RANK="0")


def test_a_round_of_which_every_checkpoint_is_damaged_ends_with_3(tmp_path: Path) -> None:
    data, run_dir = write_set(tmp_path / "data"), RunDir(tmp_path / "run")
    command = ["detect_train.train", "--run-dir", run_dir.path, "--dataset-root", data, *SMALL_DETECTOR]
    ends(0, "", *command, "--epochs", "1")
    (last,) = checkpoint_files.everything(run_dir.checkpoints)
    damage(last, "flip")
    ends(3, f"{run_dir.checkpoints}: ", *command, "--epochs", "2")
    ends(3, f"{last}: damaged", *command, "--epochs", "2", "--resume", last)


@pytest.mark.parametrize("module", ["evaluate.run", "evaluate.report"])
def test_a_command_line_that_lacks_something_ends_with_2(module: str) -> None:
    done = run([sys.executable, "-m", module])
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_worker_and_the_launcher_end_with_the_code_of_the_stage(tmp_path: Path) -> None:
    here = Checkout(tmp_path)
    assert here.worker("r1").returncode == 2
    assert here.worker("pretrain").returncode == 0
    assert here.run(*here.worker_command("r1"), RANK="0").returncode == 75
    assert here.local("--chain", "epochs=0").returncode == 2
    assert here.local("--chain").returncode == 0
