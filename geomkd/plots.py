"""Pictures: every function takes and returns an Axes, and none shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    "separation": "#0072B2",
    "information": "#E69F00",
    "efficiency": "#009E73",
    "quality": "#000000",
}
MARKS = {"separation": "o", "information": "s", "efficiency": "^", "quality": "D"}
SELECTED = "#CC79A7"
CYCLE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")


def plot_layers(
    frame: pd.DataFrame,
    bands: Mapping[str, np.ndarray],
    selected: Sequence[str],
    *,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Separation, information, efficiency and quality by depth.

    Parameters
    ----------
    frame : DataFrame
        Columns layer and the four scores, a row a layer.
    bands : mapping of str to ndarray, shape (L, 2)
        Spread of each score; may be empty.
    selected : sequence of str
        Layers to mark.
    level : float
        Share of the half-samples that the spreads cover; for the legend.
    ax : Axes, optional
        Where to draw; by default a new figure wide enough for the names.

    Returns
    -------
    Axes
        With labelled axes and a legend.
    """
    import matplotlib.pyplot as plt

    # Beside the axes there is room in a figure of our own alone; above, it would meet a title.
    place = {"loc": "best", "framealpha": 0.8}
    if ax is None:
        _, ax = plt.subplots(figsize=(max(7.5, 3.2 + 0.42 * len(frame)), 4.6), layout="constrained")
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
    depth = np.arange(len(frame))
    names = frame["layer"].tolist()
    for i in (i for i, name in enumerate(names) if name in selected):
        label = "selected" if names[i] == selected[0] else None
        ax.axvspan(i - 0.32, i + 0.32, color=SELECTED, alpha=0.22, lw=0, label=label)
    for term, colour in COLOURS.items():
        strong = term == "quality"
        ax.plot(
            depth,
            frame[term],
            color=colour,
            marker=MARKS[term],
            ms=5 if strong else 4,
            lw=2.2 if strong else 1.4,
            label=f"{term} ({term[0].upper()})",
        )
        if term in bands:
            ax.fill_between(depth, *bands[term].T, color=colour, alpha=0.18, lw=0)
    ax.set_xticks(depth, names, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_xlim(-0.6, len(frame) - 0.4)
    ax.set_xlabel("layer, in order of execution")
    ax.set_ylabel("score (no unit)")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    note = f"bands: {100 * level:g} %\nsubsampling spread" if bands else None
    ax.legend(fontsize=8, title=note, title_fontsize=8, **place)
    return ax


def plot_accuracy(
    curves: Mapping[str, Sequence[np.ndarray]], *, name: str = "accuracy", ax: Axes | None = None
) -> Axes:
    """Learning curves of several methods: mean over runs, band of one standard deviation.

    Parameters
    ----------
    curves : mapping of str to sequence of ndarray, shape (epochs,)
        Accuracy after every epoch, 0 to 1, of each run of a method.
    name : str
        What the accuracy is of.
    ax : Axes, optional
        Where to draw; by default a new figure.

    Returns
    -------
    Axes
        With labelled axes and a legend that gives the last epoch's mean and deviation.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for place, (method, runs) in enumerate(curves.items()):
        values = 100 * np.stack(runs)
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
        epochs = np.arange(1, len(mean) + 1)
        colour, dashes = CYCLE[place % len(CYCLE)], DASHES[place % len(DASHES)]
        label = f"{method}: {mean[-1]:.1f} ± {deviation[-1]:.1f}"
        ax.plot(epochs, mean, color=colour, ls=dashes, lw=1.8, label=label)
        ax.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)
    n_runs = {len(runs) for runs in curves.values()}
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{name} (%)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    title = f"last epoch, mean ± SD of {'/'.join(map(str, sorted(n_runs)))} seeds"
    ax.legend(fontsize=8, frameon=False, title=title, title_fontsize=8, loc="lower right")
    return ax
