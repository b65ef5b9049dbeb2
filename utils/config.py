"""Configuration: frozen dataclasses filled from YAML files and the command line.

dataclass default < `base:` file < file < command line. All problems are reported in one error, each
with where it came from, and an unknown key with the nearest valid ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from utils import typed_yaml
from utils.errors import InputError

T = TypeVar("T")
Layer = tuple[str, dict[str, Any]]  # where it came from -> dotted key: value
_hints = functools.cache(typing.get_type_hints)  # of a dataclass; evaluating its annotations takes most of a `load`


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; --help lists the flags")


def parser(prog: str, flags: Mapping[str, str], default: Path, description: str) -> argparse.ArgumentParser:
    """A command line of `--config FILE`, the short `flags` (flag -> dotted key) and `key=value` words."""
    result = _Parser(prog=prog, description=description, allow_abbrev=False)
    result.add_argument("--config", type=Path, default=default, help="default: %(default)s")
    for flag, key in flags.items():
        result.add_argument(flag, dest=key, metavar="VALUE", default=None, help=f"short for {key}=VALUE")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    return result


def parse(schema: type[T], command_line: argparse.ArgumentParser, argv: Sequence[str] | None) -> T:
    """The configuration that a command line asks for. Raises: InputError listing every problem."""
    arguments = vars(command_line.parse_intermixed_args(argv))
    file, words = arguments.pop("config"), arguments.pop("overrides")
    words += [f"{key}={value}" for key, value in arguments.items() if value is not None]
    return load(schema, file, words)


def load(schema: type[T], file: Path, overrides: Sequence[str] = ()) -> T:
    """`schema` filled from `file` (and its `base:` chain) and then from `key=value` overrides."""
    return build(schema, [*file_layers(file), ("command line", dict(map(split_override, overrides)))])


class Word(str):
    """A value as it was typed: what it means depends on the key's type (`--run-dir 2024` is a name)."""


def split_override(word: str) -> tuple[str, Word]:
    """`optim.lr=1e-3` -> (`optim.lr`, `1e-3`). Raises: InputError."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise InputError(f"command line: {word!r} is not of the form key=value")
    return key, Word(value)


def build(schema: type[T], layers: Sequence[Layer]) -> T:
    """Fill `schema` from layers of dotted keys, the last one winning. Raises: InputError listing every problem."""
    known = dict(leaves(schema))
    values: dict[str, Any] = {}
    problems = []
    for origin, layer in layers:
        for key, value in layer.items():
            if key not in known:
                problems.append(f"{origin}: {unknown(key, list(known))}")
                continue
            try:
                convert = _convert_word if isinstance(value, Word) else _convert
                values[key] = convert(value, known[key])
            except (TypeError, ValueError) as error:
                problems.append(f"{origin}: {key}: {error}")
    missing = object()
    for key, default in _defaults(schema, missing):
        if key not in values and default is missing and not any(key in layer for _, layer in layers):
            problems.append(f"{key}: required; give {key}=VALUE")
    if not problems:
        config = _assemble(schema, values, "")
        problems = config.problems() if hasattr(config, "problems") else []
        if not problems:
            return config
    raise InputError("\n  ".join(["configuration:", *problems]) if len(problems) > 1 else problems[0])


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts of plain YAML values."""
    return {
        key: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for key, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    }


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `load` reads back to the same value."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of `schema` with its type."""
    for name, hint in _hints(schema).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def file_layers(file: Path) -> Iterator[Layer]:
    """The dotted layers of `file`, its base first. A mapping is always a section: no key holds one."""
    content = typed_yaml.read(file)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected keys and values, got {type(content).__name__}")
    if base := content.pop("base", None):
        yield from file_layers(file.parent / str(base))
    yield str(file), dict(dotted(content))


def dotted(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys with their values."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _defaults(schema: type, missing: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(schema):
        hint = _hints(schema)[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _defaults(hint, missing, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", missing if field.default is dataclasses.MISSING else field.default


def _assemble(schema: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = _hints(schema)
    given = {}
    for field in dataclasses.fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            given[field.name] = _assemble(hint, values, f"{key}.")
        elif key in values:
            given[field.name] = values[key]
    return schema(**given)


def unknown(key: str, known: list[str]) -> str:
    """What to tell about a key that is not among `known`: the nearest ones, and those of its section."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    section = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown key {key!r}{hint} (known: {', '.join(section or known)})"


def _convert_word(word: Word, hint: Any) -> Any:
    """A typed word as `hint`: YAML, but a name that looks like a number stays the name."""
    value = typed_yaml.parse(str(word), "its value")
    if str in (hint, *typing.get_args(hint)) and not isinstance(value, str | None):
        return str(word)
    return _convert(value, hint)


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; no guessing beyond int -> float. Raises: TypeError, ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert(value, hint)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"expected a list, got {value!r}")
        return tuple(_convert(item, arguments[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return value
