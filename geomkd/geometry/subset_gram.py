"""The subset of a sample whose Gram matrix is kept: for spectra, transfer scores, and afterwards.

A full spectrum costs n^3, and joint selection needs the Gram matrices of all layers at once. Both
are read off the same at most 1,000 samples of every layer, in float64 while the layer is in hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import Columns
from geomkd.geometry.precision import ZERO_VARIANCE, exact_arithmetic
from geomkd.geometry.principal import Principal, of_gram

MOST = 1000  # samples of the subset


def nested(index: Tensor, sizes: list[int], seed: int) -> list[Tensor]:
    """Rows of every class in a seeded order: the first of each are a smaller sample.

    Examples
    --------
    >>> import torch
    >>> [rows.sort().values for rows in nested(torch.tensor([0, 1, 0, 1]), [2, 2], seed=0)]
    [tensor([0, 2]), tensor([1, 3])]
    """
    generator = torch.Generator().manual_seed(seed)
    own = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    keys = torch.rand(len(index), **own).argsort().to(index.device)
    order = keys[index[keys].argsort(stable=True)]
    return list(order.split(sizes))


def balanced(orders: list[Tensor], samples: int) -> Tensor:
    """Rows of a nested sample of at most ``samples``, equally many a class, rising.

    At least two of every class, even where that is more than ``samples``.
    """
    share = max(2, samples // len(orders))
    return torch.cat([rows[:share] for rows in orders]).sort().values


class SubsetGram:
    """Gram matrix of some rows of a layer's features, gathered while its columns are read.

    Parameters
    ----------
    rows : Tensor, shape (m,)
        Which rows, of the features as they come.
    scale : float
        Power of two that the columns were multiplied by, which is undone.

    Attributes
    ----------
    gram : Tensor, shape (m, m)
        About the mean of these rows, float64.
    dim : int
        Features, d.
    """

    def __init__(self, rows: Tensor, scale: float = 1.0) -> None:
        m, zeros = len(rows), {"dtype": torch.float64, "device": rows.device}
        self.rows, self.scale, self.dim, self._done = rows, scale, 0, False
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
            self._done = True

        return watched

    def add(self, piece: Tensor) -> None:
        """Add (n, width) columns of the features."""
        with exact_arithmetic(self.gram.device):
            exact = piece[self.rows].double().div_(self.scale)
            mean = exact.mean(dim=0)
            exact.sub_(mean)
            self.gram.addmm_(exact, exact.T)
            self._to_mean += exact @ mean
            self._mean_sq += mean @ mean
            self.dim += piece.shape[1]

    def principal(self, part: Tensor, *, center: bool) -> Principal:
        """Principal coordinates of some of the rows, given by their places."""
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
        return torch.where(varies, self.gram[i, j], 0.0).float().cpu().numpy()

    def _raw_sq(self) -> Tensor:
        """Squared norms of the rows as they are, (m,)."""
        return self.gram.diagonal() + 2 * self._to_mean + self._mean_sq


def parts_of(index: Tensor, subsamples: int, sweep: Sequence[int], seed: int) -> list[Tensor]:
    """Places in the subset of the draws: all of it, its half-samples, its smaller samples.

    Parameters
    ----------
    index : Tensor, shape (m,)
        Class of each sample in the subset.
    subsamples, seed : int
        Half-samples and their seed.
    sweep : sequence of int
        Smaller samples; of a size that the subset has not, all of it.

    Returns
    -------
    list of Tensor
        Rising places, 1 + subsamples + len(sweep) of them.
    """
    device, sizes = index.device, index.bincount().tolist()
    parts = [torch.arange(len(index), device=device)]
    if subsamples:
        order = torch.argsort(index, stable=True)
        drawn = Draws.halves(sizes, subsamples, seed, device)
        parts += [order[member].sort().values for member in drawn.member.T]
    orders = nested(index, sizes, seed)
    smaller = (balanced(orders, samples) if samples < len(index) else parts[0] for samples in sweep)
    return [*parts, *smaller]


def unpacked(packed: np.ndarray, m: int) -> np.ndarray:
    """Gram matrices (L, m, m), float32, from L packed ones.

    Examples
    --------
    >>> import numpy as np
    >>> unpacked(np.array([[1.0, 2.0, 3.0]]), 2)
    array([[[1., 2.],
            [2., 3.]]], dtype=float32)
    """
    i, j = np.triu_indices(m)
    grams = np.empty((len(packed), m, m), dtype=np.float32)
    grams[:, i, j] = grams[:, j, i] = packed
    return grams
