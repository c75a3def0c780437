"""What ``labels=`` of a run comes to, and the few inputs that tell its layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.common.randomness import all_seeded, seed_of
from geomkd.data.sample import Sample
from geomkd.data.sources import can_be_read_again, to_device
from geomkd.measures.table import LABEL_FREE
from geomkd.network.forward import Forward, call, first_tensor, unwrap
from geomkd.scoring.plan import BATCH

EXAMPLES = 2  # samples of the batch that tells the layers


def example_of(sample: Sample, device: torch.device) -> Any:
    """Return the few inputs that tell the layers."""
    return to_device(next(sample.batches(EXAMPLES)), device)


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
    model: nn.Module,
    data: Any,
    device: torch.device,
    forward: Forward | None,
    seed: int,
    **keys: Any,
) -> Tensor:
    """Classes of largest output for all of the data, (N,): a pass over it, model as it is."""
    if not can_be_read_again(data):
        raise ValueError('labels="predicted" needs data of known length; got an iterable')
    every = Sample(data, sys.maxsize, seed=0, labelled=False, **keys)
    found = []
    for number, batch in enumerate(every.batches(BATCH)):
        with torch.no_grad(), all_seeded(seed_of(seed, number), device):
            output = first_tensor(call(unwrap(model), to_device(batch, device), forward))
        if output.ndim != 2 or output.shape[1] < 2:
            raise ValueError(
                f'labels="predicted" needs a model that gives (B, C) scores; got '
                f"{tuple(output.shape)}"
            )
        found.append(output.argmax(dim=1).cpu())
    return torch.cat(found)
