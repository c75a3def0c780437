"""Intrinsic dimension from distances to the nearest neighbours.

What these numbers are on a network's features: statistics of a sample at one scale. They are biased
above about ten dimensions, and they move with the number of samples, with pooling and with noise
(arXiv 2604.20276). Compare layers at the same n; none of them is "the" dimension.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from geomkd.common.checks import as_features, check_choice, check_int, check_number
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import Neighbours, Rows, search
from geomkd.geometry.precision import exact_arithmetic
from geomkd.geometry.row_blocks import nearest_rows
from geomkd.measures.measure import Measure

K = 20  # neighbours of mle_dimension
METHODS = ("linear", "mle")
AVERAGES = ("harmonic", "arithmetic")


def two_nn(features: Any, *, method: str = "linear", discard: float = 0.1) -> Tensor:
    """Dimension from the ratio of the distances to the second and the first neighbour.

    Parameters
    ----------
    features : Tensor or ndarray, shape (n, ...)
        Flattened to (n, d); any floating-point type and device.
    method : {"linear", "mle"}
        Straight line through 0, or maximum likelihood over all rows.
    discard : float
        Share of the largest ratios that "linear" leaves out, 0 <= discard < 1.

    Returns
    -------
    Tensor, shape ()
        float64, on the features' device.

    Raises
    ------
    ValueError
        Fewer than 3 distinct rows, NaN or Inf, an unknown method, ``discard`` outside [0, 1).

    Warns
    -----
    UserWarning
        Rows that equal another were dropped; how many.

    Notes
    -----
    With mu_i = r_2 / r_1 of row i, sorted, F_i = i / n: "linear" is the slope through 0 of
    -log(1 - F) on log mu over the first floor((1 - discard) n); "mle" is (n - 1) / sum log mu.
    Equal rows would make r_1 = 0. Those that are only nearly equal (augmented twins) are not
    dropped, and pull the dimension down. Where all ratios are 1 (a regular grid) it is infinite.

    Cost: one neighbour search, n^2 d multiplications.

    References
    ----------
    Facco, d'Errico, Rodriguez, Laio. Estimating the intrinsic dimension of datasets by a minimal
    neighborhood information. Scientific Reports 7, 2017. Denti, Doimo, Laio, Mira. The generalized
    ratios intrinsic dimension estimator. Scientific Reports 12, 2022.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures import two_nn
    >>> plane = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> round(two_nn(torch.cat([plane, plane.square()], dim=1)).item(), 1)
    2.1
    """
    check_choice(method, "method", METHODS)
    discard = check_number(discard, "discard", least=0, below=1)
    found = _distinct_neighbours(features, 2, least=3)
    with exact_arithmetic(found.index.device):
        log_mu = found.sq_distance.log().diff(dim=1)[:, 0] / 2
        return two_nn_from(log_mu, method=method, discard=discard)


def two_nn_from(log_mu: Tensor, *, method: str = "linear", discard: float = 0.1) -> Tensor:
    """Dimension from log(r_2 / r_1) of the rows, (n,): a 0-d tensor."""
    n = len(log_mu)
    if method == "mle":
        return (n - 1) / log_mu.sum()
    kept = math.floor((1 - discard) * n + 1e-9)
    steps = torch.arange(1, kept + 1, dtype=torch.float64, device=log_mu.device)
    if kept == n:  # -log(1 - F) of the last is infinite
        kept, steps = n - 1, steps[:-1]
    x, y = log_mu.sort().values[:kept], -torch.log1p(-steps / n)
    sq = (x * x).sum()
    return torch.where(sq > 0, (x * y).sum() / sq, torch.inf)


def drawn_two_nn(gram: ClassGram, near: Neighbours, member: Tensor) -> Tensor:
    """`two_nn` of each draw from nearest distinct rows, (R,); NaN for fewer than 3 rows."""
    logs, valid = _log_distances(near)
    columns = []
    for drawn in member.T:
        inside = valid & drawn[near.index]
        first, second = (_at_rank(logs, inside, rank)[drawn] for rank in (1, 2))
        nothing = logs.new_tensor(torch.nan)
        columns.append(two_nn_from(second - first) if len(first) >= 3 else nothing)
    return torch.stack(columns)


def mle_dimension(
    features: Any, *, k: int = K, average: str = "harmonic", pointwise: bool = False
) -> Tensor:
    """Dimension by maximum likelihood from the distances to the k nearest neighbours.

    ``features``, (n, ...), their errors and the warning as in `two_nn`.

    Parameters
    ----------
    k : int
        Neighbours of every row, 2 <= k < distinct rows.
    average : {"harmonic", "arithmetic"}
        How the rows' estimates are brought together: by the harmonic mean (MacKay and Ghahramani's
        correction) or, as first published, by the plain mean, which is another estimator.
    pointwise : bool
        Return every row's own estimate instead.

    Returns
    -------
    Tensor, shape () or (distinct rows,)
        float64, on the features' device; the rows in their order.

    Notes
    -----
    With T_j the distance to neighbour j, row i's estimate is m_i = [1 / (k - 1) sum_{j < k}
    log(T_k / T_j)]^-1; the harmonic mean of the m_i is [1 / (n (k - 1)) sum_ij log(T_k / T_j)]^-1.
    A row whose k neighbours are equally far away has an infinite estimate.

    Cost: one neighbour search, n^2 d multiplications.

    References
    ----------
    Levina, Bickel. Maximum likelihood estimation of intrinsic dimension. NeurIPS 2004. MacKay,
    Ghahramani. Comments on it, 2005.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures import mle_dimension
    >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    >>> round(mle_dimension(line.repeat(1, 8)).item(), 1)
    1.0
    """
    k = check_int(k, "k", least=2)
    check_choice(average, "average", AVERAGES)
    found = _distinct_neighbours(features, k, least=k + 1)
    with exact_arithmetic(found.index.device):
        log_distance = found.sq_distance.log() / 2
        excess = (log_distance[:, -1:] - log_distance).sum(dim=1)
        return mle_dimension_from(excess, k, average=average, pointwise=pointwise)


def mle_dimension_from(
    excess: Tensor, k: int, *, average: str = "harmonic", pointwise: bool = False
) -> Tensor:
    """Dimension from sum_{j < k} log(T_k / T_j) of the rows, (n,)."""
    if pointwise or average == "arithmetic":
        local = (k - 1) / excess
        return local if pointwise else local.mean()
    return (k - 1) / excess.mean()


def drawn_mle_dimension(gram: ClassGram, near: Neighbours, member: Tensor) -> Tensor:
    """`mle_dimension` of each draw from nearest distinct rows, (R,); NaN for K rows and fewer."""
    logs, valid = _log_distances(near)
    columns = []
    for drawn in member.T:
        inside = valid & drawn[near.index]
        farthest = _at_rank(logs, inside, K).unsqueeze(1)
        counted = inside & (inside.cumsum(dim=1) <= K)
        excess = torch.where(counted, farthest - logs, 0.0).sum(dim=1)[drawn]
        nothing = logs.new_tensor(torch.nan)
        columns.append(mle_dimension_from(excess, K) if len(excess) > K else nothing)
    return torch.stack(columns)


def _log_distances(near: Neighbours) -> tuple[Tensor, Tensor]:
    """Log distances to the neighbours, and which there are, (n, k) each."""
    valid = near.sq_distance.isfinite() & (near.sq_distance > 0)
    return torch.where(valid, near.sq_distance, 1.0).log() / 2, valid


def _at_rank(logs: Tensor, valid: Tensor, rank: int) -> Tensor:
    """Log distance to the valid neighbour of that rank, of the last where there are fewer: (n,)."""
    counts = valid.cumsum(dim=1)
    wanted = counts[:, -1:].clamp(max=rank)
    return torch.where(valid & (counts == wanted), logs, 0.0).sum(dim=1)


def _distinct_neighbours(features: Any, k: int, *, least: int) -> Neighbours:
    """Find the k nearest among distinct rows: of equal ones the first stays, a warning counts."""
    x = as_features(features)
    if len(x) >= least:
        found = search(Rows(x), k)  # in any scale: only ratios count
        if bool((found.sq_distance[:, 0] > 0).all()):
            return found
        kept = first_of_equals(x)
        warnings.warn(
            f"{len(x) - len(kept)} of {len(x)} feature rows equal another and were dropped",
            stacklevel=3,
        )
        x = x[kept]
    if len(x) < least:
        raise ValueError(
            f"at least {least} distinct feature rows are needed; got {len(x)} of "
            f"{len(as_features(features))}"
        )
    return search(Rows(x), k)


def first_of_equals(features: Tensor) -> Tensor:
    """Rows of (n, d) features, rising, that equal no earlier one."""
    distinct, group = torch.unique(features + 0.0, dim=0, return_inverse=True)  # -0.0 is 0.0
    place = torch.arange(len(features), device=features.device)
    first = torch.full((len(distinct),), len(features), device=features.device)
    return first.scatter_reduce(0, group, place, "amin").sort().values


def distinct(gram: ClassGram, near: Neighbours, member: Tensor) -> tuple[Neighbours, Tensor, int]:
    """Neighbours among distinct rows, which rows stand for the draws', and how many were dropped.

    Of equal rows the first stands for whichever of them a draw of (n, R) ``member`` holds.
    """
    own = torch.arange(gram.n, device=gram.device)
    first, among = own, member.any(dim=1)
    while bool((near.sq_distance[among] == 0).any()):
        first = _first_equal(near, among)[first]
        among = among & (first == own)
        near = nearest_rows(gram, near.index.shape[1], among)
    held = torch.zeros_like(member, dtype=torch.int64).index_add_(0, first, member.long()) > 0
    return near, held, int((first != own).sum())


def _first_equal(near: Neighbours, among: Tensor) -> Tensor:
    """First of the rows that are linked to each by distances of 0: (n,)."""
    own = torch.arange(len(among), device=among.device)
    # Of many equal rows each has only some of the others among its neighbours.
    linked = (near.sq_distance == 0) & among.unsqueeze(1)
    to = torch.where(linked, near.index, own.unsqueeze(1))
    first, before = torch.minimum(own, to.amin(dim=1)), own
    while not torch.equal(first, before):
        before = first
        low = first.unsqueeze(1).expand_as(to).flatten()
        first = first.scatter_reduce(0, to.flatten(), low, "amin")
        first = first[to].amin(dim=1)
    return first


def warn_of_equal_rows(count: int, n: int) -> None:
    """Warn of rows that `distinct` has dropped."""
    if count:
        warnings.warn(
            f"{count} of {n} feature rows equal another and were dropped from the distances "
            "behind two_nn and mle_dimension",
            stacklevel=2,
        )


ROWS = (
    Measure("two_nn", "distinct", drawn_two_nn),
    Measure("mle_dimension", "distinct", drawn_mle_dimension),
)
