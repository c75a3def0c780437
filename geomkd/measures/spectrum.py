"""How many directions a layer varies in: measures of the spectrum of its covariance.

s_k are the singular values of the n centred rows, l_k = s_k^2 / n the variances along the principal
axes. Cores take the positive s_k^2, falling. The cost is that of `geometry.principal.principal`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geomkd.common.checks import check_choice, check_int, check_number
from geomkd.geometry.precision import inverse
from geomkd.geometry.principal import Principal, principal
from geomkd.measures.measure import Measure
from geomkd.measures.quality_statistics import entropy_nats, terms_to

SPECTRA = ("singular", "eigenvalues")
THRESHOLD = 0.9  # of the variance, in pca_dimension
FIT = (11, 100)  # ranks, as in the published code: its range(10, 100) counts from 0
_ISOTROPY_FLOOR = 1e-6  # as published


def pca_dimension_from(sq_singular: Tensor, n: int, dim: int, threshold: float) -> Tensor:
    """PCA dimension of an (n, dim) sample from its squared singular values (r,), falling."""
    shares = _shares(sq_singular)
    # Ten equal shares of 0.1 reach 0.9 after nine, but for rounding.
    terms = terms_to(shares.unsqueeze(0), threshold - _rounding(n, dim)).squeeze(0)
    return torch.where(shares.sum() > 0, terms.double(), 0.0)


def participation_ratio_from(sq_singular: Tensor) -> Tensor:
    """Participation ratio from squared singular values (r,)."""
    return inverse(_shares(sq_singular).square().sum())


def debiased_participation_ratio_from(found: Principal) -> Tensor:
    """Ratio of the unbiased estimates of (tr C)^2 and tr C^2; centred, at least 4 rows."""
    above, below, tolerance = _distinct_rows(found)
    ratio = torch.where(below > tolerance[1], above / below, torch.inf)
    return torch.where(above > tolerance[0], ratio, 0.0)


def spectral_entropy_from(sq_singular: Tensor, on: str) -> Tensor:
    """Entropy in nats of singular values or eigenvalues, from squared singular values (r,)."""
    values = sq_singular.sqrt() if on == "singular" else sq_singular
    return entropy_nats(_shares(values).unsqueeze(0)).squeeze(0) + 0.0  # not -0 of one direction


def effective_rank_from(sq_singular: Tensor, on: str) -> Tensor:
    """Exponential of `spectral_entropy_from`; 0 without variance."""
    rank = spectral_entropy_from(sq_singular, on).exp()
    return torch.where(sq_singular.sum() > 0, rank, 0.0)


def power_law_alpha_from(sq_singular: Tensor, fit: tuple[int, int]) -> Tensor:
    """Exponent of decay over the ranks of ``fit``, from positive squared singular values (r,)."""
    first, last = fit[0], min(fit[1], len(sq_singular))
    if last <= first:
        return sq_singular.new_full((), torch.nan)
    rank = torch.arange(first, last + 1, dtype=sq_singular.dtype, device=sq_singular.device)
    weight = _shares(1 / rank)
    x = rank.log()
    x = x - (weight * x).sum()
    return -(weight * x * sq_singular[first - 1 : last].log()).sum() / (weight * x * x).sum()


def isotropy_from(sq_singular: Tensor, n: int, dim: int, scale: Tensor | float = 1.0) -> Tensor:
    """Isotropy of an (n, dim) sample, from squared singular values (r,) times scale squared."""
    count, variances = min(n, dim), sq_singular / n
    mean = variances.sum() / count
    zeros = count - len(sq_singular)
    sq_deviations = (variances - mean).square().sum() + zeros * mean.square()
    spread = (sq_deviations / count).sqrt() + _ISOTROPY_FLOOR * scale * scale
    return torch.where(mean > 0, mean / spread, 0.0)


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return torch.where(total > 0, values / total, 0.0)


def _rounding(n: int, dim: int) -> float:
    """Relative error of a sum over the spectrum."""
    return max(n, dim) * torch.finfo(torch.float64).eps


def _distinct_rows(found: Principal) -> tuple[Tensor, Tensor, tuple[float, Tensor]]:
    """Estimates of (tr C)^2 and tr C^2 over T^2 (see `participation_ratio`), and their rounding."""
    n, total = found.n, found.sq_singular.sum()
    sq_dots = _shares(found.sq_singular).square().sum()
    sq_norms = found.coordinates.square().sum(dim=1) * inverse(total)
    own = n * (n - 1) * sq_norms.square().sum()
    one = (total > 0).to(total.dtype)  # T^2 / T^2, which is 0 without variance
    quadruples = n * (n - 1) * (n - 2) * (n - 3)
    square_of_trace = (n * n - 3 * n + 1) * one + 2 * sq_dots - own
    pairs = (n - 1) * (n - 2) * sq_dots + one
    rounding = _rounding(n, found.dim) / quadruples
    tolerance = rounding * n * n, rounding * pairs
    return square_of_trace / quadruples, (pairs - own) / quadruples, tolerance


def pca_dimension(features: Any, *, threshold: float = THRESHOLD, center: bool = True) -> Tensor:
    """Fewest principal components that hold a share of the variance.

    Parameters
    ----------
    features : Tensor or ndarray, shape (n, ...)
        Flattened to (n, d); any floating-point type and device.
    threshold : float
        Share of the variance, above 0, at most 1.
    center : bool
        Subtract the mean of the rows first.

    Returns
    -------
    Tensor, shape ()
        A whole number, float64; 0 where all rows are equal (uncentred: all are 0).

    Raises
    ------
    TypeError, ValueError
        What is not as above, NaN or Inf.

    Notes
    -----
    min m with ``sum_{k <= m} l_k >= threshold * sum_k l_k``, ties up to rounding. At most
    min(n - 1, d): a small sample has a small dimension, so compare at equal n. Variances below
    max(n, d) eps of the largest are taken as 0. Uncentred, a large common offset gives 1.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.spectrum import pca_dimension
    >>> axes = torch.eye(10)
    >>> pca_dimension(torch.cat([axes, -axes]))  # ten equal variances
    tensor(9., dtype=torch.float64)
    """
    threshold = check_number(threshold, "threshold", above=0, most=1)
    found = principal(features, center=center)
    return pca_dimension_from(found.sq_singular, found.n, found.dim, threshold)


def participation_ratio(features: Any, *, debiased: bool = False) -> Tensor:
    """Participation ratio of the variances along the principal axes.

    ``features``, (n, ...), and errors as in `pca_dimension`.

    Parameters
    ----------
    debiased : bool
        Estimate the ratio of the distribution that the rows, at least 4, are of, not that of the
        sample.

    Returns
    -------
    Tensor, shape ()
        Float64, at least 1; 0 where all rows are equal (debiased: or all but one), debiased inf
        where no two distinct differences of rows have a direction in common.

    Notes
    -----
    ``(tr C)^2 / tr C^2``, C the covariance: ``(sum l_k)^2 / sum l_k^2``.

    The plain one is between 1 and min(n - 1, d) and mostly tells n where n is small: for white
    noise it is about n d / (n + d), not d. Debiased, it is the ratio of unbiased estimates of
    (tr C)^2 and tr C^2, means over distinct rows. With g the centred Gram matrix, T its trace,
    B = sum_ij g_ij^2 and D = sum_i g_ii^2, these are ::

        ((n^2 - 3 n + 1) T^2 + 2 B - n (n - 1) D) / (n (n - 1) (n - 2) (n - 3))
        ((n - 1) (n - 2) B + T^2 - n (n - 1) D) / (n (n - 1) (n - 2) (n - 3))

    Their ratio is not itself unbiased: of white noise (n = 30, d = 100) it was 100.7 ± 7.1, the
    plain one 22.3. It may exceed n and d. Duplicate rows pull it down.

    References
    ----------
    Recanatesi et al. A scale-dependent measure of system dimensionality. Patterns 2022.
    Chun, Canatar, Chung, Lee. arXiv 2509.26560. Zhou, Guo. A note on the unbiased estimator of
    Sigma^2. Statistics and Probability Letters 2017.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.spectrum import participation_ratio
    >>> noise = torch.randn(30, 100, generator=torch.Generator().manual_seed(0))
    >>> bool(participation_ratio(noise) < 25)
    True
    >>> bool(90 < participation_ratio(noise, debiased=True) < 110)
    True
    """
    found = principal(features)
    if not debiased:
        return participation_ratio_from(found.sq_singular)
    if found.n < 4:
        raise ValueError(f"debiased=True needs features of at least 4 rows; got n = {found.n}")
    return debiased_participation_ratio_from(found)


def spectral_entropy(features: Any, *, on: str = "singular", center: bool = True) -> Tensor:
    """Entropy of the singular values, or of the variances along the principal axes, in nats.

    ``features``, (n, ...), ``center`` and errors as in `pca_dimension`.

    Parameters
    ----------
    on : {"singular", "eigenvalues"}
        Shares of the sum of singular values s_k, or of their squares.

    Returns
    -------
    Tensor, shape ()
        Float64, from 0 to log min(n - 1, d) (uncentred: log min(n, d)); 0 where all rows are equal
        (uncentred: all are 0).

    Notes
    -----
    ``-sum p_k log p_k`` with p_k = s_k / sum s or s_k^2 / sum s^2, and 0 log 0 = 0. Singular values
    below sqrt(max(n, d) eps) of the largest are taken as 0; they weigh a small noise in many
    directions far more than the variances do. Compare at equal n.

    References
    ----------
    Roy, Vetterli. The effective rank: a measure of effective dimensionality. EUSIPCO 2007.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.spectrum import spectral_entropy
    >>> axes = torch.eye(10)
    >>> spectral_entropy(torch.cat([axes, -axes]))  # log 10
    tensor(2.3026, dtype=torch.float64)
    """
    check_choice(on, "on", SPECTRA)
    return spectral_entropy_from(principal(features, center=center).sq_singular, on)


def effective_rank(features: Any, *, on: str = "singular", center: bool = True) -> Tensor:
    """Exponential of the spectral entropy: how many equal directions would have it.

    Parameters and errors as in `spectral_entropy`. ``on="singular", center=False`` is RankMe
    without the constant that it adds to the shares.

    Returns
    -------
    Tensor, shape ()
        Float64, from 1 to the rank; 0 where all rows are equal (uncentred: all are 0).

    Notes
    -----
    ``exp(-sum p_k log p_k)``. With 1e-5 added to every p_k, as published code does, ten equal
    directions of 2,048 come out as 12.65; here they are 10. Uncentred, a common offset pulls it
    to 1.

    References
    ----------
    As in `spectral_entropy`; Garrido, Balestriero, Najman, LeCun. RankMe. ICML 2023.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.spectrum import effective_rank
    >>> axes = torch.eye(10)
    >>> effective_rank(torch.cat([axes, -axes]))
    tensor(10.0000, dtype=torch.float64)
    """
    check_choice(on, "on", SPECTRA)
    return effective_rank_from(principal(features, center=center).sq_singular, on)


def power_law_alpha(features: Any, *, fit: tuple[int, int] = FIT, center: bool = True) -> Tensor:
    """Exponent alpha of a power law l_k = c k^-alpha fitted to the variances.

    ``features``, (n, ...), ``center`` and errors as in `pca_dimension`.

    Parameters
    ----------
    fit : tuple of two int
        First and last rank k that are fitted, rising from at least 1, both included, cut to the
        layer's rank.

    Returns
    -------
    Tensor, shape ()
        Float64. NaN where fewer than two ranks of the range are there, as of equal rows.

    Notes
    -----
    Minus the slope of log l_k on log k by least squares with weights 1 / k, and without the first
    ten ranks, as published. A layer of rank below 100 is fitted over a shorter range, to its last
    and steepest ranks; give ``fit`` to compare layers of unlike width. Few samples steepen the
    tail: alpha of white noise is 0 only for n far above d.

    References
    ----------
    Agrawal, Mondal, Ghosh, Richards. alpha-ReQ. NeurIPS 2022.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.spectrum import power_law_alpha
    >>> x = torch.diag(torch.arange(1.0, 41.0) ** -0.75)  # variances fall as k^-1.5
    >>> power_law_alpha(torch.cat([x, -x]), fit=(2, 30))
    tensor(1.5000, dtype=torch.float64)
    """
    if not isinstance(fit, (tuple, list)) or len(fit) != 2:
        raise TypeError(f"fit must be two ranks (first, last), counted from 1; got {fit!r}")
    first = check_int(fit[0], "the first rank of fit", least=1)
    fit = first, check_int(fit[1], "the last rank of fit", least=first + 1)
    return power_law_alpha_from(principal(features, center=center).sq_singular, fit)


def isotropy(features: Any) -> Tensor:
    """Isotropy as LOES defines it: mean of the variances over their standard deviation.

    ``features``, (n, ...), and errors as in `pca_dimension`.

    Returns
    -------
    Tensor, shape ()
        Float64, positive; 0 where all rows are equal.

    Notes
    -----
    ``mean(l) / (std(l) + 1e-6)`` over the min(n, d) eigenvalues l of the centred covariance (which
    divides by n), with the population standard deviation. Eigenvalues of 0 count (for d >= n there
    is always one); those below max(n, d) eps of the largest are taken as 0.

    It has no upper bound. The 1e-6 is absolute: scale matters where the standard deviation is not
    far above it. Equal variances, or one feature, give their mean times 1e6. Compare at equal n.

    References
    ----------
    Batra et al. LOES. ICML 2026, arXiv 2605.23033.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.spectrum import isotropy
    >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> isotropy(x)  # variances 2 and 0.5
    tensor(1.6667, dtype=torch.float64)
    """
    found = principal(features)
    return isotropy_from(found.sq_singular, found.n, found.dim, found.scale)


def _row(name: str, of: Callable[[Principal], Tensor], center: bool | None = None) -> Measure:
    return Measure(name, "spectrum", lambda found, *_: of(found), center=center)


ROWS = (
    _row("pca_dimension", lambda p: pca_dimension_from(p.sq_singular, p.n, p.dim, THRESHOLD)),
    _row("participation_ratio", lambda p: participation_ratio_from(p.sq_singular), center=True),
    _row("spectral_entropy", lambda p: spectral_entropy_from(p.sq_singular, "singular")),
    _row("effective_rank", lambda p: effective_rank_from(p.sq_singular, "singular")),
    _row("power_law_alpha", lambda p: power_law_alpha_from(p.sq_singular, FIT)),
    _row("isotropy", lambda p: isotropy_from(p.sq_singular, p.n, p.dim, p.scale), center=True),
)
