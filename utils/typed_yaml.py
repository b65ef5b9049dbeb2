"""YAML read the way people mean it: `1e-3` is a number, `no` is a word, a key stands once.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false, `0123` is 83 and `12:30` is 750;
the loader here uses the scalars of YAML 1.2's core schema. It is the C one: 6 times the Python one's speed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from reprlib import repr as brief
from typing import Any, ClassVar

import yaml

from utils.errors import InputError

DEEPEST = 1000  # levels of nesting; a text needs at least as many bytes for them


class TypedLoader(yaml.CSafeLoader):
    """SafeLoader with YAML 1.2 scalars, lists and mappings of words, and nothing else.

    No merging of mappings either: 600 bytes of `!!merge` can ask for more memory than a node has.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key is a word or a number", key)
            if key.value in seen:
                raise _error(f"key {key.value!r} stands twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `!!merge` keys as they are: a tag that nothing constructs."""


def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _add_scalar(tag: str, pattern: str, first: list[str], convert: Callable[[str], Any]) -> None:
    """Read plain scalars that `pattern` fits, and scalars with this tag, by `convert`."""
    expression = re.compile(pattern)

    def construct(loader: TypedLoader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        try:
            if expression.match(text):
                return convert(text)
        except ValueError as error:  # an integer of thousands of digits
            raise _error(str(error), node) from None
        raise _error(f"{brief(text)} is no {tag}", node)

    TypedLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", expression, first)
    TypedLoader.add_constructor(f"tag:yaml.org,2002:{tag}", construct)


_add_scalar("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""], lambda text: None)
_add_scalar("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF"), lambda text: text.lower() == "true")
_add_scalar("int", r"^[-+]?[0-9]+$", list("-+0123456789"), int)
_add_scalar(
    "float",
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    list("-+.0123456789"),
    lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
)
for tag, construct in (
    ("tag:yaml.org,2002:str", TypedLoader.construct_yaml_str),
    ("tag:yaml.org,2002:seq", TypedLoader.construct_yaml_seq),
    ("tag:yaml.org,2002:map", TypedLoader.construct_yaml_map),
    (None, TypedLoader.construct_undefined),
):
    TypedLoader.add_constructor(tag, construct)  # type: ignore[type-var]


def _check_depth(text: str | bytes) -> None:
    """Raises: ValueError for nesting that would overflow the C stack of the constructor and kill the process."""
    depth = 0
    for event in yaml.parse(text, Loader=TypedLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def parse(text: str | bytes, name: str) -> Any:
    """The value of YAML `text`; `name` says in errors where it came from.

    Raises: InputError with line and column.
    """
    try:
        if len(text) > DEEPEST:
            _check_depth(text)
        return yaml.load(text, Loader=TypedLoader)
    except yaml.reader.ReaderError as error:
        raise InputError(f"{name}:{_line(text, error.position)}: bad YAML: {error.reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise InputError(f"{where}: bad YAML: {getattr(error, 'problem', None) or error}") from None


# What dumpers write for lists of numbers, of lists of numbers, and of words. Nothing that needs thought: no
# comments, quotes, exponents or other scripts, no line that could go on in the next one.
_NUMBER = rb"-?[0-9]{1,15}(?:\.[0-9]{1,17})?"
_LIST = re.compile(
    rb"([a-z_]{1,50}):(?: \[\]\n"
    rb"|\n((?:- - %(number)b\n(?:  - %(number)b\n)*)+)"
    rb"|\n((?:- %(number)b\n)+)"
    rb"|\n((?:- [a-zA-Z_]\w*(?:[ -]\w+)*\n)+))" % {b"number": _NUMBER}
)
_NOT_WORDS = frozenset({"null", "true", "false"})


def parse_lists(text: bytes, name: str) -> Any:
    """What `parse` gives, many times faster where `text` is nothing but such lists under keys."""
    value = _plain_lists(text)
    return parse(text, name) if value is None else value


def _plain_lists(text: bytes) -> dict[str, list[Any]] | None:
    value: dict[str, list[Any]] = {}
    position = 0
    while match := _LIST.match(text, position):
        position = match.end()
        name, rows, numbers, words = match.groups()
        items: list[Any] = []
        if rows:
            items = [list(map(_number, row.split(b"\n  - "))) for row in rows[4:-1].split(b"\n- - ")]
        elif numbers:
            items = list(map(_number, numbers[2:-1].split(b"\n- ")))
        elif words:
            items = words[2:-1].decode().split("\n- ")
        key = name.decode()
        if key in value or key in _NOT_WORDS or (words and not _NOT_WORDS.isdisjoint(map(str.lower, items))):
            return None
        value[key] = items
    return value if value and position == len(text) else None


def _number(text: bytes) -> float:
    return float(text) if b"." in text else int(text)


def _line(text: str | bytes, position: int) -> int:
    """The number of the line that holds byte `position`."""
    return (text.encode() if isinstance(text, str) else text)[:position].count(b"\n") + 1


def read(path: Path) -> Any:
    """The value of a YAML file. Raises: InputError when it is missing, unreadable or not YAML."""
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
