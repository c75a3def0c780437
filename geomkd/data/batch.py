"""One batch or sample, whoever made it: inputs and labels, told apart and moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from geomkd.common.checks import as_labels

LABEL_KEYS = ("labels", "label")  # looked for where no label_key is given
Array = Tensor | np.ndarray
Keys = tuple[str | None, str | None]  # of inputs and of labels, in batches that are mappings


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
        values = part.items() if isinstance(part, Mapping) else ()
        if lists := [key for key, value in values if isinstance(value, list)]:
            raise TypeError(
                f"a sample must hold tensors or arrays; got a list as {lists[0]!r} (a Hugging Face "
                "Dataset gives tensors after .with_format('torch'))"
            )
    try:
        return default_collate(items)
    except RuntimeError as error:
        raise ValueError(
            f"these samples make no batch ({error}): pad them, or give a DataLoader with a "
            "collate_fn that does, such as transformers' DataCollatorWithPadding"
        ) from error


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
    if isinstance(batch, Mapping) and not has_labels(batch, label_key):
        return batch if input_key is None else unpack({**batch, "label": 0}, input_key, "label")[0]
    if isinstance(batch, Array):
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0]
    return unpack(batch, input_key, label_key)[0]


def has_labels(batch: Any, label_key: str | None) -> bool:
    """Whether there is something in a batch that may be labels."""
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
