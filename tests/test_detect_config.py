"""The shipped rounds are the published recipe, and a configuration that cannot work is refused whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from detect_train.config import DEFAULT, parse
from utils.errors import InputError

CONFIGS = DEFAULT.parent
NEEDED = ["--run-dir", "run", "--dataset-root", "data"]
BACKBONE = ["--bp", "backbone.pth"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*r?.yaml")), ids=lambda path: path.name)
def test_every_shipped_round_loads(path: Path) -> None:
    cfg = parse(["--config", str(path), *NEEDED, *BACKBONE])
    assert cfg.data.on_error == "error" and cfg.resume == "auto"
    assert path.read_text().startswith("# ")


def test_the_rounds_are_the_published_ones() -> None:
    rounds = [parse(["--config", str(CONFIGS / f"r{n}.yaml"), *NEEDED, *BACKBONE]) for n in (1, 2, 3)]
    assert [(cfg.optim.lr, cfg.epochs) for cfg in rounds] == [(0.03, 23), (0.003, 27), (0.0003, 37)]
    for cfg in rounds:
        assert (cfg.batch_size, cfg.optim.momentum, cfg.optim.weight_decay) == (4, 0.9, 1e-4)
        assert cfg.model == rounds[0].model and cfg.model.backbone == "resnet50"


@pytest.mark.parametrize("prefix", ["", "demo_", "dense_", "demo_dense_"])
def test_a_later_round_lowers_the_rate_and_adds_epochs(prefix: str) -> None:
    rounds = [parse(["--config", str(CONFIGS / f"{prefix}r{n}.yaml"), *NEEDED, *BACKBONE]) for n in (1, 2, 3)]
    for before, after in itertools.pairwise(rounds):
        assert after.optim.lr == pytest.approx(before.optim.lr / 10) and after.epochs > before.epochs
        assert after.model == before.model and after.batch_size == before.batch_size


def test_the_short_flags() -> None:
    flags = [
        "--bp",
        "b.pth",
        "--resume",
        "last.pth",
        "--lr",
        "1e-3",
        "--batch-size",
        "8",
        "--epochs",
        "9",
        "--workers",
        "2",
    ]
    cfg = parse([*NEEDED, *flags, "model.norm=sync", "model.min_size=[320, 400]"])
    assert (cfg.backbone, cfg.resume, cfg.optim.lr) == ("b.pth", "last.pth", 0.001)
    assert (cfg.batch_size, cfg.epochs, cfg.workers, cfg.run_dir, cfg.data.labeled) == (
        8,
        9,
        2,
        "run",
        "data",
    )
    assert (cfg.model.norm, cfg.model.min_size) == ("sync", (320, 400))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model.norm=frozen, model.trainable_layers=5: would keep random weights"),
        (["model.norm=train", "model.trainable_layers=3"], "would keep random weights"),
        ([*BACKBONE, "model.norm=sync", "model.trainable_layers=3"], "statistics of layers that keep"),
        ([*BACKBONE, "best=b.pth"], "best: needs init"),
        ([*BACKBONE, "--batch-size", "0"], "batch_size=0: at least 1"),
        ([*BACKBONE, "--lr", "0"], "optim.lr=0.0: above 0"),
        ([*BACKBONE, "model.min_size=[900]", "model.max_size=800"], r"model.min_size=\[900\], max_size=800"),
        ([*BACKBONE, "model.min_size=[]"], r"model.min_size=\[\]"),
        ([*BACKBONE, "model.anchor_sizes=[32, 64]"], "one above 0 for each of the 5 levels"),
        ([*BACKBONE, "model.backbone=resnet20"], "model.backbone: expected one of resnet18"),
        ([*BACKBONE, "model.nrom=train"], "did you mean 'model.norm'"),
    ],
)
def test_what_cannot_work_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse([*NEEDED, *words])


def test_random_weights_may_be_trained_whole() -> None:
    cfg = parse([*NEEDED, "model.norm=train"])
    assert cfg.backbone is cfg.init is None


def test_all_problems_come_at_once() -> None:
    with pytest.raises(InputError) as error:
        parse([*NEEDED, *BACKBONE, "--workers", "-1", "--epochs", "0", "model.proposals_test=0"])
    assert len(str(error.value).splitlines()) == 4
