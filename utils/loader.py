"""The order of the data as a function of (seed, epoch), and items whose randomness is their own.

Nothing of a loader has to be saved to go on exactly where a run stopped: batches follow from (seed, epoch)
by index arithmetic, and each item seeds its random numbers from (seed, epoch, index), whatever worker makes it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import dist, loader_processes, stop
from utils.device import fed
from utils.errors import InputError

WAIT = 0.7  # of the time that ranks wait for each other: the cause is known before they give up
CPU = torch.device("cpu")
Key = tuple[int, int]  # (epoch, index)


class GlobalBatches(Sampler[Any]):
    """This rank's share of each shuffled global batch; the global batches do not depend on the number of ranks.

    Examples that do not fill a last batch are left out of that epoch.

    Raises: InputError when the batch does not divide by the ranks, or is larger than the data set.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if batch_size % dist.size():
            raise InputError(f"batch_size={batch_size} does not divide by {dist.size()} ranks; use a multiple of them")
        if length < batch_size:
            raise InputError(f"batch_size={batch_size} is more than the {length} training images")
        self.length, self.batch_size, self.seed, self.epoch, self.done = length, batch_size, seed, 0, 0

    def go_to(self, epoch: int, done: int) -> None:
        """Go on in `epoch` after its first `done` batches."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        return self.length // self.batch_size - self.done

    def __iter__(self) -> Iterator[Any]:
        order = self._order(self.epoch)
        for batch in range(self.done, self.done + len(self)):
            yield self._share(batch, self._batch(order, batch))

    def _share(self, batch: int, examples: np.ndarray) -> Any:
        """What this rank's dataset is asked for: its part of the global batch's examples, as `Key`s."""
        return [(self.epoch, int(index)) for index in mine(examples)]

    def indices(self, epoch: int, batch: int) -> list[int]:
        """The examples of all ranks in one batch."""
        return self._batch(self._order(epoch), batch).tolist()

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def _batch(self, order: np.ndarray, batch: int) -> np.ndarray:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]


def mine(examples: np.ndarray) -> np.ndarray:
    """This rank's part of what belongs to a global batch."""
    share = len(examples) // dist.size()
    return examples[dist.rank() * share : (dist.rank() + 1) * share]


class WholeBatches(Sampler[list[int]]):
    """Batches 0, 1, 2, ... of the data in order, dealt to the ranks: no image twice.

    A batch has the same images however many ranks there are, since images are padded to the largest of
    their batch and the padding is felt in the last digits.
    """

    def __init__(self, length: int, batch_size: int) -> None:
        everything = [list(range(start, min(start + batch_size, length))) for start in range(0, length, batch_size)]
        self.batches = everything[dist.rank() :: dist.size()]
        self.of_every_rank = len(everything) // dist.size()  # a rank has as many batches, or one more

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Seeded(Dataset[Any]):
    """`dataset[index]` for a key (epoch, index), with random numbers that depend on (seed, epoch, index) only.

    Args:
        dataset: with `ahead(indices)`, called for a batch before its examples are read, see `Tree.ahead`.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        with seeded(self.seed, *key):
            return self.dataset[key[1]]

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        self.dataset.ahead([index for _, index in keys])
        return [self[key] for key in keys]


def seed_from(*numbers: int) -> int:
    """A 63-bit seed that mixes `numbers` well: neighbours do not give related streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators from `numbers`, and put their states back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = seed_from(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def whole(batch: Any) -> Any:
    """The `collate` of a data set that makes whole batches itself."""
    return batch


def make(
    dataset: Dataset[Any],
    batches: Sampler[Any],
    *,
    workers: int,
    device: torch.device,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """A loader over `batches` with `workers` processes (0: in this one), pinned for CUDA; `start` iterates it."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=loader_processes.prepare,
        generator=torch.Generator(),  # its own: iterating must not draw from the global one
    )


def start(loader: DataLoader[Any], device: torch.device = CPU) -> Iterator[Any]:
    """The batches of `loader`, see `device.fed`.

    A signal while its workers start reaches none that does not ignore it yet.

    Raises: EnvironmentProblem when the workers give nothing for nearly as long as a rank may.
    """
    seconds = WAIT * dist.patience() if loader.num_workers else 0
    with loader_processes.answer_within(seconds), stop.held_back():
        made = iter(loader)
    with fed(made, device) as batches:
        while True:
            with loader_processes.answer_within(seconds):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
