"""Batches of training and validation data, in a seeded order of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from geomkd.checks import as_labels, as_tensor, check_int
from geomkd.sampling import labels_kept_by, to_device, unpack

EXAMPLES = 4  # samples of the batch that tells shapes before training


class Batches:
    """One epoch of batches each time it is iterated: inputs and labels, on one device.

    Parameters
    ----------
    data : pair of tensors, map-style Dataset, or DataLoader
        Inputs and labels, a data set of such items, or a loader over one, of which data set,
        ``collate_fn``, ``num_workers`` and ``worker_init_fn`` are used.
    batch_size : int
        Samples of a batch; the last one may be smaller.
    device : torch.device
        Where the batches go.
    seed : int, optional
        Seeds the order, another in each epoch. Without it the samples come in their own order.
    name : str
        What error messages call the data.
    input_key, label_key : str, optional
        Where inputs and labels are in batches that are mappings. Without ``input_key`` everything
        but the labels is the input.

    Notes
    -----
    With a seed, a last batch of one sample is left out: batch normalisation cannot train on it.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        device: torch.device,
        seed: int | None = None,
        name: str = "train",
        input_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        self.name, self.device = name, device
        self.input_key, self.label_key = input_key, label_key
        self.n_classes: int | None = None
        self._tensors, self._loader = None, None
        if isinstance(data, tuple | list):
            self._tensors = _checked_tensors(data, name)
            n_samples = len(self._tensors[0])
        else:
            dataset, options = _checked_dataset(data, name)
            n_samples = len(dataset)
        least = 1 if seed is None else 2
        check_int(n_samples, f"number of samples in {name}", least=least)
        self._order = Order(n_samples, batch_size, seed)
        if self._tensors is None:
            self._loader = DataLoader(
                dataset,
                batch_sampler=self._order,
                persistent_workers=options["num_workers"] > 0,
                generator=Generator().manual_seed(seed or 0),
                **options,
            )

    @property
    def n_samples(self) -> int:
        """Samples of an epoch."""
        return self._order.n_samples

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        if self._tensors is not None:
            x, y = self._tensors
            for index in self._order:
                yield to_device((x[index], y[index]), self.device)
        else:
            for batch in self._loader:
                yield self._unpacked(batch)

    def example(self) -> Any:
        """Return the inputs of the first few samples."""
        if self._tensors is not None:
            return to_device(self._tensors[0][:EXAMPLES], self.device)
        dataset = self._loader.dataset
        items = [dataset[i] for i in range(min(EXAMPLES, len(dataset)))]
        return self._unpacked(self._loader.collate_fn(items))[0]

    def check_labels(self, n_classes: int) -> None:
        """Check the labels against the number of logits: those known now, the others as they come.

        Raises
        ------
        ValueError
            A label below 0, or not below ``n_classes``.
        """
        known = (
            self._tensors[1] if self._tensors is not None else labels_kept_by(self._loader.dataset)
        )
        if known is not None:
            _check_range(known, n_classes, self.name)
        else:
            self.n_classes = n_classes

    def _unpacked(self, batch: Any) -> tuple[Any, Tensor]:
        try:
            inputs, labels = unpack(batch, self.input_key, self.label_key)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None
        labels = _checked_labels(labels, None, self.name)
        if self.n_classes is not None:
            _check_range(labels, self.n_classes, self.name)
        return to_device(inputs, self.device), to_device(labels, self.device)


class Order:
    """Lists of sample indices, a batch each; iterated once an epoch."""

    def __init__(self, n_samples: int, batch_size: int, seed: int | None) -> None:
        self.batch_size = batch_size
        self.generator = None if seed is None else Generator().manual_seed(seed)
        lonely = self.generator is not None and n_samples % batch_size == 1 and batch_size > 1
        self.total, self.n_samples = n_samples, n_samples - lonely

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.generator is None:
            order = torch.arange(self.total)
        else:
            order = torch.randperm(self.total, generator=self.generator)
        for batch in order[: self.n_samples].split(self.batch_size):
            yield batch.tolist()


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
