"""What a launch will do, stage by stage, decided before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobs import state
from jobs.overrides import distribute
from jobs.stages import Chain
from utils.errors import InputError

Resources = dict[str, str | bool]  # sbatch's long options; True for one without a value


@dataclass(frozen=True)
class Step:
    """One stage of a launch. run: on from its checkpoints, if it has any. again: from nothing."""

    stage: str
    action: Literal["skip", "run", "again"]
    words: Sequence[str]  # for its program
    config: Mapping[str, Any]  # what the words make of the stage's configuration
    needs: Sequence[str]  # parents that must be done first


def select(chain: Chain, only: str | None, start: str | None) -> list[str]:
    """The stages asked for, parents first: one, one and what depends on it, or all. Raises: InputError."""
    if only:
        return [chain.stage(only).name]
    if not start:
        return list(chain.stages)
    chosen = {chain.stage(start).name}
    for stage in chain.stages.values():
        if chosen.intersection(stage.parents):
            chosen.add(stage.name)
    return [stage for stage in chain.stages if stage in chosen]


def make(chain: Chain, selected: Sequence[str], words: Sequence[str], again: bool) -> tuple[list[Step], list[str]]:
    """The steps for the selected stages, parents first, and every problem of their configurations.

    A stage that is done is skipped, unless `again`, or something it was made from is made anew.
    """
    problems = []
    steps: dict[str, Step] = {}
    try:
        own = distribute(words, chain.stages, selected, "command line")
    except InputError as error:
        return [], [str(error)]
    for stage in selected:
        try:
            config = chain.resolve(stage, own[stage])
            new = {name for name, step in steps.items() if step.action != "skip"}
            needs = chain.needs(stage, config)
            steps[stage] = Step(stage, _action(chain, stage, config, new, again), own[stage], config, needs)
        except InputError as error:
            problems.append(f"{stage}: {error}")
            continue
        for parent in needs:
            now = state.read(chain, parent)["status"]
            if parent not in selected and now != "done":
                problems.append(f"{stage}: needs {parent}, which is {now}: wait, or use --from {parent}")
    return list(steps.values()), problems


def _action(
    chain: Chain, stage: str, config: Mapping[str, Any], new: set[str], again: bool
) -> Literal["skip", "run", "again"]:
    record = state.read(chain, stage)
    made_from = {source["from"].partition(".")[0] for source in record["inputs"].values() if source["from"]}
    if record["status"] == "stale" or made_from & new or (again and record["status"] == "done"):
        return "again"
    return "skip" if state.is_done(chain, stage, config) else "run"
