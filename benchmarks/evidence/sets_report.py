"""Tables and pictures of what the journals hold of students on sets of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence.choices import EVENLY, RANDOM
from benchmarks.evidence.objectives import CE, COMPARED, FEATURES, KD, RIVALS, WEIGHTED, WITH_KD
from benchmarks.evidence.report import number, table
from benchmarks.evidence.sets_found import Run, SetsFound
from geomkd.common.results_folder import write_picture

POINT, LINE, DOTS = "#0072B2", "#D55E00", "#009E73"
Rows = Callable[[SetsFound], dict[str, list[Run]]]  # by a row's name, the runs it stands for


def choices_of(found: SetsFound) -> dict[str, list[Run]]:
    """Sets by name; the random draws are one."""
    rows: dict[str, list[Run]] = {}
    for name, layers in found.choices.items():
        name = RANDOM if name.startswith(RANDOM) else name
        rows.setdefault(name, []).append(found.run(FEATURES, layers))
    return rows


def objectives_of(found: SetsFound) -> dict[str, list[Run]]:
    if not found.choices:
        return {}
    return {name: [found.run(name)] for name in (*COMPARED, *RIVALS)}


def report(founds: Sequence[SetsFound], left: Sequence[str]) -> str:
    """Everything there is to tell, as Markdown; ``left`` says what is open of each teacher."""
    there = [found for found in founds if found.choices]
    parts = ["## Runs", runs(founds, left)]
    for found in there:
        parts += [f"## Sets of {found.teacher.name}: features alone", choices(found)]
        parts += [f"## Objectives on evenly spaced pairs of {found.teacher.name}"]
        parts += [objectives(found)]
    if there:
        parts += ["## Weight of the features", weights(there)]
    for found in there:
        if shown := amounts(found):
            parts += [f"## Amounts of images, {found.teacher.name}", shown]
    return "\n\n".join(parts)


def runs(founds: Sequence[SetsFound], left: Sequence[str]) -> str:
    """What is finished, what failed, what is open."""
    rows, total, failures = [], 0, 0
    for found, open_ in zip(founds, left, strict=True):
        lines = [line for of in found.runs.values() for line in of.values()]
        failed = sum("failed" in line for line in lines)
        total, failures = total + len(lines), failures + failed
        about = found.about if found.choices else {}
        rows.append([
            found.teacher.name, about.get("fingerprint", "–"),
            number(100 * about.get("accuracy", np.nan), 1), found.rule or "–", str(len(lines)),
            str(failed), open_,
        ])  # fmt: skip
    rows.append(["all", "", "", "", str(total), str(failures), ""])
    head = ["teacher", "fingerprint", "its test %", "rule", "runs", "failed", "open"]
    return table(head, rows)


def choices(found: SetsFound) -> str:
    """Accuracies by set, and the points above evenly spaced layers."""
    rows, evenly = [], found.run(FEATURES)
    for name, layers in found.choices.items():
        run = found.run(FEATURES, layers)
        rows.append([name, " ".join(layers), *_cells(found, run, evenly)])
    return table(["set", "layers", *_head(EVENLY)], rows)


def objectives(found: SetsFound) -> str:
    """Accuracies by objective, and the points above features alone."""
    rows = []
    for name, (run,) in objectives_of(found).items():
        if run in found.runs:
            rows.append([name, *_cells(found, run, found.run(FEATURES))])
    return table(["objective", *_head(FEATURES)], rows)


def weights(founds: Sequence[SetsFound]) -> str:
    """Best weight on the other seeds, compared on the one left, against features alone."""
    rows = []
    for found in founds:
        for arm, names in WEIGHTED.items():
            means = [found.accuracies(found.run(name)) for name in names.values()]
            cells = [number(each.mean() if len(each) else np.nan, 1) for each in means]
            told, over = found.held_out(arm), found.over_features(arm)
            best = ["–", "–"]
            if told is not None:
                best = [" ".join(map(str, told[0])), number(told[1].mean(), 1)]
            gain = "–" if over is None else f"{over.mean():+.1f} ({_each(over, '+.1f')})"
            features = found.accuracies(found.run(FEATURES))
            alone = number(features.mean() if len(features) else np.nan, 1)
            rows.append([found.teacher.name, arm, *cells, *best, alone, gain])
    (some, *_) = WEIGHTED.values()
    head = ["teacher", "objective", *(f"w = {w}" for w in some), "best w by the other seeds"]
    return table([*head, "there", "features", "minus features (each seed)"], rows)


def amounts_of(found: SetsFound) -> dict[str, list[Run]]:
    """By objective, runs with several amounts of images, fewest first."""
    lines: dict[str, list[Run]] = {}
    weighted = set(WEIGHTED[WITH_KD].values())
    for run in sorted(found.runs, key=lambda run: run.per_class):
        usual = run == found.run(run.objective, per_class=run.per_class)
        if usual and run.objective in {CE, KD, FEATURES, *weighted}:
            lines.setdefault(run.objective, []).append(run)
    return {name: lines[name] for name in lines if len(lines[name]) > 1}


def amounts(found: SetsFound) -> str | None:
    """Accuracies by objective and number of images; None where there is one number alone."""
    lines = amounts_of(found)
    sizes = sorted({run.per_class for runs in lines.values() for run in runs})
    if not sizes:
        return None
    rows = []
    for name, of in lines.items():
        by_size = {run.per_class: found.accuracies(run) for run in of}
        cells = [by_size.get(size, np.array([])) for size in sizes]
        rows.append([name, *(f"{_mean(c)} ({_each(c)})" if len(c) else "–" for c in cells)])
    return table(["objective", *(f"{size} a class" for size in sizes)], rows)


def _head(against: str) -> list[str]:
    return ["each seed, %", "mean ± SD", f"minus {against} (90 %)", "head refitted"]


def _cells(found: SetsFound, run: Run, against: Run) -> list[str]:
    each, again = found.accuracies(run), found.accuracies(run, "refitted")
    told = found.difference(run, against)
    points = "same" if run == against else "–"
    if told is not None:
        points = f"{told.gain:+.1f} ({told.low:+.1f} to {told.high:+.1f})"
    return [_each(each), _mean(each), points, number(again.mean() if len(again) else np.nan, 1)]


def _each(values: np.ndarray, form: str = ".1f") -> str:
    return " ".join(format(value, form) for value in values) or "–"


def _mean(values: np.ndarray) -> str:
    if len(values) < 2:
        return number(values[0] if len(values) else np.nan, 1)
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


# ---- pictures ------------------------------------------------------------------------------------


def picture(founds: Sequence[SetsFound], rows_of: Rows, line: str, path: Path) -> None:
    """Write what `drawn` draws."""
    write_picture(path, drawn(founds, rows_of, line))


def drawn(founds: Sequence[SetsFound], rows_of: Rows, line: str):
    """Accuracy by row, a panel a teacher, every seed a point; a row's mean marks the others.

    ``line`` is the row whose mean is drawn through its panel. The best rows are on top.
    """
    import matplotlib.pyplot as plt

    points = [
        {name: np.concatenate([found.accuracies(run) for run in of]) for name, of in rows.items()}
        for found, rows in ((found, rows_of(found)) for found in founds)
    ]
    means = [{name: each.mean() for name, each in of.items() if len(each)} for of in points]
    names = list(dict.fromkeys(name for of in means for name in of))

    def order(name: str) -> float:
        return float(np.mean([of[name] - of.get(line, 0) for of in means if name in of]))

    names.sort(key=order)
    size = (2.4 + 2.6 * len(founds), 1.4 + 0.26 * len(names))
    figure, axes = plt.subplots(
        1, len(founds), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for ax, found, of, mean in zip(axes[0], founds, points, means, strict=True):
        for place, name in enumerate(names):
            each = of.get(name, np.array([]))
            ax.plot(each, [place] * len(each), "o", color=POINT, ms=4, alpha=0.7, mew=0)
            if name in mean:
                ax.plot(mean[name], place, "|", color="black", ms=12, mew=1.8)
        if line in mean:
            ax.axvline(mean[line], color=LINE, ls="--", lw=1.2)
        zero = found.accuracies(found.run(CE))
        if len(zero):
            ax.axvline(zero.mean(), color=DOTS, ls=":", lw=1.6)
        ax.set_title(found.teacher.name, fontsize=9)
        ax.set_xlabel("test accuracy (%)", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].set_ylim(-0.7, len(names) - 0.3)
    _legend(figure, line)
    return axes[0, 0]


def _legend(figure, line: str) -> None:
    from matplotlib.lines import Line2D

    shown = {
        "a seed": {"marker": "o", "ls": "", "color": POINT, "ms": 5},
        "mean": {"marker": "|", "ls": "", "color": "black", "ms": 10, "mew": 2},
        f"mean of {line}": {"ls": "--", "color": LINE},
        "mean of cross entropy alone": {"ls": ":", "color": DOTS, "lw": 1.6},
    }
    handles = [Line2D([], [], label=label, **style) for label, style in shown.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def amounts_picture(found: SetsFound, path: Path) -> None:
    """Accuracy by number of images, a line an objective, every seed a point."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    looks = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")]
    looks += [("#56B4E9", "v"), ("#E69F00", "P"), ("#000000", "X")]
    sizes: set[int] = set()
    for (name, of), (colour, marker) in zip(amounts_of(found).items(), looks, strict=False):
        images = [next(iter(found.runs[run].values()))["images"] for run in of]
        each = [found.accuracies(run) for run in of]
        sizes |= set(images)
        ax.plot(images, [a.mean() for a in each], "-", color=colour, lw=1.2)
        for n, values in zip(images, each, strict=True):
            ax.plot([n] * len(values), values, marker, color=colour, ms=4, alpha=0.7, mew=0)
        ax.plot([], [], marker, ls="-", color=colour, label=name)
    ax.set_xscale("log")
    ax.set_xticks(sorted(sizes), [f"{n:,}" for n in sorted(sizes)])
    ax.minorticks_off()
    ax.set_xlabel("training images")
    ax.set_ylabel("test accuracy (%)")
    ax.set_title(
        f"students of {found.teacher.name}: every seed, line through the means", fontsize=9
    )
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)
    write_picture(path, ax)
