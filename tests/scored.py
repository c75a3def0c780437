"""Scores made by hand, and what a picture of them says."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from oracle import TERMS
from torch import nn

from geomkd import LayerScores, score_layers
from geomkd.scoring.settings import Settings

QUALITY = [1.0, 3.0, 2.0, 9.0]
SETTINGS = {
    "model": "Net",
    "measures": ["knowledge_quality"],
    "definition": "published",
    "pool": "flatten",
    "center": True,
    "samples": 60,
    "samples_per_class": [15, 15],
    "classes": 4,
    "labels": "own",
    "subset": 0,
    "subset_classes": [],
    "entropy_per_class": None,
    "dataset_size": 60.0,
    "subsamples": 0,
    "sweep": [],
    "null": 0,
    "seed": 0,
    "partial": False,
}


def made(draws=None, quality=QUALITY, **settings):
    """Scores of four layers, the last after the head's input, with given half-samples."""
    n = len(quality)
    frame = pd.DataFrame(
        {
            "layer": ["stem", "block", "fc.input", "fc.act"][:n],
            "depth": range(n),
            "kind": ["map", "map", "vector", "vector"][:n],
            "role": ["activation", "block", "head_input", "head"][:n],
            "shape": [(8, 4, 4), (16, 2, 2), (16,), (5,)][:n],
            "n": 60,
            "dim": [128, 64, 16, 5][:n],
            "separation": [0.4, 0.3, 0.2, 0.1][:n],
            "information": [0.5, 0.5, 0.5, 0.5][:n],
            "efficiency": [0.1, 0.2, 0.3, 0.4][:n],
            "quality": quality,
            "mean_norm": [1.0, 2.0, 3.0, 4.0][:n],
        }
    )
    if draws is None:
        drawn = {name: np.empty((n, 0)) for name in TERMS}
    else:
        drawn = {name: np.tile(frame[name].to_numpy()[:, None], draws.shape[1]) for name in TERMS}
        drawn["quality"] = draws
    return LayerScores(frame, drawn, Settings.of(SETTINGS | settings))


def swept(first, last):
    """Scores of four layers, with their quality in samples of 20 and 30."""
    sweep = {name: np.ones((4, 2)) for name in TERMS} | {"quality": np.array([first, last]).T}
    return replace(made(sweep=[20, 30]), sweep=sweep)


def measured():
    """Scores of three layers of a small network, the last behind the head's input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4), nn.Tanh())
    y = torch.arange(40) % 4
    x = torch.randn(4, 1, 8, 8)[y] + torch.randn(40, 1, 8, 8)
    return score_layers(model, (x, y), ["1", "3.input", "4"], subsamples=8, progress=False)


def jumping(flips=6, total=50):
    """Half-samples in which "block" falls below "fc.input" in ``flips`` of ``total``."""
    draws = np.tile(np.array(QUALITY)[:, None], total)
    draws[1, :flips] = 1.5
    return draws


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def middle(patch):
    """Where a patch's middle is, along x: matplotlib's `axvspan` gives a rectangle or a polygon."""
    box = patch.get_path().transformed(patch.get_patch_transform()).get_extents()
    return box.x0 + box.width / 2
