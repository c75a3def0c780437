"""Tables and a picture of what the journals hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.evidence.found import HEADS, Found, tau
from benchmarks.evidence.rules import RULES
from benchmarks.evidence.scores import IMAGES
from benchmarks.evidence.students import ARMS, ZERO_LINE
from benchmarks.evidence.verdict import mean_regrets, verdict
from geomkd.common.results_folder import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column names, the others count."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def report(founds: Sequence[Found], chosen: str | None) -> str:
    """Everything there is to tell, as Markdown."""
    there = [found for found in founds if found.about]
    whole = [found for found in there if found.complete]
    parts = ["## Teachers", teachers(there)]
    for found in there:
        parts += [f"## Students of {found.teacher.name}", students(found)]
    if whole:
        parts += ["## Regret of every rule, in points (tau)", rules(whole)]
        parts += ["## Other arms", arms(whole)]
        for found in whole:
            name = found.teacher.name
            parts += [f"## Controls of {name}: regret (tau), by what is scored", controls(found)]
    if chosen is not None:
        parts += ["## Verdict", f"The rule that went to confirmation: {chosen}."]
        confirmation = [found for found in founds if found.teacher.confirmation]
        if all(found.complete for found in confirmation):
            parts.append(verdict(chosen, confirmation))
    return "\n\n".join(parts)


def teachers(founds: Sequence[Found]) -> str:
    rows = []
    for found in founds:
        a, failed = found.about, sum("failed" in run for run in found.runs.values())
        shares = (100 * a[key] for key in ("training_accuracy", "scored_accuracy", "accuracy"))
        ceilings = [number(found.ceiling(head=head)) if found.layers() else "–" for head in HEADS]
        state = "open" if not found.complete else "decided" if found.decided else "undecided"
        rows.append([
            found.teacher.name, *(number(share, 1) for share in shares), str(a["parameters"]),
            f"{len(found.layers())} of {len(a['layers'])}", f"{len(found.runs)}, {failed}",
            *ceilings, state, a["fingerprint"],
        ])  # fmt: skip
    head = ["teacher", "training %", "scored %", "test %", "parameters", "layers", "runs, failed"]
    return table([*head, "ceiling", "refitted", "", "fingerprint"], rows)


def students(found: Found) -> str:
    """Accuracies by layer, and the gain over cross entropy alone."""
    zero, refitted = (found.zero_line(head=head) for head in HEADS)
    each = " ".join(number(v, 1) for v in zero)
    mean = zero.mean() if len(zero) else np.nan
    again = refitted.mean() if len(refitted) else np.nan
    rows = [[ZERO_LINE, each, number(mean, 1), "", number(again, 1)]]
    along, anew = found.accuracies(), found.accuracies(head="refitted")
    for name, accuracies, other in zip(found.layers(), along, anew, strict=True):
        each = " ".join(number(v, 1) for v in accuracies)
        gain = f"{accuracies.mean() - mean:+.1f}"
        rows.append([name, each, number(accuracies.mean(), 1), gain, number(other.mean(), 1)])
    return table(["layer", "each seed, %", "mean", "gain", "head refitted"], rows)


def rules(founds: Sequence[Found]) -> str:
    discovery = mean_regrets([f for f in founds if not f.teacher.confirmation])
    confirmation = mean_regrets([f for f in founds if f.teacher.confirmation])
    rows = []
    for name in sorted(RULES, key=lambda name: np.nan_to_num(discovery[name], nan=np.inf)):
        cells = [f"{number(found.regret(name))} ({number(found.tau(name))})" for found in founds]
        rows.append([name, number(discovery[name]), number(confirmation[name]), *cells])
    means = ["mean, discovery", "mean, confirmation"]
    return table(["rule", *means, *(found.teacher.name for found in founds)], rows)


def controls(found: Found) -> str:
    """What becomes of a score on other images, without training, with labels permuted."""
    rows = []
    for name, rule in RULES.items():
        if not rule.baseline:
            each = [(found.regret(name, images), found.tau(name, images)) for images in IMAGES]
            rows.append([name, *(f"{number(lost)} ({number(order)})" for lost, order in each)])
    return table(["rule", *IMAGES], rows)


def arms(founds: Sequence[Found]) -> str:
    """Whether the order of the layers is that of the main arm."""
    rows = []
    for found in founds:
        for arm in list(ARMS)[1:]:
            names = found.layers(arm)
            if not names or len(names) < len(
                {n for a, n, _ in found.runs if a == arm} - {ZERO_LINE}
            ):
                continue
            places = [found.layers().index(name) for name in names]
            main, other = (
                found.accuracies()[places].mean(axis=1),
                found.accuracies(arm).mean(axis=1),
            )
            zero = found.zero_line(arm)
            rows.append([
                found.teacher.name, arm, str(len(names)), number(tau(main, other)),
                number(found.ceiling(arm)), names[int(main.argmax())], names[int(other.argmax())],
                number(zero.mean() if len(zero) else np.nan, 1),
                " ".join(number(v, 1) for v in other),
            ])  # fmt: skip
    head = ["teacher", "arm", "layers", "tau with features", "ceiling", "best layer", "best here"]
    return table([*head, "cross entropy alone, %", "by layer, %"], rows)


def picture(founds: Sequence[Found], path: Path) -> None:
    write_picture(path, regret_map(founds))


def regret_map(founds: Sequence[Found]) -> Axes:
    """Rules by teachers: regret in colour and figures, the best rule on discovery on top."""
    import matplotlib.pyplot as plt

    discovery = [found for found in founds if not found.teacher.confirmation] or list(founds)
    regrets = {name: [found.regret(name) for found in founds] for name in RULES}
    means = {name: np.mean([found.regret(name) for found in discovery]) for name in RULES}
    order = sorted(RULES, key=means.__getitem__)
    values = np.array([regrets[name] for name in order])
    width, height = 3.2 + 0.9 * len(founds), 1.6 + 0.22 * len(order)
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    top = max(float(np.nanmax(values)), 1.0)
    ax.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    for (row, place), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 * top else "black"
        ax.text(place, row, number(value, 1), ha="center", va="center", fontsize=7, color=colour)
    ax.set_yticks(range(len(order)), order, fontsize=7)
    shown = [f"{f.teacher.name}{'' if f.decided else '*'}" for f in founds]
    ax.set_xticks(range(len(founds)), shown, fontsize=7, rotation=30, ha="right")
    between = sum(not found.teacher.confirmation for found in founds)
    if 0 < between < len(founds):
        ax.axvline(between - 0.5, color="#D55E00", lw=1.5)
    ax.set_title("points below the best layer (* seeds disagree)", fontsize=8)
    ax.spines[:].set_visible(False)
    return ax
