"""Which images each rank encodes as queries and which as keys: shuffling BN by index."""

from __future__ import annotations

import numpy as np

from ssl_train.data import Share
from utils import dist, loader
from utils.errors import InputError

SHUFFLE = 1  # sets the stream of the shuffle apart from all others of (seed, epoch, ...)


class ShuffledBatches(loader.GlobalBatches):
    """This rank's `Share` of each shuffled global batch, the images of its keys shuffled over all ranks and groups.

    The shuffle follows from (seed, epoch, batch) and is the same on every rank, so only keys travel (arXiv:1911.05722,
    section 3.3, shuffles the images between GPUs). Where one group encodes the whole batch there is nothing to shuffle.

    Raises: InputError when the batch does not divide by ranks and `bn_groups`, or is larger than the data set.
    """

    def __init__(self, length: int, batch_size: int, seed: int, bn_groups: int) -> None:
        super().__init__(length, batch_size, seed)
        self.parts = dist.size() * bn_groups
        if batch_size % self.parts:
            raise InputError(
                f"batch_size={batch_size} does not divide by {dist.size()} ranks times model.bn_groups={bn_groups}; "
                "use a multiple of them"
            )

    def _share(self, batch: int, examples: np.ndarray) -> Share:
        order = self.order(batch)
        return Share(self.epoch, loader.mine(examples), examples[loader.mine(order)], order)

    def order(self, batch: int) -> np.ndarray:
        """(N,): which example of the epoch's global batch stands at each place of the keys' batch."""
        if self.parts == 1:
            return np.arange(self.batch_size)
        numbers = np.random.SeedSequence((self.seed, self.epoch, batch), spawn_key=(SHUFFLE,))
        return np.random.default_rng(numbers).permutation(self.batch_size)
