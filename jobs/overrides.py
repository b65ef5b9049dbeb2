"""`key=value` words meant for a whole chain, given to the stages that know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from utils import config
from utils.errors import InputError
from utils.shared_config import MACHINE_KEYS

if TYPE_CHECKING:
    from jobs.stages import Stage


def distribute(
    words: Sequence[str], stages: Mapping[str, Stage], selected: Sequence[str], origin: str
) -> dict[str, list[str]]:
    """The words of each selected stage: `optim.momentum=0.8` for all that know the key, `r1.epochs=3` for r1.

    Raises: InputError listing every word that fits no stage, or whose key has another value in each.
    """
    result: dict[str, list[str]] = {name: [] for name in selected}
    known = {name: stages[name].keys() for name in selected} if words else {}
    problems = []
    for word in words:
        key, _ = config.split_override(word)
        first, _, rest = key.partition(".")
        if first in stages and rest:
            if first in result:
                result[first].append(word.removeprefix(f"{first}."))
            else:
                problems.append(f"{word}: {first} is not among the selected stages ({', '.join(selected)})")
            continue
        users = [name for name in selected if key in known[name]]
        values = {name: stages[name].reference().get(key) for name in users}
        differing = {name: value for name, value in values.items() if value is not None}
        if not users:
            problems.append(config.unknown(key, sorted(set().union(*known.values()))))
        elif len(set(map(repr, differing.values()))) > 1 and key not in MACHINE_KEYS:
            listed = ", ".join(f"{name} {value}" for name, value in differing.items())
            problems.append(f"{key} differs between stages ({listed}): say {users[-1]}.{key}=VALUE")
        for name in users:
            result[name].append(word)
    if problems:
        raise InputError("\n  ".join([f"{origin}:", *problems]))
    return result
