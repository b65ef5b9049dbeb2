"""Data order and randomness are functions of (seed, epoch, index), nothing else."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ssl_train.batches import ShuffledBatches
from utils import dist, loader
from utils.errors import EnvironmentProblem, InputError, cli
from utils.paths import ROOT, RunDir

Item = tuple[int, float, float, float]


class Draws(Dataset[Item]):
    """Items that draw from every generator an augmentation may use."""

    def __len__(self) -> int:
        return 23

    def ahead(self, indices: list[int]) -> None:
        pass

    def __getitem__(self, index: int) -> Item:
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def one_epoch(workers: int, epoch: int, seed: int = 7) -> list[Item]:
    batches = loader.GlobalBatches(23, 4, seed)
    batches.go_to(epoch, 0)
    made = loader.make(loader.Seeded(Draws(), seed), batches, workers=workers, device=torch.device("cpu"), collate=list)
    return [item for batch in made for item in batch]


def test_items_do_not_depend_on_the_number_of_workers() -> None:
    alone = one_epoch(0, epoch=3)
    assert alone == one_epoch(2, epoch=3)
    assert len({item[1] for item in alone}) == len({item[3] for item in alone}) == 20


def test_epochs_differ_in_order_and_in_each_item_s_numbers() -> None:
    first, second = one_epoch(0, epoch=0), one_epoch(0, epoch=1)
    assert [item[0] for item in first] != [item[0] for item in second]
    assert not {item[1] for item in first} & {item[1] for item in second}


def test_an_item_leaves_the_caller_s_generators_alone() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    loader.Seeded(Draws(), 7)[0, 5]
    assert draw() == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_same_global_batches(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [sorted(index for _, index in batch) for batch in loader.GlobalBatches(23, 4, 7)]
    monkeypatch.setattr(dist, "size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shares.append(list(loader.GlobalBatches(23, 4, 7)))
    together = [sorted(index for share in batch for _, index in share) for batch in zip(*shares, strict=True)]
    assert together == whole
    assert len(whole) == 5 and len({index for batch in whole for index in batch}) == 20


@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_keys_are_of_the_same_global_batch_shuffled(ranks: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loader.GlobalBatches(53, 8, 7)
    whole.go_to(3, 0)
    monkeypatch.setattr(dist, "size", lambda: ranks)
    dealt = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        batches = ShuffledBatches(53, 8, 7, groups)
        batches.go_to(3, 0)
        dealt.append(list(batches))
        batches.go_to(3, 4)
        resumed = list(batches)
        assert len(resumed) == 2 and all(map(np.array_equal, resumed[0], dealt[-1][4]))
    orders = []
    for number, shares in enumerate(zip(*dealt, strict=True)):
        examples = np.concatenate([share.query for share in shares])
        assert examples.tolist() == whole.indices(3, number)
        assert np.concatenate([share.key for share in shares]).tolist() == examples[shares[0].order].tolist()
        assert all(share.order.tolist() == shares[0].order.tolist() and share.epoch == 3 for share in shares)
        orders.append(tuple(shares[0].order.tolist()))
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(orders)) == 1 if ranks == groups == 1 else len(set(orders)) == 6, "each batch has its own"
    batches.go_to(4, 0)
    assert ranks == groups == 1 or tuple(next(iter(batches)).order.tolist()) not in orders


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_deals_whole_batches_and_no_image_twice(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "size", lambda: ranks)
    dealt = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        dealt += list(loader.WholeBatches(11, 2))
    assert sorted(dealt) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]


def test_batches_that_do_not_fit_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="batch_size=8 is more than the 5 training images"):
        loader.GlobalBatches(5, 8, 0)
    monkeypatch.setattr(dist, "size", lambda: 3)
    with pytest.raises(InputError, match="batch_size=4 does not divide by 3 ranks"):
        loader.GlobalBatches(50, 4, 0)
    with pytest.raises(InputError, match=r"batch_size=9 does not divide by 3 ranks times model\.bn_groups=2"):
        ShuffledBatches(50, 9, 0, bn_groups=2)


class Stops(Dataset[torch.Tensor]):
    """Its loader process stops for good while it makes the third item, with the second one not handed over yet."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return torch.zeros(3)


def test_a_loader_process_that_stops_while_it_hands_over_a_tensor_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_loader", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == EnvironmentProblem.exit_code, done.stderr
    assert done.stderr.splitlines()[-1].startswith("ERROR 75: a loader process gave nothing for 2 s")


def waits_for_it() -> None:
    with dist.session("cpu", RunDir(Path(sys.argv[1])), timeout=2 / loader.WAIT) as device:
        for _ in loader.start(loader.make(Stops(), [[0], [1], [2], [3]], workers=1, device=device)):  # type: ignore[arg-type]
            time.sleep(0.5)  # the second item's message comes meanwhile, and its tensor is fetched from nobody


if __name__ == "__main__":
    cli(waits_for_it)
