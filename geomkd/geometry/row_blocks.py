"""Whole rows of a layer's Gram matrix, block by block: one pass for all that reads distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from geomkd.geometry.gram import BLOCK, ClassGram
from geomkd.geometry.neighbours import SPARE, Neighbours, smallest
from geomkd.geometry.precision import DOT_ERROR, SQ_DISTANCE_ERROR

NUMBERS = 4_000_000  # of a block of rows, and of what is summed from it: 32 MB in float64


class Reader(Protocol):
    """What is done with a block of rows."""

    def __call__(self, rows: slice, dots: Tensor, sq_distance: Tensor) -> None:
        """Read (b, n) centred dot products and squared distances; neither may be changed."""


def full_rows(gram: ClassGram, height: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows, their centred dot products and squared distances to all rows, (b, n) float64."""
    for start in range(0, gram.n, height):
        rows = slice(start, min(start + height, gram.n))
        dots = gram.rows_of_dots(rows)
        distance = dots.mul(-2).add_(gram.centred_sq[rows, None]).add_(gram.centred_sq)
        distance.clamp_(min=0)
        at = torch.arange(rows.start, rows.stop, device=gram.device).unsqueeze(1)
        distance.scatter_(1, at, 0.0)
        yield rows, dots, distance


def walk(gram: ClassGram, readers: Sequence[Reader], *, sums: int = 1) -> None:
    """Let every reader see every row; ``sums`` numbers a row are what the largest of them holds."""
    height = max(16, min(512, NUMBERS // max(gram.n, sums)))
    for rows, dots, distance in full_rows(gram, height):
        for read in readers:
            read(rows, dots, distance)


class NearestRows:
    """Reader that keeps the k nearest rows of every row, itself apart.

    Parameters
    ----------
    gram : ClassGram
        Whose rows are read.
    k : int
        How many.
    among : Tensor, shape (n,), optional
        Rows that may be neighbours; all by default.
    """

    def __init__(self, gram: ClassGram, k: int, among: Tensor | None = None) -> None:
        self.gram, self.k = gram, min(k, gram.n - 1)
        self.shut = None if among is None else ~among
        self.kept = min(self.k + SPARE, gram.n - 1)
        shape = (gram.n, self.kept)
        self.sq = torch.empty(shape, dtype=torch.float64, device=gram.device)
        self.at = torch.empty(shape, dtype=torch.int64, device=gram.device)

    def __call__(self, rows: slice, dots: Tensor, sq_distance: Tensor) -> None:
        """Keep the nearest of these rows."""
        at = torch.arange(rows.start, rows.stop, device=self.gram.device).unsqueeze(1)
        open_ = sq_distance.scatter(1, at, torch.inf)
        if self.shut is not None:
            open_.masked_fill_(self.shut, torch.inf)
        self.sq[rows], self.at[rows] = smallest(open_, self.kept)

    def found(self) -> Neighbours:
        """Neighbours in the Gram matrix's scale; what cancellation spoilt is measured again."""
        gram, k = self.gram, self.k
        norm, farthest = gram.residual_sq.sqrt(), self.sq[:, -1].clone()
        error = 2 * DOT_ERROR[gram.dtype] * norm.unsqueeze(1) * norm[self.at]
        error += 2.0**-48 * (gram.centred_sq.unsqueeze(1) + gram.centred_sq[self.at])
        open_ = (error > SQ_DISTANCE_ERROR * self.sq) & self.sq.isfinite()
        rows = open_[:, :k].any(dim=1).nonzero().flatten()
        if len(rows):
            last = int((open_ * torch.arange(1, self.kept + 1, device=gram.device)).max())
            shut = self.sq[rows, :last].isinf()  # where fewer rows are open
            measured = gram.measure(rows, self.at[rows, :last])
            self.sq[rows, :last] = measured.masked_fill_(shut, torch.inf)
            self.sq[rows], order = self.sq[rows].sort(dim=1, stable=True)
            self.at[rows] = self.at[rows].gather(1, order)
        if len(rows) and self.kept < gram.n - 1:
            # No row that was not kept is nearer than this.
            reach = farthest[rows] - 2 * DOT_ERROR[gram.dtype] * norm[rows] * norm.max()
            self._search_again(rows[self.sq[rows, k - 1] > reach])
        return Neighbours(self.sq[:, :k], self.at[:, :k])

    def _search_again(self, rows: Tensor) -> None:
        """Find the nearest of these rows from products in float64."""
        for part in rows.split(BLOCK):
            distance = self.gram.exact_sq_distances(part)
            distance.scatter_(1, part.unsqueeze(1), torch.inf)
            if self.shut is not None:
                distance.masked_fill_(self.shut, torch.inf)
            least, at = smallest(distance, self.kept)
            sq = self.gram.measure(part, at).masked_fill_(least.isinf(), torch.inf)
            self.sq[part], order = sq.sort(dim=1, stable=True)
            self.at[part] = at.gather(1, order)


def nearest_rows(gram: ClassGram, k: int, among: Tensor | None = None) -> Neighbours:
    """Find the k nearest rows of every row of a Gram matrix, in a pass of their own."""
    reader = NearestRows(gram, k, among)
    walk(gram, [reader])
    return reader.found()


def sums_over_classes(gram: ClassGram, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Sum (b, n) values over each class with (n, Q) weights of its rows: (b, C, Q)."""

    def sums(values: Tensor) -> Tensor:
        return torch.stack([values[:, s:e] @ weights[s:e] for s, e in gram.spans], dim=1)

    return sums


def sums_over_labels(index: Tensor, weights: Tensor, n_classes: int) -> Callable[[Tensor], Tensor]:
    """Sum (b, n) values over classes that differ between columns of (n, Q) ``index``: (b, C, Q)."""
    names = torch.arange(n_classes, device=index.device).view(1, -1, 1)
    hot = ((index.unsqueeze(1) == names) * weights.unsqueeze(1)).flatten(1)

    def sums(values: Tensor) -> Tensor:
        return (values @ hot).view(len(values), n_classes, -1)

    return sums
