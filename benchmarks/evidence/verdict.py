"""The one rule that goes to confirmation, and whether it may be recommended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.evidence.found import Found
from benchmarks.evidence.rules import RULES

RIVALS = ("deepest block", "Q")
WITHOUT = ("deepest block", "head's input")  # one of these, where no score did better
LEAST = 0.5  # points below both rivals
LEVEL, REPEATS = 0.9, 2000


class Against(NamedTuple):
    """Points by which a rule's mean regret is below a rival's, and a bootstrap's interval."""

    rival: str
    gain: float
    low: float
    high: float


def mean_regrets(teachers: Sequence[Found]) -> dict[str, float]:
    """Mean regret of every rule over the teachers whose seeds agree."""
    decided = [found for found in teachers if found.decided]
    return {
        name: float(np.mean([found.regret(name) for found in decided])) if decided else np.nan
        for name in RULES
    }


def choose(discovery: Sequence[Found]) -> str:
    """Score of lowest mean regret; of equals that of highest mean tau, then the first."""
    missing = [found.teacher.name for found in discovery if not found.complete]
    if missing:
        raise ValueError(f"the rule is chosen once all of these are through: {', '.join(missing)}")
    decided = [found for found in discovery if found.decided]
    if not decided:
        raise ValueError("on no teacher do the seeds agree about the layers: nothing to choose by")
    regrets = mean_regrets(discovery)

    def order(name: str) -> tuple[float, float]:
        taus = [found.tau(name) for found in decided]
        return round(regrets[name], 6), -np.nan_to_num(np.mean(taus), nan=-1.0)

    return min((name for name, rule in RULES.items() if not rule.baseline), key=order)


def against(rule: str, rival: str, confirmation: Sequence[Found], *, seed: int = 0) -> Against:
    """Compare two rules' picks over teachers, resampling seeds and test images.

    The best layer cancels in a difference of regrets. Teachers of one data set share its images.
    """
    rng = np.random.default_rng(seed)
    decided = [found for found in confirmation if found.decided]
    gains, drawn = [], []
    for data in dict.fromkeys(found.teacher.data for found in decided):
        counts = None
        for found in (f for f in decided if f.teacher.data == data):
            layers = found.layers()
            ours, theirs = (layers[found.scored(name).argmax()] for name in (rule, rival))
            points = 100 * (found.right(ours).astype(float) - found.right(theirs))
            if counts is None:
                n = points.shape[1]
                counts = rng.multinomial(n, np.full(n, 1 / n), size=REPEATS) / n
            drawn.append(redrawn(points, counts, rng))
            gains.append(points.mean())
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Against(rival, float(np.mean(gains)), float(low), float(high))


def redrawn(points: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of points (seeds, images) over drawn seeds, and images drawn as often as counted."""
    by_seed = counts @ points.T  # (repeats, seeds)
    again = rng.integers(points.shape[0], size=by_seed.shape)
    return np.take_along_axis(by_seed, again, axis=1).mean(axis=1)


def verdict(rule: str, confirmation: Sequence[Found]) -> str:
    """What may be recommended, in a sentence."""
    if not any(found.decided for found in confirmation):
        return "On no confirmation teacher do the seeds agree about the layers: nothing is shown."
    compared = [against(rule, rival, confirmation) for rival in RIVALS]
    told = "; ".join(
        f"{a.gain:+.2f} points of {a.rival} ({LEVEL:.0%}: {a.low:+.2f} to {a.high:+.2f})"
        for a in compared
    )
    if all(a.low >= LEAST for a in compared):
        return f"Recommended: {rule}, {told}."
    regrets = mean_regrets(confirmation)
    best = min(WITHOUT, key=regrets.__getitem__)
    return f"No score did better ({rule}: {told}). Recommended: {best}."
