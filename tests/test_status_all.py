"""`--status --all`: a line a chain, from one call to Slurm, whatever is in the directories."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.chains import SMALL, jobs
from tests.checkout import Checkout
from tests.cluster import Cluster
from tests.cluster.machine import PATH


def overview(here: Checkout, **environ: str) -> dict[str, str]:
    """Chain -> its line."""
    with here.start(here.environ["RELAY_PYTHON"], *WORDS, **environ) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    head, *lines = output.splitlines()
    assert head.split()[:4] == ["chain", "done", "stage", "state"]
    return {line.split()[0]: line for line in lines}


WORDS = ["jobs/launch.py", "--file", "tests/standin/chain.yaml", "--status", "--all"]


def test_a_line_for_each_chain_also_for_those_that_are_damaged(tmp_path: Path) -> None:
    here = Checkout(tmp_path)
    runs = here.root / "runs"
    assert here.local("--chain").returncode == 0
    assert here.local("--chain", "--name", "second", "r1.fail=error").returncode == 1
    for name in ("torn", "short", "strange", "unwritten"):
        shutil.copytree(runs / "standin", runs / name)
    (runs / "torn/r2/state.json").write_text('{"status": "do')
    (runs / "short/r2/state.json").write_text('{"status": "done"}')
    (runs / "strange/r9").mkdir()
    (runs / "strange/r9/state.json").write_text("{}")
    (runs / "unwritten/jobs.json").write_text("[1]")
    (runs / "empty").mkdir()
    (runs / "folder/r1/state.json").mkdir(parents=True)
    (runs / "notes.txt").touch()
    found = overview(here)
    assert list(found) == ["empty", "folder", "second", "short", "standin", "strange", "torn", "unwritten"]
    assert found["standin"].split()[1:4] == ["5/5", "eval", "DONE"]
    assert found["second"].split()[1:4] == ["1/5", "r1", "FAILED"]
    assert found["second"].endswith("RuntimeError: the disk is on fire")
    assert found["empty"].split() == ["empty", "0/5", "pretrain", "TODO"]
    for name in ("torn", "short"):
        assert found[name].split()[1:4] == ["UNKNOWN", f"{runs / name}/r2/state.json", "is"]
    assert "has r9, no stage of chain.yaml" in found["strange"]
    assert f"{runs}/unwritten/jobs.json is damaged" in found["unwritten"]
    assert "Is a directory" in found["folder"]
    damaged = here.local("--chain", "--name", "torn")
    assert (damaged.returncode, "torn/r2/state.json is damaged" in damaged.stdout) == (2, True), damaged.stdout


def test_all_is_no_action_of_its_own(tmp_path: Path) -> None:
    refused = Checkout(tmp_path).local("--all")
    assert (refused.returncode, "--all: only with --status" in refused.stdout) == (2, True)


def noted(here: Checkout) -> dict[str, str]:
    """An environment in which each call of Slurm's programs is a line in the file `calls`."""
    folder = here.root / "bin"
    folder.mkdir()
    for program in ("sbatch", "squeue", "sacct", "scontrol", "sinfo"):
        note = f'echo "{program} $(echo "$*" | tr "\\n" " ")" >> {here.root}/calls'
        (folder / program).write_text(f'#!/bin/bash\n{note}\nexec {shutil.which(program, path=PATH)} "$@"\n')
        (folder / program).chmod(0o755)
    return {"PATH": f"{folder}:{PATH}"}


def calls(here: Checkout) -> list[str]:
    """The calls since the last time."""
    file = here.root / "calls"
    found = file.read_text().splitlines()
    file.unlink()
    return found


@pytest.mark.slurm
@pytest.mark.usefixtures("nothing_stays_queued")
def test_slurm_is_asked_once_for_a_hundred_chains(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    environ = noted(here)
    words = [*(f"--sbatch={option}" for option in [*SMALL, "--hold"]), "--chain"]
    launched = here.run(here.environ["RELAY_PYTHON"], *WORDS[:3], *words, **environ)
    assert launched.returncode == 0, launched.stdout
    made = calls(here)
    assert sum("--test-only" in call for call in made) == 1  # all stages ask for the same
    assert sum(call.startswith("sbatch") for call in made) == 1 + 5
    for number in range(100):
        shutil.copytree(here.root / "runs/standin", here.root / f"runs/copy{number}")
    found = overview(here, **environ)
    assert len(found) == 101
    assert found["standin"].split()[1:6] == ["0/5", "pretrain", "PENDING", "(JobHeldUser)", jobs(here)["pretrain"]]
    made = calls(here)
    assert [call.split()[0] for call in made] in (["squeue"], ["squeue", "sacct"])
