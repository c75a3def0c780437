"""The whole grid: what is done, what is open, and the table of what was found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.paper.data import PaperData, Sizes
from benchmarks.paper.estimate import estimate
from benchmarks.paper.places import Place, read_json, slug
from benchmarks.paper.recipes import Combination
from benchmarks.paper.run import run


def state(combination: Combination, seeds: int, place: Place) -> str:
    """``done``, ``part``, ``open``, or ``skipped`` with the reason."""
    if combination.obstacle:
        return f"skipped: {combination.obstacle}"
    files = [place.student(combination, seed) for seed in range(seeds)]
    done = sum(file.exists() for file in files)
    if done == seeds:
        return "done"
    begun = any(place.checkpoints(file).exists() for file in files)
    return f"part: {done} of {seeds} seeds" if done or begun else "open"


def listing(combinations: Sequence[Combination], seeds: int, place: Place) -> str:
    """A line for each combination, with its state, and a line that counts them."""
    states = [state(combination, seeds, place) for combination in combinations]
    width = max(len(slug(c.dataset)) for c in combinations) + 2
    lines = [
        f"{slug(c.dataset):<{width}}{f'{c.teacher} -> {c.student}':<26}{c.method:<23}"
        f"{c.layers or '-':<12}{now}"
        for c, now in zip(combinations, states, strict=True)
    ]
    counts = ", ".join(
        f"{sum(now.startswith(kind) for now in states)} {kind}"
        for kind in ("done", "part", "open", "skipped")
    )
    return "\n".join([*lines, f"{len(lines)} combinations of {seeds} seeds: {counts}"])


def run_open(
    combinations: Sequence[Combination],
    seeds: int,
    read: Callable[[str], PaperData],
    place: Place,
    sizes: dict[str, Sizes] | None = None,
) -> int:
    """Run in order what is not done, after an estimate where the data sets' sizes are given.

    Returns 1 where a run ended with an error, which is told, else 0.
    """
    todo = [c for c in combinations if state(c, seeds, place).startswith(("open", "part"))]
    if todo and sizes:
        for line in estimate(todo, seeds, sizes, place):
            place.say(line)
    failed = 0
    for combination in todo:
        try:
            run(combination, seeds, read(combination.dataset), place)
        except RuntimeError as error:  # such as too little memory: the others may still fit
            failed += 1
            place.say(f"{slug(combination.dataset)}, {combination.name}: {error}")
    place.say(tabulate(combinations, seeds, place))
    return 1 if failed else 0


def tabulate(combinations: Sequence[Combination], seeds: int, place: Place) -> str:
    """Test accuracy after the last epoch, mean ± SD over all seeds, as Markdown."""
    recipe = replace(combinations[0].recipe, imagenet=None)  # each teacher has its own, or none
    title = "Test accuracy (%) after the last epoch, mean ± SD over all finished seeds; "
    tables = [title + (f"recipe {recipe.suffix[1:]}." if recipe.suffix else "the paper's recipe.")]
    for dataset in dict.fromkeys(c.dataset for c in combinations):
        own = [c for c in combinations if c.dataset == dataset]
        tables.append(_table(own, seeds, place))
    return "\n\n".join(tables)


def cell(results: Sequence[dict[str, Any] | None], seeds: int) -> str:
    """Mean ± SD of the accuracies of some runs, and how many were not finished or diverged."""
    found = [100 * r["test_accuracy"] for r in results if r and "failed" not in r]
    failed = sum(bool(r) and "failed" in r for r in results)
    if not found and not failed:
        return ""
    text = f"{statistics.mean(found):.2f}" if found else "none"
    text += f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    notes = [f"{len(found)} of {seeds}"] if len(found) < seeds else []
    notes += [f"{failed} diverged"] if failed else []
    return text + (f" ({', '.join(notes)})" if notes else "")


def _table(combinations: Sequence[Combination], seeds: int, place: Place) -> str:
    pairs = list(dict.fromkeys((c.teacher, c.student) for c in combinations))
    rows: dict[tuple, dict] = {}
    teachers = {}
    for c in combinations:
        results = [read_json(place.student(c, seed)) for seed in range(seeds)]
        cells = rows.setdefault((c.method, c.layers), {})
        cells[c.teacher, c.student] = "–" if c.obstacle else cell(results, seeds)
        known = read_json(place.teacher(c))
        start = ", from ImageNet" * bool(c.recipe.imagenet)
        accuracy = f"{100 * known['test_accuracy']:.2f}{start}" if known else ""
        teachers[c.teacher, c.student] = accuracy
    head = [slug(combinations[0].dataset), "layers", *(f"{t} → {s}" for t, s in pairs)]
    lines = [head, ["---", "---", *["---:"] * len(pairs)]]
    lines.append(["teacher", "", *(teachers[pair] for pair in pairs)])
    for (method, layers), cells in rows.items():
        lines.append([method, layers or "", *(cells.get(pair, "") for pair in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
