"""ClassGram: the one Gram matrix of a layer's sample, and what can be read off it by blocks.

From every sample its class mean is subtracted, ``x = c + m``, and only ``C C'`` (``c`` the rows of
``C``) is an n x n product. What the means contribute is of rank two per pair of classes. It is
added in float64, block by block, so that neither a common offset nor collapsed classes cost
digits: ``x_i.x_j = c_i.c_j + c_i.m_b + m_a.c_j + m_a.m_b``.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from geomkd.common.checks import Classes, as_classes, as_features, check_rows_finite
from geomkd.geometry.class_sums import Block, ClassSums
from geomkd.geometry.columns import (
    Columns,
    column_slices,
    exact_dots,
    exact_sq_distances,
    sq_differences,
)
from geomkd.geometry.neighbours import (
    Neighbours,
    Tile,
    nearest_of,
    searched_again,
    smallest,
    unsure,
)
from geomkd.geometry.precision import BLOCK, DOT_ERROR, inverse, scale_of

_NEAR = 2.0**-8  # rows of a squared norm below this share of |c_i|^2 are measured again
_MOST_NEAR = 256  # of them at the most: two tables of n float64 a row


class ClassGram:
    """Gram matrix of n samples in C classes, rows sorted by class.

    Built by `ClassGram.of` from an (n, d) tensor, or by `ClassGram.from_columns` from slices of its
    columns, so that a layer larger than memory needs n x n numbers and one slice at a time.

    Attributes
    ----------
    columns : callable
        What ``sums`` were added up of, to be read again where they cancel.
    scale : float
        Power of two that the features were multiplied by; distances and norms are divided by it.
    upper : Tensor, shape (n, n)
        Gram matrix of the class-centred samples, on and above the diagonal blocks.
    order : Tensor, shape (n,)
        Row of the features that each sorted row is.
    residual_sq, centred_sq, raw_sq : Tensor, shape (n,)
        Squared norms of the samples about their class's mean, the mean of all, 0; float64.
    zero_rows : Tensor, shape (n,)
        True for samples whose features are all exactly zero.
    between_sq : Tensor, shape ()
        Sum over classes of n_a |m_a - m|^2, float64.
    dim : int
        Number of features, d.

    Notes
    -----
    Cost: n^2 d flops (half of a plain product), n^2 numbers, and O(n d C) in float64.
    "Centred" below means: minus the mean of all rows; "raw": as they came.
    """

    def __init__(self, sums: ClassSums, columns: Columns, scale: float = 1.0) -> None:
        self.columns, self.scale, self._near = columns, scale, None
        self.classes, self.dtype, self.dim = sums.classes, sums.dtype, sums.dim
        self.order, self.class_of, self.spans, self._blocks = sums.rows
        self.n, self.n_classes, self.device = len(self.order), len(self.spans), self.order.device
        self.upper, self.residual_sq = sums.upper, sums.residual_sq
        self.dot_error = DOT_ERROR[self.dtype]
        self.upper.diagonal().copy_(self.residual_sq)
        self.zero_rows = sums.largest == 0
        c, own = self.n_classes, self.class_of
        mean_dot, overall = sums.mean_dot[:c, :c], sums.mean_dot[:c, c]
        mean_sq = mean_dot.diagonal()
        self.between_sq, self.apart = sums.sizes @ mean_sq, mean_sq.max().sqrt()
        # x_i.x_j (centred) = c_i.c_j + half_i[b] + half_j[a]; raw adds shift_i + shift_j.
        self._half = sums.residual_dot[:, :c] + mean_dot.index_select(0, own) / 2
        to_overall = sums.residual_dot[:, c] + overall.index_select(0, own)
        self._shift = to_overall + sums.mean_dot[c, c] / 2
        to_own = sums.residual_dot[:, :c].gather(1, own.unsqueeze(1)).squeeze(1)
        self.centred_sq = (self.residual_sq + 2 * to_own + mean_sq[own]).clamp_(min=0)
        self.raw_sq = (self.centred_sq + 2 * self._shift).clamp_(min=0)
        self.raw_sq.masked_fill_(self.zero_rows, 0.0)

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> Self:
        """Gram matrix of (n, ...) features with (n,) labels, both checked."""
        x = as_features(features)
        classes = as_classes(labels, len(x), x.device)
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        return cls.from_columns(lambda: column_slices(x), classes, dtype)

    @classmethod
    def from_columns(
        cls, columns: Columns, classes: Classes, dtype: torch.dtype, scale: float = 1.0
    ) -> Self:
        """Gram matrix of features that ``columns()`` yields in (n, width) slices.

        ``columns`` is called again where numbers must be looked at once more: of features whose
        squares leave ``dtype``, of rows that nearly vanish, in `refine` and `measure`.
        """

        def scaled() -> Iterator[Tensor]:
            for piece in columns():
                yield piece * more
                del piece  # before the next slice is made

        sums, read = ClassSums.over(columns, classes, dtype), columns
        check_rows_finite(sums.largest, sums.rows.order)
        more = float(scale_of(sums.largest, dtype))
        if more != 1.0:
            del sums
            sums, read = ClassSums.over(scaled, classes, dtype), scaled
        gram = cls(sums, read, scale * more)
        if gram._measure_near_rows() > _MOST_NEAR and dtype is torch.float32:
            del sums, gram  # too many to measure one by one
            return cls.from_columns(read, classes, torch.float64, scale * more)
        return gram

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

    def blocks(self, *, raw: bool = False) -> Iterator[tuple[Block, Block, Tensor]]:
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

    def nearest_other(self, k: int = 1, among: Tensor | None = None) -> Neighbours:
        """Find the k nearest samples of other classes, (n, k), as products give them.

        Distances are scaled as the Gram matrix is, and stand in rising order. ``among``, (n,),
        tells which rows may be found.
        """
        sq, at = nearest_of(self._distances_to_others(among), self.n, k, self.centred_sq)
        return Neighbours(sq.clamp_(min=0), at)

    @cached_property
    def nearest_of_others(self) -> Neighbours:
        """The nearest sample of another class to each, (n, 1), as products give it."""
        return self.nearest_other()

    def nearest_others_of(self, rows: Tensor, k: int) -> Neighbours:
        """Find the k nearest of other classes of (m,) rising rows: (m, k), the first to 1e-5."""
        found = []
        for some, dots in self._dots_of(rows):
            sq = dots.mul_(-2).add_(self.centred_sq[some, None]).add_(self.centred_sq)
            same = self.class_of[some, None] == self.class_of
            found.append(smallest(sq.masked_fill_(same, torch.inf), k))
        sq, at = (torch.cat(parts) for parts in zip(*found, strict=True))
        sq.clamp_(min=0)
        open_ = unsure(self, Neighbours(sq[:, :1], at[:, :1]), rows)[0].nonzero()[:, 0]
        if len(open_):
            sq[open_] = self.measure(rows[open_], at[open_])
        return Neighbours(sq, at)

    def _dots_of(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some of (m,) rising rows, and their centred dot products with all rows, (b, n)."""
        counts = (rows // BLOCK).bincount(minlength=len(self._blocks)).tolist()
        for own, some in zip(self._blocks, rows.split(counts), strict=True):
            dots = torch.empty(len(some), self.n, dtype=torch.float64, device=self.device)
            at, half, upper = some - own.rows.start, self._half[some], self.upper
            for cols in self._blocks if len(some) else ():
                below = cols.rows.start < own.rows.start
                rest = upper[cols.rows, own.rows].T[at] if below else upper[some, cols.rows]
                left = torch.cat([half[:, cols.span], own.hot[at]], 1)
                right = torch.cat([cols.hot, self._half[cols.rows, own.span]], 1)
                dots[:, cols.rows].copy_(rest).addmm_(left, right.T)
            for k, row in enumerate(self._near[0] if self._near else ()):
                table = self._near[1][False][k]
                dots[some == row] = table
                dots[:, row] = table[some]
            yield some, dots

    def _distances_to_others(self, among: Tensor | None) -> Iterator[Tile]:
        sq = self.centred_sq
        for rows, cols, dots in self.blocks():
            distance = dots.mul_(-2).add_(sq[rows.rows, None]).add_(sq[cols.rows])
            if cols.span.start < rows.span.stop:
                same = self.class_of[rows.rows, None] == self.class_of[cols.rows]
                distance.masked_fill_(same, torch.inf)
            if among is not None:
                distance.masked_fill_(~among[cols.rows], torch.inf)
                distance.masked_fill_(~among[rows.rows, None], torch.inf)
            yield rows.rows, cols.rows, distance

    # ---- where the Gram matrix cancels ----------------------------------------------------------

    def _measure_near_rows(self) -> int:
        """Measure again the rows near the origin or the mean, whose cosines cancellation spoils.

        ``c_i.c_j`` is off by a share of ``|c_i||c_j|``, which may exceed ``|x_i||x_j|``. At most
        256 rows, of n products in float64 each; costs two more readings of the columns. Returns how
        many there are; where they are more, in float32 nothing is measured.
        """
        raw_sq = self.raw_sq.masked_fill(self.zero_rows, torch.inf)  # cosine 0 as it is
        share = torch.minimum(raw_sq, self.centred_sq) / self.residual_sq
        share.masked_fill_(self.residual_sq == 0, torch.inf)
        count = int((share < _NEAR).sum())
        if not count or (count > _MOST_NEAR and self.dtype is torch.float32):
            return count
        rows = share.argsort()[: min(count, _MOST_NEAR)]
        tables = {}
        for raw, norms in ((False, self.centred_sq), (True, self.raw_sq)):
            dots, _ = exact_dots(self.columns, self.order[rows], self.n, raw=raw)
            tables[raw] = dots[:, self.order]
            norms[rows] = tables[raw].gather(1, rows.unsqueeze(1)).squeeze(1)
        self._near = rows.tolist(), tables
        return count

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
        """Rows whose nearest distance, (n,), the Gram matrix cannot give to a relative 1e-5.

        With ``per_class`` only rows that may hold their class's smallest distance count.
        """
        near = Neighbours(sq_distance.unsqueeze(1), at.unsqueeze(1))
        open_, error = (t.squeeze(1) for t in unsure(self, near))
        if per_class:
            least = torch.full_like(error[: self.n_classes], torch.inf)
            least.scatter_reduce_(0, self.class_of, sq_distance + error, "amin")
            open_ &= sq_distance - error <= least[self.class_of]
        return open_.nonzero().flatten()

    def refine(self, rows: Tensor) -> Tensor:
        """Squared distance of each of ``rows`` to its nearest of another class, (len(rows),).

        Found in float64, then measured; costs two more readings of the columns for 512 rows.
        """
        own = self.class_of
        found = searched_again(self, rows, 1, lambda part: own[part, None] == own)
        return found.sq_distance[:, 0]

    def exact_rows(self, rows: Tensor) -> Tensor:
        """Squared distances of (m,) rows to all, from products in float64: (m, n)."""
        return exact_sq_distances(self.columns, self.order[rows], self.n)[:, self.order]

    def measure(self, rows: Tensor, at: Tensor) -> Tensor:
        """Squared distances from (m,) ``rows`` to (m, k) rows ``at``, by difference: (m, k)."""
        return sq_differences(self.columns, self.order[rows], self.order[at])
