"""Pictures: every function takes and returns an Axes, and none shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    shown: Sequence[str],
    bands: Mapping[str, np.ndarray],
    selected: Sequence[str],
    *,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Scores by depth; others than knowledge quality's on their own ranges.

    Parameters
    ----------
    frame : DataFrame
        Columns layer and the scores, a row a layer.
    shown : sequence of str
        Scores to draw.
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
        height = max(4.6, 1.2 + 0.23 * len(shown))
        size = (max(7.5, 3.2 + 0.42 * len(frame)), height)
        _, ax = plt.subplots(figsize=size, layout="constrained")
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}
    depth = np.arange(len(frame))
    names = frame["layer"].tolist()
    for i in (i for i, name in enumerate(names) if name in selected):
        label = "selected" if names[i] == selected[0] else None
        ax.axvspan(i - 0.32, i + 0.32, color=SELECTED, alpha=0.22, lw=0, label=label)
    own_range = not set(shown) <= set(COLOURS)
    for place_of, name in enumerate(shown):
        values, label = frame[name].to_numpy(float), name.replace("_", " ")
        low, width = 0.0, 1.0
        if own_range:
            low, high = _range(values)
            width = (high - low) or 1.0
            label += f" ({low:.3g} to {high:.3g})"
        elif name in COLOURS:
            label += f" ({name[0].upper()})"
        style = _style(name, place_of, own_range)
        ax.plot(depth, (values - low) / width, label=label, **style)
        if name in bands and len(shown) <= 5:  # more bands are mud
            band = (bands[name] - low) / width
            ax.fill_between(depth, *band.T, color=style["color"], alpha=0.15, lw=0)
    ax.set_xticks(depth, names, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_xlim(-0.6, len(frame) - 0.4)
    ax.set_xlabel("layer, in order of execution")
    ax.set_ylabel("score, from its least to its greatest layer" if own_range else "score (no unit)")
    if own_range:  # a band may be many times as wide as the curve is high
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.75), min(high, 1.75))
    else:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    note = f"bands: {100 * level:g} %\nsubsampling spread" if bands and len(shown) <= 5 else None
    ax.legend(fontsize=8, title=note, title_fontsize=8, **place)
    return ax


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def _style(name: str, place: int, own_range: bool) -> dict[str, Any]:
    """Colour, dashes and mark: of knowledge quality its own, of others a turn of each."""
    if not own_range:
        strong = name == "quality"
        look = {"ms": 5 if strong else 4, "lw": 2.2 if strong else 1.4}
        return {"color": COLOURS[name], "marker": MARKS[name]} | look
    turn, marks = place // len(CYCLE), "osD^vP*X"
    look = {"ls": DASHES[turn % len(DASHES)], "marker": marks[place % len(marks)]}
    return {"color": CYCLE[place % len(CYCLE)], "ms": 4, "lw": 1.4} | look


def plot_sweep(
    names: Sequence[str],
    sizes: Sequence[int],
    curves: np.ndarray,
    taus: np.ndarray,
    *,
    name: str,
    ax: Axes | None = None,
) -> Axes:
    """Scores of layers by sample size: whether their order has settled.

    Parameters
    ----------
    names : sequence of str
        The L layers, in order of depth.
    sizes : sequence of int
        The S sample sizes.
    curves : ndarray, shape (L, S)
        Score of each layer at each size.
    taus : ndarray, shape (S - 1,)
        Kendall's tau between successive sizes.
    name : str
        What the score is.
    ax : Axes, optional
        Where to draw; by default a new figure.

    Returns
    -------
    Axes
        With labelled axes; layers by colour, from the first (dark) to the last (bright).
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    if ax is None:
        size = (7.5, max(4.6, 1.0 + 0.2 * len(names)))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(names)))
    for layer, curve, colour in zip(names, curves, colours, strict=True):
        ax.plot(sizes, curve, color=colour, marker="o", ms=3.5, lw=1.5, label=layer)
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, ha="right")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(plt.NullLocator())
    for low, high, tau in zip(sizes, sizes[1:], taus, strict=False):
        middle = (low * high) ** 0.5  # of a logarithmic axis
        style = {"ha": "center", "va": "bottom", "fontsize": 8, "color": "0.3"}
        ax.annotate(f"τ {tau:.2f}", (middle, 1.0), xycoords=("data", "axes fraction"), **style)
    ax.set_xlabel("samples (τ: Kendall's, between the orders of the layers)")
    ax.set_ylabel(name.replace("_", " "))
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
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


def plot_similarity(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Heat map of what `similarity_matrix` returns, the first layers at the lower left.

    Parameters
    ----------
    frame : DataFrame
        Rows the layers of one model, columns those of another; ``frame.index.name`` and
        ``frame.columns.name``, where they are set, name the models.
    ax : Axes, optional
        Where to draw; by default a new figure large enough for the names.

    Returns
    -------
    Axes
        With a labelled colour bar beside it.
    """
    import matplotlib.pyplot as plt

    rows, columns = frame.shape
    if ax is None:
        size = (max(4.5, 2.8 + 0.22 * columns), max(3.6, 1.6 + 0.22 * rows))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    values = frame.to_numpy(float)
    measure = frame.attrs.get("measure", "similarity")
    top = None if measure == "procrustes" else 1.0
    low = min(0.0, float(np.nanmin(values)))  # debiased CKA may be a little below 0
    # viridis: even steps of lightness, for colour-blind readers too.
    image = ax.imshow(values, cmap="viridis", vmin=low, vmax=top, origin="lower", aspect="auto")
    names = {"cka": "CKA (debiased, no unit)", "procrustes": "Procrustes distance (no unit)"}
    ax.figure.colorbar(image, ax=ax, label=names.get(measure, measure))
    text = {"fontsize": 8}
    ax.set_xticks(range(columns), frame.columns, rotation=90, **text)
    ax.set_yticks(range(rows), frame.index, **text)
    ax.set_xlabel(f"layer of {frame.columns.name or 'b'}")
    ax.set_ylabel(f"layer of {frame.index.name or 'a'}")
    return ax
