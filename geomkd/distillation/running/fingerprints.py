"""What two runs must share for one to go on where the other ended, in a few letters."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from geomkd.data.sources import Tensors
from geomkd.distillation.running.batches import Batches
from geomkd.network.forward import unwrap

PROBES = 16  # items of a data set that are compared


def weights_fingerprint(model: nn.Module) -> str:
    """Names, types, shapes and values of a model's state, and its modules as they print."""
    root = unwrap(model)
    return _digest(repr(root), root.state_dict())


def shapes_fingerprint(model: nn.Module) -> str:
    """Names, types and shapes of a model's state."""
    state = unwrap(model).state_dict()
    shapes = {k: (str(v.dtype), tuple(v.shape)) for k, v in state.items() if hasattr(v, "shape")}
    return _digest(repr(shapes))


def data_fingerprint(batches: Batches) -> str:
    """Every value of a pair of tensors; of a data set length, labels and some of its items.

    Of a subset, a sampler's included, the indices too. The items are what the data set's transforms
    make of them. A change to an item that is not among those 16 goes unnoticed.
    """
    source = batches.source
    if isinstance(source, Tensors):
        return _digest((source.inputs, source.targets))
    dataset, rows = source.dataset, []
    name = type(dataset).__qualname__
    while isinstance(dataset, Subset):
        rows.append(torch.as_tensor([int(i) for i in dataset.indices]))
        dataset = dataset.dataset
    # Items that differ between two readings, by a generator of the data set's own, tell nothing.
    items, again = probes(batches, 0), probes(batches, 0)
    items = items if _digest(items) == _digest(again) else None
    return _digest(name, source.total, source.known_labels(), items, *rows)


def draws_at_random(batches: Batches) -> bool:
    """Whether a data set's items, of those compared, change with what random generators give."""
    if isinstance(batches.source, Tensors):
        return False
    first = _digest(probes(batches, 0))
    return any(_digest(probes(batches, epoch)) != first for epoch in range(1, 9))


def probes(batches: Batches, epoch: int = 0) -> list[Any]:
    """Read some of the items, a batch each."""
    n = batches.order.total
    places = torch.linspace(0, n - 1, min(PROBES, n)).long().tolist()
    return [batches.of([i], epoch=epoch) for i in places]


def _digest(*values: Any) -> str:
    sha = hashlib.sha256()
    for value in values:
        _feed(sha, value)
    return sha.hexdigest()[:16]


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous()
        sha.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif hasattr(value, "items"):
        for key, item in value.items():
            sha.update(str(key).encode())
            _feed(sha, item)
    elif isinstance(value, tuple | list):
        sha.update(f"{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())
