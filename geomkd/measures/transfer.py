"""Transfer scores: how well a linear or Gaussian reader would do, without training one.

Made for comparing features of the same samples and labels, and for nothing else.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geomkd.common.checks import check_int, check_number
from geomkd.geometry.precision import inverse
from geomkd.geometry.principal import Principal
from geomkd.measures.measure import Measure
from geomkd.measures.null import WithNull, principal_against_null

NOISE_FLOOR = 1e-6  # of a target's mean square: the least noise that logme allows
VARIANCE_FLOOR = 1e-4  # of the mean variance per axis: the least variance of a class in gbc
_GRID = 128  # ratios alpha / beta tried on the way to the largest evidence
_HALVINGS = 28  # of the step between two of them: to 1e-8, of which the evidence sees the square
_BLOCK = 2**16  # numbers in a table of class pairs: stays in cache


def logme(
    features: Any, labels: Any, *, center: bool = False, null: int = 0, seed: int = 0
) -> Tensor | WithNull:
    """Largest log evidence per sample of a Bayesian linear model of the one-hot labels.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` and errors as in
    `geomkd.knowledge_quality`.

    Parameters
    ----------
    center : bool
        Give the model an intercept. Without (as published) features are taken as they are.

    Returns
    -------
    Tensor, shape (), or WithNull
        In nats per sample, any sign, float64, on the features' device.

    Notes
    -----
    For each class the targets y in {0, 1} are modelled as y = F w + e, w ~ N(0, I / alpha),
    e ~ N(0, I / beta), so y ~ N(0, K) with K = I / beta + F F' / alpha. The score is the mean over
    classes of max over alpha, beta of log N(y; 0, K) / n. With s_i the r squared singular values of
    F, u_i its left singular vectors and t = alpha / beta,

        2 log N = n log(beta / 2 pi) - sum_i log(1 + s_i / t) - beta Q(t),
        Q(t) = sum_i (u_i'y)^2 t / (t + s_i) + the square of what of y is outside the span.

    d enters through r alone (the authors' code gives other numbers for n < d).

    Where features reproduce a target exactly (collapsed classes, a repeated row of a wide layer)
    the evidence has no bound: the noise 1 / beta is at least 1e-6 of the target's mean square.
    Where alpha has no bound (no signal, all features zero), the limit is taken. The highest of
    several maxima is found on a grid of t and refined by bisection; the published fixed point need
    not converge (on noise, not in 3,000 updates).

    Without ``center`` the mean of the features stands in for an intercept, and moving them changes
    the score. With it the score is the evidence of the n - 1 contrasts between samples, per
    contrast: the two are not to be compared. Scale and rotation matter to neither.

    Not an accuracy: more and smaller classes score higher at chance (C classes of equal size:
    -log(2 pi / C) / 2 - 1 / 2).

    Cost: `principal`, n r C multiplications and about 250 passes over r C numbers, for each
    permutation again.

    References
    ----------
    You, Liu, Wang, Long. LogME: practical assessment of pre-trained models for transfer learning.
    ICML 2021. You, Liu, Zhang, Wang, Jordan, Long. Ranking and tuning pre-trained models.
    JMLR 23, 2022.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.transfer import logme
    >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    >>> labels = (x[:, 0] > 0).long()
    >>> logme(x, labels) > logme(x[:, 1:], labels)
    tensor(True)
    """
    score = partial(logme_from, center=center)
    return principal_against_null(score, features, labels, null, seed, center=center)


def logme_from(
    principal: Principal, index: Tensor, n_classes: int, *, center: bool = False
) -> Tensor:
    """`logme` of the coordinates as they are; ``center`` where they are about their mean."""
    coordinates = principal.coordinates
    counts = _sums(coordinates.new_ones(principal.n, 1), index, n_classes).squeeze(1)
    mean = counts / principal.n if center else torch.zeros_like(counts)  # of each target
    n, power = principal.n - center, counts * (1 - mean)
    best = 0.5 * (torch.log(n / power) - 1 - math.log(2 * math.pi))  # alpha to infinity
    if len(principal.sq_singular):
        unit = coordinates / principal.sq_singular.sqrt()
        along = _sums(unit, index, n_classes).T - unit.sum(dim=0).unsqueeze(1) * mean
        outside = (power - along.square().sum(dim=0)).clamp(min=0)
        largest = principal.sq_singular[0]  # t in its units: as free of scale as the score
        found = _Evidence(principal.sq_singular / largest, along.square(), outside, power, n)
        best = torch.maximum(best, found.largest() / n)
    return best.mean()


def _sums(values: Tensor, index: Tensor, n_classes: int) -> Tensor:
    """Sum (n, r) values over each class: (C, r)."""
    return values.new_zeros(n_classes, values.shape[1]).index_add_(0, index, values)


class _Evidence:
    """Log evidence of C targets as a function of t = alpha / beta, at the best beta of each t."""

    def __init__(self, s: Tensor, sq_along: Tensor, outside: Tensor, power: Tensor, n: int) -> None:
        self.s, self.sq_along, self.n = s.unsqueeze(1), sq_along, n
        self.outside = outside if len(s) < n else torch.zeros_like(outside)
        self.most_beta = n / (NOISE_FLOOR * power)

    def largest(self) -> Tensor:
        """Maximum over t for each target, (C,)."""
        # Steps of at most 0.6 in log t, over all t at which a target of more than the least noise
        # or less than pure noise can have its maximum.
        low, high = self.s[-1].log() - 28, self.s[0].log() + 14
        share = torch.linspace(0, 1, _GRID, dtype=self.s.dtype, device=self.s.device)
        log_t = low + (high - low) * share
        left = self.s / log_t.exp()  # (r, G)
        misfit = (1 / (1 + left)).T @ self.sq_along + self.outside
        on_grid = self._at(misfit, torch.log1p(left).sum(dim=0).unsqueeze(1))
        top, at = on_grid.max(dim=0)
        low, high = log_t[(at - 1).clamp(min=0)], log_t[(at + 1).clamp(max=_GRID - 1)]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            up = self._rises(middle.exp())
            low, high = torch.where(up, middle, low), torch.where(up, high, middle)
        left = self.s / middle.exp()
        misfit = (self.sq_along / (1 + left)).sum(dim=0) + self.outside
        return torch.maximum(top, self._at(misfit, torch.log1p(left).sum(dim=0)))

    def _at(self, misfit: Tensor, log_det: Tensor) -> Tensor:
        beta = torch.minimum(self.n / misfit, self.most_beta)
        return 0.5 * (self.n * torch.log(beta / (2 * math.pi)) - log_det - beta * misfit)

    def _rises(self, t: Tensor) -> Tensor:
        """Whether the evidence grows with t, or the update of You et al. raises t: the same."""
        shrunk = t / (t + self.s)
        kept = 1 - shrunk
        gamma = kept.sum(dim=0)
        left = self.sq_along * shrunk
        weight = (left * kept).sum(dim=0)  # t |m|^2
        residual = (left * shrunk).sum(dim=0) + self.outside  # |y - F m|^2
        unfitted = self.n - len(self.s) + shrunk.sum(dim=0)  # n - gamma
        free = gamma * residual > unfitted * weight
        bound = gamma > self.most_beta * weight
        return torch.where(self.n < self.most_beta * (residual + weight), free, bound)


def h_score(
    features: Any,
    labels: Any,
    *,
    shrinkage: str | float = "ledoit_wolf",
    null: int = 0,
    seed: int = 0,
) -> Tensor | WithNull:
    """Variance between classes in units of the shrunk covariance, summed over directions.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` and errors as in
    `geomkd.knowledge_quality`.

    Parameters
    ----------
    shrinkage : "ledoit_wolf" or float
        Share a of the target in the covariance, 0 <= a <= 1; 0 is the H-score of Bao et al., 1
        leaves nothing.

    Returns
    -------
    Tensor, shape (), or WithNull
        Between 0 and min(C - 1, rank), float64, on the features' device.

    Notes
    -----
    tr(S_a^-1 (1 - a) B), with S the covariance of the features, B that of the class means, each
    sample having its own class's (both divide by n), S_a = (1 - a) S + a mu I and mu = tr S / d
    over all d features. The estimate of a is scikit-learn's ``ledoit_wolf``:
    min(1, (sum_i |x_i|^4 / n - tr S^2) / (n (tr S^2 - (tr S)^2 / d))) of centred rows, and 0 where
    S is a multiple of I. With a = 0, S^-1 is the pseudo-inverse. Where all rows are equal: 0.

    S = B + (covariance within classes), so shrinking S shrinks B: the factor 1 - a, as Ibrahim et
    al. have it. With a = 0 and n <= d every layer scores C - 1, noise too. With Ledoit-Wolf,
    features whose few directions are all equally wide are taken for noise, whatever their classes.

    Cost: `principal` and n r C multiplications, again for each permutation; nothing of size d x d.

    References
    ----------
    Bao et al. An information-theoretic approach to transferability in task transfer learning.
    ICIP 2019. Ibrahim, Ponomareva, Mazumder. Newer is not always better: rethinking transferability
    metrics, their peculiarities, stability and performance. ECML PKDD 2022 (arXiv 2110.06893).
    Ledoit, Wolf. A well-conditioned estimator for large-dimensional covariance matrices. Journal of
    Multivariate Analysis 88, 2004.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.transfer import h_score
    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    >>> h_score(x, torch.tensor([0, 0, 1, 1]))
    tensor(0.9000, dtype=torch.float64)
    """
    if shrinkage != "ledoit_wolf":
        shrinkage = check_number(shrinkage, 'shrinkage, unless "ledoit_wolf",', least=0, most=1)
    score = partial(h_score_from, shrinkage=shrinkage)
    return principal_against_null(score, features, labels, null, seed)


def h_score_from(
    principal: Principal, index: Tensor, n_classes: int, *, shrinkage: str | float = "ledoit_wolf"
) -> Tensor:
    """`h_score` of centred principal coordinates."""
    hot = _one_hot(index, n_classes)
    sizes = hot.sum(dim=0)
    between = ((hot / sizes).T @ principal.coordinates).square().T @ (sizes / principal.n)
    variance = principal.sq_singular / principal.n
    alpha = _ledoit_wolf(principal) if shrinkage == "ledoit_wolf" else shrinkage
    shrunk = (1 - alpha) * variance + alpha * variance.sum() / principal.dim
    return (between * (1 - alpha) / shrunk).sum()


def _ledoit_wolf(principal: Principal) -> Tensor:
    """Ledoit and Wolf's share of mu I, from the spectrum and the norms of the rows."""
    n, d = principal.n, principal.dim
    share = principal.sq_singular * inverse(principal.sq_singular.sum())  # of the trace
    sq_norm = principal.coordinates.square().sum(dim=1)
    sq_norm = sq_norm * inverse(sq_norm.mean())
    sq_sum = share.square().sum()
    error = (sq_norm.square().mean() - sq_sum).clamp(min=0) / n
    spread = sq_sum - 1 / d
    rounding = max(n, d) * torch.finfo(share.dtype).eps * sq_sum
    return torch.where(spread > rounding, (error / spread).clamp(max=1), 0.0)


def gbc(
    features: Any, labels: Any, *, components: int = 64, null: int = 0, seed: int = 0
) -> Tensor | WithNull:
    """Overlap of the classes, taken as diagonal Gaussians on principal axes, with a minus sign.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` and errors as in
    `geomkd.knowledge_quality`.

    Parameters
    ----------
    components : int
        Principal axes that are kept, at least 1; all of them where the sample's rank is less.

    Returns
    -------
    Tensor, shape (), or WithNull
        Between -C (C - 1), no class unlike another, and 0, none overlapping another; float64, on
        the features' device.

    Notes
    -----
    -sum over a != b of exp(-D_ab): both (a, b) and (b, a), and no division by their number, as in
    the authors' code. With means m and variances v (population) of the classes on each axis,
    D_ab = sum (m_a - m_b)^2 / (4 (v_a + v_b)) + 1/2 sum log((v_a + v_b) / (2 sqrt(v_a v_b))).

    Each v is at least 1e-4 of the mean variance of the kept axes over all samples (published: 1e-4
    itself, which depends on the features' scale). Where all rows are equal: -C (C - 1).

    Of few samples a class, estimated Gaussians are far apart even where the classes are one: pure
    noise in 512 features and 10 classes scores -77 with 2,000 samples, -1.5 with 100. Use ``null``.
    Between equal variances the choice of principal axes is arbitrary, and so is the score.

    Cost: `principal`, 2 n k C and C^2 k multiplications with k components, again for each
    permutation.

    References
    ----------
    Pandy, Agostinelli, Uijlings, Ferrari, Mensink. Transferability estimation using Bhattacharyya
    class separability. CVPR 2022.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.transfer import gbc
    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    >>> gbc(x, torch.tensor([0, 0, 1, 1]))  # D = 9 / (4 * (1/4 + 1/4))
    tensor(-0.0222, dtype=torch.float64)
    """
    score = partial(gbc_from, components=check_int(components, "components", least=1))
    return principal_against_null(score, features, labels, null, seed)


def gbc_from(
    principal: Principal, index: Tensor, n_classes: int, *, components: int = 64
) -> Tensor:
    """`gbc` of centred principal coordinates."""
    x = principal.coordinates[:, :components]
    hot = _one_hot(index, n_classes)
    weights = (hot / hot.sum(dim=0)).T
    means = weights @ x
    floor = VARIANCE_FLOOR * x.square().sum() / max(x.numel(), 1)
    variance = torch.maximum(weights @ (x - means[index]).square(), floor)
    half_log = 0.25 * variance.log().sum(dim=1)
    names = torch.arange(n_classes, device=x.device)
    overlap = torch.zeros((), dtype=x.dtype, device=x.device)
    step = max(1, _BLOCK // (n_classes * max(x.shape[1], 1)))
    for start in range(0, n_classes, step):
        some = slice(start, start + step)
        both = variance[some, None] + variance
        distance = ((means[some, None] - means).square() / (4 * both)).sum(dim=2)
        distance += 0.5 * (both / 2).log().sum(dim=2) - half_log[some, None] - half_log
        other = names[some, None] != names
        overlap = overlap + torch.where(other, torch.exp(-distance), 0.0).sum()
    return -overlap


def _one_hot(index: Tensor, n_classes: int) -> Tensor:
    return (index.unsqueeze(1) == torch.arange(n_classes, device=index.device)).double()


ROWS = (
    Measure("logme", "spectrum", logme_from, supervised=True, center=False),
    Measure("h_score", "spectrum", h_score_from, supervised=True),
    Measure("gbc", "spectrum", gbc_from, supervised=True),
)
