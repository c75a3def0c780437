"""What a layer's Gram matrix is made of: products of class-centred samples, and of class means."""

from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

from geomkd.common.checks import Classes
from geomkd.geometry.columns import Columns
from geomkd.geometry.precision import BLOCK, exact_arithmetic


class Block(NamedTuple):
    """Consecutive sorted rows, the classes they span, and their membership (rows x span)."""

    rows: slice
    span: slice
    hot: Tensor


class Sorted(NamedTuple):
    """Samples sorted by class: which they are, their classes, the classes' rows, and blocks."""

    order: Tensor
    class_of: Tensor
    spans: list[tuple[int, int]]
    blocks: list[Block]

    @classmethod
    def by(cls, classes: Classes) -> Self:
        """Sort samples, those of a class as they come."""
        order = torch.argsort(classes.index, stable=True)
        class_of = classes.index.index_select(0, order)
        starts, blocks = [0, *accumulate(classes.sizes)], []
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            low, high = bisect_right(starts, start) - 1, bisect_left(starts, stop)
            hot = class_of[start:stop, None] == torch.arange(low, high, device=order.device)
            blocks.append(Block(slice(start, stop), slice(low, high), hot.double()))
        return cls(order, class_of, list(pairwise(starts)), blocks)


class ClassSums:
    """What a Gram matrix is made of, added up over slices of columns; its product in ``dtype``.

    Attributes
    ----------
    upper : Tensor, shape (n, n)
        Products of the class-centred samples, on and above the diagonal blocks.
    residual_sq, largest : Tensor, shape (n,)
        Squared norms of these; largest magnitude in each row.
    residual_dot, mean_dot : Tensor, shape (n, C + 1), (C + 1, C + 1)
        Their products with the class means about the overall mean, and with that; of all these.
    """

    def __init__(self, classes: Classes, dtype: torch.dtype) -> None:
        self.classes, self.dtype, self.dim = classes, dtype, 0
        self.rows = Sorted.by(classes)
        n, c = len(classes.index), len(classes.sizes)
        zeros = {"dtype": torch.float64, "device": classes.index.device}
        self.upper = torch.zeros(n, n, **zeros | {"dtype": dtype})
        self.residual_sq, self.largest = torch.zeros(2, n, **zeros)
        self.residual_dot = torch.zeros(n, c + 1, **zeros)
        self.mean_dot = torch.zeros(c + 1, c + 1, **zeros)
        self.sizes = torch.tensor(classes.sizes, **zeros)

    @classmethod
    def over(cls, columns: Columns, classes: Classes, dtype: torch.dtype) -> Self:
        """Add up all columns."""
        sums = cls(classes, dtype)
        with exact_arithmetic(sums.upper.device):
            for piece in columns():
                sums.add(piece)
                del piece  # before the next slice is made
        return sums

    def add(self, piece: Tensor) -> None:
        """Add (n, width) columns of the features: a pure reduction, nothing is checked."""
        order, class_of, _, blocks = self.rows
        self.dim += piece.shape[1]
        centred = piece.index_select(0, order).to(self.dtype)
        largest = torch.linalg.vector_norm(centred, float("inf"), dim=1).double()
        self.largest = torch.maximum(self.largest, largest)
        means = self.sizes.new_zeros(len(self.sizes), piece.shape[1])
        for block in blocks:
            means[block.span].addmm_(block.hot.T, centred[block.rows].double())
        overall = means.sum(dim=0, keepdim=True) / len(order)
        # Rounded as the features are, so that equal samples of a class leave exactly zero.
        means = (means / self.sizes.unsqueeze(1)).to(self.dtype).double()
        reference = torch.cat([means - overall, overall])
        self.mean_dot.addmm_(reference, reference.T)
        for block in blocks:
            exact = centred[block.rows].double()
            exact.sub_(means.index_select(0, class_of[block.rows]))
            self.residual_dot[block.rows].addmm_(exact, reference.T)
            self.residual_sq[block.rows] += torch.linalg.vector_norm(exact, dim=1).square()
            centred[block.rows] = exact
        for s in range(0, len(order), BLOCK):
            self.upper[s : s + BLOCK, s:].addmm_(centred[s : s + BLOCK], centred[s:].T)
