"""Principal coordinates of a sample: what spectra and transfer scores of a layer are read from.

A centred sample is, up to a rotation, its n x r principal coordinates (r its rank, at most n - 1):
whatever does not depend on the choice of axes can be computed from them, however wide the layer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import as_features, check_finite
from geomkd.geometry.precision import COLUMNS, ZERO_VARIANCE, exact_arithmetic


class Principal(NamedTuple):
    """Principal coordinates of n samples.

    Attributes
    ----------
    coordinates : Tensor, shape (n, r)
        Centred samples on their principal axes, float64, the widest axis first. Dot products and
        distances are those of the features; where squares would leave float64, those of the
        features times a power of two.
    sq_singular : Tensor, shape (r,)
        Squared singular values of the centred sample, falling, all positive: n times the
        population variance along each axis.
    dim : int
        Features, d.
    """

    coordinates: Tensor
    sq_singular: Tensor
    dim: int

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.coordinates)


def principal(features: Any, *, center: bool = True) -> Principal:
    """Principal coordinates of (n, ...) features, by way of the smaller of X X' and X' X.

    Parameters
    ----------
    features : Tensor or ndarray, shape (n, ...)
        Flattened to (n, d); any floating-point type and device.
    center : bool
        Subtract the mean of the rows first.

    Returns
    -------
    Principal
        In float64. Rank 0 where all rows are equal.

    Notes
    -----
    Cost: min(n, d)^2 max(n, d) multiplications in float64 and one eigenproblem of size min(n, d).

    Examples
    --------
    >>> import torch
    >>> from geomkd.geometry.principal import principal
    >>> found = principal(torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    >>> found.sq_singular
    tensor([18.,  2.], dtype=torch.float64)
    """
    x = as_features(features)
    check_finite(x)
    with exact_arithmetic(x.device):
        top = float(x.abs().max())
        extreme = top > 0 and not 2.0**-400 < top < 2.0**400  # squares would leave float64
        scale = 2.0 ** -math.frexp(top)[1] if extreme else 1.0
        wide = x.shape[1] >= len(x)
        square = torch.zeros(2 * (min(x.shape),), dtype=torch.float64, device=x.device)
        if not wide:
            exact = _centred(x, scale, center)
            values, axes = torch.linalg.eigh(square.addmm_(exact.T, exact))
            kept = _positive(values, _raw_sum(x, scale), max(x.shape))
            return Principal(exact @ axes[:, kept].flip(1), values[kept].flip(0), x.shape[1])
        for start in range(0, x.shape[1], COLUMNS):
            exact = _centred(x[:, start : start + COLUMNS], scale, center)
            square.addmm_(exact, exact.T)
        return of_gram(square, x.shape[1], raw_sum=_raw_sum(x, scale))


def of_gram(gram: Tensor, dim: int, *, raw_sum: Tensor | float = 0.0) -> Principal:
    """Principal coordinates of the n samples behind an (n, n) Gram matrix, float64.

    ``raw_sum``, the sum of the squared norms before centring, tells variance from rounding.
    """
    values, axes = torch.linalg.eigh(gram)
    kept = _positive(values, raw_sum, max(len(gram), dim))
    values = values[kept].flip(0)
    return Principal(axes[:, kept].flip(1) * values.sqrt(), values, dim)


def _centred(x: Tensor, scale: float, center: bool) -> Tensor:
    exact = x.double() * scale
    return exact.sub_(exact.mean(dim=0)) if center else exact


def _raw_sum(x: Tensor, scale: float) -> Tensor:
    pieces = (x[:, s : s + COLUMNS].double() * scale for s in range(0, x.shape[1], COLUMNS))
    return sum(piece.square().sum() for piece in pieces)


def _positive(values: Tensor, raw_sum: Tensor | float, size: int) -> Tensor:
    """Which eigenvalues are more than rounding."""
    floor = size * torch.finfo(values.dtype).eps * values[-1]
    return (values > floor) & (values.sum() > ZERO_VARIANCE * raw_sum) & (values > 0)
