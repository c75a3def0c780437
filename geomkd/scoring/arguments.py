"""What ``layers=`` and ``labels=`` of a run come to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.data.sample import Sample, can_be_read_again, to_device
from geomkd.network.forward import Forward, call, first_tensor, unwrap
from geomkd.network.layers import Layer, candidate_layers, describe_layers
from geomkd.scoring.layer_measures import LABEL_FREE
from geomkd.scoring.plan import BATCH

EXAMPLES = 2  # samples of the batch that tells the layers


def example_of(sample: Sample, device: torch.device) -> Any:
    """Return the few inputs that tell the layers."""
    return to_device(next(sample.batches(EXAMPLES)), device)


def chosen_layers(
    model: nn.Module, names: Sequence[str] | None, example: Any, forward: Forward | None
) -> list[Layer]:
    """Describe the layers of these names, in their order; without names what a model offers."""
    if names is None:
        return candidate_layers(model, example, forward=forward)
    names = names if isinstance(names, str) else list(names)
    chosen = describe_layers(model, names, example, forward=forward)
    if not chosen or len(set(names)) < len(names):
        raise ValueError(f"layers must be names of layers, none of them twice; got {names}")
    return chosen


def in_order(
    model: nn.Module, names: Sequence[str] | None, example: Any, forward: Forward | None
) -> list[Layer]:
    """`chosen_layers` in order of execution; role "head" after the head's input."""
    chosen = chosen_layers(model, names, example, forward)
    if names is None:
        return chosen
    try:
        offered = candidate_layers(model, example, forward=forward)
    except ValueError:  # neither a block nor an activation tells where the head begins
        offered = []
    head = next((layer.order for layer in offered if layer.role == "head_input"), float("inf"))
    return [
        replace(layer, role="head") if layer.role == "named" and layer.order > head else layer
        for layer in sorted(chosen, key=lambda layer: layer.order)
    ]


def label_options(
    labels: Any, wanted: dict[str, Callable | None], predict: Callable[[], Tensor]
) -> dict[str, Any]:
    """Turn ``labels=`` into options of the sample, for measures as `named` gives them."""
    if not isinstance(labels, str):
        return {"labels": labels}
    if labels == "predicted":
        return {"labels": predict(), "lonely": False}
    if labels != "none":
        raise ValueError(f'labels must be an array, "predicted" or "none"; got {labels!r}')
    needing = [name for name, own in wanted.items() if own is None and name not in LABEL_FREE]
    if needing:
        raise ValueError(f"these measures need labels: {needing}; without: {list(LABEL_FREE)}")
    return {"labelled": False}


def predicted(
    model: nn.Module, data: Any, device: torch.device, forward: Forward | None, **keys: Any
) -> Tensor:
    """Classes of largest output for all of the data, (N,): a pass over it, model as it is."""
    if not can_be_read_again(data):
        raise ValueError('labels="predicted" needs data of known length; got an iterable')
    every = Sample(data, sys.maxsize, seed=0, labelled=False, **keys)
    found = []
    for batch in every.batches(BATCH):
        with torch.no_grad():
            output = first_tensor(call(unwrap(model), to_device(batch, device), forward))
        if output.ndim != 2 or output.shape[1] < 2:
            raise ValueError(
                f'labels="predicted" needs a model that gives (B, C) scores; got '
                f"{tuple(output.shape)}"
            )
        found.append(output.argmax(dim=1).cpu())
    return torch.cat(found)
