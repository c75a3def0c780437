"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from geomkd import __version__
from geomkd.loading import load_data, load_model
from geomkd.quickstart import STUDENT_EPOCHS, quickstart, sqrt_si
from geomkd.reports import machine, new_folder, write_frame, write_json, write_picture
from geomkd.scores import LayerScores
from geomkd.scoring import score_layers

BY = ("quality", "separation", "information", "efficiency")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 when the input was wrong, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"geomkd {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"geomkd {options.command}: interrupted", file=sys.stderr)
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
        samples=options.samples,
        definition=options.definition,
        pool=options.pool,
        subsamples=options.subsamples,
        seed=options.seed,
        device=options.device,
        memory=options.memory,
        progress=not options.quiet,
    )
    by = sqrt_si if options.by == "sqrt_si" else options.by
    before_head = int((scores.to_frame()["role"] != "head").sum())
    selected = scores.select(min(options.k, before_head), by=by)
    folder = new_folder(options.out, "geomkd-scores")
    write_frame(folder / "layers.csv", scores.to_frame())
    write_frame(folder / "ranks.csv", scores.rank(by=by))
    write_picture(folder / "layers.png", scores.plot(k=len(selected), by=by))
    scores.save(folder / "scores.npz")
    summary = {"model": loaded.story, "data": str(options.data), "images": transform}
    summary |= {"selected": selected, "by": options.by, "settings": scores.settings}
    write_json(folder / "summary.json", summary | {"machine": machine()})
    print("\n" + ranked_table(scores))
    print(f"selected by {options.by}: {', '.join(selected)}")
    print(f"wrote layers.csv, ranks.csv, layers.png, scores.npz and summary.json to {folder}")


def ranked_table(scores: LayerScores) -> str:
    """Layers from best to worst quality, as text."""
    ranks = scores.rank()
    columns = ["layer", "kind", "dim", "separation", "information", "efficiency", "quality"]
    table = ranks.drop(columns="score").merge(scores.to_frame()[columns], on="layer")
    table["95% ranks"] = [
        "-" if missing else f"{low}-{high}"
        for low, high, missing in zip(
            table["lowest_rank"], table["highest_rank"], table["lowest_rank"].isna(), strict=True
        )
    ]
    shown = ["rank", "95% ranks", *columns, "tied_with"]
    return table[shown].to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="geomkd",
        description="Which layers of a network hold knowledge worth teaching, and how sure are we.",
    )
    parser.add_argument("--version", action="version", version=f"geomkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    start = commands.add_parser(
        "quickstart", help="a teacher, its ranked layers and students, on bundled digits"
    )
    start.set_defaults(run=_quickstart)
    start.add_argument("--seeds", type=int, default=3, help="students of each method (default: 3)")
    start.add_argument(
        "--epochs", type=int, default=STUDENT_EPOCHS, help="of a student (default: %(default)s)"
    )

    score = commands.add_parser("score", help="rank the layers of a model of yours")
    score.set_defaults(run=_score)
    add = score.add_argument
    add("--model", required=True, help="torchvision:NAME or package.module:factory")
    add("--weights", help="file of a state dict; without it the weights are random")
    add("--data", required=True, help="FILE.npz, a folder of class folders, or of IDX files")
    add("--split", help="which arrays of an npz or IDX set (default: train)")
    add("--image-size", type=int, help="resize the shorter side and cut out the centre (folders)")
    add("--mean", type=float, nargs="+", help="one number, or one a channel")
    add("--std", type=float, nargs="+", help="one number, or one a channel")
    add("--layers", nargs="+", help="names of modules (default: blocks, activations, head input)")
    add("--samples", type=int, default=5000, help="most images in all (default: 5000)")
    add("--definition", default="published", help="published (default) or robust")
    add("--pool", default="flatten", help="flatten (default), mean, max, cls or published")
    add("--subsamples", type=int, default=50, help="half-samples behind the ranks (default: 50)")
    add("--k", type=int, default=4, help="layers to select (default: 4)")
    add("--by", choices=[*BY, "sqrt_si"], default="quality", help="score to select by")
    add("--device", help="where to run (default: where the model is)")
    add("--memory", default="2GB", help="most memory beside model and data (default: 2GB)")
    for command in (start, score):
        command.add_argument("--out", help="new folder for the results")
        command.add_argument("--seed", type=int, default=0, help="default: 0")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser
