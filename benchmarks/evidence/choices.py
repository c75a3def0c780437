"""Sets of a teacher's layers to distil from, by name, and which student block learns which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.material import Material
from benchmarks.evidence.rules import RULES, main_layers, values
from geomkd import score_layers
from geomkd.distillation.pairing import evenly_spaced
from geomkd.network.layers import Layer
from geomkd.scoring.selection import top

K = 4  # layers of a set
DRAWS = 3  # sets drawn at random
REDUNDANCY = 0.5  # its weight where Q is chosen with it, as in LOES
EVENLY = "evenly spaced"
RANDOM = "random"


def by_place(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Sets that know only where layers are: candidates in order of depth, the head's input last."""
    blocks = [layer for layer in layers if layer.role == "block"]
    names, main = ([layer.name for layer in of] for of in (layers, blocks))
    k, head = min(K, len(main)), names[-1]
    found = {
        EVENLY: evenly_spaced(main, k),
        "last 4": main[-k:],
        "stage ends": stage_ends(blocks),
        "head's input alone": [head],
        "anchored at the head's input": anchored(names, main, head, K),
    }
    for draw in range(DRAWS):
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(draw))
        found[f"{RANDOM} {draw + 1}"] = [names[i] for i in sorted(order[:K].tolist())]
    return found


def by_scores(model: nn.Module, material: Material, names: Sequence[str]) -> dict[str, list[str]]:
    """Sets by Q in both definitions, by Q with redundancy, by LOES, on held-out images."""
    data, k = (material.x_score, material.y_score), min(K, len(names))
    options = {"subsamples": 0, "dataset_size": len(material.x_train), "progress": False}
    scores = score_layers(model, data, list(names), **options)
    robust = score_layers(model, data, list(names), definition="robust", **options)
    return {
        "Q": scores.select(k),
        "Q robust": robust.select(k),
        "Q with redundancy": scores.select(k, redundancy=REDUNDANCY),
        "LOES": scores.select(k, by="loes"),
    }


def by_rule(rule: str, frame: Any) -> dict[str, list[str]]:
    """Sets by the rule that went to confirmation; of one without an order, its layer alone."""
    names = frame["layer"].tolist()
    best = top(values(RULES[rule], frame), min(K, len(names)) if RULES[rule].ordered else 1)
    return {
        "the rule's top 4": [names[i] for i in sorted(best)],
        "anchored at the rule's best": anchored(names, main_layers(frame), names[best[0]], K),
    }


def anchored(names: Sequence[str], blocks: Sequence[str], anchor: str, k: int) -> list[str]:
    """K layers that end in the anchor, the others evenly spaced among the blocks below it.

    ``names`` are all candidates in order of depth, ``blocks`` those among them to choose from. With
    fewer than k - 1 blocks below, all of these are taken.
    """
    below = [name for name in names[: list(names).index(anchor)] if name in set(blocks)]
    return evenly_spaced([*below, anchor], min(k, len(below) + 1))


def stage_ends(blocks: Sequence[Layer]) -> list[str]:
    """Blocks behind which the features have another shape, and the last."""
    *inner, last = blocks
    ends = [a.name for a, b in zip(inner, blocks[1:], strict=True) if a.shape != b.shape]
    return [*ends, last.name]


def paired(layers: Sequence[str], blocks: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs in order of depth: layer i of k with student block number ``round((i + 1) m / k)``.

    As `geomkd.pair_layers`; of a student with fewer blocks than k, some learn from two layers.
    """
    k, m = len(layers), len(blocks)
    places = [max(round((i + 1) * m / k), 1) - 1 for i in range(k)]
    return [(name, blocks[place]) for name, place in zip(layers, places, strict=True)]
