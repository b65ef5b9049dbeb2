"""The stages of a chain, read from a chain file, put in order and turned into command lines."""

from __future__ import annotations

import graphlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import tpu_config
from jobs.overrides import distribute
from jobs.tpu_config import Tpu
from utils import config, typed_yaml
from utils.errors import InputError
from utils.paths import ROOT, ChainDir, RunDir, check_name

FIELDS = ("module", "config", "slurm")
Fields = dict[str, dict[str, str]]  # stage -> field: value


@dataclass(frozen=True)
class Stage:
    name: str
    module: str  # has main(argv), and beside it a config module with Config and parse(argv)
    config: Path
    slurm: Path  # its #SBATCH header holds the stage's resources
    inputs: Mapping[str, str]  # config key -> "stage.output"

    @property
    def parents(self) -> list[str]:
        return list(dict.fromkeys(source.partition(".")[0] for source in self.inputs.values()))

    @property
    def program(self) -> Any:
        """The torch-free configuration module of the stage's program. Raises: InputError if it has none."""
        try:
            return importlib.import_module(f"{self.module.rpartition('.')[0]}.config")
        except ModuleNotFoundError as error:
            raise InputError(f"stage {self.name}, module {self.module}: {error}") from None

    def keys(self) -> list[str]:
        return [key for key, _ in config.leaves(self.program.Config)]

    def reference(self) -> dict[str, Any]:
        """Dotted key -> value of the stage's configuration file."""
        return _flat(self.config)


@dataclass(frozen=True)
class Chain:
    """Stages, parents first, and the chain's directory."""

    name: str
    file: Path
    stages: Mapping[str, Stage]
    overrides: Mapping[str, Sequence[str]]  # stage -> the file's own key=value words
    store: str | None = None  # URL below which the run directories are mirrored
    tpu: Tpu | None = None

    @property
    def dir(self) -> ChainDir:
        return ChainDir.named(self.name)

    def run_dir(self, stage: str) -> RunDir:
        return RunDir(self.dir.stage(stage).path, self.url(stage) if self.store else None)

    def url(self, *stage: str) -> str:
        """Where the store has the chain, or one stage's run directory. Only for a chain with a store."""
        assert self.store
        return "/".join((self.store.rstrip("/"), self.name, *stage))

    def stage(self, name: str) -> Stage:
        """Raises: InputError."""
        if name not in self.stages:
            raise InputError(f"{self.file} has no stage {name!r} (stages: {', '.join(self.stages)})")
        return self.stages[name]

    def argv(self, stage: str, words: Sequence[str], inputs: Mapping[str, str]) -> list[str]:
        """The command line of a stage's program; `inputs` is config key -> path. The later word wins."""
        given = {"run_dir": str(self.run_dir(stage).path), **inputs}
        ours = [word(*item) for item in given.items()]
        theirs = [_at_home(item) for item in (*self.overrides[stage], *words)]
        return ["--config", str(self.stages[stage].config), *ours, *theirs]

    def worker_words(self, stage: str, words: Sequence[str]) -> list[str]:
        """The command line of the stage's worker."""
        store = [f"--store={self.store}"] if self.store else []
        return [stage, f"--file={self.file}", f"--name={self.name}", *store, *words]  # a name may begin with a dash

    def resolve(self, stage: str, words: Sequence[str]) -> dict[str, Any]:
        """The stage's configuration by dotted key; an input that a parent will give reads `stage.output`.

        Raises: InputError listing every problem of the configuration.
        """
        program = self.stages[stage].program
        parsed = program.parse(self.argv(stage, words, self.stages[stage].inputs))
        resolved = dict(config.dotted(config.to_dict(parsed)))
        if resolved["run_dir"] != str(self.run_dir(stage).path):
            raise InputError(f"run_dir={resolved['run_dir']}: in a chain it follows from --name")
        return resolved

    def needs(self, stage: str, resolved: Mapping[str, Any]) -> list[str]:
        """The parents that must be done first: none for inputs, or a file to resume from, given by hand."""
        if resolved.get("resume") not in (None, "auto", "never"):
            return []
        sources = [source for key, source in self.stages[stage].inputs.items() if resolved[key] == source]
        return list(dict.fromkeys(source.partition(".")[0] for source in sources))


def word(key: str, value: Any) -> str:
    """`key=value` that reads back as `value`."""
    plain = isinstance(value, str) and typed_yaml.parse(value, key) == value
    return f"{key}={value if plain else json.dumps(value)}"


def _at_home(word: str) -> str:
    """key=~/file as key=/home/me/file: not every shell, and no program, does it."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).expanduser()}" if value.startswith("~/") else word


def load(file: Path, name: str | None = None, store: str | None = None) -> Chain:
    """The chain of a chain file, with another `name` and `store` if given.

    Raises: InputError listing every problem.
    """
    fields: Fields = {}
    inputs: Fields = {}
    elsewhere: dict[str, Any] = {}
    overrides, problems = [], []
    for key, value in _flat(file).items():
        match key.split("."):
            case ["name"]:
                name = name or str(value)
            case ["overrides", *parts]:
                overrides.append(word(".".join(parts), value))
            case ["stages", stage, "inputs", *parts]:
                inputs.setdefault(stage, {})[".".join(parts)] = str(value)
            case ["stages", stage, "module" | "config" | "slurm" as field]:
                fields.setdefault(stage, {})[field] = str(value)
            case ["store"] | ["tpu", *_]:
                elsewhere[key] = value
            case ["stages", stage, *_]:
                problems.append(config.unknown(key, [f"stages.{stage}.{field}" for field in (*FIELDS, "inputs")]))
            case _:
                problems.append(config.unknown(key, ["name", "overrides", "stages", "store", "tpu"]))
    problems += _problems(fields, inputs)
    try:
        places = tpu_config.read(file.name, elsewhere)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n  ".join([f"{file}:", *problems]))
    stages = {
        stage: Stage(stage, of["module"], ROOT / of["config"], ROOT / of["slurm"], inputs.get(stage, {}))
        for stage, of in fields.items()
    }
    graph = graphlib.TopologicalSorter({stage.name: stage.parents for stage in stages.values()})
    try:
        order = list(graph.static_order())
    except graphlib.CycleError as error:
        raise InputError(f"{file}: stages wait for each other: {' -> '.join(error.args[1])}") from None
    name = check_name(name or file.stem, "chain name")
    shared = distribute(overrides, stages, order, str(file))
    tpu = places.tpu if any(key != "store" for key in elsewhere) else None
    ordered = {stage: stages[stage] for stage in order}
    return Chain(name, file.resolve(), ordered, shared, store or places.store, tpu)


def _flat(file: Path) -> dict[str, Any]:
    return {key: value for _, layer in config.file_layers(file) for key, value in layer.items()}


def _problems(fields: Fields, inputs: Fields) -> Iterator[str]:
    if not fields:
        yield "no stages"
    for stage in {**fields, **inputs}:
        check_name(stage, "stage name")
        given = fields.get(stage, {})
        for field in FIELDS:
            if field not in given:
                yield f"stages.{stage}.{field}: required"
            elif field != "module" and not (ROOT / given[field]).is_file():
                yield f"stages.{stage}.{field}: {given[field]}: no such file"
        for key, source in inputs.get(stage, {}).items():
            parent, _, output = source.partition(".")
            if parent not in fields or not output:
                yield f"stages.{stage}.inputs.{key}: {source!r} is not <stage>.<output> of this file"
