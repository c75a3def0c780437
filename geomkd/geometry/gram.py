"""ClassGram: the one Gram matrix of a layer's sample, and what can be read off it by blocks.

From every sample its class mean is subtracted, ``x = c + m``, and only ``C C'`` (``c`` the rows of
``C``) is an n x n product. What the means contribute is of rank two per pair of classes. It is
added in float64, block by block, so that neither a common offset nor collapsed classes cost
digits: ``x_i.x_j = c_i.c_j + c_i.m_b + m_a.c_j + m_a.m_b``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import Classes, as_classes, as_features, check_rows_finite
from geomkd.geometry.neighbours import keep_nearest
from geomkd.geometry.precision import COLUMNS, DOT_ERROR, exact_arithmetic, inverse

BLOCK = 512  # rows of a block: a float64 block of 2 MB stays in cache

_DISTANCE_TOLERANCE = 1e-5
_NEAR = 2.0**-8  # rows of a squared norm below this share of |c_i|^2 are measured again
_FEW = 8  # candidates for the nearest that are measured by difference
_MOST_NEAR = 256  # of them at the most: two tables of n float64 a row

Columns = Callable[[], Iterator[Tensor]]


def column_slices(features: Tensor, scale: float = 1.0) -> Iterator[Tensor]:
    """Slices of at most 1,024 columns of an (n, d) tensor, in at least float32, times ``scale``."""
    for start in range(0, features.shape[1], COLUMNS):
        piece = features[:, start : start + COLUMNS]
        piece = piece.float() if piece.dtype in (torch.float16, torch.bfloat16) else piece
        yield piece if scale == 1.0 else piece * scale


class _Block(NamedTuple):
    """Consecutive sorted rows, the classes they span, and their membership (rows x span)."""

    rows: slice
    span: slice
    hot: Tensor


@dataclass(eq=False, repr=False)
class ClassGram:
    """Gram matrix of n samples in C classes, rows sorted by class.

    Built by `ClassGram.of` from an (n, d) tensor, or by `ClassGram.from_columns` from slices of its
    columns, so that a layer larger than memory needs n x n numbers and one slice at a time.

    Parameters
    ----------
    classes : Classes
        Class index and sizes of the samples, in the order of the features' rows.
    dtype : torch.dtype
        Type of the n x n product: float32, or float64 for float64 features.
    scale : float
        Power of two that the features were multiplied by; distances and norms are divided by it.

    Attributes
    ----------
    upper : Tensor, shape (n, n)
        Gram matrix of the class-centred samples, on and above the diagonal blocks.
    order : Tensor, shape (n,)
        Row of the features that each sorted row is.
    residual_sq : Tensor, shape (n,)
        Squared norms of the class-centred samples, float64.
    zero_rows : Tensor, shape (n,)
        True for samples whose features are all exactly zero.
    largest : Tensor, shape (n,)
        Largest magnitude in each row, float64.
    dim : int
        Number of features, d.

    Notes
    -----
    Cost: n^2 d flops (half of a plain product), n^2 numbers, and O(n d C) in float64.
    "Centred" below means: minus the mean of all rows; "raw": as they came.

    Examples
    --------
    >>> import torch
    >>> from geomkd.geometry.gram import ClassGram
    >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    >>> gram = ClassGram.of(x, torch.tensor([0, 0, 1, 1]))
    >>> gram.class_dots(1, raw=True)
    tensor([[ 4.,  8.],
            [ 8., 16.]], dtype=torch.float64)
    """

    classes: Classes
    dtype: torch.dtype
    scale: float = 1.0
    upper: Tensor = field(init=False)
    dim: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        index, sizes = self.classes.index, self.classes.sizes
        self.n, self.n_classes, self.device = len(index), len(sizes), index.device
        self.starts = [0, *accumulate(sizes)]
        self.order = torch.argsort(index, stable=True)
        self.class_of = index.index_select(0, self.order)
        self.spans = list(zip(self.starts, self.starts[1:], strict=False))
        n, c, zeros = self.n, self.n_classes, {"dtype": torch.float64, "device": self.device}
        self.upper = torch.zeros(n, n, dtype=self.dtype, device=self.device)
        self.residual_sq = torch.zeros(n, **zeros)
        self._sizes = torch.tensor(sizes, **zeros)
        self._residual_dot = torch.zeros(n, c + 1, **zeros)  # c_i . (class means, overall mean)
        self._mean_dot = torch.zeros(c + 1, c + 1, **zeros)
        self.largest = torch.zeros(n, **zeros)
        self._blocks = [self._block(s, min(s + BLOCK, n)) for s in range(0, n, BLOCK)]

    def _block(self, start: int, stop: int) -> _Block:
        low, high = bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop)
        names = torch.arange(low, high, device=self.device)
        hot = (self.class_of[start:stop, None] == names).double()
        return _Block(slice(start, stop), slice(low, high), hot)

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> ClassGram:
        """Gram matrix of (n, ...) features with (n,) labels, both checked."""
        x = as_features(features)
        classes = as_classes(labels, len(x), x.device)
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        return cls.from_columns(lambda: column_slices(x), classes, dtype)

    @classmethod
    def from_columns(
        cls, columns: Columns, classes: Classes, dtype: torch.dtype, scale: float = 1.0
    ) -> ClassGram:
        """Gram matrix of features that ``columns()`` yields in (n, width) slices.

        ``columns`` is called again where numbers must be looked at once more: of features whose
        squares leave ``dtype``, of rows that nearly vanish, in `refine` and `measure`.

        Raises
        ------
        ValueError
            Features that are not finite.
        """
        gram = cls._summed(columns, classes, dtype, scale)
        check_rows_finite(gram.largest, gram.order)
        top = float(gram.largest.max())
        if top and not 2.0**-20 < top < 2.0**20:  # a power of two is exact
            del gram
            widest = 1000 if dtype is torch.float64 else 125
            more = math.ldexp(1.0, -max(-widest, min(widest, math.frexp(top)[1])))
            gram = cls._summed(
                lambda: (piece * more for piece in columns()), classes, dtype, scale * more
            )
        gram.measure_near_rows()
        return gram

    @classmethod
    def _summed(
        cls, columns: Columns, classes: Classes, dtype: torch.dtype, scale: float
    ) -> ClassGram:
        gram = cls(classes, dtype, scale)
        gram.columns = columns
        with exact_arithmetic(gram.device):
            for piece in columns():
                gram.add(piece)
                del piece  # before the next slice is made
            gram.finish()
        return gram

    def add(self, piece: Tensor) -> None:
        """Add (n, width) columns of the features: a pure reduction, nothing is checked."""
        self.dim += piece.shape[1]
        centred = piece.index_select(0, self.order)
        largest = torch.linalg.vector_norm(centred, float("inf"), dim=1).double()
        self.largest = torch.maximum(self.largest, largest)
        means = torch.zeros(self.n_classes, piece.shape[1], dtype=torch.float64, device=self.device)
        for block in self._blocks:
            means[block.span].addmm_(block.hot.T, centred[block.rows].double())
        overall = means.sum(dim=0, keepdim=True) / self.n
        # Rounded as the features are, so that equal samples of a class leave exactly zero.
        means = (means / self._sizes.unsqueeze(1)).to(self.dtype).double()
        reference = torch.cat([means - overall, overall])
        self._mean_dot.addmm_(reference, reference.T)
        for block in self._blocks:
            exact = centred[block.rows].double()
            exact.sub_(means.index_select(0, self.class_of[block.rows]))
            self._residual_dot[block.rows].addmm_(exact, reference.T)
            self.residual_sq[block.rows] += torch.linalg.vector_norm(exact, dim=1).square()
            centred[block.rows] = exact
        for s in range(0, self.n, BLOCK):
            self.upper[s : s + BLOCK, s:].addmm_(centred[s : s + BLOCK], centred[s:].T)

    def finish(self) -> None:
        """From the sums over columns to what the blocks are read with."""
        c, self._near = self.n_classes, None
        self.upper.diagonal().copy_(self.residual_sq)
        self.zero_rows = self.largest == 0
        mean_dot, overall = self._mean_dot[:c, :c], self._mean_dot[:c, c]
        own = self._residual_dot[:, :c].gather(1, self.class_of.unsqueeze(1)).squeeze(1)
        # x_i.x_j (centred) = c_i.c_j + half_i[b] + half_j[a]; raw adds shift_i + shift_j.
        self._half = self._residual_dot[:, :c] + mean_dot.index_select(0, self.class_of) / 2
        to_overall = self._residual_dot[:, c] + overall.index_select(0, self.class_of)
        self._shift = to_overall + self._mean_dot[c, c] / 2
        self.centred_sq = (
            self.residual_sq + 2 * own + mean_dot.diagonal().index_select(0, self.class_of)
        ).clamp_(min=0)
        self.raw_sq = (self.centred_sq + 2 * self._shift).clamp_(min=0)
        self.raw_sq.masked_fill_(self.zero_rows, 0.0)

    # ---- reading --------------------------------------------------------------------------------

    def class_residual_gram(self, a: int) -> Tensor:
        """Gram matrix of class ``a`` about its own mean, (n_a, n_a), float64."""
        s, e = self.spans[a]
        square = self.upper[s:e, s:e].to(torch.float64, copy=True)
        # Left of the diagonal blocks nothing was computed; no triu, which is slow when it is small.
        for b in range((s // BLOCK + 1) * BLOCK - s, e - s, BLOCK):
            square[b : b + BLOCK, :b] = square[:b, b : b + BLOCK].T
        return square

    def class_dots(self, a: int, *, raw: bool = False) -> Tensor:
        """Dot products within class ``a``, (n_a, n_a), float64."""
        s, e = self.spans[a]
        shift = self._half[s:e, a] + (self._shift[s:e] if raw else 0.0)
        dots = self.class_residual_gram(a).add_(shift.unsqueeze(1)).add_(shift)
        return self._with_near_rows(dots, slice(s, e), slice(s, e), raw)

    def blocks(self, *, raw: bool = False) -> Iterator[tuple[_Block, _Block, Tensor]]:
        """Blocks on and above the diagonal: rows, columns, float64 dot products."""
        for p, rows in enumerate(self._blocks):
            for cols in self._blocks[p:]:
                left = [self._half[rows.rows, cols.span], rows.hot]
                right = [cols.hot, self._half[cols.rows, rows.span]]
                if raw:
                    left += [self._shift[rows.rows, None], torch.ones_like(rows.hot[:, :1])]
                    right += [torch.ones_like(cols.hot[:, :1]), self._shift[cols.rows, None]]
                dots = self.upper[rows.rows, cols.rows].to(torch.float64, copy=True)
                dots.addmm_(torch.cat(left, 1), torch.cat(right, 1).T)
                yield rows, cols, self._with_near_rows(dots, rows.rows, cols.rows, raw)

    def between_sq(self) -> Tensor:
        """Sum over classes of n_a |m_a - m|^2, float64."""
        return self._sizes @ self._mean_dot.diagonal()[: self.n_classes]

    def rows_of_dots(self, rows: slice) -> Tensor:
        """Centred dot products of consecutive rows with all rows, (b, n), float64."""
        dots = torch.empty(rows.stop - rows.start, self.n, dtype=torch.float64, device=self.device)
        for s in range(0, self.n, BLOCK):  # the product is there from each block's own rows on
            above = slice(max(rows.start, s), min(rows.stop, s + BLOCK))
            if above.start < above.stop:
                part = slice(above.start - rows.start, above.stop - rows.start)
                dots[part, :s] = self.upper[:s, above].T
                dots[part, s:] = self.upper[above, s:]
        of_row, half = self.class_of[rows], self._half
        dots.add_(half[rows].index_select(1, self.class_of))
        dots.add_(half.T.index_select(0, of_row))
        return self._with_near_rows(dots, rows, slice(0, self.n), False)

    def abs_cosine_form(self, weights: Tensor) -> Tensor:
        """``sum_ij v_i v_j |cos(x_i, x_j)|`` for every column v of (n, R) weights, raw: (R,)."""
        v = weights * inverse(self.raw_sq.sqrt()).unsqueeze(1)
        total = torch.zeros(v.shape[1], dtype=torch.float64, device=self.device)
        for rows, cols, dots in self.blocks(raw=True):
            share = (v[rows.rows] * (dots.abs_() @ v[cols.rows])).sum(dim=0)
            total += share if rows is cols else 2 * share
        return total

    def dot_times(self, weights: Tensor) -> Tensor:
        """Centred Gram matrix times (n, R) weights: (n, R)."""
        out = torch.zeros_like(weights)
        for rows, cols, dots in self.blocks():
            out[rows.rows].addmm_(dots, weights[cols.rows])
            if rows is not cols:
                out[cols.rows].addmm_(dots.T, weights[rows.rows])
        return out

    def nearest_other(self, k: int = 1, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the k nearest samples of other classes: squared distances and rows, each (n, k).

        Distances are scaled as the Gram matrix is, and stand in rising order. ``among``, (n,),
        tells which rows may be found.
        """
        best = torch.full((self.n, k), torch.inf, dtype=torch.float64, device=self.device)
        at = torch.zeros(self.n, k, dtype=torch.int64, device=self.device)
        sq = self.centred_sq
        for rows, cols, dots in self.blocks():
            distance = dots.mul_(-2).add_(sq[rows.rows, None]).add_(sq[cols.rows])
            if cols.span.start < rows.span.stop:
                same = self.class_of[rows.rows, None] == self.class_of[cols.rows]
                distance.masked_fill_(same, torch.inf)
            if among is not None:
                distance.masked_fill_(~among[cols.rows], torch.inf)
                distance.masked_fill_(~among[rows.rows, None], torch.inf)
            keep_nearest(best, at, rows.rows, cols.rows.start, distance)
            if rows is not cols:
                keep_nearest(best, at, cols.rows, rows.rows.start, distance.T)
        return best.clamp_(min=0), at

    # ---- where the Gram matrix cancels ----------------------------------------------------------

    def measure_near_rows(self) -> None:
        """Measure again the rows near the origin or the mean, whose cosines cancellation spoils.

        ``c_i.c_j`` is off by a share of ``|c_i||c_j|``, which may exceed ``|x_i||x_j|``. At most
        256 rows, of n products in float64 each; costs two more readings of the columns.
        """
        raw_sq = self.raw_sq.masked_fill(self.zero_rows, torch.inf)  # cosine 0 as it is
        share = torch.minimum(raw_sq, self.centred_sq) / self.residual_sq
        share.masked_fill_(self.residual_sq == 0, torch.inf)
        rows = share.argsort()[: int((share < _NEAR).sum().clamp(max=_MOST_NEAR))]
        if not len(rows):
            return
        tables = {raw: self._exact_dots(rows, raw=raw) for raw in (False, True)}
        at = torch.arange(len(rows), device=self.device)
        self.centred_sq[rows] = tables[False][at, rows]
        self.raw_sq[rows] = tables[True][at, rows]
        self._near = rows.tolist(), tables

    def _with_near_rows(self, dots: Tensor, rows: slice, cols: slice, raw: bool) -> Tensor:
        if self._near is not None:
            near, tables = self._near
            for k, row in enumerate(near):
                if rows.start <= row < rows.stop:
                    dots[row - rows.start] = tables[raw][k, cols]
                if cols.start <= row < cols.stop:
                    dots[:, row - cols.start] = tables[raw][k, rows]
        return dots

    def unresolved(self, sq_distance: Tensor, at: Tensor, *, per_class: bool) -> Tensor:
        """Rows whose nearest distance the Gram matrix cannot give to a relative 1e-5.

        ``x^2 + y^2 - 2xy`` cancels where two samples of different classes nearly coincide. With
        ``per_class`` only rows that may hold their class's smallest distance count.
        """
        residual = self.residual_sq.sqrt()
        # No sample of a larger residual than this is as near, by the triangle inequality.
        means = self._mean_dot.diagonal()[: self.n_classes].max().sqrt()
        reach = (sq_distance.sqrt() + residual + 2 * means).clamp(max=residual.max())
        error = 2 * DOT_ERROR[self.dtype] * residual * reach
        # Without residuals (collapsed classes) what is left is float64 rounding of the norms.
        error = error + 2.0**-48 * (self.centred_sq + self.centred_sq[at])
        open_ = error > 2 * _DISTANCE_TOLERANCE * sq_distance
        if per_class:
            least = torch.full((self.n_classes,), torch.inf, dtype=error.dtype, device=self.device)
            least.scatter_reduce_(0, self.class_of, sq_distance + error, "amin")
            open_ &= sq_distance - error <= least[self.class_of]
        return open_.nonzero().flatten()

    def refine(self, rows: Tensor) -> Tensor:
        """Squared distance of each of ``rows`` to its nearest of another class, (len(rows),).

        Found in float64, the few nearest then measured; costs two more readings of the columns.
        """
        nearest = []
        for part in rows.split(2 * BLOCK):
            distance = self.exact_sq_distances(part)
            distance.masked_fill_(self.class_of[part, None] == self.class_of, torch.inf)
            found, at = distance.topk(min(_FEW, self.n), dim=1, largest=False)
            nearest.append(self.measure(part, at).masked_fill_(found.isinf(), torch.inf).amin(1))
        return torch.cat(nearest)

    def exact_sq_distances(self, rows: Tensor) -> Tensor:
        """Squared distances of (m,) rows to all, from products in float64: (m, n)."""
        dots = self._exact_dots(rows, raw=False)
        return dots.mul_(-2).add_(self.centred_sq[rows, None]).add_(self.centred_sq)

    def measure(self, rows: Tensor, at: Tensor) -> Tensor:
        """Squared distances from (m,) ``rows`` to (m, k) rows ``at``, by difference: (m, k)."""
        total = torch.zeros(at.shape, dtype=torch.float64, device=self.device)
        rows, at = self.order[rows], self.order[at]
        with exact_arithmetic(self.device):
            for piece in self.columns():
                for s in range(0, len(rows), BLOCK):
                    left = piece[rows[s : s + BLOCK]].double()
                    for k in range(at.shape[1]):
                        right = piece[at[s : s + BLOCK, k]].double()
                        total[s : s + BLOCK, k] += (left - right).square_().sum(dim=1)
                del piece
        return total

    def _exact_dots(self, rows: Tensor, *, raw: bool) -> Tensor:
        """Dot products of ``rows`` with all rows in float64, (len(rows), n), from the columns."""
        dots = torch.zeros(len(rows), self.n, dtype=torch.float64, device=self.device)
        with exact_arithmetic(self.device):
            for piece in self.columns():
                mean = sum(part.double().sum(dim=0) for part in piece.split(BLOCK)) / self.n
                shift = torch.zeros_like(mean) if raw else mean
                left = piece[self.order[rows]].double() - shift
                for block in self._blocks:
                    right = piece[self.order[block.rows]].double() - shift
                    dots[:, block.rows].addmm_(left, right.T)
                del piece
        return dots


def residual_gram(
    columns: Columns, samples: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Gram matrix of one class about its mean, (m, m), from slices of its columns."""
    gram = torch.zeros(samples, samples, dtype=dtype, device=device)
    with exact_arithmetic(device):
        for piece in columns():
            exact = piece.double()
            centred = exact.sub_(exact.mean(dim=0)).to(dtype)
            gram.addmm_(centred, centred.T)
            del piece, exact, centred
    return gram.double()
