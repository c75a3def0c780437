"""The nearest samples of every sample: one search behind every measure of neighbours.

A search reads rows of squared distances from a source: plain features (`Rows`), of which one
triangle of products is computed and nothing kept, or a layer's `ClassGram`, which has the products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import as_features, check_finite
from geomkd.geometry.precision import DOT_ERROR, SQ_DISTANCE_ERROR, exact_arithmetic

BLOCK = 512  # rows that are taken to float64 at a time
TILE = 2048  # rows and columns whose distances are in hand at a time
SPARE = 4  # candidates beyond k, where distances are measured again
_CENTRED = 2**25  # features of a tile's rows, at most: 128 MB
_GATHERED = 8_000_000  # numbers gathered at a time where distances are measured


class Neighbours(NamedTuple):
    """The k nearest samples of each of n, the nearest first.

    Attributes
    ----------
    sq_distance : Tensor, shape (n, k)
        Squared distances, float64, rising along a row; equal rows are exactly 0 apart.
    index : Tensor, shape (n, k)
        Which rows they are.
    """

    sq_distance: Tensor
    index: Tensor


class Rows:
    """Features of n samples, ready for products of centred rows; nothing is copied.

    Parameters
    ----------
    features : Tensor or ndarray, shape (n, ...)
        Any floating-point type and device.

    Attributes
    ----------
    centre : Tensor, shape (d,)
        Mean of the rows, rounded to float32 unless the features are float64.
    sq : Tensor, shape (n,)
        Squared norms about ``centre``, float64.
    scale : float
        Power of two that features are multiplied by where their squares would leave the type.
    """

    def __init__(self, features: Any) -> None:
        x = as_features(features)
        check_finite(x)
        self.given, self.n, self.device = x, len(x), x.device
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        top = float(torch.linalg.vector_norm(x, float("inf")))
        extreme = top > 0 and not 2.0**-20 < top < 2.0**20
        self.scale = math.ldexp(1.0, min(1000, -math.frexp(top)[1])) if extreme else 1.0
        parts = (part.double() * self.scale for part in x.split(BLOCK))
        self.centre = (sum(part.sum(dim=0) for part in parts) / self.n).to(dtype)
        self.sq = torch.empty(self.n, dtype=torch.float64, device=x.device)
        for s in range(0, self.n, BLOCK):
            exact = self.exact(slice(s, s + BLOCK))
            self.sq[s : s + BLOCK] = torch.linalg.vector_norm(exact, dim=1).square()
        self.error = DOT_ERROR[dtype]

    def centred(self, rows: slice) -> Tensor:
        """Take some rows about ``centre``, in the type of the products; a copy."""
        if self.scale != 1.0:  # which float32 may not hold
            return self.exact(rows).to(self.centre.dtype)
        return self.given[rows].to(self.centre.dtype) - self.centre

    def triangle(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and their squared distances: tiles on and above the diagonal."""
        height = min(TILE, max(256, _CENTRED // self.given.shape[1]))
        tiles = [slice(s, min(self.n, s + height)) for s in range(0, self.n, height)]
        for i, rows in enumerate(tiles):
            left = self.centred(rows)
            # The norms ride along as two more features: one product gives x^2 + y^2 - 2 xy.
            sq, one = self.sq[rows, None].to(left.dtype), left.new_ones(len(left), 1)
            whole = torch.cat([left, sq, one], dim=1)
            for cols in tiles[i:]:
                right = left if cols is rows else self.centred(cols)
                sq, one = self.sq[cols, None].to(left.dtype), left.new_ones(len(right), 1)
                yield rows, cols, whole @ torch.cat([right * -2, one, sq], dim=1).T

    def measure(self, rows: Tensor, at: Tensor) -> Tensor:
        """Squared distances from (m,) rows to (m, k) rows, by difference in float64: (m, k)."""
        total = torch.empty(at.shape, dtype=torch.float64, device=self.device)
        step = max(1, _GATHERED // (at.shape[1] * self.given.shape[1]))
        for s in range(0, len(rows), step):
            left = self.given[rows[s : s + step]].double().unsqueeze(1)
            right = (
                self.given[at[s : s + step].flatten()].double().view(*at[s : s + step].shape, -1)
            )
            total[s : s + step] = right.sub_(left).mul_(self.scale).square_().sum(dim=2)
        return total

    def exact(self, rows: slice | Tensor) -> Tensor:
        """Centred features of some rows before any rounding to float32, float64."""
        return (self.given[rows].double() * self.scale).sub_(self.centre)

    def exact_rows(self, rows: Tensor) -> Tensor:
        """Squared distances of (m,) rows to all, from products in float64: (m, n)."""
        left, starts = self.exact(rows), range(0, self.n, BLOCK)
        dots = torch.cat([left @ self.exact(slice(s, s + BLOCK)).T for s in starts], dim=1)
        return dots.mul_(-2).add_(self.sq[rows, None]).add_(self.sq)


def nearest(features: Any, k: int) -> Neighbours:
    """Find the k nearest rows of every row of (n, ...) features, itself apart.

    Raises
    ------
    ValueError
        ``k`` is not between 1 and n - 1.

    Notes
    -----
    Euclidean distance. Cost: n^2 d multiplications in the features' own precision; memory two tiles
    of 2,048 rows, 2,048^2 distances, and the result. Distances that the products cannot give to a
    relative 1e-5 (of twins, of tight groups far apart) are measured again by difference in float64.

    Examples
    --------
    >>> import torch
    >>> from geomkd.geometry.neighbours import nearest
    >>> nearest(torch.tensor([[0.0], [1.0], [3.0]]), 1).index.flatten()
    tensor([1, 0, 1])
    """
    rows = Rows(features)
    if not 1 <= k < rows.n:
        raise ValueError(f"k must be between 1 and n - 1 = {rows.n - 1} neighbours; got {k}")
    found = search(rows, k)
    return Neighbours(found.sq_distance / rows.scale / rows.scale, found.index)


def search(rows: Rows, k: int) -> Neighbours:
    """Find the k nearest, 1 <= k < n; squared distances are in the scale of ``rows``."""
    with exact_arithmetic(rows.device):
        return _searched(rows, k)


def _searched(rows: Rows, k: int) -> Neighbours:
    best = torch.full((rows.n, k), torch.inf, dtype=rows.centre.dtype, device=rows.device)
    at = torch.zeros(rows.n, k, dtype=torch.int64, device=rows.device)
    for part, cols, distance in rows.triangle():
        if part == cols:
            distance.fill_diagonal_(torch.inf)
        else:
            keep_nearest(best, at, cols, part.start, distance.T)
        keep_nearest(best, at, part, cols.start, distance)
    return _settled(rows, Neighbours(best.double().clamp_(min=0), at))


def _settled(rows: Rows, found: Neighbours) -> Neighbours:
    """Find again, in float64, the neighbours of rows whose distances cancellation has spoilt."""
    sq, at = found
    k, norm = at.shape[1], rows.sq.sqrt()
    error = 2 * rows.error * norm.unsqueeze(1) * norm[at] + 2.0**-48 * rows.sq.unsqueeze(1)
    for part in (error > SQ_DISTANCE_ERROR * sq).any(dim=1).nonzero().flatten().split(BLOCK):
        near = rows.exact_rows(part)
        near[torch.arange(len(part), device=part.device), part] = torch.inf
        candidates = smallest(near, min(rows.n - 1, k + SPARE))[1]
        measured, order = rows.measure(part, candidates).sort(dim=1, stable=True)
        sq[part], at[part] = measured[:, :k], candidates.gather(1, order[:, :k])
    return Neighbours(sq, at)


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k smallest of every row and their places, rising: (m, k) each.

    A row is dealt into about sqrt(k n) groups. The k smallest lie in the k groups of least minimum,
    so that only their members need be sorted: several times faster than sorting all.
    """
    n = values.shape[1]
    if k == 1:
        return values.min(dim=1, keepdim=True)
    groups = math.isqrt(k * n)
    depth = n // groups
    if depth < 4:
        return values.topk(k, dim=1, largest=False)
    dealt = groups * depth
    if values.stride(0) == 1:  # columns of a matrix, along which minima would be slow
        least = values.T[:dealt].unflatten(0, (depth, groups)).amin(dim=0).T.contiguous()
    else:
        least = values[:, :dealt].unflatten(1, (depth, groups)).amin(dim=1)
    chosen = least.topk(k, dim=1, largest=False, sorted=False).indices
    steps = torch.arange(0, dealt, groups, device=values.device)
    places = (chosen.unsqueeze(1) + steps.view(1, -1, 1)).flatten(1)
    rest = torch.arange(dealt, n, device=values.device).expand(len(values), -1)
    places = torch.cat([places, rest], dim=1)
    found, order = values.gather(1, places).topk(k, dim=1, largest=False)
    return found, places.gather(1, order)


def keep_nearest(best: Tensor, at: Tensor, rows: slice, first: int, distance: Tensor) -> None:
    """Merge (m, w) distances to the w rows from ``first`` on into the nearest so far."""
    k = best.shape[1]
    value, column = smallest(distance, min(k, distance.shape[1]))
    both = torch.cat([best[rows], value], dim=1)
    best[rows], keep = both.topk(k, dim=1, largest=False)
    at[rows] = torch.cat([at[rows], column + first], dim=1).gather(1, keep)
