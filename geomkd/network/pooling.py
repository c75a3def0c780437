"""Pooling of a layer's activations before they are measured."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import max_pool2d

from geomkd.common.checks import check_choice

POOLS = ("flatten", "mean", "max", "cls", "published")
PUBLISHED_LIMIT = 262_144  # values of a map above which the published analysis pools
_SPACE = {"map": (2, 3), "map_last": (1, 2), "tokens": (1,), "vector": ()}


def check_pool(pool: str) -> str:
    """One of the poolings."""
    return check_choice(pool, "pool", POOLS)


def pooled(x: Tensor, kind: str, pool: str) -> Tensor:
    """Activations of one layer, pooled to (B, d).

    Parameters
    ----------
    x : Tensor, shape (B, ...)
        Activations.
    kind : str
        Their kind, as in `Layer`.
    pool : {"flatten", "mean", "max", "cls", "published"}
        "flatten" keeps every value. "mean" and "max" pool over space or tokens (class token
        included) to one value a channel. "cls" takes the first token. "published" flattens, maps of
        more than 262,144 values max-pooled first, kernel ceil(sqrt(d / 262144)).

    Raises
    ------
    ValueError
        A pooling that the kind has no axes for.

    Examples
    --------
    >>> import torch
    >>> pooled(torch.ones(2, 3, 4, 4), "map", "mean").shape
    torch.Size([2, 3])
    """
    dim = math.prod(x.shape[1:])
    if pool == "published" and kind == "map" and dim > PUBLISHED_LIMIT:
        x = max_pool2d(x, math.ceil(math.sqrt(dim / PUBLISHED_LIMIT)))
    if pool in ("flatten", "published") or kind == "vector":
        return x.flatten(1)
    if pool == "cls" and kind == "tokens":
        return x[:, 0]
    if pool == "cls" or kind not in _SPACE:
        raise ValueError(f"pool={pool!r} does not fit features of kind {kind!r}, {tuple(x.shape)}")
    space = _SPACE[kind]
    return x.mean(dim=space) if pool == "mean" else x.amax(dim=space)
