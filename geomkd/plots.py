"""Pictures: every function takes and returns an Axes, and none shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart.
TERMS = ("separation", "information", "efficiency", "quality")
COLOURS = dict(zip(TERMS, ("#0072B2", "#E69F00", "#009E73", "#000000"), strict=True))
MARKS = dict(zip(TERMS, "os^D", strict=True))
SELECTED = "#CC79A7"
CYCLE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "frameon": False}  # a legend
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")


def _axes(ax: Axes | None, width: float, height: float, *, grid: str | None = None) -> Axes:
    """Axes of the house style: those given, or those of a new figure of this size in inches."""
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(figsize=(width, height), layout="constrained")[1]
    if grid is not None:
        ax.grid(axis=grid, alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_layers(
    frame: pd.DataFrame,
    shown: Sequence[str],
    bands: Mapping[str, np.ndarray],
    selected: Sequence[str],
    *,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Scores by depth; several, of which not all are knowledge quality's, on their own ranges.

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
    """
    # Beside the axes there is room in a figure of our own alone; above, it would meet a title.
    place = BESIDE if ax is None else {"loc": "best", "framealpha": 0.8}
    width, height = max(7.5, 3.2 + 0.42 * len(frame)), max(4.6, 1.2 + 0.23 * len(shown))
    ax = _axes(ax, width, height, grid="y")
    depth = np.arange(len(frame))
    names = frame["layer"].tolist()
    for i in (i for i, name in enumerate(names) if name in selected):
        label = "selected" if names[i] == selected[0] else None
        ax.axvspan(i - 0.32, i + 0.32, color=SELECTED, alpha=0.22, lw=0, label=label)
    of_quality = set(shown) <= set(COLOURS)
    own_range = len(shown) > 1 and not of_quality
    for place_of, name in enumerate(shown):
        values, label = frame[name].to_numpy(float), name.replace("_", " ")
        low, width = 0.0, 1.0
        if own_range:
            low, high = _range(values)
            width = (high - low) or 1.0
            label += f" ({low:.3g} to {high:.3g})"
        elif name in COLOURS:
            label += f" ({name[0].upper()})"
        style = _style(name, place_of, not of_quality)
        ax.plot(depth, (values - low) / width, label=label, **style)
        if name in bands and len(shown) <= 5:  # more bands are mud
            band = (bands[name] - low) / width
            ax.fill_between(depth, *band.T, color=style["color"], alpha=0.15, lw=0)
    ax.set_xticks(depth, names, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
    unit = "score, from its least to its greatest layer" if own_range else "score (no unit)"
    ax.set(xlim=(-0.6, len(frame) - 0.4), xlabel="layer, in order of execution", ylabel=unit)
    if own_range:  # a band may be many times as wide as the curve is high
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.75), min(high, 1.75))
    elif of_quality:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    note = f"bands: {100 * level:g} %\nsubsampling spread" if bands and len(shown) <= 5 else None
    ax.legend(fontsize=8, title=note, title_fontsize=8, **place)
    return ax


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def _style(name: str, place: int, in_turn: bool) -> dict[str, Any]:
    """Colour, dashes and mark: of knowledge quality its own, of others a turn of each."""
    if not in_turn:
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
    """Scores of layers, from the first (dark) to the last (bright), by sample size.

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
    """
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter, NullLocator

    ax = _axes(ax, 7.5, max(4.6, 1.0 + 0.2 * len(names)), grid="y")
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    for layer, curve, colour in zip(names, curves, colours, strict=True):
        ax.plot(sizes, curve, color=colour, marker="o", ms=3.5, lw=1.5, label=layer)
    ax.set_xscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, ha="right")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    for low, high, tau in zip(sizes, sizes[1:], taus, strict=False):
        middle = (low * high) ** 0.5  # of a logarithmic axis
        style = {"ha": "center", "va": "bottom", "fontsize": 8, "color": "0.3"}
        ax.annotate(f"τ {tau:.2f}", (middle, 1.0), xycoords=("data", "axes fraction"), **style)
    label = "samples (τ: Kendall's, between the orders of the layers)"
    ax.set(xlabel=label, ylabel=name.replace("_", " "))
    ax.legend(fontsize=7, **BESIDE)
    return ax


def plot_accuracy(
    curves: Mapping[str, Sequence[np.ndarray]], *, name: str = "accuracy", ax: Axes | None = None
) -> Axes:
    """Learning curves of several methods: mean over runs, band of one standard deviation.

    The legend gives those of the last epoch.

    Parameters
    ----------
    curves : mapping of str to sequence of ndarray, shape (epochs,)
        Accuracy after every epoch, 0 to 1, of each run of a method.
    name : str
        What the accuracy is of.
    ax : Axes, optional
        Where to draw; by default a new figure.
    """
    ax = _axes(ax, 7.5, 4.6, grid="both")
    for place, (method, runs) in enumerate(curves.items()):
        values = 100 * np.stack(runs)
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
        epochs = np.arange(1, len(mean) + 1)
        colour, dashes = CYCLE[place % len(CYCLE)], DASHES[place % len(DASHES)]
        label = f"{method}: {mean[-1]:.1f} ± {deviation[-1]:.1f}"
        ax.plot(epochs, mean, color=colour, ls=dashes, lw=1.8, label=label)
        ax.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)
    ax.set(xlabel="epoch", ylabel=f"{name} (%)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    n_runs = sorted({len(runs) for runs in curves.values()})
    title = f"last epoch, mean ± SD of {'/'.join(map(str, n_runs))} seeds"
    ax.legend(fontsize=8, frameon=False, title=title, title_fontsize=8, loc="lower right")
    return ax


def plot_training(history: pd.DataFrame, objective: str, ax: Axes | None = None) -> Axes:
    """Learning curves of one run: accuracy on the left axis, which is returned, loss on the right.

    Parameters
    ----------
    history : DataFrame
        A row an epoch: epoch, loss, and what there is of train_accuracy and val_accuracy.
    objective : str
        Name of what was minimised, for the legend.
    ax : Axes, optional
        Where to draw; by default a new figure.
    """
    ax = _axes(ax, 6.4, 4.8)
    loss_axis, epochs = ax.twinx(), history["epoch"]
    for axis, column, label, colour, dashes in (
        (ax, "train_accuracy", "train", CYCLE[1], "-"),
        (ax, "val_accuracy", "validation", CYCLE[2], "-"),
        (loss_axis, "loss", "loss", "#999999", "--"),
    ):
        if column in history:
            marker = "." if len(epochs) < 30 else None
            axis.plot(epochs, history[column], dashes, color=colour, label=label, marker=marker)
    ax.set(xlabel="epoch", ylabel="accuracy")
    ax.xaxis.get_major_locator().set_params(integer=True)
    loss_axis.set_ylabel("training loss")
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, "frameon": False}
    above["handles"] = [*ax.get_lines(), *loss_axis.get_lines()]
    ax.legend(title=f"objective {objective}", **above)
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
    """
    rows, columns = frame.shape
    ax = _axes(ax, max(4.5, 2.8 + 0.22 * columns), max(3.6, 1.6 + 0.22 * rows))
    values = frame.to_numpy(float)
    measure = frame.attrs.get("measure", "similarity")
    top = None if measure == "procrustes" else 1.0
    low = min(0.0, float(np.nanmin(values)))  # debiased CKA may be a little below 0
    # viridis: even steps of lightness, for colour-blind readers too.
    image = ax.imshow(values, cmap="viridis", vmin=low, vmax=top, origin="lower", aspect="auto")
    names = {"cka": "CKA (debiased, no unit)", "procrustes": "Procrustes distance (no unit)"}
    ax.figure.colorbar(image, ax=ax, label=names.get(measure, measure))
    ax.set_xticks(range(columns), frame.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(rows), frame.index, fontsize=8)
    of_a, of_b = frame.index.name or "a", frame.columns.name or "b"
    ax.set(xlabel=f"layer of {of_b}", ylabel=f"layer of {of_a}")
    return ax
