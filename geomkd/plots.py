"""Pictures: every function takes and returns an Axes, and none shows it.

Without ``ax`` they draw in a new figure, large enough for the names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geomkd.common.checks import check_choice, check_number

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
NAMES = {"rotation": 55, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}  # of layers
MOST = 6  # curves on one Axes
LAYERS = "layer, in order of execution"
X = {"depth": f"number of the {LAYERS}", "relative depth": "relative depth (0 first layer, 1 last)"}
ALIKE = ("samples", "classes", "definition", "pool", "center", "labels")
ALIKE += ("entropy_per_class", "dataset_size")


def _axes(ax: Axes | None, width: float, height: float, *, grid: str | None = None) -> Axes:
    """Axes of the house style: those given, or those of a new figure of this size in inches."""
    if ax is not None and ax.get_xlabel() in (LAYERS, *X.values()):
        way = "geomkd.plots.compare({name: scores, ...}) draws several scores on one Axes"
        raise ValueError(f"ax must be without curves of layers; got one that has some ({way})")
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(figsize=(width, height), layout="constrained")[1]
    if grid is not None:
        ax.grid(axis=grid, alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return ax


def words_of(by: Any) -> str:
    """Name a column, or a function of the frame, as a picture does."""
    return getattr(by, "__name__", str(by)).replace("_", " ").replace("<lambda>", "a function")


def plot_layers(
    frame: pd.DataFrame,
    shown: Sequence[str],
    bands: Mapping[str, np.ndarray],
    selected: Sequence[str],
    *,
    selected_by: Any = None,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Scores by depth; several others than knowledge quality's on their own ranges.

    More than six have a panel each; what is returned is then the empty Axes around the panels.

    Parameters
    ----------
    frame : DataFrame
        Columns layer and the scores, a row a layer.
    shown, bands
        Scores to draw, and the spread of each, (L, 2), where there is one.
    selected, selected_by
        Layers to mark, and by what they were chosen, for the legend.
    level : float
        Share of the half-samples that the spreads cover; for the legend.
    """
    by = "selected" if selected_by is None else f"selected by {words_of(selected_by)}"
    note = f"bands: {100 * level:g} %\nsubsampling spread" if bands else None
    if len(shown) > MOST:
        told = [f"shaded: {by}"] * any(selected) + [note] * bool(bands)
        return _panels(frame, shown, bands, selected, ax, "; ".join(told).replace("\n", " "))
    own, ax = ax is None, _axes(ax, max(7.5, 3.2 + 0.42 * len(frame)), 4.6, grid="y")
    for i in np.flatnonzero(frame["layer"].isin(list(selected))):
        ax.axvspan(i - 0.32, i + 0.32, color=SELECTED, alpha=0.22, lw=0, label=by)
        by = None  # once in the legend
    own_range = len(shown) > 1 and not set(shown) <= set(COLOURS)
    for place, name in enumerate(shown):
        values, label = frame[name].to_numpy(float), words_of(name)
        low, high = _range(values) if own_range else (0.0, 1.0)
        width = (high - low) or 1.0
        if own_range:
            label += f" ({low:.3g} to {high:.3g})"
        elif name in COLOURS:
            label += f" ({name[0].upper()})"
        style = {"label": label} | _style(name, place, own_range or name not in COLOURS)
        band = (bands[name] - low) / width if name in bands else None
        _curve(ax, np.arange(len(values)), (values - low) / width, band, style)
    ax.set_xticks(range(len(frame)), frame["layer"], **NAMES)
    unit = "score, from its least to its greatest layer" if own_range else "score (no unit)"
    ax.set(xlim=(-0.6, len(frame) - 0.4), xlabel=LAYERS, ylabel=unit)
    if set(shown) <= set(COLOURS):
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    return _legend(ax, note, own)


def _curve(ax: Axes, x: Any, values: Any, band: np.ndarray | None, style: dict[str, Any]) -> None:
    ax.plot(x, values, **style)
    if band is not None:
        ax.fill_between(x, *band.T, color=style["color"], alpha=0.15, lw=0)


def _legend(ax: Axes, note: str | None, own: bool) -> Axes:
    # Beside the axes there is room in a figure of our own alone; above, it would meet a title.
    place = BESIDE if own else {"loc": "best", "framealpha": 0.8}
    ax.legend(fontsize=8, title=note, title_fontsize=8, **place)
    return ax


def _panels(frame: Any, shown: Any, bands: Any, selected: Any, ax: Any, told: str) -> Axes:
    """Small multiples, a score each on its own scale, in the place of an Axes."""
    width = 1.0 + 0.17 * max(10, len(frame))
    columns = max(1, min(3, int(18 / width)))
    rows = -(-len(shown) // columns)
    ax = _axes(ax, columns * width, 1.5 + 1.7 * rows)
    if (place := ax.get_subplotspec()) is None:
        raise ValueError(f"more than {MOST} scores need an ax of plt.subplots; got {ax!r}")
    grid, above = place.subgridspec(rows, columns), f"scores (no unit) by {LAYERS}\n{told}\n\n"
    for i, name in enumerate(shown):
        panel = ax.figure.add_subplot(grid[i // columns, i % columns])
        plot_layers(frame, [name], bands, selected, ax=panel).get_legend().remove()
        panel.set_title(f"{'' if i else above}{words_of(name)}", fontsize=9, loc="left")
        panel.set(xlabel="", ylabel="")
        panel.tick_params(labelsize=7, labelbottom=i + columns >= len(shown))
    ax.set_xlabel(LAYERS)  # not seen: says that the place is taken
    ax.axis("off")
    return ax


def compare(
    scores: Mapping[Any, Any],
    *,
    by: Any = "quality",
    x: str = "depth",
    heat: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw a score of several teachers, or of checkpoints of one, with its spreads.

    Parameters
    ----------
    scores : mapping of str or int to LayerScores
        By name; checkpoints by epoch. Where they were not made alike a warning says in what.
    by : str or callable
        A column, or a function of the frame, as in `LayerScores.rank`.
    x : {"depth", "relative depth"}
        Layers in their order, named where all have the same; or from 0 to 1.
    heat : bool
        A heat map in place of curves: a row a layer, which must be the same, a column an epoch.
    """
    if not isinstance(scores, Mapping) or not scores:
        raise TypeError(f"scores must be {{name: LayerScores, ...}}, not empty; got {scores!r}")
    check_choice(x, "x", X)
    for key in ALIKE:
        if len(found := dict.fromkeys(str(s.settings[key]) for s in scores.values())) > 1:
            warnings.warn(f"the scores differ in {key}: {', '.join(found)}", stacklevel=2)
    curves = {str(name): s.curve(by) for name, s in scores.items()}
    layers = [s.frame["layer"].tolist() for s in scores.values()]
    longest = max(layers, key=len)
    alike = all(names == longest for names in layers)
    if heat:
        if not alike:
            raise ValueError(f"heat=True needs the same layers in all of {list(curves)}")
        words = (words_of(by), "epoch" if all(isinstance(k, int) for k in scores) else "", LAYERS)
        return _heat(np.stack([c[0] for c in curves.values()], 1), longest, curves, words, ax)
    own, ax = ax is None, _axes(ax, max(7.5, 3.2 + 0.42 * len(longest)), 4.6, grid="y")
    for i, (name, (values, band)) in enumerate(curves.items()):
        at = np.arange(len(values)) if x == "depth" else np.linspace(0, 1, len(values))
        _curve(ax, at, values, band, {"label": name} | _style("", i, True))
    label = LAYERS if alike and x == "depth" else X[x]
    ax.set(xlabel=label, ylabel=words_of(by))
    ax.xaxis.get_major_locator().set_params(integer=x == "depth")
    if label == LAYERS:
        ax.set_xticks(range(len(longest)), longest, **NAMES)
    banded = any(band is not None for _, band in curves.values())
    return _legend(ax, "bands: 95 %\nsubsampling spread" if banded else None, own)


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def _style(name: str, place: int, own_range: bool) -> dict[str, Any]:
    """Colour, dashes and mark: of knowledge quality its own, of others a turn of each."""
    if not own_range:
        strong = name == "quality"
        look = {"ms": 5 if strong else 4, "lw": 2.2 if strong else 1.4}
        return {"color": COLOURS[name], "marker": MARKS[name]} | look
    look = {"ls": DASHES[place % len(DASHES)], "marker": "osD^vP*X"[place % 8]}
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
    """
    ax = _axes(ax, 7.5, 4.6, grid="both")
    for place, (method, runs) in enumerate(curves.items()):
        values = 100 * np.stack(runs)
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))
        epochs = np.arange(1, len(mean) + 1)
        colour, dashes = CYCLE[place % len(CYCLE)], DASHES[place % len(DASHES)]
        spread = f" ± {deviation[-1]:.1f}" if len(values) > 1 else ""
        label = f"{method}: {mean[-1]:.1f}{spread}"
        band = np.stack([mean - deviation, mean + deviation], axis=1)
        _curve(ax, epochs, mean, band, {"color": colour, "ls": dashes, "lw": 1.8, "label": label})
    ax.set(xlabel="epoch", ylabel=f"{name} (%)")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    n_runs = sorted({len(runs) for runs in curves.values()})
    several = f", mean ± SD of {'/'.join(map(str, n_runs))} seeds" if n_runs[-1] > 1 else ""
    title = f"last epoch{several}"
    ax.legend(fontsize=8, frameon=False, title=title, title_fontsize=8, loc="lower right")
    return ax


def plot_training(
    history: pd.DataFrame, objective: str, ax: Axes | None = None, *, teacher: float | None = None
) -> Axes:
    """Learning curves of one run: accuracy on the left axis, which is returned, loss on the right.

    Parameters
    ----------
    history : DataFrame
        A row an epoch: epoch, loss, and what there is of train_accuracy and val_accuracy.
    objective : str
        Name of what was minimised, for the legend.
    teacher : float, optional
        Accuracy of the teacher, 0 to 1: a dashed line.
    """
    ax = _axes(ax, 6.4, 4.8)
    loss_axis, epochs = ax.twinx(), history["epoch"]
    for axis, column, label, colour, dashes in (
        (ax, "train_accuracy", "train", CYCLE[1], "-"),
        (ax, "val_accuracy", "validation", CYCLE[2], "-"),
        (loss_axis, "loss", "loss", "#767676", ":"),
    ):
        if column in history:
            marker = "." if len(epochs) < 30 else None
            axis.plot(epochs, history[column], dashes, color=colour, label=label, marker=marker)
    if teacher is not None:
        check_number(teacher, "teacher_accuracy", least=0, most=1)
        ax.axhline(teacher, color=CYCLE[0], ls="--", lw=1.2, label=f"teacher ({teacher:.3f})")
    ax.set(xlabel="epoch", ylabel="accuracy (share of 1)")
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    loss_axis.set_ylabel("training loss")
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 4, "frameon": False}
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
    """
    measure = frame.attrs.get("measure", "similarity")
    top = None if measure == "procrustes" else 1.0
    low = min(0.0, float(np.nanmin(frame.to_numpy(float))))  # debiased CKA may be a little below 0
    names = {"cka": "CKA (debiased, no unit)", "procrustes": "Procrustes distance (no unit)"}
    of_a, of_b = frame.index.name or "a", frame.columns.name or "b"
    words = (names.get(measure, measure), f"layer of {of_b}", f"layer of {of_a}")
    return _heat(frame, frame.index, frame.columns, words, ax, vmin=low, vmax=top)


def plot_classes(frame: pd.DataFrame, *, by: str = "separation", ax: Axes | None = None) -> Axes:
    """Heat map of a column of `LayerScores.per_class`: a row a layer, a column a class."""
    table = frame.pivot(index="layer", columns="class", values=by).loc[frame["layer"].unique()]
    words = (f"{words_of(by)} (of cosines, no unit)", "class", LAYERS)
    return _heat(table, table.index, table.columns, words, ax)


def _heat(values: Any, rows: Any, columns: Any, words: Any, ax: Any, **limits: Any) -> Axes:
    height, width = np.shape(values)
    ax = _axes(ax, max(4.5, 2.8 + 0.22 * width), max(3.6, 1.6 + 0.22 * height))
    # viridis: even steps of lightness, for colour-blind readers too.
    options = {"cmap": "viridis", "origin": "lower", "aspect": "auto"} | limits
    ax.figure.colorbar(ax.imshow(np.asarray(values, float), **options), ax=ax, label=words[0])
    turn = 90 * any(len(str(name)) > 2 for name in columns)
    ax.set_xticks(range(width), columns, rotation=turn, fontsize=8)
    ax.set_yticks(range(height), rows, fontsize=8)
    ax.set(xlabel=words[1], ylabel=words[2])
    return ax
