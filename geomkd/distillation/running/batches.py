"""Batches of training and validation data, in a seeded order of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from geomkd.common.checks import as_labels, as_tensor, check_int
from geomkd.data.sample import labels_kept_by, to_device, unpack
from geomkd.distillation.running.order import Order, seed_of

EXAMPLES = 4  # samples of the batch that tells shapes before training
SPREAD = 512  # samples that principal components are fitted on


class Batch(NamedTuple):
    """Samples of one forward and backward pass of this process.

    Attributes
    ----------
    inputs, labels
        On the device.
    index : list of int
        Places of the samples in the data.
    share : float
        By what the mean loss is multiplied, so that the mean of all processes' gradients, summed
        over the parts of a step, is the gradient of the mean over the whole batch.
    """

    inputs: Any
    labels: Tensor
    index: list[int]
    share: float


class Batches:
    """Batches of a data set, on one device.

    Parameters
    ----------
    data : pair of tensors, map-style Dataset, or DataLoader
        Inputs and labels, a data set of such items, or a loader over one, of which data set,
        ``collate_fn``, ``num_workers`` and ``worker_init_fn`` are used.
    order : callable
        Makes the `Order` of so many samples.
    device : torch.device
        Where the batches go.
    name : str
        What error messages call the data.
    input_key, label_key : str, optional
        Where inputs and labels are in batches that are mappings. Without ``input_key`` everything
        but the labels is the input.

    Notes
    -----
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
        self._tensors, self._items, options = None, None, {}
        if isinstance(data, tuple | list):
            self._tensors = _checked_tensors(data, name)
            n_samples = len(self._tensors[0])
        else:
            dataset, options = _checked_dataset(data, name)
            n_samples = len(dataset)
        self.order = order(n_samples)
        check_int(n_samples, f"number of samples in {name}", least=self.order.least)
        if self._tensors is None:
            self._items = SeededItems(dataset, options.pop("collate_fn"), self.order.seed)
            self._loader = DataLoader(
                self._items,
                batch_sampler=self.order,
                collate_fn=_as_it_is,
                persistent_workers=options["num_workers"] > 0,
                generator=torch.Generator().manual_seed(self.order.seed),
                **options,
            )

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield the batches of each step of an epoch, from step ``start`` on."""
        self.order.begin(epoch, start)
        loaded = None if self._tensors is not None else iter(self._loader)
        for parts in self.order.steps():
            step = []
            for index, share in parts:
                inputs, labels = self._at(index) if loaded is None else self._unpacked(next(loaded))
                step.append(Batch(inputs, labels, index, share))
            yield step
        if loaded is not None:  # a loader with workers has more to do than its last batch
            next(loaded, None)

    def of(self, index: list[int], *, epoch: int = 0) -> Any:
        """Read the inputs of some samples, as they are in an epoch (none trains in epoch 0)."""
        if self._tensors is not None:
            return self._at(index)[0]
        return self._unpacked(self._items.__getitems__([(epoch, i) for i in index]))[0]

    def example(self) -> Any:
        """Return the inputs of the first few samples."""
        return self.of(list(range(min(EXAMPLES, self.order.total))))

    def spread(self, batch_size: int) -> Iterator[Any]:
        """Yield inputs of some hundred samples from all over the data, by batches."""
        index = torch.linspace(0, self.order.total - 1, min(SPREAD, self.order.total)).long()
        for part in index.split(batch_size):
            yield self.of(part.tolist())

    @property
    def data(self) -> Any:
        """The pair of tensors, or the data set."""
        return self._tensors if self._tensors is not None else self._items.dataset

    def check_labels(self, n_classes: int) -> None:
        """Check the labels against the number of logits: those known now, the others as they come.

        Raises
        ------
        ValueError
            A label below 0, or not below ``n_classes``.
        """
        known = self._tensors[1] if self._tensors is not None else labels_kept_by(self.data)
        if known is not None:
            _check_range(known, n_classes, self.name)
        else:
            self.n_classes = n_classes

    def _at(self, index: list[int]) -> tuple[Any, Tensor]:
        x, y = self._tensors
        return to_device((x[index], y[index]), self.device)

    def _unpacked(self, batch: Any) -> tuple[Any, Tensor]:
        try:
            inputs, labels = unpack(batch, *self.keys)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None
        labels = _checked_labels(labels, None, self.name)
        if self.n_classes is not None:
            _check_range(labels, self.n_classes, self.name)
        return to_device(inputs, self.device), to_device(labels, self.device)


class SeededItems(Dataset):
    """Collated batches of a data set; what it draws follows the seed, the epoch and the samples.

    Parameters
    ----------
    dataset : map-style Dataset
        The data set.
    collate : callable
        Makes a batch of a list of items.
    seed : int
        Seeds the draws.
    """

    def __init__(self, dataset: Any, collate: Callable[[list], Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        """Batch of samples named by epoch and index."""
        index = [i for _, i in keys]
        fetch = getattr(self.dataset, "__getitems__", None)
        with drawing_from(seed_of(self.seed, *keys[0])):
            items = fetch(index) if fetch else [self.dataset[i] for i in index]
            return self.collate(items)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Within, torch, NumPy and ``random`` draw from the seed on the host; afterwards as before."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what data sets draw from
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _as_it_is(batch: Any) -> Any:
    return batch


def _checked_tensors(data: tuple | list, name: str) -> tuple[Tensor, Tensor]:
    if len(data) != 2:
        raise ValueError(f"{name} must be a pair (inputs, labels); got {len(data)} items")
    x = as_tensor(data[0], f"{name} inputs")
    if x.ndim < 2:
        raise ValueError(f"{name} inputs must be (n, ...), at least 2-d; got {tuple(x.shape)}")
    return x, _checked_labels(data[1], len(x), name)


def _checked_dataset(data: Any, name: str) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"num_workers": 0, "collate_fn": default_collate}
    dataset = data
    if isinstance(data, DataLoader):
        dataset = data.dataset
        options = {key: getattr(data, key) for key in (*options, "worker_init_fn")}
        if data.batch_sampler is None:
            raise ValueError(f"{name}: a DataLoader with batch_size=None does not collate samples")
    is_map = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset | Tensor | np.ndarray | Mapping | str) or not is_map:
        raise TypeError(
            f"{name} must be a pair of tensors, a map-style Dataset or a DataLoader over one; "
            f"got {type(dataset).__name__}"
        )
    return dataset, options


def _checked_labels(labels: Any, n: int | None, name: str) -> Tensor:
    try:
        return as_labels(labels, n)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _check_range(labels: Tensor, n_classes: int, name: str) -> None:
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"{name}: labels must be 0 ... {n_classes - 1} for the student's {n_classes} logits; "
            f"got {low} ... {high}"
        )
