"""In which order samples are trained on, and how a batch is shared out."""

from collections.abc import Iterator

import torch

from geomkd.common.distributed import World
from geomkd.common.randomness import generator_options, seed_of

Part = tuple[list[int], float]


class Order:
    """Indices of the samples of every step of an epoch, for one of several processes.

    A batch is a piece of one permutation that all processes share; of each, process r takes every
    world-th index, and splits them into parts where gradients are accumulated.

    Parameters
    ----------
    total : int
        Samples in the data.
    batch_size : int
        Samples of a step, over all processes.
    seed : int
        Seeds the permutation of each epoch.
    world : World
        This process among the others.
    parts : int
        Forward and backward passes of a step.
    shuffle : bool
        False for validation: the order of the data, nothing left out.
    full : bool
        Whether a shorter last batch is left out.

    Notes
    -----
    A last batch of fewer than two samples for each process is left out of training: batch
    normalisation cannot train on one.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        *,
        seed: int,
        world: World,
        parts: int = 1,
        shuffle: bool = True,
        full: bool = False,
    ) -> None:
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.world, self.parts, self.shuffle = world, parts, shuffle
        self.least = (batch_size if full else min(2, batch_size) * world.size) if shuffle else 1
        short = total % batch_size
        self.n_samples = total - (short if shuffle and short < self.least else 0)
        self.epoch, self.start = 1, 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Say which epoch comes next, and how many of its steps are left out."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def size_of_step(self, step: int) -> int:
        """Count the samples of a step, from 1, over all processes."""
        return min(self.batch_size, self.n_samples - (step - 1) * self.batch_size)

    def steps(self) -> Iterator[list[Part]]:
        """Yield the parts of each step: indices, and the weight of their mean loss."""
        order = torch.arange(self.total)
        if self.shuffle:
            options = generator_options(seed_of(self.seed, self.epoch))
            order = torch.randperm(self.total, **options)
        for batch in order[: self.n_samples].split(self.batch_size)[self.start :]:
            own = self.world.share(batch)
            if not len(own):  # of a last batch of validation data
                continue
            parts = max(1, min(self.parts, len(batch) // (2 * self.world.size)))
            shares = [(part.tolist(), len(part)) for part in own.tensor_split(parts)]
            yield [(index, n * self.world.size / len(batch)) for index, n in shares]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield epoch and index of the samples of each part, as a loader's batch sampler does."""
        for step in self.steps():
            for index, _ in step:
                yield [(self.epoch, i) for i in index]
