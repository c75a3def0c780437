"""Ranks of layers and how sure they are; choosing layers. Functions of scores and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class RankSets(NamedTuple):
    """Ranks of L layers, 1 the highest score.

    Attributes
    ----------
    rank : ndarray, shape (L,)
        Rank by the estimate.
    lowest, highest : ndarray, shape (L,)
        Best and worst rank of the rank set: the central share of the ranks in the half-samples.
    ties : list of list of int
        Layers whose order against this one flips in more than ``1 - level`` of the half-samples.
    """

    rank: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    ties: list[list[int]]


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank 1 for the highest score along the first axis; equal scores share the better rank.

    Examples
    --------
    >>> import numpy as np
    >>> ranks(np.array([0.2, 0.9, 0.2]))
    array([2, 1, 2])
    """
    return 1 + (scores[None, :] > scores[:, None]).sum(axis=1)


def rank_sets(estimate: np.ndarray, draws: np.ndarray, level: float = 0.95) -> RankSets:
    """Rank sets and ties of layers from scores of half-samples.

    Parameters
    ----------
    estimate : ndarray, shape (L,)
        Scores of the full sample.
    draws : ndarray, shape (L, R)
        Scores of R half-samples, each column the same draw for every layer.
    level : float
        Share of the half-samples that a rank set covers, 0 < level < 1.

    Returns
    -------
    RankSets
        Ranks, bounds and ties.

    Raises
    ------
    ValueError
        ``level`` outside (0, 1), no half-sample, shapes that do not fit, or NaN.

    Notes
    -----
    Minima are part of the scores, for which the ordinary bootstrap fails; half-samples without
    replacement do not need it. The sets say how much of the order is due to the choice of images,
    they are no confidence intervals.

    Examples
    --------
    >>> import numpy as np
    >>> sets = rank_sets(np.array([1.0, 0.9, 0.1]), np.array([[1, 2], [2, 1], [0, 0]]) / 2)
    >>> sets.rank, sets.lowest, sets.highest, sets.ties
    (array([1, 2, 3]), array([1, 1, 3]), array([2, 2, 3]), [[1], [0], []])
    """
    estimate, draws = np.asarray(estimate, dtype=float), np.asarray(draws, dtype=float)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}")
    if draws.ndim != 2 or len(draws) != len(estimate) or draws.shape[1] == 0:
        raise ValueError(f"draws must be ({len(estimate)}, R), R > 0; got {draws.shape}")
    unscored = np.isnan(estimate) | np.isnan(draws).any(axis=1)
    if unscored.any():
        raise ValueError(
            f"scores must not be NaN; got {unscored.sum()} of {len(estimate)} layers without"
        )
    drawn = ranks(draws)
    tail = (1 - level) / 2
    lowest = np.quantile(drawn, tail, axis=1, method="inverted_cdf").astype(int)
    highest = np.quantile(drawn, 1 - tail, axis=1, method="inverted_cdf").astype(int)
    above = np.sign(estimate[:, None] - estimate[None, :])
    drawn_above = np.sign(draws[:, None] - draws[None, :])
    flips = (drawn_above != above[:, :, None]).mean(axis=2)
    tied = (flips > 1 - level) & ~np.eye(len(flips), dtype=bool)
    ties = [np.flatnonzero(row).tolist() for row in tied]
    return RankSets(ranks(estimate), lowest, highest, ties)


def spread(estimate: np.ndarray, draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Subsampling spread: the estimate plus the quantiles of (draw - mean of draws), (L, 2).

    Half-samples are biased against the full sample, hence the difference to their own mean. A
    spread, not a confidence interval.

    Examples
    --------
    >>> import numpy as np
    >>> spread(np.array([1.0]), np.array([[0.4, 0.5, 0.6]]), level=0.5).round(3)
    array([[0.95, 1.05]])
    """
    tail = (1 - level) / 2
    around = draws - draws.mean(axis=1, keepdims=True)
    return estimate[:, None] + np.quantile(around, [tail, 1 - tail], axis=1).T


def top(names: Sequence[str], scores: np.ndarray, k: int) -> list[str]:
    """Choose the k names of highest score, in the order in which they came; ties to the earlier.

    Raises
    ------
    ValueError
        ``k`` is not between 1 and the number of names, or a score is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> top(["a", "b", "c"], np.array([0.3, 0.1, 0.9]), 2)
    ['a', 'c']
    """
    scores = np.asarray(scores, dtype=float)
    if not 1 <= k <= len(names):
        raise ValueError(f"k must be between 1 and the {len(names)} layers to choose from; got {k}")
    if np.isnan(scores).any():
        unscored = [name for name, score in zip(names, scores, strict=True) if np.isnan(score)]
        raise ValueError(f"every layer needs a score to be selected by; NaN for {unscored}")
    chosen = np.argsort(-scores, kind="stable")[:k]
    return [names[i] for i in sorted(chosen)]
