"""Batches of training and validation data, in a seeded order of their own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geomkd.common.checks import about, check_int
from geomkd.common.randomness import HostDraws, seed_of
from geomkd.data.sources import Items, Tensors, source_of, split, to_device
from geomkd.distillation.running.order import Order
from geomkd.network.forward import first_tensor
from geomkd.network.masks import Masks, masks_in

EXAMPLES = 4  # samples of the batch that tells shapes before training
SPREAD = 512  # samples that principal components are fitted on


def part_of(inputs: Any, network: str) -> Any:
    """Give the "student" or the "teacher" its part of the inputs, where each has one; else all."""
    apart = isinstance(inputs, Mapping) and set(inputs) == {"student", "teacher"}
    return inputs[network] if apart else inputs


def masks_of(inputs: Any) -> Masks:
    """Mask of a batch, or of the student's part and of the teacher's where each has one."""
    parts = [part_of(inputs, network) for network in ("student", "teacher")]
    return masks_in(inputs) if parts[0] is inputs else tuple(map(masks_in, parts))


class Batch(NamedTuple):
    """Samples of one forward and backward pass of this process."""

    inputs: Any  # on the device, as the labels
    labels: Tensor
    index: list[int]  # places of the samples in the data
    # By what the mean loss is multiplied, so that the mean of all processes' gradients, summed over
    # the parts of a step, is the gradient of the mean over the whole batch.
    share: float


class Batches:
    """Batches of a data set, on one device.

    Data and keys are as `geomkd.data.sources.source_of` takes them; ``order`` makes the `Order` of
    so many samples; errors call the data by its ``name``.

    What a data set draws from torch, NumPy or ``random`` while it makes the samples of a batch
    follows the seed, the epoch and the batch: not the workers, nor where a run was resumed.
    """

    def __init__(
        self,
        data: Any,
        order: Callable[[int], Order],
        *,
        device: torch.device,
        name: str = "train",
        input_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        self.name, self.device = name, device
        self.keys = (input_key, label_key)
        self.n_classes: int | None = None
        with about(name):
            self.source = source_of(data, self.keys, streams=False, soft=True)
            if isinstance(self.source, Tensors) and first_tensor(self.source.inputs).ndim < 2:
                shape = tuple(first_tensor(self.source.inputs).shape)
                raise ValueError(f"inputs must be (n, ...), at least 2-d; got {shape}")
        self.order = order(self.source.total)
        check_int(self.source.total, f"number of samples in {name}", least=self.order.least)
        self._loader = None
        if isinstance(self.source, Items):
            self._loader = self.source.loader(
                self.order.seed,
                dataset=SeededItems(self.source, self.order.seed),
                collate_fn=_as_it_is,
                batch_sampler=self.order,
                persistent_workers=self.source.workers["num_workers"] > 0,
            )

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield the batches of each step of an epoch, from step ``start`` on."""
        self.order.begin(epoch, start)
        loaded = None if self._loader is None else iter(self._loader)
        for parts in self.order.steps():
            step = []
            for index, share in parts:
                inputs, labels = self._at(index) if loaded is None else self._checked(next(loaded))
                step.append(Batch(inputs, labels, index, share))
            yield step
        if loaded is not None:  # a loader with workers has more to do than its last batch
            next(loaded, None)

    def of(self, index: list[int], *, epoch: int = 0) -> Any:
        """Read the inputs of some samples, as they are in an epoch (none trains in epoch 0)."""
        if self._loader is None:
            return self._at(index)[0]
        return self._checked(self._loader.dataset.__getitems__([(epoch, i) for i in index]))[0]

    def example(self) -> Any:
        """Return the inputs of the first few samples."""
        return self.of(list(range(min(EXAMPLES, self.order.total))))

    def spread(self, batch_size: int) -> Iterator[Any]:
        """Yield inputs of some hundred samples from all over the data, by batches."""
        index = torch.linspace(0, self.order.total - 1, min(SPREAD, self.order.total)).long()
        for part in index.split(batch_size):
            yield self.of(part.tolist())

    def check_labels(self, n_classes: int) -> None:
        """Check the labels against the number of logits: some now, of data sets all as they come.

        Raises
        ------
        ValueError
            A label below 0, or not below ``n_classes``; another number of probabilities.
        """
        known = self.source.known_labels()
        if isinstance(self.source, Tensors):
            self._check_range(known, n_classes)
            return
        self.n_classes = n_classes
        if known is not None:
            low, high = int(known.argmin()), int(known.argmax())
            if known[low] < 0 or known[high] >= n_classes:
                self.of([low, high])  # what the items give counts, and is checked here

    def check_numbered_as(self, other: Self) -> None:
        """Refuse classes of other names, such as folders, than another data set's."""
        sources = self.source, other.source
        mine, theirs = (getattr(getattr(s, "dataset", None), "classes", None) for s in sources)
        if isinstance(mine, list) and isinstance(theirs, list) and mine != theirs:
            raise ValueError(
                f"{self.name} must have the classes of {other.name}, {theirs}; got {mine}"
            )

    def _at(self, index: list[int]) -> tuple[Any, Tensor]:
        return to_device((self.source.at(index), self.source.targets[index]), self.device)

    def _checked(self, batch: Any) -> tuple[Any, Tensor]:
        with about(self.name):
            inputs, labels = split(batch, self.keys, soft=True)
        if self.n_classes is not None:
            self._check_range(labels, self.n_classes)
        return to_device((inputs, labels), self.device)

    def _check_range(self, labels: Tensor, n_classes: int) -> None:
        if labels.ndim == 2:
            if labels.shape[1] != n_classes:
                raise ValueError(
                    f"{self.name}: rows of labels must be as long as the student's {n_classes} "
                    f"logits; got {labels.shape[1]}"
                )
            return
        low, high = torch.stack(torch.aminmax(labels)).tolist()
        if low < 0 or high >= n_classes:
            raise ValueError(
                f"{self.name}: labels must be 0 ... {n_classes - 1} for the student's {n_classes} "
                f"logits; got {low} ... {high}"
            )


class SeededItems(Dataset):
    """Collated batches of a data set; what it draws follows the seed, the epoch and the samples."""

    def __init__(self, source: Items, seed: int) -> None:
        self.dataset, self.collate, self.seed = source.dataset, source.collate, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        """Batch of samples named by epoch and index."""
        index = [i for _, i in keys]
        fetch = getattr(self.dataset, "__getitems__", None)
        with HostDraws(seed_of(self.seed, *keys[0])):
            items = fetch(index) if fetch else [self.dataset[i] for i in index]
            return self.collate(items)


def _as_it_is(batch: Any) -> Any:
    return batch
