"""Principal coordinates of a sample: what spectra and transfer scores of a layer are read from.

A centred sample is, up to a rotation, its n x r principal coordinates (r its rank, at most n - 1):
whatever does not depend on the choice of axes can be computed from them, however wide the layer.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geomkd.common.checks import as_features, check_finite
from geomkd.geometry.columns import Columns, column_slices
from geomkd.geometry.precision import ZERO_VARIANCE, centred, exact_arithmetic, scale_of


class Principal(NamedTuple):
    """Principal coordinates of n samples, float64: dot products and distances are the features'.

    Where squares would leave float64, they are those of the features times ``scale``.
    """

    coordinates: Tensor  # (n, r) centred samples on their principal axes, the widest first
    sq_singular: Tensor  # (r,) n times the variance along each axis: falling, all positive
    dim: int  # features, d
    scale: Tensor | float = 1.0  # a power of two

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.coordinates)


def principal(features: Any, *, center: bool = True) -> Principal:
    """Principal coordinates of (n, ...) features, by way of the smaller of X X' and X' X.

    Rank 0 where all rows are equal. Cost: min(n, d)^2 max(n, d) multiplications in float64 and one
    eigenproblem of size min(n, d).
    """
    x = as_features(features)
    check_finite(x)
    with exact_arithmetic(x.device):
        scale = scale_of(x, torch.float64, beyond=400)  # where squares leave float64
        if x.shape[1] < len(x):
            exact, means_sq = _exact(x, scale, center)
            return _of_narrow(exact, means_sq)._replace(scale=scale)
        square = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        raw_sum = torch.zeros_like(scale)
        for piece in column_slices(x):
            exact, means_sq = _exact(piece, scale, center)
            square.addmm_(exact, exact.T)
            raw_sum = raw_sum + means_sq
        found = of_gram(square, x.shape[1], raw_sum=raw_sum + square.trace())
        return found._replace(scale=scale)


def _of_narrow(exact: Tensor, means_sq: Tensor | float = 0.0) -> Principal:
    """Principal coordinates of (n, d) float64 features as they are, d < n."""
    square = exact.T @ exact
    values, axes = torch.linalg.eigh(square)
    kept = _positive(values, square.trace() + means_sq, len(exact))
    return Principal(exact @ axes[:, kept].flip(1), values[kept].flip(0), exact.shape[1])


def _exact(x: Tensor, scale: Tensor, center: bool) -> tuple[Tensor, Tensor | float]:
    """Features in float64, and the squared norms of the mean that was taken off every row."""
    if not center:
        return x.double() * scale, 0.0
    exact, mean = centred(x, scale)
    return exact, len(x) * mean.square().sum()


def of_gram(gram: Tensor, dim: int, *, raw_sum: Tensor | float = 0.0) -> Principal:
    """Principal coordinates of the n samples behind an (n, n) Gram matrix, float64.

    ``raw_sum``, the sum of the squared norms before centring, tells variance from rounding.
    """
    values, axes = torch.linalg.eigh(gram)
    kept = _positive(values, raw_sum, max(len(gram), dim))
    values = values[kept].flip(0)
    return Principal(axes[:, kept].flip(1) * values.sqrt(), values, dim)


def _positive(values: Tensor, raw_sum: Tensor | float, size: int) -> Tensor:
    """Which eigenvalues are more than rounding."""
    floor = size * torch.finfo(values.dtype).eps * values[-1]
    return (values > floor) & (values.sum() > ZERO_VARIANCE * raw_sum) & (values > 0)


class SubsetGram:
    """Gram matrix of (m,) rows of a layer's features, gathered while its columns are read.

    ``gram``, (m, m), is about the mean of these rows, float64; the ``scale`` that the columns were
    multiplied by is undone.
    """

    seen: Callable[[int], Any] = staticmethod(lambda width: None)  # told how many columns were

    def __init__(self, rows: Tensor, scale: float = 1.0) -> None:
        m, zeros = len(rows), {"dtype": torch.float64, "device": rows.device}
        self.rows, self.scale, self.dim, self._done = rows, scale, 0, False
        self._narrow: list[tuple[Tensor, Tensor]] = []  # of a narrow layer its features, and mean
        self.gram = torch.zeros(m, m, **zeros)
        self._to_mean = torch.zeros(m, **zeros)  # (x_i - mean) . mean
        self._mean_sq = torch.zeros((), **zeros)

    def watching(self, columns: Columns) -> Columns:
        """Return the columns, which on their first reading are gathered from."""

        def watched() -> Iterator[Tensor]:
            for piece in columns():
                if not self._done:
                    self.add(piece)
                yield piece
                del piece  # before the next slice is made
            self._done = True

        return watched

    def add(self, piece: Tensor) -> None:
        """Add (n, width) columns of the features."""
        with exact_arithmetic(self.gram.device):
            exact, mean = centred(piece[self.rows], 1 / self.scale)
            self.gram.addmm_(exact, exact.T)
            self._to_mean += exact @ mean
            self._mean_sq += mean @ mean
            self.dim += piece.shape[1]
            self._narrow = [*self._narrow, (exact, mean)] if self.dim < len(self.rows) else []
        self.seen(piece.shape[1])

    def principal(self, part: Tensor, *, center: bool) -> Principal:
        """Principal coordinates of some of the rows, given by their places."""
        if self.dim < len(part):
            exact, mean = (torch.cat(pieces, dim=-1) for pieces in zip(*self._narrow, strict=True))
            rows = exact[part]
            own = rows.mean(dim=0)
            if center:
                return _of_narrow(rows - own, len(part) * (own + mean).square().sum())
            return _of_narrow(rows + mean)
        gram = self.gram[part][:, part]
        to_mean = self._to_mean[part]
        raw_sum = self._raw_sq()[part].sum()
        if center:
            row = gram.mean(dim=1)
            gram = gram - row.unsqueeze(1) - row + row.mean()
        else:
            gram = gram + to_mean.unsqueeze(1) + to_mean + self._mean_sq
        return of_gram(gram, self.dim, raw_sum=raw_sum)

    def packed(self) -> np.ndarray:
        """Upper triangle of the Gram matrix, float32: what is kept of a layer; 0 if rows equal."""
        i, j = torch.triu_indices(*self.gram.shape, device=self.gram.device)
        varies = self.gram.trace() > ZERO_VARIANCE * self._raw_sq().sum()
        kept = self.gram[i, j] * scale_of(self.gram, beyond=100)  # as float32 may not hold it
        return torch.where(varies, kept, 0.0).float().cpu().numpy()

    def _raw_sq(self) -> Tensor:
        """Squared norms of the rows as they are, (m,)."""
        return self.gram.diagonal() + 2 * self._to_mean + self._mean_sq


def unpacked(packed: np.ndarray, m: int) -> np.ndarray:
    """Gram matrices (L, m, m), float32, from L packed ones."""
    i, j = np.triu_indices(m)
    grams = np.empty((len(packed), m, m), dtype=np.float32)
    grams[:, i, j] = grams[:, j, i] = packed
    return grams
