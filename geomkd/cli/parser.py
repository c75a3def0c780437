"""Options of the command line; those of ``distill`` may come from a TOML file as well."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from geomkd import __version__
from geomkd.cli.config import arguments_of
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.distillation.running.recipe import PRECISIONS
from geomkd.distillation.running.teacher import CACHE_DTYPES
from geomkd.measures.table import NAMES, QUALITY
from geomkd.quickstart import STUDENT_EPOCHS

BY = ("quality", "separation", "information", "efficiency", "sqrt_si")
MODEL = "torchvision:NAME or package.module:factory"
DATA = "FILE.npz, a folder of class folders, or of IDX files"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, so that they end in one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise ValueError(f"{message} ({self.prog} --help tells the options)")


def parsed(arguments: Sequence[str], **runs: Callable) -> argparse.Namespace:
    """Parse a command line; where it names a ``--config``, options in it come before its own.

    Parameters
    ----------
    arguments : sequence of str
        Without the name of the program.
    **runs : callable
        What each command is run by.

    Raises
    ------
    ValueError
        Unknown options, bad values, or a file that holds such.
    """
    parser = Parser(
        prog="geomkd",
        description="Which layers of a network hold knowledge worth teaching, and how sure are we.",
    )
    parser.add_argument("--version", action="version", version=f"geomkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _quickstart(commands)
    _score(commands)
    distill = _distill(commands)
    options = own = parser.parse_args(arguments)
    if getattr(own, "config", None) is not None:
        command, *rest = arguments
        options = parser.parse_args([command, *arguments_of(own.config, distill), *rest])
        if own.layers is not None or own.pairs is not None:  # either overrides both
            options.layers, options.pairs = own.layers, own.pairs
    options.run, options.arguments = runs[options.command], list(arguments)
    return options


def _quickstart(commands: argparse._SubParsersAction) -> None:
    start = commands.add_parser(
        "quickstart", help="a teacher, its ranked layers and students, on bundled digits"
    )
    start.add_argument("--seeds", type=int, default=3, help="students of each method (default: 3)")
    start.add_argument(
        "--epochs", type=int, default=STUDENT_EPOCHS, help="of a student (default: %(default)s)"
    )
    _add_common(start)


def _score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser("score", help="rank the layers of a model of yours")
    add = score.add_argument
    add("--model", required=True, help=MODEL)
    add("--weights", help="file of a state dict; without it the weights are random")
    add("--data", required=True, help=DATA)
    _add_images(score)
    add("--layers", nargs="+", help="names of modules (default: blocks, activations, head input)")
    add("--definition", default="published", help="published (default) or robust")
    add("--pool", default="flatten", help="flatten (default), mean, max, cls or published")
    add("--measures", nargs="+", default=[QUALITY], help=f"of {', '.join(NAMES)}")
    add("--subsamples", type=int, default=50, help="half-samples behind the ranks (default: 50)")
    add("--sweep", type=int, nargs="+", default=[], help="smaller sample sizes to score beside")
    _add_scoring(score)
    add("--by", help="score to select by, or sqrt_si, or loes (default: quality or the first)")
    add("--device", help="where to run (default: where the model is)")
    _add_common(score)


def _distill(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    distill = commands.add_parser("distill", help="train a student of a teacher of yours")
    add = distill.add_argument
    add("--config", metavar="FILE.toml", help="options by their names; the command line overrides")
    add("--teacher", help=MODEL)
    add("--teacher-weights", type=os.path.abspath, help="file of a state dict (default: random)")
    add("--student", help=MODEL)
    add("--student-weights", type=os.path.abspath, help="file of a state dict (default: random)")
    add("--data", type=os.path.abspath, help=DATA)
    _add_images(distill)
    add("--val-data", type=os.path.abspath, help="validation data (default: none)")
    add("--val-split", help="which arrays of --val-data, or without it of --data, to validate on")
    add("--objective", choices=OBJECTIVES, default="features", help="default: features")
    add("--set", nargs="+", metavar="NAME=VALUE", help="options of the objective")
    add(
        "--layers", nargs="+", help="of the teacher: auto (by scores, default), even, last or names"
    )
    add(
        "--pairs", nargs="+", metavar="T:S", help="teacher and student layers, in place of --layers"
    )
    _add_scoring(distill)
    add("--by", choices=BY, default="quality", help="score to select by")
    _add_training(distill)
    add("--cache", action=argparse.BooleanOptionalAction, default=False, help="teacher features")
    add("--cache-dir", type=os.path.abspath, help="where to (default: under the results)")
    add("--cache-dtype", choices=[*filter(None, CACHE_DTYPES)], help="default: the teacher's")
    add("--checkpoint-steps", type=int, help="checkpoints between those of the epochs")
    add("--log-dir", type=os.path.abspath, help="folder for TensorBoard's scalars")
    add("--device", help="where to run (default: this process's accelerator, if there is one)")
    add("--resume", action="store_true", help="go on where the run in --out was, or begin it")
    _add_common(distill)
    return distill


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=int, default=50, help="default: 50")
    add("--batch-size", type=int, default=128, help="over all processes (default: 128)")
    add("--accumulate", type=int, default=1, help="parts of a process's batch (default: 1)")
    add("--lr", type=float, default=0.0075, help="largest rate of the cycle (default: 0.0075)")
    add("--weight-decay", type=float, default=0.01, help="default: 0.01")
    add("--clip-norm", type=float, help="of the gradients of backbone and projectors")
    add("--head-clip-norm", type=float, help="of the head's gradients (default: --clip-norm)")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    for name, text in (("compile", "the student"), ("channels-last", "memory format of images")):
        add(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=text)


def _add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", help="which arrays of an npz or IDX set (default: train)")
    add("--image-size", type=int, help="resize the shorter side and cut out the centre (folders)")
    add("--mean", type=float, nargs="+", help="one number, or one a channel")
    add("--std", type=float, nargs="+", help="one number, or one a channel")


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--samples", type=int, default=5000, help="most images that are scored (default: 5000)")
    add("--k", type=int, default=4, help="layers to select (default: 4)")
    add("--memory", default="2GB", help="most memory of scoring beside model and data (2GB)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", help="new folder for the results")
    add("--seed", type=int, default=0, help="default: 0")
    add("--quiet", action=argparse.BooleanOptionalAction, default=False, help="no progress bars")
