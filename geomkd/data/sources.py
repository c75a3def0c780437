"""What a user hands over as data, told apart in one place: sources to read, and their batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from geomkd.common.checks import as_labels, as_tensor
from geomkd.common.randomness import HostDraws
from geomkd.network.forward import first_tensor, tensors_in

LABEL_KEYS = ("labels", "label")  # looked for where no label_key is given
READ = 256  # samples of a batch while only labels are read
Array = Tensor | np.ndarray
Keys = tuple[str | None, str | None]  # of inputs and of labels, in batches that are mappings


def source_of(
    data: Any,
    keys: Keys = (None, None),
    *,
    labelled: bool = True,
    streams: bool = True,
    soft: bool = False,
) -> Tensors | Items | Stream:
    """Tell which form data has.

    Parameters
    ----------
    data : pair of tensors, map-style Dataset, DataLoader, or iterable of batches
        Inputs and labels; a batch is (inputs..., labels) or a mapping, and so may all of the data
        be. A list whose first entry has one value for its label is one of samples, else of batches.
        Of a DataLoader, its data set, collate function and workers are used, and the samples that
        its sampler gives, in the order of the data set.
    keys : (str or None, str or None)
        Where inputs and labels are in batches that are mappings; see `unpack`.
    labelled : bool
        False where labels do not matter and need not be there: a tensor of inputs will do.
    streams : bool
        Whether data that can be read but once will do.
    soft : bool
        Whether labels may be rows of probabilities.

    Raises
    ------
    TypeError
        Data of no such form.
    ValueError
        No samples, not as many labels as inputs, or a sampler other than the sequential, the
        random (each sample once) and the subset sampler.
    """
    if isinstance(data, Array) and not labelled:
        return Tensors(data)
    if isinstance(data, Mapping):
        every = unpack(data, *keys) if labelled else (inputs_of(data, *keys),)
        return Tensors(*every, soft=soft)
    is_list = isinstance(data, tuple | list) and not isinstance(data, Dataset)
    if is_list and (isinstance(data, tuple) or not data or isinstance(data[0], Array)):
        return _pair(data, labelled, soft)
    if is_list and _is_sample(data[0], keys):
        return Items(data, keys)
    shown = type(data).__name__
    if isinstance(data, DataLoader):
        shown += f" of {type(data.dataset).__name__}"
        if data.batch_sampler is None:
            shown += " with batch_size=None"
        elif not isinstance(data.dataset, IterableDataset):
            return Items(_given_by(data), keys, data)
    if not isinstance(data, Array | str):
        by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        if by_index and not is_list and not isinstance(data, IterableDataset):
            return Items(data, keys)
        if streams and isinstance(data, Iterable):
            return Stream(data, keys, labelled)
    rest = ", a DataLoader or an iterable of batches" if streams else " or a DataLoader over one"
    raise TypeError(f"data must be a pair of tensors, a map-style Dataset{rest}; got {shown}")


def can_be_read_again(data: Any) -> bool:
    """Whether data is read by its indices, as often as needed, and not as a stream."""
    return not isinstance(source_of(data, labelled=False), Stream)


def _pair(data: tuple | list, labelled: bool, soft: bool) -> Tensors:
    if len(data) != 2 or not isinstance(data[0], Array | Mapping) or not isinstance(data[1], Array):
        shown = ", ".join(type(part).__name__ for part in data)
        raise TypeError(f"data must be a pair (inputs, labels) of tensors; got ({shown})")
    inputs, labels = data
    if labelled:
        return Tensors(inputs, labels, soft)
    if isinstance(inputs, Array) and len(inputs) != len(labels):
        raise ValueError(
            "a pair of tensors is inputs and labels, of one length (two batches need an "
            f"iterator); got {len(inputs)} and {len(labels)}"
        )
    return Tensors(inputs)


def _is_sample(entry: Any, keys: Keys) -> bool:
    """Whether an entry of a list is one sample, and no batch: its label is a single value."""
    try:
        return np.ndim(unpack(entry, *keys)[1]) == 0
    except (TypeError, ValueError):
        return False


def _given_by(loader: DataLoader) -> Any:
    """Return a loader's data set, or the subset of it that the loader's sampler gives."""
    batches, dataset = loader.batch_sampler, loader.dataset
    # Of the exact types alone: what a class of the user's own gives is not known.
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    kind = type(sampler)
    if kind is SubsetRandomSampler:
        return Subset(dataset, sorted(int(i) for i in sampler.indices))
    if kind is SequentialSampler or (
        kind is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    ):
        n = len(sampler.data_source)
        return dataset if n == len(dataset) else Subset(dataset, range(n))
    shown = kind.__name__ + " with replacement= or num_samples=" * (kind is RandomSampler)
    raise ValueError(
        "a DataLoader's sampler must be a SequentialSampler, RandomSampler (of every sample once) "
        f"or SubsetRandomSampler; got {shown}: give the data set, or a Subset of what counts"
    )


# ---- sources -------------------------------------------------------------------------------------


class Tensors:
    """Inputs, and labels unless they do not matter, as tensors or arrays, or mappings of such."""

    kept_bytes = 0

    def __init__(self, inputs: Any, labels: Any = None, soft: bool = False) -> None:
        if isinstance(inputs, Mapping):
            self.inputs = {k: as_tensor(v, f"inputs[{k!r}]") for k, v in inputs.items()}
        else:
            self.inputs = as_tensor(inputs, "inputs")
        shapes = [tuple(tensor.shape) for tensor in tensors_in(self.inputs)]
        if len({shape[:1] for shape in shapes}) != 1 or shapes[0][:1] in ((), (0,)):
            shown = " and ".join(map(str, shapes)) or "none"
            raise ValueError(f"inputs must be (n, ...); got shape {shown}")
        self.total = len(first_tensor(self.inputs))
        self.targets = None if labels is None else as_labels(labels, self.total, soft=soft)

    def at(self, index: Any) -> Any:
        """Return the inputs of some samples."""
        if isinstance(self.inputs, Tensor):
            return self.inputs[index]
        return {key: value[index] for key, value in self.inputs.items()}

    def known_labels(self) -> Tensor:
        """Labels of all samples."""
        return self.targets

    def labels(self, *, believe: bool = True) -> Tensor:
        """Labels of all samples."""
        return self.targets

    def read(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Yield inputs of some samples, batch by batch."""
        for part in indices.split(batch_size):
            yield self.at(part.tolist())


class Items:
    """A map-style data set, with the collate function and the workers of its DataLoader."""

    kept_bytes = 0

    def __init__(self, dataset: Any, keys: Keys, loader: DataLoader | None = None) -> None:
        self.dataset, self.keys, self.total = dataset, keys, len(dataset)
        if self.total == 0:
            raise ValueError("the data set is empty")
        self.believed: Tensor | None = None  # labels of all samples that items are held against
        self.collate, self.workers = collated, {"num_workers": 0}
        if loader is not None:
            names = ("num_workers", "worker_init_fn", "multiprocessing_context")
            own = loader.collate_fn
            self.collate = collated if own is default_collate else own
            self.workers = {name: getattr(loader, name) for name in names}

    def known_labels(self) -> Tensor | None:
        """Labels of all samples, where they can be had without reading the samples."""
        return labels_kept_by(self.dataset, self.keys[1])

    def labels(self, *, believe: bool = True) -> Tensor:
        """Labels of all samples: those that the data set keeps, or else read from its items."""
        known = self.believed = self.known_labels() if believe else None
        if known is None:
            with HostDraws(0):
                every = self.loader(0, batch_size=READ)
                parts = [split(batch, self.keys)[1] for batch in every]
            known = as_labels(torch.cat(parts), self.total)
        return known

    def read(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield inputs of some samples, batch by batch; what a data set draws follows the seed.

        Raises
        ------
        LabelsDiffer
            Where a sample's label is not the one that was believed.
        """
        loader = self.loader(seed, batch_size=batch_size, sampler=indices.tolist())
        batches, draws = iter(loader), HostDraws(seed)
        for part in indices.split(batch_size):
            # Transforms draw from global states: theirs within a batch, the caller's between.
            with draws:
                batch = next(batches)
            if self.believed is not None and _has_labels(batch, self.keys[1]):
                _check_believed(self.believed[part], split(batch, self.keys)[1], part)
            yield inputs_of(batch, *self.keys)

    def check_believed(self, seed: int) -> None:
        """Read a few hundred samples, if labels are believed; `LabelsDiffer` where others come."""
        if self.believed is not None:
            next(self.read(torch.arange(min(self.total, READ)), READ, seed))

    def loader(self, seed: int, **options: Any) -> DataLoader:
        """Make a loader over the data set, or another one, with these workers."""
        own = {"dataset": self.dataset, "collate_fn": self.collate, **self.workers}
        own["generator"] = torch.Generator().manual_seed(seed)
        return DataLoader(**(own | options))


class LabelsDiffer(Exception):
    """An item gives another label than its data set keeps for it."""


def _check_believed(believed: Tensor, given: Tensor, places: Tensor) -> None:
    differ = (believed != given.cpu()).nonzero() if len(given) == len(believed) else ()
    if len(differ):
        i = int(differ[0])
        raise LabelsDiffer(
            f"sample {int(places[i])} of the data set has label {int(given[i])}, but its .targets "
            f"or .labels say {int(believed[i])}: labels are read from the samples"
        )


class Stream:
    """An iterable of batches, which may be read but once."""

    def __init__(self, batches: Iterable, keys: Keys, labelled: bool) -> None:
        self.batches, self.keys, self.labelled = batches, keys, labelled

    def __iter__(self) -> Iterator[tuple[Any, list[int]]]:
        """Yield the inputs and the labels of every batch; zeros where labels do not matter."""
        for batch in self.batches:
            if self.labelled:
                inputs, labels = split(batch, self.keys)
                if any(len(x) != len(labels) for x in tensors_in(inputs)):
                    got = f"{len(labels)} and {[tuple(x.shape) for x in tensors_in(inputs)]}"
                    raise ValueError(f"a batch has as many labels as inputs; got {got}")
                yield inputs, labels.tolist()
            else:
                inputs = inputs_of(batch, *self.keys)
                yield inputs, [0] * len(first_tensor(inputs))


# ---- batches -------------------------------------------------------------------------------------


def split(batch: Any, keys: Keys, *, soft: bool = False) -> tuple[Any, Tensor]:
    """Split a batch into inputs and labels, whose form is checked here for all kinds of data."""
    inputs, labels = unpack(batch, *keys)
    if np.ndim(labels) == 0:
        raise ValueError("data must give batches; got one sample (use a DataLoader)")
    known = isinstance(labels, Array)
    if not known and isinstance(labels[0], Array) and labels[0].ndim:
        raise ValueError("labels of several values must be tensors; got a list of tensors a batch")
    return inputs, as_labels(labels if known else np.asarray(labels), soft=soft)


def collated(items: list[Any]) -> Any:
    """Make a batch as `default_collate` does; say what is amiss with texts that are not padded."""
    for part in items[0] if isinstance(items[0], tuple) else items[:1]:
        if isinstance(part, Mapping) and any(isinstance(x, list) for x in part.values()):
            how = "a Hugging Face Dataset gives tensors after .with_format('torch')"
            raise TypeError(f"samples must hold tensors; got lists in {list(part)} ({how})")
    try:
        return default_collate(items)
    except RuntimeError as error:
        how = "pad them, or give a DataLoader whose collate_fn does (DataCollatorWithPadding)"
        raise ValueError(f"these samples make no batch ({error}): {how}") from error


def item_of(inputs: Any, i: int) -> Any:
    """One sample of a batch of inputs, copied out of it."""
    if isinstance(inputs, Mapping):
        return {key: item_of(value, i) for key, value in inputs.items()}
    arrays = Array | Mapping | tuple | list
    if isinstance(inputs, tuple | list) and any(isinstance(part, arrays) for part in inputs):
        return tuple(item_of(value, i) for value in inputs)
    item = inputs[i]  # of a list too: texts, or whatever else is not a tensor
    if isinstance(item, np.ndarray | np.generic):
        item = torch.as_tensor(item)
    return item.clone() if isinstance(item, Tensor) else item


def inputs_of(batch: Any, input_key: str | None, label_key: str | None) -> Any:
    """Return the inputs of a batch that may have no labels: a tensor, one item, or a mapping."""
    if isinstance(batch, Mapping) and not _has_labels(batch, label_key):
        return batch if input_key is None else unpack({**batch, "label": 0}, input_key, "label")[0]
    if isinstance(batch, Array):
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0]
    return unpack(batch, input_key, label_key)[0]


def _has_labels(batch: Any, label_key: str | None) -> bool:
    if isinstance(batch, Mapping):
        return label_key is not None or not batch.keys().isdisjoint(LABEL_KEYS)
    return isinstance(batch, tuple | list) and len(batch) > 1


def unpack(batch: Any, input_key: str | None, label_key: str | None) -> tuple[Any, Any]:
    """Split a batch into inputs and labels.

    Raises
    ------
    TypeError
        A batch that is neither a mapping nor a tuple or list.
    ValueError
        A key that the batch has not, or a tuple of fewer than two items.
    """
    if isinstance(batch, Mapping):
        found = label_key or next((key for key in LABEL_KEYS if key in batch), None)
        for option, key in (("label_key", found), ("input_key", input_key or found)):
            if key not in batch:
                raise ValueError(
                    f"{option} must be one of the batch's keys {sorted(batch)}; got {key!r}"
                )
        if input_key is not None:
            return batch[input_key], batch[found]
        return {key: value for key, value in batch.items() if key != found}, batch[found]
    if not isinstance(batch, tuple | list):
        raise TypeError(
            f"a batch must be (inputs, labels) or a mapping; got {type(batch).__name__}"
        )
    if len(batch) < 2:
        raise ValueError(f"a batch must be (inputs, labels); got {len(batch)} item")
    return batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors on the device, within mappings, tuples and lists too."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def labels_kept_by(dataset: Any, key: str | None = None) -> Tensor | None:
    """Labels that a data set keeps, where they are likely the ones that it gives."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if isinstance(dataset, Subset):
        kept = labels_kept_by(dataset.dataset, key)
        return None if kept is None else kept[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_kept_by(part, key) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)
    tensors = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else None
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):  # Hugging Face's
        names = [name for name in ((key,) if key else LABEL_KEYS) if name in dataset.column_names]
        tensors = dataset.with_format("numpy")[names[0]][:] if names else None
    for kept in (tensors, getattr(dataset, "targets", None), getattr(dataset, "labels", None)):
        if isinstance(kept, list | tuple):
            kept = np.asarray(kept) if len(kept) and np.ndim(kept[0]) == 0 else None
        if isinstance(kept, np.ndarray | Tensor):
            kept = np.asarray(kept.cpu() if isinstance(kept, Tensor) else kept)
            if kept.dtype.kind in "iu" and kept.shape == (len(dataset),):
                return torch.from_numpy(kept.astype(np.int64))
    return None
