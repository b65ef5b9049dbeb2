"""The configuration loader: precedence, types, and errors that say where and what instead."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from utils import config, typed_yaml
from utils.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float
    momentum: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Config:
    arch: Literal["resnet18", "resnet50"]
    epochs: int
    optim: Optim
    data: str | None = None
    sizes: tuple[int, ...] = (1,)

    def problems(self) -> list[str]:
        return ["epochs: must be at least 1"] if self.epochs < 1 else []


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("arch: resnet50\nepochs: 10\noptim: {lr: 3e-2, momentum: 0.9}\n")
    (tmp_path / "round.yaml").write_text("base: base.yaml\noptim:\n  lr: 1e-3\nsizes: [2, 3]\n")
    return tmp_path


def parse(files: Path, *argv: str) -> Config:
    line = config.parser("test", {"--lr": "optim.lr"}, files / "round.yaml", "a test")
    return config.parse(Config, line, argv)


def test_default_base_file_and_command_line_win_in_that_order(files: Path) -> None:
    loaded = parse(files)
    assert loaded == Config(arch="resnet50", epochs=10, optim=Optim(lr=0.001, momentum=0.9), sizes=(2, 3))
    loaded = parse(files, "epochs=4", "--lr", "1e-4", "data=x.sqsh")
    assert (loaded.epochs, loaded.optim.lr, loaded.data) == (4, 0.0001, "x.sqsh")


def test_yaml_written_is_read_back_to_the_same_value(files: Path) -> None:
    loaded = parse(files)
    (files / "again.yaml").write_text(config.to_yaml(loaded))
    assert config.load(Config, files / "again.yaml") == loaded


def test_all_problems_are_in_one_error_with_origin_and_the_nearest_key(files: Path) -> None:
    (files / "round.yaml").write_text("base: base.yaml\noptim: {lrr: 1, momentum: fast}\narch: resnet19\n")
    with pytest.raises(InputError) as caught:
        parse(files, "epoch=3")
    message = str(caught.value)
    assert f"{files / 'round.yaml'}: unknown key 'optim.lrr'; did you mean 'optim.lr'?" in message
    assert "optim.momentum: expected float, got 'fast' (str)" in message
    assert "arch: expected one of resnet18, resnet50, got 'resnet19'" in message
    assert "command line: unknown key 'epoch'; did you mean 'epochs'?" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["epochs=true"], "expected int, got True"),
        (["epochs=1.5"], "expected int, got 1.5"),
        (["optim.lr=.nan"], "expected a finite number"),
        (["epochs=0"], "epochs: must be at least 1"),
        (["epochs"], "not of the form key=value"),
        (["--epochs", "3"], "unrecognized arguments"),
        (["--config", "none.yaml"], "none.yaml: No such file"),
        (["optim=3"], "unknown key 'optim'"),
    ],
)
def test_bad_input_is_an_input_error(files: Path, argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(files, *argv)


def test_a_required_key_that_nothing_gives_is_named(files: Path) -> None:
    (files / "round.yaml").write_text("arch: resnet18\n")
    with pytest.raises(InputError, match=r"(?s)epochs: required.*optim\.lr: required"):
        parse(files)


def test_a_config_is_frozen(files: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(files).epochs = 3  # type: ignore[misc]


def test_yaml_scalars_mean_what_they_look_like() -> None:
    text = "{a: 1e-3, b: no, c: 0123, d: 12:30:00, e: 1_000, f: null, g: true, h: -.inf, i: 1.5}"
    expected = {
        "a": 0.001, "b": "no", "c": 123, "d": "12:30:00", "e": "1_000", "f": None, "g": True, "h": float("-inf"),
        "i": 1.5,
    }  # fmt: skip
    assert typed_yaml.parse(text, "x") == expected


@pytest.mark.parametrize(
    ("text", "message"), [("a: 1\na: 2\n", "x:2:1: .*stands twice"), ("a: [1\nb: 2\n", r"x:2:\d+: bad YAML"),
                          ("a: !!python/object/apply:os.system [id]", "bad YAML")]
)  # fmt: skip
def test_bad_yaml_is_refused_with_line_and_column(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        typed_yaml.parse(text, "x")


def test_a_name_that_looks_like_a_number_stays_a_name_on_the_command_line(files: Path) -> None:
    assert parse(files, "data=2024").data == "2024"
    assert parse(files, 'data="2024"').data == "2024"
    assert parse(files, "data=null").data is None
