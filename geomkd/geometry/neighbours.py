"""The nearest samples of every sample, and the one place where near twins are measured again.

``x^2 + y^2 - 2xy`` cancels where two samples nearly coincide. What it cannot give to a relative
1e-5 is measured by difference; where the nearest may have been missed they are searched again, from
products in float64.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from geomkd.common.checks import as_features, check_finite
from geomkd.geometry.columns import column_slices, exact_sq_distances, sq_differences
from geomkd.geometry.precision import (
    BLOCK,
    DOT_ERROR,
    exact_arithmetic,
    few_rows,
    mean_of,
    scale_of,
)

TILE = 2048  # rows and columns whose distances are in hand at a time
SPARE = 4  # candidates beyond k, where distances are measured again
_SQ_DISTANCE_ERROR = 1e-5  # share of a squared distance that may come from products
_CENTRED = 2**25  # features that are centred at a time, at most: 128 MB

Tile = tuple[slice, slice, Tensor]  # rows, columns and their squared distances
Mask = Callable[[Tensor], Tensor]


class Neighbours(NamedTuple):
    """The k nearest samples of each of n, the nearest first."""

    sq_distance: Tensor  # (n, k) float64, rising along a row; equal rows are exactly 0 apart
    index: Tensor  # (n, k) which rows they are


class Source(Protocol):
    """Samples whose products are known to some precision, and which can be read again."""

    n: int
    centred_sq: Tensor  # (n,) squared norms about the mean of all, or near it, float64
    residual_sq: Tensor  # (n,) of what was multiplied: samples about points of their own
    apart: Tensor  # how far from the mean these points lie at most
    dot_error: float  # share of the product of two norms that a product may be off by

    def measure(self, rows: Tensor, at: Tensor) -> Tensor:
        """Squared distances from (m,) rows to (m, k) rows, by difference: (m, k)."""

    def exact_rows(self, rows: Tensor) -> Tensor:
        """Squared distances of (m,) rows to all, from products in float64: (m, n)."""


class Rows:
    """Features of n samples, ready for products of centred rows; nothing is copied.

    ``centre``, (d,), is the mean of the rows, rounded to float32 unless the features are float64;
    ``scale`` the power of two that they are multiplied by where squares would leave the type.
    """

    def __init__(self, features: Any) -> None:
        x = as_features(features)
        check_finite(x)
        self.given, self.n, self.scale = x, len(x), float(scale_of(x))
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        self.centre, self.dot_error = mean_of(x, self.scale).to(dtype), DOT_ERROR[dtype]
        norms, parts = [], few_rows(x)
        room = torch.empty_like(parts[0], dtype=torch.float64)
        for part in parts:  # in one room: fresh memory would cost more than the arithmetic
            about = room[: len(part)].copy_(part).mul_(self.scale).sub_(self.centre)
            norms.append(torch.linalg.vector_norm(about, dim=1))
        self.centred_sq = self.residual_sq = torch.cat(norms).square()
        self.apart = torch.zeros_like(self.centred_sq[0])

    def centred(self, rows: slice) -> Tensor:
        """Take some rows about ``centre``, in the type of the products; a copy."""
        part = self.given[rows].to(self.centre.dtype)
        return (part if self.scale == 1.0 else part * self.scale) - self.centre

    def triangle(self) -> Iterator[Tile]:
        """Yield tiles on and above the diagonal, each in the memory of the one before.

        Of strips low enough that what lies below the diagonal is a tenth, and of columns that are
        centred once and meet every strip.
        """
        fit = max(256, _CENTRED // self.given.shape[1])
        height = min(TILE, fit, 256 * math.ceil(self.n / 2560))
        width = min(4 * TILE, fit) // height * height
        sq = self.centred_sq.to(self.centre.dtype)
        room = sq.new_empty(height * min(self.n, width))
        for start in range(0, self.n, width):
            right = self.centred(slice(start, min(self.n, start + width)))
            for top in range(0, start + len(right), height):
                rows = slice(top, min(self.n, top + height))
                own = slice(top - start, top - start + height)
                left, beyond = (right[own], right[own.start :]) if top >= start else (
                    self.centred(rows), right)  # fmt: skip
                first = max(top, start)
                distance = room[: len(left) * len(beyond)].view(len(left), len(beyond))
                of_columns = sq[first : start + len(right)]
                torch.addmm(of_columns, left, beyond.T, alpha=-2, out=distance)
                distance.add_(sq[rows, None])
                if top >= start:
                    yield rows, rows, distance[:, : len(left)].fill_diagonal_(torch.inf)
                    first, distance = rows.stop, distance[:, len(left) :]
                if distance.shape[1]:
                    yield rows, slice(first, start + len(right)), distance

    def measure(self, rows: Tensor, at: Tensor) -> Tensor:
        """See `Source`."""
        return sq_differences(partial(column_slices, self.given, self.scale), rows, at)

    def exact_rows(self, rows: Tensor) -> Tensor:
        """See `Source`."""
        return exact_sq_distances(partial(column_slices, self.given, self.scale), rows, self.n)


def search(rows: Rows, k: int) -> Neighbours:
    """Find the k nearest of every row, itself apart, 1 <= k < n.

    Squared distances are in the scale of ``rows``. Cost: n^2 d multiplications in the features' own
    precision; memory two tiles of 2,048 rows, 2,048^2 distances, and the result.
    """
    with exact_arithmetic(rows.centre.device):
        sq, at = nearest_of(rows.triangle(), rows.n, min(k + SPARE, rows.n - 1), rows.centre)
        return settled(rows, Neighbours(sq.double().clamp_(min=0), at), k)


# ---- where products cancel -----------------------------------------------------------------------


def unsure(
    source: Source, near: Neighbours, rows: Tensor | slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Whether products cannot give (m, k) distances, and what these are off by at the most."""
    sq, at = near
    norms, sq_norms = source.residual_sq.sqrt(), source.centred_sq
    norm, own = norms[rows].unsqueeze(1), sq_norms[rows].unsqueeze(1)
    # No sample of a larger norm than this is as near, by the triangle inequality.
    reach = (sq.sqrt() + norm + 2 * source.apart).clamp(max=norms.max())
    # Without residuals (collapsed classes) what is left is float64 rounding of the norms.
    error = 2 * source.dot_error * norm * reach + 2.0**-48 * (own + sq_norms[at])
    return error > _SQ_DISTANCE_ERROR * sq, error


def settled(source: Source, near: Neighbours, k: int, shut: Mask | None = None) -> Neighbours:
    """Find the k nearest of the candidates of all rows, none off by more than a relative 1e-5.

    ``shut`` tells which may not be neighbours of (m,) rows, as a mask that fits (m, n).
    """
    sq, at = near
    open_, error = unsure(source, near)
    rows = open_[:, :k].any(dim=1).nonzero().flatten()
    if len(rows):
        least = sq[rows, -1] - error[rows, -1]  # no sample that is no candidate is nearer
        last = int((open_[rows] * torch.arange(1, at.shape[1] + 1, device=at.device)).max())
        measured = source.measure(rows, at[rows, :last])
        sq[rows, :last] = measured.masked_fill_(sq[rows, :last].isinf(), torch.inf)
        sq[rows], order = sq[rows].sort(dim=1, stable=True)
        at[rows] = at[rows].gather(1, order)
        rows = rows[sq[rows, k - 1] > least]
        if len(rows) and at.shape[1] < source.n - 1:
            sq[rows, :k], at[rows, :k] = searched_again(source, rows, k, shut)
    return Neighbours(sq[:, :k], at[:, :k])


def searched_again(source: Source, rows: Tensor, k: int, shut: Mask | None = None) -> Neighbours:
    """Find the k nearest of (m,) rows in float64: a few more from products, then by difference."""
    found = []
    for part in rows.split(BLOCK):
        distance = source.exact_rows(part).scatter_(1, part.unsqueeze(1), torch.inf)
        if shut is not None:
            distance.masked_fill_(shut(part), torch.inf)
        least, at = smallest(distance, min(k + 2 * SPARE, source.n - 1))
        sq = source.measure(part, at).masked_fill_(least.isinf(), torch.inf)
        sq, order = sq.sort(dim=1, stable=True)
        found.append((sq[:, :k], at.gather(1, order)[:, :k]))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


# ---- the smallest of many ------------------------------------------------------------------------


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k smallest of every row and their places, rising: (m, k) each."""
    found, places = _among_them(values, k)
    found, order = found.topk(k, dim=1, largest=False)
    return found, places.gather(1, order)


def _among_them(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find values among which the k smallest of every row are, in no order, and their places.

    A row is dealt into about sqrt(k n) groups. The k smallest lie in the k groups of least minimum,
    so that only their members need be sorted: several times faster than sorting all.
    """
    n = values.shape[1]
    if k == 1:
        return values.min(dim=1, keepdim=True)
    depth = n // math.isqrt(k * n)
    if depth < 4:
        return values.topk(k, dim=1, largest=False, sorted=False)
    groups = n // depth
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
    return values.gather(1, places), places


def nearest_of(tiles: Iterator[Tile], n: int, k: int, like: Tensor) -> Neighbours:
    """Find the k nearest of n rows in tiles on and above the diagonal."""
    best = like.new_full((n, k), torch.inf)
    at = torch.zeros(n, k, dtype=torch.int64, device=like.device)
    for rows, cols, distance in tiles:
        if rows != cols:
            keep_nearest(best, at, cols, rows.start, distance.T)
        keep_nearest(best, at, rows, cols.start, distance)
    best, order = best.sort(dim=1)
    return Neighbours(best, at.gather(1, order))


def keep_nearest(best: Tensor, at: Tensor, rows: slice, first: int, distance: Tensor) -> None:
    """Merge (m, w) distances to w rows from ``first`` on into the nearest so far, in no order."""
    k = best.shape[1]
    value, column = _among_them(distance, min(k, distance.shape[1]))
    both = torch.cat([best[rows], value], dim=1)
    best[rows], keep = both.topk(k, dim=1, largest=False, sorted=False)
    at[rows] = torch.cat([at[rows], column + first], dim=1).gather(1, keep)
