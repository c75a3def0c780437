"""Scatter between and within classes: Fisher's ratio, and neural collapse.

Collapse is how near class means and samples are to the geometry that training ends in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import as_classes, as_features, as_tensor, check_finite, sums_device
from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import COLUMNS, ZERO_VARIANCE, exact_arithmetic, inverse
from geomkd.geometry.principal import Principal, principal
from geomkd.measures.measure import Measure
from geomkd.measures.null import WithNull, against_null


def fisher_ratio(features: Any, labels: Any, *, null: int = 0, seed: int = 0) -> Tensor | WithNull:
    """Scatter between classes over scatter within: tr S_b / tr S_w.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` and errors as in
    `geomkd.knowledge_quality`.

    Returns
    -------
    Tensor, shape (), or WithNull
        At least 0, float64, on the features' device.

    Notes
    -----
    tr S_b = sum_a n_a abs(m_a - m)^2 and tr S_w = sum_a sum_i abs(x_i - m_a)^2. Inf where all
    classes are single points, 0 where all rows are equal. Pure noise has (C - 1) / (n - C), which
    ``null=`` measures: not 0.

    Cost: as a Gram matrix, n^2 d multiplications; n^2 more a permutation.

    References
    ----------
    Fisher. The use of multiple measurements in taxonomic problems. Annals of Eugenics 7, 1936.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures import fisher_ratio
    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    >>> fisher_ratio(x, torch.tensor([0, 0, 1, 1]))
    tensor(9., dtype=torch.float64)
    """
    gram = ClassGram.of(features, labels)
    with exact_arithmetic(gram.device):
        return against_null(fisher_score(gram), gram.class_of, null, seed)


def fisher_score(gram: ClassGram) -> Callable[[Tensor], Tensor]:
    """`fisher_ratio` as a function of the class indices of a Gram matrix's rows."""
    value = fisher_ratio_from(gram, Draws.all_of(gram.classes.sizes, gram.device))[0]
    names, total = torch.arange(gram.n_classes, device=gram.device), gram.centred_sq.sum()

    def score(index: Tensor) -> Tensor:
        if index is gram.class_of:
            return value
        hot = (index.unsqueeze(1) == names).double()
        between = ((hot * gram.dot_times(hot)).sum(dim=0) / hot.sum(dim=0)).sum()  # about the mean
        return ratio(between, total - between, gram.raw_sq.sum())

    return score


def fisher_ratio_from(gram: ClassGram, draws: Draws) -> Tensor:
    """Ratio tr S_b / tr S_w of each draw, (R,)."""
    if draws.whole:
        parts = gram.between_sq, gram.residual_sq.sum(), gram.raw_sq.sum()
        return ratio(*parts).unsqueeze(0)
    member = draws.member.double()
    within = member.T @ gram.residual_sq
    for a, (s, e) in enumerate(gram.spans):
        part = member[s:e]
        within -= (part * (gram.class_residual_gram(a) @ part)).sum(dim=0) / draws.sizes[a]
    about = (member * gram.dot_times(member)).sum(dim=0) / sum(draws.sizes)
    total = member.T @ gram.centred_sq - about
    return ratio(total - within, within, member.T @ gram.raw_sq)


def ratio(above: Tensor, below: Tensor, raw_sq: Tensor) -> Tensor:
    """Quotient of two sums of squares; 0 where all is rounding, inf where only the lower one is 0.

    ``raw_sq``, the sum of squares about the origin, tells scatter from rounding.
    """
    above, below = above.clamp(min=0), below.clamp(min=0)
    varies = (above > 0) & (above + below > ZERO_VARIANCE * raw_sq)
    return torch.where(varies, above / below, 0.0)


class NeuralCollapse(NamedTuple):
    """Four measures of collapse, 0-d tensors; each falls to 0 as a layer collapses.

    Attributes
    ----------
    nc1
        Variability within classes: tr(S_w S_b^+) / C.
    nc2_norms
        Unequal norms of the centred class means: standard deviation over mean.
    nc2_angles
        Unequal angles between centred class means: mean |cos + 1 / (C - 1)| over pairs.
    nc3
        Distance of the head's weight from the class means, squared, each of unit Frobenius norm;
        NaN without a head.
    nc4
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
    features, labels : Tensor or ndarray, shapes (n, ...) and (n,) or (n, C)
        Floats of any type and device, flattened to (n, d); integers, or exact one-hot rows.
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

    S_b^+ is taken on the span of the centred means, at most C - 1 dimensions. Directions with less
    than max(n, d) eps of the sample's largest variance are rounding and are dropped, and variance
    within classes along these is not counted. Where all class means are equal, ``nc1`` is inf,
    ``nc2`` and ``nc3`` are NaN; where all samples are equal, ``nc1`` is NaN as well. A class mean
    at the mean of all has cosine 0 with every other.

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
        own = _class_means(found.coordinates, classes.index, len(rows))  # in principal coordinates
        sq_distance = own.square().sum(dim=1) - 2 * found.coordinates @ own.T  # but for |x|^2
        nearest = rows[sq_distance.argmin(dim=1)]
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
    b = b.to(sums_device(b.device))
    if b.shape != (len(w),) or not bool(torch.isfinite(b).all()):
        raise ValueError(f"head_bias must be ({len(w)},) and finite; got shape {tuple(b.shape)}")
    for name, part in (("head_weight", w), ("head_bias", b)):
        if part.device != x.device:
            raise ValueError(
                f"{name} must be on the features' device, {x.device}; got {part.device}"
            )
    return w, b


ROWS = (
    Measure("fisher_ratio", "gram", fisher_ratio_from, supervised=True, score=fisher_score),
    Measure(
        "neural_collapse",
        "spectrum",
        lambda *given: neural_collapse_from(*given)[:3],
        supervised=True,
        columns=NeuralCollapse._fields[:3],  # no head is known to score_layers
    ),
)
