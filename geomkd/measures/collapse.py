"""Neural collapse: how near class means and samples are to the geometry that training ends in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import as_classes, as_features, as_tensor, check_finite
from geomkd.geometry.precision import COLUMNS, exact_arithmetic, inverse
from geomkd.geometry.principal import Principal, principal


class NeuralCollapse(NamedTuple):
    """Four measures of collapse; each falls to 0 as a layer collapses.

    Attributes
    ----------
    nc1 : Tensor, shape ()
        Variability within classes: tr(S_w S_b^+) / C.
    nc2_norms : Tensor, shape ()
        Unequal norms of the centred class means: standard deviation over mean.
    nc2_angles : Tensor, shape ()
        Unequal angles between them: mean |cos + 1 / (C - 1)| over pairs.
    nc3 : Tensor, shape ()
        Distance of the head's weight from the class means, squared, each of unit Frobenius norm;
        NaN without a head.
    nc4 : Tensor, shape ()
        Share of samples for which the nearest class mean is not the head's choice; NaN without.
    """

    nc1: Tensor
    nc2_norms: Tensor
    nc2_angles: Tensor
    nc3: Tensor
    nc4: Tensor


def neural_collapse(
    features: Any, labels: Any, *, head_weight: Any = None, head_bias: Any = None
) -> NeuralCollapse:
    """Neural collapse of a layer, as Papyan, Han and Donoho measured it.

    Parameters
    ----------
    features : Tensor or ndarray, shape (n, ...)
        Flattened to (n, d); any floating-point type and device.
    labels : Tensor or ndarray, shape (n,) or (n, C)
        Integers, or one-hot or score rows whose argmax is taken.
    head_weight : Tensor or ndarray, shape (K, d), optional
        Weight of the linear layer that reads the features. Row k is of the class labelled k, so
        labels are then 0 ... K - 1; classes without a sample are left out of ``nc3``.
    head_bias : Tensor or ndarray, shape (K,), optional
        Its bias; zero where not given.

    Returns
    -------
    NeuralCollapse
        Of 0-d float64 tensors on the features' device.

    Raises
    ------
    TypeError, ValueError
        What is not as above; fewer than two classes, or a class of fewer than two samples.

    Notes
    -----
    With class means m_c, their mean m (classes weigh the same, whatever their sizes) and samples
    x_i (samples weigh the same): S_b = mean_c (m_c - m)(m_c - m)', S_w = mean_i (x_i - m_c(i))
    (x_i - m_c(i))'. The standard deviation of ``nc2_norms`` divides by C - 1. With M the rows
    m_c - m and W the head's, ``nc3`` = ||W/||W||_F - M/||M||_F||_F^2, between 0 and 4.

    The pseudo-inverse S_b^+ is taken on the span of the centred means, at most C - 1 dimensions,
    found in float64. Directions with less than max(n, d) eps of the sample's largest variance are
    rounding and are dropped: inverted, they would swamp all others. Class means that depend on
    each other thus lose directions, and variance within classes along these is not counted. Where
    all class means are equal, ``nc1`` is inf, ``nc2`` and ``nc3`` are NaN; where all samples are
    equal, ``nc1`` is NaN as well. A class mean at the mean of all has cosine 0 with every other.

    A small ``nc1`` alone says little: with n - C < d it falls with d, and on training samples it
    measures how long the teacher was trained. Of two classes, ``nc2`` is 0 always. Rotation, shift
    and scale leave ``nc1`` and ``nc2`` as they are; ``nc3`` and ``nc4`` hold for these axes.

    Cost: `principal`, a singular value decomposition of a C x r matrix (r the rank of the sample)
    and 2 n r C multiplications; with a head n d (C + K).

    References
    ----------
    Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep
    learning training", PNAS 117(40), 2020.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.collapse import neural_collapse
    >>> x = torch.eye(3).repeat_interleave(2, dim=0)
    >>> found = neural_collapse(x, torch.tensor([0, 0, 1, 1, 2, 2]), head_weight=torch.eye(3))
    >>> [round(float(value), 4) for value in found]
    [0.0, 0.0, 0.0, 0.367, 0.0]
    """
    x = as_features(features)
    classes = as_classes(labels, len(x), x.device)
    weight, bias = _checked_head(head_weight, head_bias, x, classes.names)
    with exact_arithmetic(x.device):
        found = principal(x)
        of_means = neural_collapse_from(found, classes.index, len(classes.sizes))
        if weight is None:
            return of_means
        rows = torch.tensor(classes.names, device=x.device)
        logits, means = _through_head(x, classes.index, len(rows), weight, bias)
        nearest = rows[_nearest_mean(found.coordinates, classes.index, len(rows))]
        return of_means._replace(
            nc3=torch.where(of_means.nc1.isfinite(), _duality(means, weight[rows]), torch.nan),
            nc4=(nearest != logits.argmax(dim=1)).double().mean(),
        )


def neural_collapse_from(principal: Principal, index: Tensor, n_classes: int) -> NeuralCollapse:
    """``nc1`` and ``nc2`` of principal coordinates, which any rotation leaves as they are."""
    x = principal.coordinates
    means = _class_means(x, index, n_classes)
    centred = means - means.mean(dim=0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    size = max(principal.n, principal.dim)
    floor = size * torch.finfo(x.dtype).eps * principal.sq_singular[:1].sum() / principal.n
    kept = singular.square() / n_classes > floor
    within = ((x - means[index]) @ axes.T).square().mean(dim=0)
    shares = torch.where(kept, within / singular.square(), 0.0)
    varied = torch.where(principal.sq_singular.sum() > 0, torch.inf, torch.nan)
    nc1 = torch.where(kept.any(), shares.sum(), varied)

    norms = torch.linalg.vector_norm(centred, dim=1)
    norms = torch.where(norms.square() / n_classes > floor, norms, 0.0)
    unit = centred * inverse(norms).unsqueeze(1)
    off = (unit @ unit.T + 1 / (n_classes - 1)).abs().fill_diagonal_(0)
    angles = off.sum() / (n_classes * (n_classes - 1))
    spread = norms.std() / norms.mean()
    nan = torch.full_like(nc1, torch.nan)
    of_means = [torch.where(kept.any(), value, nan) for value in (spread, angles)]
    return NeuralCollapse(nc1, *of_means, nan, nan)


def _class_means(x: Tensor, index: Tensor, n_classes: int) -> Tensor:
    hot = (index == torch.arange(n_classes, device=x.device).unsqueeze(1)).to(x.dtype)
    return (hot / hot.sum(dim=1, keepdim=True)) @ x


def _nearest_mean(coordinates: Tensor, index: Tensor, n_classes: int) -> Tensor:
    """Class whose mean is nearest to each sample, the first of equals."""
    means = _class_means(coordinates, index, n_classes)
    return (means.square().sum(dim=1) - 2 * coordinates @ means.T).argmin(dim=1)


def _through_head(
    x: Tensor, index: Tensor, n_classes: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (n, K) and class means (C, d) in float64, a slice of the features at a time."""
    logits, means = bias.double(), []
    for start in range(0, x.shape[1], COLUMNS):
        piece = x[:, start : start + COLUMNS].double()
        logits = logits + piece @ weight[:, start : start + COLUMNS].double().T
        means.append(_class_means(piece, index, n_classes))
    return logits, torch.cat(means, dim=1)


def _duality(means: Tensor, weight: Tensor) -> Tensor:
    """||W/||W|| - M/||M||||^2 of the centred means."""
    parts = []
    for part in (means - means.mean(dim=0), weight.double()):
        part = part * inverse(part.abs().max())  # squares stay within float64
        parts.append(part / torch.linalg.vector_norm(part))
    return (parts[0] - parts[1]).square().sum()


def _checked_head(
    weight: Any, bias: Any, x: Tensor, names: list[int]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if weight is None:
        if bias is not None:
            raise ValueError("head_bias needs head_weight; got a bias alone")
        return None, None
    w = as_features(weight, "head_weight")
    check_finite(w, "head_weight")
    if w.shape[1] != x.shape[1]:
        raise ValueError(f"head_weight must be (K, d), d = {x.shape[1]}; got {tuple(w.shape)}")
    if not 0 <= min(names) <= max(names) < len(w):
        raise ValueError(
            f"labels must be rows of head_weight, 0 ... {len(w) - 1}; "
            f"got {min(names)} ... {max(names)}"
        )
    b = torch.zeros(len(w), device=w.device) if bias is None else as_tensor(bias, "head_bias")
    if b.shape != (len(w),) or not bool(torch.isfinite(b).all()):
        raise ValueError(f"head_bias must be ({len(w)},) and finite; got shape {tuple(b.shape)}")
    for name, part in (("head_weight", w), ("head_bias", b)):
        if part.device != x.device:
            raise ValueError(
                f"{name} must be on the features' device, {x.device}; got {part.device}"
            )
    return w, b
