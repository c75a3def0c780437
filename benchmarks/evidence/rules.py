"""What a layer is chosen by: every rule with its sign, fixed before the first run.

Signs are what the measures' papers or their names say; none was turned after a result. A rule gives
a number a layer, the highest is picked, the earlier layer of equals. Rules that only pick one layer
have no order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from geomkd.distillation.pairing import evenly_spaced

Frame = Any  # a DataFrame, one row a layer: layer, role, and the columns of `scores.score`
NEAR_BEST = 0.95  # of the best k-NN accuracy: the tunnel's entrance


class Rule(NamedTuple):
    """From the frame to a number a layer."""

    of: Callable[[Frame], np.ndarray]
    ordered: bool = True
    baseline: bool = False  # knows only where a layer is


def column(name: str, sign: int = 1) -> Rule:
    return Rule(lambda frame: sign * frame[name].to_numpy(float))


def product(*names: str) -> Rule:
    """Geometric mean; 0 where the product is negative."""

    def of(frame: Frame) -> np.ndarray:
        values = frame[list(names)].to_numpy(float).prod(axis=1)
        return values.clip(min=0) ** (1 / len(names))

    return Rule(of)


def only(name_of: Callable[[Frame], str], *, baseline: bool = False) -> Rule:
    return Rule(lambda f: (f["layer"] == name_of(f)).to_numpy(float), False, baseline)


def main_layers(frame: Frame) -> list[str]:
    """Blocks; without blocks, the activations before the head."""
    blocks = frame.loc[frame["role"] == "block", "layer"].tolist()
    return blocks or frame.loc[frame["role"] == "activation", "layer"].tolist()


def tunnel_entrance(frame: Frame) -> str:
    near = frame["knn_accuracy"] >= NEAR_BEST * frame["knn_accuracy"].max()
    return frame.loc[near, "layer"].iloc[0]


def last_evenly_spaced(frame: Frame) -> str:
    """The last of evenly spaced layers is the last of all: the deepest block again."""
    names = main_layers(frame)
    return evenly_spaced(names, min(4, len(names)))[-1]


RULES: dict[str, Rule] = {
    "deepest block": only(lambda f: main_layers(f)[-1], baseline=True),
    "head's input": only(lambda f: f["layer"][f["role"] == "head_input"].iloc[0], baseline=True),
    "evenly spaced's last": only(last_evenly_spaced, baseline=True),
    "depth": Rule(lambda f: np.arange(len(f), dtype=float), baseline=True),
    "random": Rule(lambda f: np.zeros(len(f)), False, baseline=True),  # the mean over all layers
    "Q": column("quality"),
    "S": column("separation"),
    "I": column("information"),
    "E": column("efficiency"),
    "robust Q": column("robust_quality"),
    "robust S": column("robust_separation"),
    "robust I": column("robust_information"),
    "robust E": column("robust_efficiency"),
    "(S I)^1/2": product("separation", "information"),
    "(S I E)^1/3": product("separation", "information", "efficiency"),
    "silhouette": column("silhouette"),
    "k-NN": column("knn_accuracy"),
    "nearest class mean": column("nearest_class_mean"),
    "linear probe": column("linear_probe"),
    "Fisher ratio": column("fisher_ratio"),
    "LogME": column("logme"),
    "H-score": column("h_score"),
    "GBC": column("gbc"),
    "NC1": column("nc1", -1),  # collapsed is separated
    "NC2 norms": column("nc2_norms", -1),
    "NC2 angles": column("nc2_angles", -1),
    "CKA to last": column("cka_to_last"),
    "two-NN": column("two_nn", -1),  # low in the last layers of good networks: Ansuini 2019
    "MLE dimension": column("mle_dimension", -1),
    "PCA dimension": column("pca_dimension"),  # spectra: higher is better, as in RankMe
    "participation ratio": column("participation_ratio"),
    "spectral entropy": column("spectral_entropy"),
    "effective rank": column("effective_rank"),
    "power law": Rule(lambda f: -np.abs(f["power_law_alpha"].to_numpy(float) - 1)),  # alpha-ReQ
    "isotropy": column("isotropy"),
    "LOES's first": only(lambda f: f["layer"][f["loes_first"] == 1].iloc[0]),
    "reach x separation": Rule(lambda f: (f["separation"] * f["reach"]).to_numpy(float)),
    "tunnel entrance": only(tunnel_entrance),
    "knowledge beyond labels": Rule(
        lambda f: (f["linear_probe"] * f["class_entropy"]).to_numpy(float)
    ),
}


def values(rule: Rule, frame: Frame) -> np.ndarray | None:
    """Number of each layer, -inf where there is none; None if a column is not there."""
    try:
        found = np.asarray(rule.of(frame), dtype=float)
    except KeyError:
        return None
    return np.where(np.isnan(found), -np.inf, found)
