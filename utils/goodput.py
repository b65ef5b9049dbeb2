"""What a stage's wall time was spent on, over all its attempts, and what to change about the greatest loss.

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import attempts
from utils.attempts import SLACK
from utils.paths import RunDir

PARTS = ("queue", *attempts.PARTS, "redone", "between attempts")
WORK = ("compute", "evaluation")  # what a stage is for
WORTH = 0.1  # of the wall time: smaller losses are not named


@dataclass(frozen=True)
class Spent:
    """A stage's wall time."""

    seconds: dict[str, float] = field(default_factory=dict)  # of each of PARTS that took time
    wall: float = 0.0  # from when it was submitted, or begun, to the newest writing
    restarts: int = 0  # attempts after the first
    world_size: int = 0  # of the last attempt, and so for the next two
    device: str = ""
    cores: int = 0  # of a rank
    rank_seconds: float = 0.0  # of all ranks of all attempts together
    problems: tuple[str, ...] = ()  # what is damaged or does not add up


def stage(run_dir: RunDir, submitted: float | None) -> Spent:
    """What is known of a stage's wall time; without any attempt's file, nothing.

    Args:
        submitted: Unix time since which its newest job could have run; None outside a queue. What the jobs before
            waited in the queue is not known any more: it counts as between attempts, or not at all.
    """
    found, problems = attempts.read(run_dir)
    if not found:
        return Spent(problems=(*problems, f"{run_dir.times}: no times were kept"))
    seconds = dict.fromkeys(PARTS, 0.0)
    since = math.inf if submitted is None else submitted
    queued = next((attempt for attempt in found if attempt.began >= since - SLACK), None)
    began = ended = min(since, found[0].began) if queued is found[0] else found[0].began
    for number, attempt in enumerate(found):
        problems += attempt.problems()
        if ended - attempt.began > SLACK:
            said = f"{attempt.file}: begun before {found[number - 1].file.name} ended"
            problems.append(f"{said}, by {ended - attempt.began:.1f} s")
        waited = max(0.0, attempt.began - max(ended, since)) if attempt is queued else 0.0
        seconds["queue"] += waited
        seconds["between attempts"] += max(0.0, attempt.began - ended) - waited
        for part, spent in attempt.seconds.items():
            seconds[part] += spent
        if number + 1 < len(found):
            for part, lost in attempt.unsaved.items():
                seconds[part] -= lost
                seconds["redone"] += lost
        ended = attempt.at
    last = found[-1]
    return Spent(
        {part: value for part, value in seconds.items() if value},
        last.at - began,
        len(found) - 1,
        last.world_size,
        last.device,
        last.cores,
        sum(attempt.world_size * sum(attempt.seconds.values()) for attempt in found),
        tuple(problems),
    )


def advice(spent: Spent, config: Mapping[str, Any]) -> str:
    """The biggest loss of a stage and what to change about it. Args: config: the stage's, as in its config.yaml."""
    losses = {part: seconds for part, seconds in spent.seconds.items() if part not in WORK}
    worst = max(losses, key=lambda part: losses[part], default=None)
    if worst is None or losses[worst] <= WORTH * spent.wall:
        return "nothing above 10 %"
    name, what = REMEDIES[worst]
    return f"{losses[worst] / spent.wall:.0%} {name}: ".replace("%", " %", 1) + what(spent, config)


def _data(spent: Spent, config: Mapping[str, Any]) -> str:
    data, workers = config["data"], config["workers"]
    source = str(data["labeled"] if "labeled" in data else data["unlabeled"])
    ways = []
    if workers < spent.cores - 1:  # the step itself needs one
        ways.append(f"raise workers from {workers} to {spent.cores - 1}")
    else:
        ways.append(f"ask for more cores than {spent.cores} a rank, and as many workers")
    if not Path(source).suffix:
        ways.append(f"pack {source} into an archive")
    if "cache" in data and data["cache"] is None:
        ways.append("set data.cache to a folder of the node's disk")
    return ", or ".join(ways)


def _staging(spent: Spent, config: Mapping[str, Any]) -> str:
    if config["data"]["stage"] != "direct":
        return f"set data.stage=direct instead of {config['data']['stage']}"
    return "keep the data on a disk that outlives the job, or run longer jobs"


def _validation(spent: Spent, config: Mapping[str, Any]) -> str:
    ways = f"more ranks than {spent.world_size} share it"
    if "validate_every" in config:
        ways += f", or raise validate_every from {config['validate_every']}"
    return ways


def _redone(spent: Spent, config: Mapping[str, Any]) -> str:
    when = config["checkpoint"]
    if not isinstance(when, Mapping):  # an evaluation's is the file it measures
        return "an evaluation cannot go on within: ask for a --time that it fits in"
    minutes = when["every_minutes"]
    return f"lower checkpoint.every_minutes from {minutes:g}" if minutes else "set checkpoint.every_minutes, say to 15"


def _saving(spent: Spent, config: Mapping[str, Any]) -> str:
    when = config["checkpoint"]
    if isinstance(when, Mapping):
        for key in ("every_steps", "every_minutes"):
            if when[key]:
                return f"raise checkpoint.{key} from {when[key]:g}"
    return "what is saved once an epoch and at the end is too slow to write: use a faster disk"


def _always(what: str) -> Callable[[Spent, Mapping[str, Any]], str]:
    return lambda spent, config: what


REMEDIES = {
    "queue": ("in the queue", _always("a shorter --time in the stage's #SBATCH header lets backfill take it")),
    "start-up": ("starting up", _always("run longer jobs, or fewer stages")),
    "staging": ("staging data", _staging),
    "labels": ("reading labels", _always("stages of one chain share their index: run them as one chain")),
    "data wait": ("waiting for data", _data),
    "validation": ("validating", _validation),
    "saving": ("saving", _saving),
    "redone": ("done again after restarts", _redone),
    "between attempts": ("between attempts", _always("a longer --time ends it in fewer jobs")),
}
