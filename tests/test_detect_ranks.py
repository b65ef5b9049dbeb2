"""Two ranks of one round: a common batch, common weights, one validation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate import run as evaluate
from tests.labeled_set import write_set
from tests.rank_weights import ended_with
from tests.ranks import torchrun
from tests.test_detect_train import fine_tune, records, round_arguments
from utils import checkpoint
from utils.errors import InputError


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    write_set(folder / "data")
    found = ended_with(folder, "detect_train.train", *round_arguments(folder / "run", folder / "data", 1))
    assert (folder / "stdout").read_text().count("Epoch Stats [0]") == 1
    return folder, found


def test_the_ranks_end_with_the_same_weights_and_statistics(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = ranks
    saved = checkpoint.read(folder / "run" / "checkpoints" / "checkpoint_0000.pth")
    assert saved["conditions"]["world_size"] == 2
    for name, value in first["model"].items():
        assert torch.equal(second["model"][name], value), name
        assert torch.equal(saved["model"][name], value), name


def test_the_batch_is_the_global_one_and_the_numbers_are_common(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (first, second) = ranks
    assert first["step"] == second["step"] == 2  # 8 images in batches of 4, whatever the ranks
    assert first["metrics"] == second["metrics"]
    assert len(records(folder / "run", "train")) == 2 and len(records(folder / "run", "val")) == 1
    assert 0 < first["metrics"]["loss_avg"] < 10


def test_statistics_over_ranks_need_gpus(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data")
    words = ["--run-dir", tmp_path / "run", "--dataset-root", data, "device=cpu", "model.norm=sync"]
    done = torchrun(2, "-m", "detect_train.train", *words)
    assert done.returncode != 0
    assert "ERROR 2: model.norm=sync: on cpu only with one rank" in done.stderr


def test_another_number_of_ranks_is_refused_or_goes_on_and_the_report_says_so(
    ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = ranks
    shutil.copytree(folder / "run", tmp_path / "run")
    with pytest.raises(
        InputError, match="is of 2 ranks, this run has 1: start as many, or set allow_world_change=true"
    ):
        fine_tune(tmp_path / "run", folder / "data", 2)
    last = fine_tune(tmp_path / "run", folder / "data", 2, "allow_world_change=true")["outputs"]["last"]
    saved = checkpoint.read(last)
    assert (saved["step"], saved["resumes"]) == (4, 1), "the same global batches"
    words = [
        "--run-dir",
        str(tmp_path / "eval"),
        "--dataset-root",
        str(folder / "data"),
        "--checkpoint-path",
        str(last),
    ]
    report = evaluate.main([*words, "device=cpu", "workers=0"])["outputs"]["report"].read_text()
    assert "# resumes: 1\n# exact: no, after step 2: world_size 2 -> 1" in report
