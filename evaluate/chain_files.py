"""What a chain left in its directory, read as plain files. What is missing or damaged is said, never guessed."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils import config, metrics, paths, typed_yaml
from utils.errors import InputError
from utils.paths import RunDir

SIGNS = ("state.json", "config.yaml", "metrics.jsonl", "metrics.json")  # a folder with one of them is a stage's
BY_HAND = "run without the launcher"


@dataclass(frozen=True)
class StageFiles:
    """One stage's directory."""

    name: str
    run_dir: RunDir
    marker: Mapping[str, Any]  # state.json; empty without one: the stage waits, or was run without the launcher
    config: Mapping[str, Any]  # dotted keys; empty before the stage begins
    records: Sequence[Mapping[str, Any]]  # metrics.jsonl
    could_run: float | None  # Unix seconds since which nothing but the queue kept its job from running

    @property
    def parents(self) -> list[str]:
        return sorted({parent for parent in map(self._parent, self.marker.get("inputs", {})) if parent})

    @property
    def continues(self) -> str | None:
        """The stage whose weights, optimizer and epochs this one goes on with."""
        return self._parent("init")

    @property
    def seconds(self) -> float | None:
        """From the beginning of the last attempt to its end; None before that."""
        began, ended = (seconds(self.marker.get(key)) for key in ("started", "ended"))
        return None if began is None or ended is None else ended - began

    @property
    def nested(self) -> dict[str, Any]:
        """The configuration as its YAML has it."""
        found: dict[str, Any] = {}
        for key, value in self.config.items():
            *sections, last = key.split(".")
            inner = found
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return found

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def _parent(self, key: str) -> str | None:
        source = self.marker.get("inputs", {}).get(key)
        return str(source["from"]).partition(".")[0] if isinstance(source, dict) and source.get("from") else None


@dataclass(frozen=True)
class ChainFiles:
    """One chain's directory; its stages each after those it is made from."""

    name: str
    path: Path
    stages: tuple[StageFiles, ...]
    problems: tuple[str, ...]

    @property
    def evaluation(self) -> StageFiles | None:
        """The last stage that evaluates a checkpoint."""
        found = [stage for stage in self.stages if "checkpoint" in stage.config or stage.run_dir.report_json.exists()]
        return found[-1] if found else None

    @property
    def lines(self) -> list[list[StageFiles]]:
        """The training stages; those that go on with the one before in one list, since theirs is one loss."""
        found: list[list[StageFiles]] = []
        for stage in self.stages:
            if stage.of_kind("train"):
                before = [line for line in found if line[-1].name == stage.continues]
                (before[0].append(stage) if before else found.append([stage]))
        return found


def read(path: Path) -> ChainFiles:
    """A chain's directory. Raises: InputError when there is no stage in it."""
    path = path.resolve()
    problems: list[str] = []
    submitted = _mapping(path / "jobs.json", problems)
    folders = {entry.parent.name for sign in SIGNS for entry in path.glob(f"*/{sign}")} | set(submitted)
    names = [name for name in folders if paths.NAME.fullmatch(name) and not paths.is_set_aside(name)]
    if not names:
        raise InputError(f"{path}: no stage there; give a chain's directory, such as runs/mocov2_fpn")
    stages = {name: _stage(RunDir(path / name), submitted.get(name), problems) for name in sorted(names)}
    ordered = (replace(stage, could_run=_could_run(stage, stages)) for stage in _ordered(stages))
    return ChainFiles(path.name, path, tuple(ordered), tuple(problems))


def _could_run(stage: StageFiles, stages: Mapping[str, StageFiles]) -> float | None:
    """A chain is submitted at once; a stage then waits for its parents, and only after that in the queue."""
    ends = (str(stages[parent].marker.get("ended") or "") for parent in stage.parents if parent in stages)
    known = [seconds(end) for end in ends if end <= stage.marker["started"]]  # else the parent was run again
    return stage.could_run and max([stage.could_run, *filter(None, known)])


def status(chain: ChainFiles, stage: StageFiles) -> str:
    """todo, running, preempted, failed, done or BY_HAND; stale: made from what its parent does not have any more."""
    found = {other.name: other.marker for other in chain.stages}
    for source in stage.marker.get("inputs", {}).values():
        parent, _, output = str(source["from"]).partition(".") if source.get("from") else ("", "", "")
        left = found.get(parent, {}).get("outputs", {}).get(output, {})
        if parent and left.get("sha256") != source.get("sha256"):
            return "stale"
    if stage.marker:
        return stage.marker["status"]
    return BY_HAND if stage.config else "todo"


def seconds(text: Any) -> float | None:
    """Unix seconds of a marker's time; None for none."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp() if text else None
    except (TypeError, ValueError):
        return None


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _stage(run_dir: RunDir, entry: Any, problems: list[str]) -> StageFiles:
    marker = _mapping(run_dir.state, problems)
    if marker and not _is_sound(marker):
        problems.append(f"{run_dir.state} is damaged: not a stage's marker")
        marker = {}
    given = marker.get("config") or _yaml(run_dir.config, problems)
    submitted = seconds(entry.get("submitted")) if isinstance(entry, dict) else None
    return StageFiles(run_dir.path.name, run_dir, marker, given, _records(run_dir.metrics, problems), submitted)


def _is_sound(marker: Mapping[str, Any]) -> bool:
    if not all(isinstance(marker.get(key), str) for key in ("status", "started")):
        return False
    linked: list[Any] = [marker.get("inputs"), marker.get("outputs", {})]
    maps = all(isinstance(one, dict) for one in (marker.get("config"), *linked))
    return maps and all(isinstance(value, dict) for one in linked for value in one.values())


def _mapping(file: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; empty, and a problem, if it is another thing. Empty without a file."""
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            return content
        raise ValueError("not a JSON object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file} cannot be read: {error}")
    return {}


def _yaml(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = typed_yaml.read(file) if file.exists() else {}
        return dict(config.dotted(content)) if isinstance(content, dict) else {}
    except InputError as error:
        problems.append(str(error))
    return {}


def _records(file: Path, problems: list[str]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    try:
        for record in metrics.read(file):
            if not (isinstance(record, dict) and {"kind", "epoch", "step"} <= record.keys()):
                raise ValueError("a line is no record")
            found.append(record)
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file}: read up to record {len(found)}: {error}")
    return found


def _ordered(stages: Mapping[str, StageFiles]) -> Iterator[StageFiles]:
    """Parents first; of those that could be next, the one that began first, then by name."""
    left = dict(stages)
    while left:
        ready = [stage for stage in left.values() if not left.keys() & (set(stage.parents) - {stage.name})]
        first = min(ready or left.values(), key=lambda stage: (stage.marker.get("started", "~"), stage.name))
        yield left.pop(first.name)
