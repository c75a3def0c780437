"""Ranks of layers and how sure they are. Functions of scores and names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from geomkd.common.checks import check_number

if TYPE_CHECKING:
    import pandas as pd

    By = str | Callable[[pd.DataFrame], Any]


def sqrt_si(frame: pd.DataFrame) -> Any:
    """Geometric mean of separation and information; 0 where their product is negative.

    Examples
    --------
    >>> import pandas
    >>> sqrt_si(pandas.DataFrame({"separation": [0.5, -0.1], "information": [2.0, 1.0]})).tolist()
    [1.0, 0.0]
    """
    return (frame["separation"] * frame["information"]).clip(lower=0) ** 0.5


RULES = {"sqrt_si": sqrt_si}  # functions of the scores' frame, one number a layer, by name
SETTLED = 0.9  # tau of a sweep's last step, below which more than one pair in twenty has changed


class RankSets(NamedTuple):
    """Ranks of L layers, 1 the highest score."""

    rank: np.ndarray  # by the estimate
    best: np.ndarray  # of the rank set, the central share of the ranks in the half-samples
    worst: np.ndarray
    ties: list[list[int]]  # order against this one flips in more than 1 - level of them


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank 1 for the highest score along the first axis; equal scores share the better rank."""
    return 1 + (scores[None, :] > scores[:, None]).sum(axis=1)


def rank_sets(estimate: np.ndarray, draws: np.ndarray, level: float = 0.95) -> RankSets:
    """Rank sets that cover a share ``level``, and ties, of layers from scores of half-samples.

    From scores (L,) of the full sample and (L, R) of R half-samples, each column the same draw for
    every layer. Minima are part of the scores, for which the ordinary bootstrap fails; half-samples
    without replacement do not need it.
    """
    estimate, draws = np.asarray(estimate, dtype=float), np.asarray(draws, dtype=float)
    if draws.ndim != 2 or len(draws) != len(estimate) or draws.shape[1] == 0:
        raise ValueError(f"draws must be ({len(estimate)}, R), R > 0; got {draws.shape}")
    unscored = np.isnan(estimate) | np.isnan(draws).any(axis=1)
    if unscored.any():
        raise ValueError(
            f"scores must not be NaN; got {unscored.sum()} of {len(estimate)} layers without"
        )
    drawn = ranks(draws)
    tail = (1 - level) / 2
    best = np.quantile(drawn, tail, axis=1, method="inverted_cdf").astype(int)
    worst = np.quantile(drawn, 1 - tail, axis=1, method="inverted_cdf").astype(int)
    above = np.sign(estimate[:, None] - estimate[None, :])
    drawn_above = np.sign(draws[:, None] - draws[None, :])
    flips = (drawn_above != above[:, :, None]).mean(axis=2)
    tied = (flips > 1 - level) & ~np.eye(len(flips), dtype=bool)
    ties = [np.flatnonzero(row).tolist() for row in tied]
    return RankSets(ranks(estimate), best, worst, ties)


def spread(estimate: np.ndarray, draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Subsampling spread: the estimate plus the quantiles of (draw - mean of draws), (L, 2).

    Half-samples are biased against the full sample, hence the difference to their own mean.
    """
    tail = (1 - level) / 2
    around = draws - draws.mean(axis=1, keepdims=True)
    return estimate[:, None] + np.quantile(around, [tail, 1 - tail], axis=1).T


def rank_table(
    names: Sequence[str], estimate: np.ndarray, draws: np.ndarray | None, level: float
) -> pd.DataFrame:
    """Table of `LayerScores.rank`; without draws its columns about them are missing values."""
    import pandas as pd

    check_number(level, "level", above=0, below=1)
    check_scored(names, estimate, "ranked")
    own = ranks(estimate)
    if draws is None:
        best = worst = pd.array([pd.NA] * len(own), dtype="Int64")
        low, high, ties = np.nan, np.nan, None
    else:
        _, best, worst, tied = rank_sets(estimate, draws, level)
        low, high = spread(estimate, draws, level).T
        ties = [_spans(own[others].tolist()) for others in tied]
    table = {"layer": names, "rank": own, "best": best, "worst": worst, "score": estimate}
    table |= {"low": low, "high": high, "tied_with": ties}
    return pd.DataFrame(table).sort_values("rank", kind="stable", ignore_index=True)


def _spans(numbers: Iterable[int]) -> str:
    """Whole numbers as a short text, such as "2..4,6"."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    # Two dots: what stands about a hyphen, a spreadsheet takes for a date.
    return ",".join(f"{low}..{high}" if low < high else f"{low}" for low, high in spans)


def settling_table(sizes: Sequence[int], curves: np.ndarray) -> pd.DataFrame:
    """Table of `LayerScores.settling`, of scores (L, S) at S sample sizes."""
    import pandas as pd
    from scipy.stats import kendalltau

    steps = range(len(sizes) - 1)
    taus = [kendalltau(curves[:, i], curves[:, i + 1]).statistic for i in steps]
    columns = {"from_samples": sizes[:-1], "to_samples": sizes[1:], "tau": np.array(taus, float)}
    return pd.DataFrame(columns)


def warn_of_order(settling: pd.DataFrame, stacklevel: int) -> None:
    """Warn where the last step of a `settling_table` shows that the order has not settled."""
    step = settling.iloc[-1]
    if step["tau"] < SETTLED:
        warnings.warn(
            f"the order of the layers has not settled: from {step['from_samples']:.0f} to "
            f"{step['to_samples']:.0f} samples Kendall's tau is {step['tau']:.2f}, less than "
            f"{SETTLED}; rank sets tell nothing of other sample sizes: score more samples",
            stacklevel=stacklevel,
        )


def scores_by(frame: pd.DataFrame, by: By, among: Sequence[str] | None = None) -> np.ndarray:
    """Numbers (L,) of a column (``among`` these, or all that hold numbers), or of a function."""
    if callable(by):
        values = np.asarray(by(frame), dtype=float)
        if values.shape != (len(frame),):
            raise ValueError(
                f"by= must give one number for each of {len(frame)} layers; got {values.shape}"
            )
        return values
    if among is None:
        among = [name for name in frame if frame[name].dtype.kind in "if"]
    if by not in among:
        raise ValueError(f"by= must be a function or one of {list(among)}; got {by!r}")
    return frame[by].to_numpy(float)


def check_scored(names: Sequence[str], scores: np.ndarray, what: str) -> None:
    """``ValueError`` that names the layers without a score to be ``what`` by."""
    unscored = [name for name, score in zip(names, scores, strict=True) if np.isnan(score)]
    if unscored:
        raise ValueError(f"every layer needs a score to be {what} by; NaN for {unscored}")
