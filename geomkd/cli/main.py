"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from geomkd.cli.distill import distilled
from geomkd.cli.loading import load_data, load_model
from geomkd.cli.parser import parsed
from geomkd.cli.processes import ERRORS, is_first_to_fail
from geomkd.common.distributed import world
from geomkd.common.results_folder import machine, new_folder, write_frame, write_json, write_picture
from geomkd.measures.quality import TERMS
from geomkd.quickstart import quickstart, sqrt_si
from geomkd.scoring.layer_measures import QUALITY, columns_of, named
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.score_layers import score_layers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 when the input was wrong, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = " ".join(["geomkd", *arguments[:1]])
    try:
        options = parsed(arguments, quickstart=_quickstart, score=_score, distill=_distill)
        options.run(options)
    except ERRORS as error:
        if is_first_to_fail():
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _quickstart(options: argparse.Namespace) -> None:
    found = quickstart(
        options.out,
        seed=options.seed,
        seeds=options.seeds,
        epochs=options.epochs,
        say=print,
        progress=not options.quiet,
    )
    print("\n" + ranked_table(found.scores))
    for choice, layers in found.layers.items():
        print(f"{choice:<20}{', '.join(layers)}")
    print(f"\n{'student trained by':<30}test accuracy, last epoch, mean ± SD (each seed)")
    for method, a in found.summary["test_accuracy_last_epoch"].items():
        runs = ", ".join(f"{100 * value:.1f}" for value in a["all"])
        deviation = "" if a["sd"] is None else f" ± {100 * a['sd']:.1f}"
        print(f"{method:<30}{100 * a['mean']:>12.1f}{deviation} %   ({runs})")
    print(f"\n{found.summary['seconds']:.0f} s; wrote layers.csv, layers.png, training.png and")
    print(f"summary.json to {found.folder}")


def _score(options: argparse.Namespace) -> None:
    named(options.measures)
    offered = TERMS if QUALITY in options.measures else ()
    offered = [*offered, *columns_of(options.measures), "loes"]
    offered += ["sqrt_si"] if QUALITY in options.measures else []
    if options.by not in (None, *offered):
        raise ValueError(f"--by must be one of {', '.join(offered)}; got {options.by!r}")
    loaded = load_model(options.model, weights=options.weights, seed=options.seed)
    data, transform = load_data(
        options.data,
        loaded,
        split=options.split,
        image_size=options.image_size,
        mean=options.mean,
        std=options.std,
    )
    print(f"model: {loaded.story}\ndata: {options.data}, {len(data)} images\nimages: {transform}")
    scores = score_layers(
        loaded.model,
        data,
        options.layers,
        measures=options.measures,
        sweep=options.sweep,
        samples=options.samples,
        definition=options.definition,
        pool=options.pool,
        subsamples=options.subsamples,
        seed=options.seed,
        device=options.device,
        memory=options.memory,
        progress=not options.quiet,
    )
    by = sqrt_si if options.by == "sqrt_si" else options.by or scores.by
    ranked = scores.by if by == "loes" else by
    before_head = int((scores.to_frame()["role"] != "head").sum())
    selected = scores.select(min(options.k, before_head), by=by)
    folder = new_folder(options.out, "geomkd-scores")
    scores.save(folder / "scores.npz")  # first: a layer without a score has no rank
    write_frame(folder / "layers.csv", scores.to_frame())
    write_frame(folder / "ranks.csv", scores.rank(by=ranked))
    wrote = ["layers.csv", "ranks.csv", "layers.png", "scores.npz"]
    if options.sweep:
        write_picture(folder / "sweep.png", scores.plot_sweep(by=ranked))
        wrote.append("sweep.png")
    write_picture(folder / "layers.png", scores.plot(k=len(selected), by=by))
    settings = {k: v for k, v in scores.settings.items() if k != "subset_classes"}
    summary = {"model": loaded.story, "data": str(options.data), "images": transform}
    summary |= {"selected": selected, "by": options.by or scores.by, "settings": settings}
    write_json(folder / "summary.json", summary | {"machine": machine()})
    print("\n" + ranked_table(scores, by=ranked))
    print(f"selected by {options.by or scores.by}: {', '.join(selected)}")
    print(f"wrote {', '.join(wrote)} and summary.json to {folder}")


def _distill(options: argparse.Namespace) -> None:
    done = distilled(options, say=print)
    if not world().is_first:
        return
    summary = done.summary
    if summary["pairs"]:
        print("\n" + pairs_table(summary["pairs"]))
    settings = ", ".join(f"{k} {v}" for k, v in summary["objective"].items() if k != "name")
    print(f"\nobjective: {summary['objective']['name']}{' with ' if settings else ''}{settings}")
    last, best = summary["last_epoch"], summary["best_validation_epoch"]
    print(f"last epoch, {last['epoch']}: training accuracy {last['train_accuracy']:.1%}", end="")
    if best is not None:
        print(f", validation accuracy {last['val_accuracy']:.1%}")
        print(f"best validation epoch, {best['epoch']}: {best['val_accuracy']:.1%}", end="")
    print(f"\n{summary['seconds_of_all_epochs']:.0f} s of training; wrote student.pt, history.csv,")
    print(f"training.png, summary.json and config.toml to {done.folder}")


def pairs_table(pairs: Sequence[tuple[str, str]]) -> str:
    """Teacher and student layers side by side, as text."""
    rows = [("teacher layer", "student layer"), *pairs]
    width = max(len(teacher) for teacher, _ in rows) + 2
    return "\n".join(f"{teacher:<{width}}{student}" for teacher, student in rows)


def ranked_table(scores: LayerScores, *, by: Any = None) -> str:
    """Layers from best to worst with every score, as text."""
    ranks = scores.rank(by=by)
    columns = ["layer", "kind", "dim", *scores.draws]
    table = ranks.drop(columns="score").merge(scores.to_frame()[columns], on="layer")
    table["95% ranks"] = [
        "-" if missing else f"{low}-{high}"
        for low, high, missing in zip(
            table["best"], table["worst"], table["best"].isna(), strict=True
        )
    ]
    shown = ["rank", "95% ranks", *columns, "tied_with"]
    return table[shown].to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="")
