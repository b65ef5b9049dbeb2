"""The comparison notices a rule that is broken: else all of it would prove nothing."""

from __future__ import annotations

import shutil
import sys

from tests.chaos.place import CHAIN, RANKS, Place
from tests.chaos.report import Steps
from tests.faults import recorder

KILLED, LAST = 4, 6  # after a checkpoint, within an epoch


def rows(place: Place, reference: Steps) -> list[list[str]]:
    """For each rule of exact resuming, what the comparison says of a round that went on without it."""
    folder = place.root / "controls"
    _train(place, "cut", "--kill", KILLED)
    table = []
    for broken in (None, *recorder.BREAKS):
        name = broken or "nothing"
        shutil.copytree(folder / "cut", folder / name)
        _train(place, name, *(["--break", broken] if broken else []), "--kill", LAST)
        lines = recorder.read(folder / f"{name}.jsonl")
        if [line["step"] for line in lines] != list(range(KILLED, LAST + 1)):
            raise RuntimeError(f"the control {name} has trained {lines}")
        equal = all(line == reference["r1", line["step"]] for line in lines)
        verdict = "EQUAL" if equal else "DIFFERENT"
        table.append([f"control: {name} broken", verdict, "as it should" if equal == (not broken) else "WRONG"])
    return table


def _train(place: Place, name: str, *words: object) -> None:
    """r1 as in the chain, from where `name` is, to the step at which it is killed."""
    folder = place.root / "controls"
    folder.mkdir(exist_ok=True)
    config = place.root / "runs" / CHAIN / "r1" / "config.yaml"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    program = ["-m", "tests.faults.recorder", folder / f"{name}.jsonl", *words, "detect_train.train"]
    place.run(*launcher, *program, "--config", config, "--run-dir", folder / name)
