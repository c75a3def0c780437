"""A class-balanced, seeded sample of a data set, read as often as the layers need it."""

from __future__ import annotations

import copy
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)
from torch.utils.data import default_collate as stack

from geomkd.common.checks import Classes, as_classes, as_labels, as_tensor, check_int
from geomkd.network.forward import first_tensor

LABEL_KEYS = ("labels", "label")  # looked for where no label_key is given
READ = 256  # samples of a batch while only labels are read


class Sample:
    """At most ``samples`` samples of a data set, equally many of every class where it has them.

    Parameters
    ----------
    data : pair of tensors, map-style Dataset, DataLoader, or iterable of batches
        Inputs and labels; a batch is (inputs..., labels) or a mapping.
    samples : int
        Most samples in all: ``samples // C`` of each of C classes.
    seed : int
        Seeds the choice, and whatever a data set's transforms draw from torch, so that every pass
        sees the same inputs.
    entropy_per_class : int, optional
        Most samples of a class in `of_class`; they begin with the ones in the sample.
    labels : Tensor or ndarray, shape (N,), optional
        Labels to use in place of the data's own, which need have none.
    labelled : bool
        False for a uniform sample, all of one class; the data need have no labels.
    lonely : bool
        Whether a class of a single sample is an error, or else left out.
    input_key, label_key : str, optional
        Where inputs and labels are in batches that are mappings. Without ``label_key`` "labels" or
        "label"; without ``input_key`` everything but the labels is the input.

    Attributes
    ----------
    classes : Classes
        Class index, sizes and names of the sample, in the order in which `batches` reads it.
    total : int
        Samples in the data.
    kept_bytes : int
        Memory that holds sampled inputs, where the data can be read only once.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 0, 1, 0, 0])
    >>> sample = Sample((x, y), samples=4, seed=0)
    >>> sample.classes.sizes
    [2, 2]
    >>> [tuple(batch.shape) for batch in sample.batches(3)]
    [(3, 2), (1, 2)]
    """

    def __init__(
        self,
        data: Any,
        samples: int,
        *,
        seed: int,
        entropy_per_class: int | None = None,
        labels: Any = None,
        labelled: bool = True,
        lonely: bool = True,
        input_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        self.seed, self.kept_bytes = check_int(seed, "seed", least=0), 0
        samples = check_int(samples, "samples", least=4)
        if entropy_per_class is not None:
            check_int(entropy_per_class, "entropy_per_class", least=2)
        keys = (input_key, label_key)
        own = labelled and labels is None
        self._source = _source_of(data, keys, own)
        if self._source is None:
            if labels is not None:
                raise ValueError("labels= needs data of known length; an iterable has its own")
            self._source = _kept(data, keys, samples, entropy_per_class or 0, seed, own)
            self.kept_bytes = self._source.kept_bytes
        self.total = self._source.total
        if not labelled:
            known = torch.zeros(self.total, dtype=torch.int64)
        else:
            known = self._source.labels() if own else as_labels(labels, self.total)
        known = known.cpu()
        chosen = [rows for rows in _by_class(known, seed) if lonely or len(rows) > 1]
        if not chosen:
            raise ValueError(f"every class holds a single sample; got {self.total} samples")
        share = samples // len(chosen)
        if share < 2:
            raise ValueError(
                f"samples must be at least 2 for each of the {len(chosen)} classes; got {samples}"
            )
        self.indices = torch.cat([rows[:share] for rows in chosen]).sort().values
        known = known[self.indices]
        self.classes = as_classes(known) if labelled else Classes(known, [len(known)], [0])
        self._of_class = None
        if entropy_per_class is not None:
            self._of_class = [rows[:entropy_per_class].sort().values for rows in chosen]

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, batch_size: int, *, of_class: int | None = None) -> Iterator[Any]:
        """Yield inputs of the sample, or of the larger sample of one class, in their order."""
        indices = self.indices if of_class is None else self._of_class[of_class]
        yield from self._source.read(indices, batch_size, self.seed)

    def taken(self, places: Tensor) -> Sample:
        """Return some of the samples, in the order of their places."""
        other, index = copy.copy(self), self.classes.index[places]
        sizes = index.bincount(minlength=len(self.classes.sizes)).tolist()
        other.indices = self.indices[places]
        other.classes = self.classes._replace(index=index, sizes=sizes)
        return other

    def entropy_size(self, a: int) -> int | None:
        """Count class ``a``'s samples for its entropy; None where the sample itself serves."""
        return None if self._of_class is None else len(self._of_class[a])


def can_be_read_again(data: Any) -> bool:
    """Whether data is read by its indices, as often as needed, and not as a stream."""
    return _source_of(data, (None, None), False) is not None


def inputs_of(batch: Any, input_key: str | None, label_key: str | None) -> Any:
    """Return the inputs of a batch that may have no labels: a tensor, one item, or a mapping."""
    if isinstance(batch, Mapping) and label_key is None and not set(LABEL_KEYS) & set(batch):
        return batch if input_key is None else unpack({**batch, "label": 0}, input_key, "label")[0]
    if isinstance(batch, Tensor | np.ndarray):
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0]
    return unpack(batch, input_key, label_key)[0]


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


def labels_kept_by(dataset: Any) -> Tensor | None:
    """Labels that a data set keeps, where they are surely the ones that it gives."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    if isinstance(dataset, Subset):
        kept = labels_kept_by(dataset.dataset)
        return None if kept is None else kept[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_kept_by(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)
    tensors = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else None
    for kept in (tensors, getattr(dataset, "targets", None), getattr(dataset, "labels", None)):
        if isinstance(kept, list | tuple):
            kept = np.asarray(kept) if len(kept) and np.ndim(kept[0]) == 0 else None
        if isinstance(kept, np.ndarray | Tensor):
            kept = np.asarray(kept.cpu() if isinstance(kept, Tensor) else kept)
            if kept.dtype.kind in "iu" and kept.shape == (len(dataset),):
                return torch.from_numpy(kept.astype(np.int64))
    return None


class _Tensors:
    """A pair of tensors or arrays."""

    def __init__(self, inputs: Any, labels: Any) -> None:
        self.inputs, self.known = as_tensor(inputs, "inputs"), labels
        if self.inputs.ndim < 1 or len(self.inputs) == 0:
            raise ValueError(f"inputs must be (n, ...); got shape {tuple(self.inputs.shape)}")
        self.total = len(self.inputs)

    def labels(self) -> Tensor:
        return as_labels(self.known, self.total)

    def read(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
        for part in indices.split(batch_size):
            yield self.inputs[part.to(self.inputs.device)]


class _Items:
    """A map-style data set, with the collate function and the workers of its DataLoader."""

    def __init__(self, dataset: Any, options: dict[str, Any], keys: tuple) -> None:
        self.dataset, self.options, self.keys = dataset, options, keys
        self.total = len(dataset)
        if self.total == 0:
            raise ValueError("the data set is empty")

    def labels(self) -> Tensor:
        kept = labels_kept_by(self.dataset)
        if kept is not None:
            return kept
        with torch.random.fork_rng(devices=[]):
            every = self._loader(torch.arange(self.total), READ, 0)
            given = [as_labels(_tensor(unpack(b, *self.keys)[1])) for b in every]
        return as_labels(torch.cat(given), self.total)

    def read(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Any]:
        loader = self._loader(indices, batch_size, seed)
        batches = iter(loader)
        state = torch.Generator().manual_seed(seed).get_state()
        for _ in range(len(loader)):
            # Transforms draw from torch's global state: theirs between batches, the caller's else.
            with torch.random.fork_rng(devices=[]):
                torch.random.set_rng_state(state)
                batch = next(batches)
                state = torch.random.get_rng_state()
            yield inputs_of(batch, *self.keys)

    def _loader(self, indices: Tensor, batch_size: int, seed: int) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_size=batch_size,
            sampler=indices.tolist(),
            generator=Generator().manual_seed(seed),
            **self.options,
        )


class _Kept:
    """Inputs that were kept while an iterable was read once."""

    def __init__(self, inputs: list[Any], labels: Tensor, total: int) -> None:
        self.inputs, self.known, self.total = inputs, labels, total
        self.kept_bytes = sum(map(_bytes, inputs))

    def labels(self) -> Tensor:
        return self.known

    def read(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Any]:
        waiting: list[Any] = []
        for i in indices.tolist():
            item = self.inputs[i]
            # Token batches of an iterable may differ in length: such are not stacked.
            if waiting and (len(waiting) == batch_size or _shapes(item) != _shapes(waiting[0])):
                yield stack(waiting)
                waiting = []
            waiting.append(item)
        if waiting:
            yield stack(waiting)


def _source_of(data: Any, keys: tuple, labelled: bool) -> _Tensors | _Items | None:
    if not labelled and isinstance(data, Tensor | np.ndarray):
        return _Tensors(data, None)
    if isinstance(data, IterableDataset):
        return None
    if isinstance(data, tuple | list) and not isinstance(data, Dataset):
        if len(data) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in data):
            if not labelled and len(data[0]) != len(data[1]):
                raise ValueError(
                    "a pair of tensors is inputs and labels, of one length (two batches need an "
                    f"iterator); got {len(data[0])} and {len(data[1])}"
                )
            return _Tensors(*data)
        if isinstance(data, tuple) or not data or isinstance(data[0], Tensor | np.ndarray):
            shown = ", ".join(type(part).__name__ for part in data)
            raise TypeError(f"data must be a pair (inputs, labels) of tensors; got ({shown})")
        return None  # a list of batches
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset) or data.batch_sampler is None:
            return None
        names = ("collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context")
        return _Items(data.dataset, {name: getattr(data, name) for name in names}, keys)
    if isinstance(data, Tensor | np.ndarray | Mapping | str):
        raise TypeError(
            "data must be a pair of tensors, a map-style Dataset, a DataLoader or an iterable of "
            f"batches; got {type(data).__name__}"
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _Items(data, {}, keys)
    if isinstance(data, Iterable):
        return None
    raise TypeError(
        "data must be a pair of tensors, a map-style Dataset, a DataLoader or an iterable of "
        f"batches; got {type(data).__name__}"
    )


def _kept(
    data: Iterable, keys: tuple, samples: int, per_class: int, seed: int, labelled: bool
) -> _Kept:
    """Read an iterable once; keep a uniform choice of every class, fewer as classes appear."""
    generator = Generator().manual_seed(seed)
    held: dict[int, list[tuple[float, int, Any]]] = {}
    total = 0
    for batch in data:
        if labelled:
            inputs, labels = unpack(batch, *keys)
        else:
            inputs = inputs_of(batch, *keys)
            labels = torch.zeros(len(first_tensor(inputs)), dtype=torch.int64)
        labels = _tensor(labels)
        if labels.ndim == 0:
            raise ValueError("an iterable must give batches; got one sample (use a DataLoader)")
        for i, label in enumerate(as_labels(labels).tolist()):
            key = torch.rand((), generator=generator, dtype=torch.float64).item()
            if label not in held:
                held[label] = []
                most = max(per_class, samples // len(held), 2)
                for rows in held.values():
                    del rows[most:]
            rows = held[label]
            if len(rows) < most or key < rows[-1][0]:
                insort(rows, (key, total, _item(inputs, i)), key=itemgetter(0))
            del rows[most:]
            total += 1
    if not total:
        raise ValueError("the data holds no batch")
    rows = [(place, item, label) for label, rows in held.items() for _, place, item in rows]
    chosen = sorted(rows, key=itemgetter(0))
    return _Kept([row[1] for row in chosen], torch.tensor([row[2] for row in chosen]), total)


def _by_class(labels: Tensor, seed: int) -> list[Tensor]:
    """Return the indices of every class, in a seeded order each."""
    keys = torch.rand(len(labels), generator=Generator().manual_seed(seed), dtype=torch.float64)
    order = keys.argsort()
    _, index, counts = labels[order].unique(return_inverse=True, return_counts=True)
    return list(order[index.argsort(stable=True)].split(counts.tolist()))


def _tensor(labels: Any) -> Any:
    return labels if isinstance(labels, Tensor | np.ndarray) else np.asarray(labels)


def _item(inputs: Any, i: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _item(value, i) for key, value in inputs.items()}
    arrays = Tensor | np.ndarray | Mapping | tuple | list
    if isinstance(inputs, tuple | list) and any(isinstance(part, arrays) for part in inputs):
        return tuple(_item(value, i) for value in inputs)
    item = inputs[i]  # of a list too: texts, or whatever else is not a tensor
    if isinstance(item, np.ndarray | np.generic):
        item = torch.as_tensor(item)
    return item.clone() if isinstance(item, Tensor) else item


def _bytes(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.nbytes
    return sum(map(_bytes, _parts(item)))


def _shapes(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.shape
    return [_shapes(part) for part in _parts(item)]


def _parts(item: Any) -> Iterable:
    if isinstance(item, Mapping):
        return item.values()
    return item if isinstance(item, tuple) else ()
