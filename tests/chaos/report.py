"""What a chain left, what it should have left, and the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jobs.status import columns
from tests.chaos.driver import Injected
from tests.chaos.place import Place
from tests.chaos.record import Line
from tests.faults import recorder
from utils import checkpoint, files

HEAD = ["fault", "injected", "survived", "relaunched", "steps redone", "digest equal"]
Steps = dict[tuple[str, int], dict[str, object]]  # (stage, step) -> losses, digests


def steps(lines: Sequence[Line]) -> Steps:
    """The steps of a chain that nothing disturbed. Raises: ValueError unless all are finite and different."""
    found: Steps = {(line.stage, line.step): line.content for line in lines}
    digests = {str(content["digest"]) for content in found.values()}
    if not all(content["finite"] for content in found.values()) or len(digests) != len(lines):
        raise ValueError("a chain that nothing disturbed has losses that are not finite, or trained a step twice")
    return found


def results(place: Place, chain: str) -> dict[str, str]:
    """What the chain's stages left: name -> hash, or numbers."""
    found = {}
    for stage in place.stages:
        marker = place.marker(stage, chain)
        found[f"{stage}'s metrics"] = json.dumps(marker["metrics"])
        for name in marker["outputs"].keys() & {"last", "best"}:
            content = checkpoint.read(Path(marker["outputs"][name]["path"]))
            found[f"{stage}'s {name} model and optimizer"] = recorder.digest(content["model"], content["optimizer"])
        if "backbone" in marker["outputs"]:
            found["backbone.pth"] = files.sha256(Path(marker["outputs"]["backbone"]["path"]))
    return found


def same(lines: Sequence[Line], reference: Steps) -> bool:
    return all(reference[line.stage, line.step] == line.content for line in lines)


def rows(faults: Sequence[Injected], reference: Steps) -> list[list[str]]:
    """A row for each kind of fault, in the order of their first time."""
    table = []
    for name in dict.fromkeys(fault.name for fault in faults):
        those = [fault for fault in faults if fault.name == name and fault.injected]
        counts = [len(those), sum(fault.survived for fault in those)]
        counts += [sum(fault.relaunched for fault in those), sum(fault.redone for fault in those)]
        equal = all(same(fault.lines, reference) for fault in those)
        table.append([name, *map(str, counts), "yes" if equal else "NO"])
    return table


def table(body: Sequence[Sequence[str]]) -> str:
    return columns([HEAD, *body])
