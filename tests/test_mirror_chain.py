"""A chain with a store, taken up by a machine that has nothing but the checkout."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.checkout import Checkout
from tests.gcs_server import Server, gcs, hasty

__all__ = ["gcs", "hasty"]  # fixtures
STORE = "--store=gs://bucket/relay"


def test_chain_killed_on_one_machine_is_completed_on_another(gcs: Server, tmp_path: Path) -> None:
    one, other = Checkout(tmp_path / "one"), Checkout(tmp_path / "other")
    argv = ["jobs/launch.py", "--file", "tests/standin/chain.yaml", "--chain", "--cluster", "local", STORE]
    with one.start("setsid", one.environ["RELAY_PYTHON"], *argv, f"r2.wait_for={tmp_path / 'never'}") as launcher:
        assert launcher.stdout
        next(line for line in launcher.stdout if "listening" in line)
        os.killpg(launcher.pid, signal.SIGKILL)
    completed = other.local("--chain", STORE)
    assert completed.returncode == 0, completed.stdout
    assert "pretrain: done already, skipped" in completed.stdout
    assert "r1: done already, skipped" in completed.stdout
    assert other.made("r3") == "pretrain:0.015 r1:0.03 r2:0.003 r3:0.0003"
    assert other.state("r2")["inputs"]["init"]["path"] == str(other.root / "runs/standin/r1/last.txt")


def test_the_machine_that_was_given_up_is_refused(gcs: Server, tmp_path: Path) -> None:
    one, other = Checkout(tmp_path / "one"), Checkout(tmp_path / "other")
    words = ["--only", "pretrain", STORE, f"wait_for={tmp_path / 'go'}"]
    argv = ["jobs/launch.py", "--file", "tests/standin/chain.yaml", "--cluster", "local", *words]
    with one.start(one.environ["RELAY_PYTHON"], *argv) as frozen:
        assert frozen.stdout
        next(line for line in frozen.stdout if "listening" in line)
        with other.start(other.environ["RELAY_PYTHON"], *argv) as second:
            assert second.stdout
            next(line for line in second.stdout if "listening" in line)
            (tmp_path / "go").touch()
            rest, others = frozen.stdout.read(), second.stdout.read()
    assert frozen.returncode == 75, rest
    assert "taken over" in rest
    assert second.returncode == 0, others
