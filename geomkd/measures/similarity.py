"""How alike two layers see the same samples: centred kernel alignment, Procrustes distance.

Linear kernel throughout. Of an n x n Gram matrix only the triangle above the diagonal is computed,
in blocks of rows; of two narrow layers only their d x d' products are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from geomkd.common.checks import as_features, check_finite
from geomkd.geometry.columns import column_slices
from geomkd.geometry.precision import BLOCK, ZERO_VARIANCE, centred, exact_arithmetic, scale_of
from geomkd.geometry.principal import Principal, principal
from geomkd.measures.measure import Measure

_AT_ONCE = 2**18  # float64 numbers of all layers' rows multiplied at a time: 2 MB stay in cache
_NOISE = 4  # roundings that a dot product may be off by


class Triangle(NamedTuple):
    """Gram matrix of n centred samples, above its diagonal."""

    # Dot products of b <= 512 samples with themselves and all later ones, (b, n - start) each (some
    # of those below the diagonal are left 0); float32, or float64 for float64 features.
    rows: list[Tensor]
    sq: Tensor  # (n,) squared norms, the diagonal, float64
    floor: Tensor  # squared Frobenius norm below which it is rounding; infinite without variance


class Products(NamedTuple):
    """Inner products of the Gram matrices of L and M layers, float64; n (n - 3) HSIC if debiased.

    0 where a layer's with itself is no more than rounding.
    """

    xy: Tensor  # (L, M) between the two sets of layers
    xx: Tensor  # (L,) of each layer with itself
    yy: Tensor  # (M,)

    def plus(self, other: Self) -> Self:
        """Add those of another batch."""
        return Products(*(one + more for one, more in zip(self, other, strict=True)))

    def ratio(self) -> Tensor:
        """CKA of every pair of layers, (L, M); 0 where one of the two has nothing to compare."""
        norm = self.xx.sqrt()[:, None] * self.yy.sqrt()
        return torch.where(norm > 0, self.xy / norm, 0.0)


def cka(x: Any, y: Any, *, debiased: bool = True) -> Tensor:
    """Centred kernel alignment, with linear kernels, of two layers' features of the same samples.

    Parameters
    ----------
    x, y : Tensor or ndarray, shape (n, ...)
        Features of the same n samples in the same order, on one device. Flattened; of any
        floating-point type.
    debiased : bool
        Take the unbiased estimate of HSIC; without, the value grows with d / n even for layers
        that have nothing in common.

    Returns
    -------
    Tensor, shape ()
        At most 1, float64. Not below 0 if biased; debiased it scatters about 0 for independent
        layers. 0 where a layer has no variance, or, debiased, no more than one sample that stands
        apart or n points at equal distances (HSIC of the layer with itself is 0).

    Raises
    ------
    TypeError, ValueError
        Not features; NaN or Inf; sets of different n or devices; fewer than 4 samples (2, biased).

    Notes
    -----
    ``HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with ``K = XX'``, ``L = YY'``. Biased, HSIC is the
    sum of K_ij L_ij over centred K, L. Debiased, after Song et al., with k, l the diagonals of the
    centred K, L, whose rows sum to 0::

        n (n - 3) HSIC = sum_{i != j} K_ij L_ij + sum(k) sum(l) / ((n - 1) (n - 2))
                         - 2 k.l / (n - 2)

    Narrow layers cost 6 n d^2 flops in float64; where 3 (d + d') exceeds n (1.5 (d + d') for
    float64 features), n^2 (d + d') in the features' own precision and n^2 numbers. CKA is dominated
    by the directions of large variance, and unchanged by rotation, isotropic scale and translation,
    but not by the scale of single features.

    References
    ----------
    Kornblith et al., Similarity of neural network representations revisited, ICML 2019.
    Song et al., Supervised feature selection via dependence estimation, ICML 2007.
    Murphy et al., Correcting biased centered kernel alignment measures, 2024 (arXiv 2405.01012).

    Examples
    --------
    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(100, 4096, generator=generator)
    >>> y = torch.randn(100, 4096, generator=generator)
    >>> print(f"{cka(x, y, debiased=False):.3f}")
    0.976
    >>> bool(cka(x, y).abs() < 0.02)
    True
    >>> print(f"{cka(x, 3 * x + 1):.4f}")
    1.0000
    """
    x, y = _checked(x, y, least=4 if debiased else 2)
    with exact_arithmetic(x.device):
        return products_of([x], [y], debiased).ratio()[0, 0]


def cka_from(gram_x: Tensor, gram_y: Tensor, *, debiased: bool = True) -> Tensor:
    """CKA from the Gram matrices of two layers, (..., n, n), centred or not, one a draw.

    Entries are taken to float64 and centred there, where a Gram matrix of features far from the
    origin has lost digits before. At least 4 samples if debiased. See `cka`.
    """
    u, v = (_dense(gram, debiased) for gram in (gram_x, gram_y))
    norm = _dense_norm(u, gram_x) * _dense_norm(v, gram_y)
    return torch.where(norm > 0, (u * v).sum((-2, -1)) / norm, 0.0)


def procrustes_distance(x: Any, y: Any) -> Tensor:
    """Distance of two layers' features after the best rotation of one onto the other.

    ``x``, ``y``, (n, ...) each, and errors as in `cka`; here 2 samples are enough.

    Returns
    -------
    Tensor, shape ()
        Between 0 (equal but for rotation, reflection, isotropic scale, translation) and sqrt(2),
        float64. A layer without variance counts as X = 0: distance 1 from any other, 0 from
        another of its kind.

    Notes
    -----
    ``sqrt(|X|^2 + |Y|^2 - 2 |X'Y|_*)`` of centred X, Y of Frobenius norm 1, ``|.|_*`` the sum of
    the singular values; a metric. With ``X'Y = USV'`` it is computed as what is left, ``|XU -
    YV|^2`` and what of X and Y lies outside U and V, so that small distances keep their digits (to
    1e-8 where d > n). Cost: two eigenproblems of size min(n, d) and singular vectors of such a
    matrix. No chance level is taken off: independent layers come closer as d / n grows.

    References
    ----------
    Williams et al., Generalized shape metrics on neural representations, NeurIPS 2021.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> print(f"{procrustes_distance(x, 5 * x.flip(1) + 2):.6f}")
    0.000000
    """
    x, y = _checked(x, y, least=2)
    with exact_arithmetic(x.device):
        return procrustes_from(principal(x), principal(y))


def procrustes_from(x: Principal, y: Principal) -> Tensor:
    """Procrustes distance from the principal coordinates of two layers; see the public function."""
    x, y = _unit(x), _unit(y)
    if 0 in (x.shape[1], y.shape[1]):
        return (x.square().sum() + y.square().sum()).sqrt()
    u, _, vh = torch.linalg.svd(x.T @ y, full_matrices=False)
    in_x, in_y = x @ u, y @ vh.T
    rest = (in_x - in_y).square().sum()
    if x.shape[1] > y.shape[1]:
        rest = rest + (x - in_x @ u.T).square().sum()
    if y.shape[1] > x.shape[1]:
        rest = rest + (y - in_y @ vh).square().sum()
    return rest.sqrt()


# ---- inner products of Gram matrices -------------------------------------------------------------


def products_of(xs: Sequence[Tensor], ys: Sequence[Tensor], debiased: bool) -> Products:
    """Inner products of layers' Gram matrices from (n, d) features, by the cheaper side."""
    n = len(xs[0])
    widest = max(x.shape[1] for x in xs) + max(y.shape[1] for y in ys)
    weight = 1 if all(t.dtype is torch.float64 for t in (*xs, *ys)) else 2  # float64 at half speed
    if 3 * weight * widest <= 2 * n:
        return _narrow_products(xs, ys, debiased)
    left = [triangle_of(x, scale_of(x)) for x in xs]
    right = left if ys is xs else [triangle_of(y, scale_of(y)) for y in ys]
    return triangle_products(left, right, debiased)


def triangle_of(x: Tensor, scale: Tensor) -> Triangle:
    """Triangle of (n, d) features times a power of two, from slices of their columns."""
    n, dtype = len(x), torch.float64 if x.dtype is torch.float64 else torch.float32
    starts = range(0, n, BLOCK)
    rows = [
        torch.zeros(min(BLOCK, n - start), n - start, dtype=dtype, device=x.device)
        for start in starts
    ]
    sq, mean_sq = torch.zeros(n, dtype=scale.dtype, device=x.device), torch.zeros_like(scale)
    for columns in column_slices(x):
        piece, mean = centred(columns, scale, dtype)
        mean_sq = mean_sq + mean.square().sum()
        sq += torch.linalg.vector_norm(piece, dim=1).double().square()
        for start, block in zip(starts, rows, strict=True):
            _add_products(block, piece[start:])
    noise = (_NOISE * torch.finfo(dtype).eps * sq.sum()).square()
    return Triangle(rows, sq, torch.where(_varies(sq, mean_sq), noise, torch.inf))


def _add_products(block: Tensor, piece: Tensor) -> None:
    """Add the products of the first b rows with all, but for most of those below the diagonal."""
    b, half = len(block), BLOCK // 2
    for start in range(0, b, half):
        rows = slice(start, start + half)
        block[rows, start:b].addmm_(piece[rows], piece[start:b].T)
    if len(piece) > b:
        block[:, b:].addmm_(piece[:b], piece[b:].T)


def triangle_products(
    xs: Sequence[Triangle], ys: Sequence[Triangle], debiased: bool = True
) -> Products:
    """Inner products of the layers' Gram matrices, all of the same n samples."""
    k, l = (torch.stack([t.sq for t in side]) for side in (xs, ys))  # noqa: E741
    xy = torch.zeros(len(xs), len(ys), dtype=k.dtype, device=k.device)
    xx, yy = torch.zeros_like(xy[:, 0]), torch.zeros_like(xy[0])
    for block, rows in enumerate(xs[0].rows):
        step = max(1, _AT_ONCE // (rows.shape[1] * (len(xs) + len(ys))))
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            left = _upper(xs, block, part, debiased)
            right = left if ys is xs else _upper(ys, block, part, debiased)
            xy.addmm_(left, right.T)
            xx += _own(left)
            yy += _own(right)
    found = [2 * xy, 2 * xx, 2 * yy]
    if not debiased:
        diagonal = k @ l.T, k.square().sum(dim=1), l.square().sum(dim=1)
        found = [both + own for both, own in zip(found, diagonal, strict=True)]
    floors = (torch.stack([t.floor for t in side]) for side in (xs, ys))
    return _above(*found, *floors)


def _upper(side: Sequence[Triangle], block: int, part: slice, debiased: bool) -> Tensor:
    """Take some rows of a block above the diagonal, float64, flattened to one row a layer."""
    n, first = len(side[0].sq), side[0].rows[block][part]
    exact = first.new_empty(len(side), *first.shape, dtype=torch.float64)
    for t, own in zip(side, exact, strict=True):
        own.copy_(t.rows[block][part])
        if debiased:
            # The rows of a centred matrix sum to 0: without the diagonal to -sq, which U-centring
            # takes off here, entry by entry, as later one large sum would cancel another.
            sq = t.sq[block * BLOCK :]
            own.add_((sq - t.sq.sum() / (n - 1)) / (n - 2)).add_(sq[part, None] / (n - 2))
    return exact.triu_(1 + part.start).flatten(1)


def _own(rows: Tensor) -> Tensor:
    return torch.bmm(rows[:, None], rows[:, :, None]).flatten()


def _narrow_products(xs: Sequence[Tensor], ys: Sequence[Tensor], debiased: bool) -> Products:
    """Inner products of Gram matrices as |X'Y|^2, all in float64."""
    left = [_Narrow.of(x) for x in xs]
    right = left if ys is xs else [_Narrow.of(y) for y in ys]
    n = len(xs[0])

    def inner(one: _Narrow, other: _Narrow) -> Tensor:
        value = (one.exact.T @ other.exact).square().sum()
        if debiased:
            share = one.sq.sum() * other.sq.sum() / ((n - 1) * (n - 2))
            value = value - one.sq @ other.sq * (n / (n - 2)) + share
        return value

    xy = torch.stack([torch.stack([inner(one, other) for other in right]) for one in left])
    xx, yy = (torch.stack([inner(one, one) for one in side]) for side in (left, right))
    floors = (torch.stack([one.floor for one in side]) for side in (left, right))
    return _above(xy, xx, yy, *floors)


class _Narrow(NamedTuple):
    """Centred features in float64, their squared norms, and what is rounding as in `Triangle`."""

    exact: Tensor
    sq: Tensor
    floor: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Self:
        exact, mean = centred(x, scale_of(x))
        sq = torch.linalg.vector_norm(exact, dim=1).square()
        noise = _NOISE * torch.finfo(sq.dtype).eps * sq.sum().square()
        return cls(exact, sq, torch.where(_varies(sq, mean.square().sum()), noise, torch.inf))


def _varies(sq: Tensor, mean_sq: Tensor) -> Tensor:
    return sq.sum() > ZERO_VARIANCE * (sq.sum() + len(sq) * mean_sq)


def _above(xy: Tensor, xx: Tensor, yy: Tensor, floor_x: Tensor, floor_y: Tensor) -> Products:
    """Set to 0 what is no more than rounding."""
    x, y = xx > floor_x, yy > floor_y
    xy = torch.where(x[:, None] & y, xy, 0.0)
    return Products(xy, torch.where(x, xx, 0.0), torch.where(y, yy, 0.0))


def _dense(gram: Tensor, debiased: bool) -> Tensor:
    """Centred Gram matrix, (..., n, n), float64; U-centred (diagonal 0) for the debiased HSIC."""
    n, exact = gram.shape[-1], gram.double()
    if debiased:
        others = 1 - torch.eye(n, dtype=exact.dtype, device=exact.device)
        exact = exact * others
    row = exact.sum(dim=-1, keepdim=True) / (n - 2 if debiased else n)
    total = row.sum(dim=-2, keepdim=True) / (n - 1 if debiased else n)
    exact = exact - row - row.mT + total
    return exact * others if debiased else exact


def _dense_norm(centred: Tensor, gram: Tensor) -> Tensor:
    """Frobenius norm of each matrix, 0 where that is no more than rounding."""
    trace = gram.diagonal(dim1=-2, dim2=-1).double().sum(dim=-1)
    norm = torch.linalg.matrix_norm(centred)
    return torch.where(norm > _NOISE * torch.finfo(gram.dtype).eps * trace, norm, 0.0)


def _unit(x: Principal) -> Tensor:
    norm = torch.linalg.vector_norm(x.coordinates)
    return torch.where(norm > 0, x.coordinates / norm, 0.0)


def _checked(x: Any, y: Any, least: int) -> tuple[Tensor, Tensor]:
    x, y = as_features(x, "x"), as_features(y, "y")
    if len(x) != len(y):
        raise ValueError(f"x and y must hold the same samples; got n = {len(x)} and {len(y)}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device; got {x.device} and {y.device}")
    if len(x) < least:
        raise ValueError(f"at least {least} samples are needed; got n = {len(x)}")
    for features, name in ((x, "x"), (y, "y")):
        if not bool(torch.isfinite(torch.stack(torch.aminmax(features))).all()):
            check_finite(features, name)  # which counts the rows, in more time
    return x, y


ROWS = (Measure("cka_to_last", "kept", cka_from),)
