"""Choosing layers: by their scores alone, or good ones that do not say the same thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geomkd.common.checks import as_tensor, check_number
from geomkd.scoring.loes import check_k, loes
from geomkd.scoring.loes import redundancy as overlap
from geomkd.scoring.ranking import check_scored, scores_by

if TYPE_CHECKING:
    from geomkd.scoring.layer_scores import LayerScores
    from geomkd.scoring.ranking import By


def selected(
    scores: LayerScores, k: int, by: By, redundancy: float, options: dict[str, float]
) -> list[str]:
    """See `LayerScores.select`."""
    if options and by != "loes":
        raise TypeError(f"{sorted(options)} are options of by='loes' alone")
    if redundancy and by == "loes":
        raise ValueError("by='loes' has its own weight of redundancy: gamma=")
    before = np.flatnonzero(scores.frame["role"] != "head")
    names = scores.frame["layer"].to_numpy()[before]
    if by == "loes":
        index, n_classes = np.array(scores.how.subset_classes), scores.how.classes
        labels = (index, n_classes) if n_classes > 1 else (None, None)
        dims = scores.frame["dim"].to_numpy()[before]
        steps = loes(scores.grams[before], *labels, k, dims=dims, **options)
        chosen = [step.layer for step in steps]
    else:
        values = scores_by(scores.frame, by)[before]
        check_scored(names, values, "selected")
        if redundancy:
            chosen = top_apart(values, overlap(scores.grams[before]), k, redundancy)
        else:
            chosen = top(values, k)
    return names[sorted(chosen)].tolist()


def top(scores: np.ndarray, k: int) -> list[int]:
    """Return the indices of the k highest scores, the best first; ties to the earlier."""
    check_k(k, len(scores))
    return np.argsort(-np.asarray(scores, dtype=float), kind="stable")[:k].tolist()


def top_apart(scores: Any, redundancy: Any, k: int, gamma: float = 0.5) -> list[int]:
    """Choose k layers of high score that say different things, one after the other.

    The first is the layer of highest score; each next one has the highest ``score - gamma * (its
    largest redundancy to a layer chosen before)``. Scores are first put on [0, 1], the worst of
    the layers on 0 and the best on 1, so that gamma means the same whatever the measure: at 1, full
    redundancy costs as much as the way from the best layer to the worst.

    Takes finite scores (L,) and a redundancy (L, L) as `geomkd.scoring.loes.redundancy` gives it,
    or any other likeness between 0 and 1. Returns indices in the order of choice; ties go to the
    earlier layer.
    """
    values = as_tensor(scores, "scores").double().cpu().numpy()
    alike = as_tensor(redundancy, "redundancy").double().cpu().numpy()
    if values.ndim != 1 or alike.shape != (len(values), len(values)):
        raise ValueError(
            f"scores must be (L,) and redundancy (L, L); got {values.shape} and {alike.shape}"
        )
    if not (np.isfinite(values).all() and np.isfinite(alike).all()):
        raise ValueError("scores and redundancy must be finite; got NaN or Inf")
    check_k(k, len(values))
    check_number(gamma, "gamma", least=0)
    span = np.ptp(values)
    scaled = (values - values.min()) / (span if span > 0 else 1.0)
    chosen = [int(scaled.argmax())]
    while len(chosen) < k:
        penalised = scaled - gamma * alike[:, chosen].max(axis=1)
        penalised[chosen] = -np.inf
        chosen.append(int(penalised.argmax()))
    return chosen
