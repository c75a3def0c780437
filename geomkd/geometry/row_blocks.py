"""Whole rows of a layer's Gram matrix, block by block: one pass for all that reads distances."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import SPARE, Neighbours, settled, smallest
from geomkd.geometry.precision import BLOCK

NUMBERS = 4_000_000  # of a block of rows, and of what is summed from it: 32 MB in float64


# Reads rows, their (b, n) centred dot products and squared distances; neither may be changed.
Reader = Callable[[slice, Tensor, Tensor], None]


def full_rows(gram: ClassGram, height: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows, their centred dot products and squared distances to all rows, (b, n) float64.

    A distance that is float64 rounding of the norms is 0: a root would make 1e-8 of 1e-16, and
    equal rows would differ.
    """
    for start in range(0, gram.n, height):
        rows = slice(start, min(start + height, gram.n))
        dots = gram.rows_of_dots(rows)
        distance = dots.mul(-2).add_(gram.centred_sq[rows, None]).add_(gram.centred_sq)
        distance.masked_fill_(distance <= 2.0**-47 * gram.centred_sq[rows, None], 0.0)
        at = torch.arange(rows.start, rows.stop, device=gram.device).unsqueeze(1)
        distance.scatter_(1, at, 0.0)
        yield rows, dots, distance


def walk(gram: ClassGram, readers: Sequence[Reader], *, sums: int = 1) -> None:
    """Let every reader see every row; ``sums`` numbers a row are what the largest of them holds."""
    height = max(16, min(BLOCK, NUMBERS // max(gram.n, sums)))
    for rows, dots, distance in full_rows(gram, height):
        for read in readers:
            read(rows, dots, distance)


class NearestRows:
    """Reader that keeps the k nearest of every row, itself apart; (n,) ``among`` tells of which."""

    def __init__(self, gram: ClassGram, k: int, among: Tensor | None = None) -> None:
        self.gram, self.k = gram, min(k, gram.n - 1)
        self.shut = None if among is None else ~among
        shape = (gram.n, min(self.k + SPARE, gram.n - 1))
        self.sq = torch.empty(shape, dtype=torch.float64, device=gram.device)
        self.at = torch.empty(shape, dtype=torch.int64, device=gram.device)

    def __call__(self, rows: slice, dots: Tensor, sq_distance: Tensor) -> None:
        """Keep the nearest of these rows."""
        at = torch.arange(rows.start, rows.stop, device=self.gram.device).unsqueeze(1)
        open_ = sq_distance.scatter(1, at, torch.inf)
        if self.shut is not None:
            open_.masked_fill_(self.shut, torch.inf)
        self.sq[rows], self.at[rows] = smallest(open_, self.sq.shape[1])

    def found(self) -> Neighbours:
        """Neighbours in the Gram matrix's scale; what cancellation spoilt is measured again."""
        shut = None if self.shut is None else lambda rows: self.shut
        return settled(self.gram, Neighbours(self.sq, self.at), self.k, shut)


def nearest_rows(gram: ClassGram, k: int, among: Tensor | None = None) -> Neighbours:
    """Find the k nearest rows of every row of a Gram matrix, in a pass of their own."""
    reader = NearestRows(gram, k, among)
    walk(gram, [reader])
    return reader.found()


def sums_over_classes(gram: ClassGram, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Sum (b, n) values over each class with (n, Q) weights of its rows: (b, C, Q)."""
    spans = gram.spans
    return lambda values: torch.stack([values[:, s:e] @ weights[s:e] for s, e in spans], dim=1)


def sums_over_labels(index: Tensor, weights: Tensor, n_classes: int) -> Callable[[Tensor], Tensor]:
    """Sum (b, n) values over classes that differ between columns of (n, Q) ``index``: (b, C, Q)."""
    names = torch.arange(n_classes, device=index.device).view(1, -1, 1)
    hot = ((index.unsqueeze(1) == names) * weights.unsqueeze(1)).flatten(1)
    return lambda values: (values @ hot).view(len(values), n_classes, -1)
