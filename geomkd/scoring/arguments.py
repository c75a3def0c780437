"""What ``protocol=`` and ``labels=`` of a run come to, and the few inputs that tell its layers."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.common.checks import check_choice
from geomkd.common.distributed import world
from geomkd.common.randomness import all_seeded, seed_of
from geomkd.data.sample import Sample
from geomkd.data.sources import can_be_read_again, to_device
from geomkd.measures.table import LABEL_FREE, TABLE
from geomkd.network.forward import Forward, call, first_tensor, tried, unwrap
from geomkd.network.pooling import check_pool
from geomkd.scoring.plan import BATCH
from geomkd.scoring.settings import Settings

EXAMPLES = 2  # samples of the batch that tells the layers
FEW = 25  # samples of a class, below which scores say more of their number than of the layer
# Sampling behind the figures of arXiv 2511.14981: S, E and r of 5,000 samples, H of more.
PAPER = {"entropy_per_class": 500, "pool": "published", "samples": 5000, "definition": "published"}


def sampling_of(
    protocol: str | None,
    entropy_per_class: int | None,
    pool: str | None,
    samples: int,
    definition: str,
    *,
    beside: tuple[int, Any] = (0, ()),
) -> tuple[int | None, str]:
    """Return samples of a class for the entropy, and pooling: as given, or the protocol's.

    Raises
    ------
    ValueError
        An unknown protocol or pooling, an argument that contradicts the protocol, or samples for
        the entropy ``beside`` a null or a sweep.
    """
    check_choice(protocol, "protocol", (None, "paper"))
    given = {"entropy_per_class": entropy_per_class, "pool": pool}
    given |= {"samples": samples, "definition": definition}
    for name, value in given.items():
        if protocol and value is not None and value != PAPER[name]:
            raise ValueError(
                f"protocol={protocol!r} and {name}={value!r} contradict each other: the protocol "
                f"has {name}={PAPER[name]!r}; leave out one of the two"
            )
    if protocol:
        entropy_per_class, pool = PAPER["entropy_per_class"], PAPER["pool"]
    null, sweep = beside
    swept = not isinstance(sweep, Sequence) or len(sweep) > 0
    if entropy_per_class is not None and (null or swept):
        of = f"protocol={protocol!r}" if protocol else "entropy_per_class="
        raise ValueError(f"{of} has samples of its own for the entropy: without null= and sweep=")
    return entropy_per_class, "flatten" if pool is None else check_pool(pool)


def example_of(sample: Sample, device: torch.device) -> Any:
    """Return the few inputs that tell the layers."""
    return to_device(next(sample.batches(EXAMPLES)), device)


def warn_of_few(settings: Settings, samples: int, stacklevel: int) -> None:
    """Warn of a class with few samples, where a measure that was asked for needs classes."""
    fewest, supervised = settings.samples_per_class[0], TABLE.keys() - set(LABEL_FREE)
    if fewest >= FEW or not supervised & set(settings.measures) or not world().is_first:
        return
    remedy = "the data have no more of it: add data, or leave such classes out"
    if samples // settings.classes < FEW:
        remedy = f"samples={FEW * settings.classes} or more asks for enough; got {samples}"
    warnings.warn(
        f"a class has fewer than {FEW} samples: the smallest of {settings.classes} has {fewest}; "
        f"scores move with that number, and layers change places: {remedy}",
        stacklevel=stacklevel,
    )


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
    found, run = [], tried
    for number, batch in enumerate(every.batches(BATCH)):
        with torch.no_grad(), all_seeded(seed_of(seed, number), device):
            output = first_tensor(run(unwrap(model), to_device(batch, device), forward))
        run = call
        if output.ndim != 2 or output.shape[1] < 2:
            raise ValueError(
                f'labels="predicted" needs a model that gives (B, C) scores; got '
                f"{tuple(output.shape)}"
            )
        found.append(output.argmax(dim=1).cpu())
    return torch.cat(found)
