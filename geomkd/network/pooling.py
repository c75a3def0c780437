"""Pooling of a layer's activations before they are measured."""

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from geomkd.common.checks import check_choice
from geomkd.network.kinds import positions_first

POOLS = ("flatten", "mean", "max", "cls", "last", "published")
PUBLISHED_LIMIT = 262_144  # values of a map above which the published analysis pools
_SPACE = {"map": (2, 3), "map_last": (1, 2), "tokens": (1,), "sequence": (2,)}
_FITS = {"cls": ("tokens",), "last": ("tokens", "sequence")}


def check_pool(pool: str) -> str:
    """One of the poolings."""
    return check_choice(pool, "pool", POOLS)


def pooled(x: Tensor, kind: str, pool: str, real: Tensor | None = None) -> Tensor:
    """Activations of one layer, pooled to (B, d).

    Parameters
    ----------
    x : Tensor, shape (B, ...)
        Activations.
    kind : str
        Their kind, as in `Layer`.
    pool : {"flatten", "mean", "max", "cls", "last", "published"}
        "flatten" keeps every value. "mean" and "max" pool over space, tokens (class token included)
        or time to one value a channel. "cls" takes the first token, "last" the last token or step.
        "published" flattens, maps of more than 262,144 values max-pooled first, kernel
        ceil(sqrt(d / 262144)).
    real : Tensor, shape (B, T), optional
        Which positions of tokens or of a sequence count; each sample is pooled as without others.

    Raises
    ------
    ValueError
        A pooling that the kind has no axes for, or that needs as many real positions in all
        samples; a sample without any.

    Examples
    --------
    >>> pooled(torch.ones(2, 3, 4, 4), "map", "mean").shape
    torch.Size([2, 3])
    """
    dim, flat = math.prod(x.shape[1:]), pool in ("flatten", "published")
    if not flat and kind not in (*_FITS.get(pool, _SPACE), "vector"):
        raise ValueError(f"pool={pool!r} does not fit features of kind {kind!r}, {tuple(x.shape)}")
    if real is not None:
        sizes = real.sum(dim=1).tolist()
        if min(sizes) == 0 or (flat and min(sizes) < max(sizes)):
            needs = f"pool={pool!r} needs {'as many' if flat else 'some'} tokens in every sample"
            remedy = ": pass pool='mean', 'max' or 'last'" if flat else ""
            raise ValueError(f"{needs}; got {min(sizes)} to {max(sizes)} by the mask{remedy}")
        parts = (part[None] for part in positions_first(x, kind)[real].split(sizes))
        return torch.cat([pooled(positions_first(part, kind), kind, pool) for part in parts])
    if pool == "published" and kind == "map" and dim > PUBLISHED_LIMIT:
        x = max_pool2d(x, math.ceil(math.sqrt(dim / PUBLISHED_LIMIT)))
    if flat or kind == "vector":
        return x.flatten(1)
    if pool in ("cls", "last"):
        return positions_first(x, kind)[:, 0 if pool == "cls" else -1]
    return x.mean(dim=_SPACE[kind]) if pool == "mean" else x.amax(dim=_SPACE[kind])
