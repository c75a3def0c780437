"""Command line of the paper's comparison; ``python -m benchmarks.paper --help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch

import benchmarks.paper as package
from benchmarks.paper.data import PUBLISHED, PaperData, load, sizes_of
from benchmarks.paper.grid import listing, run_open, state, tabulate
from benchmarks.paper.places import Place, file_hash
from benchmarks.paper.recipes import (
    CHOICES,
    PAIRS,
    STUDENT_LAYERS,
    TEACHERS,
    Combination,
    Recipe,
    all_combinations,
    combination,
)
from benchmarks.paper.run import run
from geomkd.common.distributed import world
from geomkd.distillation.rivals import OBJECTIVES

RESULTS = Path(package.__file__).parents[1] / "results" / "paper"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 1 when runs failed, 2 for wrong input, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"benchmarks.paper {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"benchmarks.paper {options.command}: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    names = (options.dataset, options.teacher, options.student, options.method, options.layers)
    weights = {options.teacher: options.imagenet_weights} if options.imagenet_weights else {}
    recipe = _recipe(options, weights.get(options.teacher))
    chosen = combination(*names, recipe)
    if chosen.obstacle:
        raise ValueError(f"{chosen.method} {chosen.obstacle}")
    place = _place(options, weights)
    if state(chosen, options.seeds, place) != "done":
        run(chosen, options.seeds, _reader(options)(options.dataset), place)
    place.say(tabulate([chosen], options.seeds, place))
    return 0


def _grid(options: argparse.Namespace) -> int:
    weights = dict(options.imagenet_weights)
    place = _place(options, weights)
    hashes = {name: file_hash(path) for name, path in weights.items()}
    wanted = [c for c in all_combinations(options.datasets, _recipe(options), hashes)
              if _is_wanted(c, options)]  # fmt: skip
    if not wanted:
        raise ValueError("no combination has all of these data sets, pairs, methods and layers")
    if options.list:
        place.say(listing(wanted, options.seeds, place))
    elif options.tabulate:
        place.say(tabulate(wanted, options.seeds, place))
    else:
        place.say(listing(wanted, options.seeds, place))
        sizes = sizes_of(options.datasets, options.data_root, download=options.download)
        if options.no_estimate or world().size > 1:  # what is measured is one process's step
            sizes = None
        return run_open(wanted, options.seeds, _reader(options), place, sizes)
    return 0


def _is_wanted(c: Combination, options: argparse.Namespace) -> bool:
    return (
        f"{c.teacher}-{c.student}" in options.pairs
        and c.method in options.methods
        and (c.layers is None or c.layers in options.layers)
    )


def _recipe(options: argparse.Namespace, weights: Path | None = None) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        augment=options.augment,
        validation=options.validation,
        subset=options.subset,
        precision=options.precision,
        imagenet=None if weights is None else file_hash(weights),
    )


def _place(options: argparse.Namespace, weights: dict[str, Path]) -> Place:
    first = world().is_first
    return Place(
        out=options.out,
        work=options.work,
        device=torch.device(options.device or _best_device()),
        imagenet=weights,
        progress=not options.quiet,
        say=partial(print, flush=True) if first else lambda line: None,
    )


def _best_device() -> torch.device:
    """Accelerator of this process where there is one, else the processor."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


def _reader(options: argparse.Namespace) -> Callable[[str], PaperData]:
    """Reads a data set; keeps the last one, as the grid takes them one after the other."""

    @lru_cache(maxsize=1)
    def read(dataset: str) -> PaperData:
        return load(
            dataset,
            options.data_root,
            download=options.download,
            subset=options.subset,
            validation=options.validation,
        )

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="a teacher, and a student for each seed")
    one.set_defaults(run=_run)
    one.add_argument("--dataset", required=True, help=f"{', '.join(PUBLISHED)} or npz:FILE")
    one.add_argument("--teacher", required=True, choices=TEACHERS)
    one.add_argument("--student", required=True, choices=STUDENT_LAYERS)
    one.add_argument("--method", required=True, choices=OBJECTIVES)
    one.add_argument("--layers", default="paper_q", choices=CHOICES, help="default: %(default)s")
    one.add_argument("--imagenet-weights", type=Path, metavar="FILE", help="for the teacher's body")

    grid = commands.add_parser("grid", help="all combinations, or those of the names given")
    grid.set_defaults(run=_grid)
    grid.add_argument("--datasets", nargs="+", default=list(PUBLISHED), metavar="DATASET")
    pairs = [f"{teacher}-{student}" for teacher, student in PAIRS]
    grid.add_argument("--pairs", nargs="+", default=pairs, choices=pairs)
    grid.add_argument("--methods", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    grid.add_argument("--layers", nargs="+", default=CHOICES, choices=CHOICES)
    grid.add_argument("--imagenet-weights", nargs="+", type=_named_file, default=[],
                      metavar="TEACHER=FILE")  # fmt: skip
    grid.add_argument("--no-estimate", action="store_true", help="begin at once")
    only = grid.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="say what is done and open, no more")
    only.add_argument("--tabulate", action="store_true", help="print the table, no more")
    for command in (one, grid):
        _add_common(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    add, paper = command.add_argument, Recipe()
    add("--seeds", type=_at_least_one, default=3, help="students of a combination (default: 3)")
    add("--data-root", type=Path, default=Path("data"), help="holds the data sets' folders")
    add("--download", action="store_true", help="let torchvision fetch CIFAR")
    add("--epochs", type=int, default=paper.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=paper.batch_size, help="default: %(default)s")
    add("--subset", type=_at_least_one, metavar="N", help="train and test on at most N images each")
    add("--augment", action="store_true", help="random crops and flips of training images")
    add("--validation", action="store_true", help="set a fifth of the training images apart")
    add("--precision", default=paper.precision, choices=["fp32", "bf16", "fp16"])
    add("--device", help="default: the accelerator, if any")
    add("--out", type=Path, default=RESULTS, help="finished runs (default: %(default)s)")
    add("--work", type=Path, default=Path(".paper-work"), help="checkpoints, teachers' weights")
    add("--quiet", action="store_true", help="no progress bars")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1; got {text!r}")
    return int(text)


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or name not in TEACHERS:
        raise argparse.ArgumentTypeError(
            f"expected TEACHER=FILE with a teacher of {', '.join(TEACHERS)}; got {text!r}"
        )
    return name, Path(file)


if __name__ == "__main__":
    sys.exit(main())
