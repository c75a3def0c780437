"""Options of the command line; those of ``distill`` may come from a TOML file as well.

An option that a function has a parameter of the same name for takes its type and default from it.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NoReturn

from geomkd import __version__
from geomkd.cli.config import arguments_of
from geomkd.cli.models import FORMS
from geomkd.distillation import distill
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.distillation.running.recipe import PRECISIONS
from geomkd.distillation.running.teacher import CACHE_DTYPES
from geomkd.measures.table import NAMES
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.score_layers import score_layers

DATA = "FILE.npz, a folder of class folders, or of IDX files"
WEIGHTS = (
    "file of a state dict, or DEFAULT: its library's, if on disk (default: random; of hf: own)"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, so that they end in one line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise ValueError(f"{message} ({self.prog} --help tells the options)")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; where it names a ``--config``, options in it come before its own.

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
    _layers(commands)
    _score(commands)
    distill = _distill(commands)
    options = own = parser.parse_args(arguments)
    if getattr(own, "config", None) is not None:
        command, *rest = arguments
        options = parser.parse_args([command, *arguments_of(own.config, distill), *rest])
        if own.layers is not None or own.pairs is not None:  # either overrides both
            options.layers, options.pairs = own.layers, own.pairs
    options.arguments = list(arguments)
    return options


def options_of(function: Callable, options: argparse.Namespace) -> dict[str, Any]:
    """Options that are parameters of a function, where they have a value."""
    known = signature(function).parameters
    return {k: v for k, v in vars(options).items() if k in known and v is not None}


def _adder(parser: argparse.ArgumentParser, function: Callable) -> Callable[..., None]:
    """Make an ``add_argument`` that knows a function's defaults, and tells them in the help."""
    parameters = signature(function).parameters
    known = {n: p.default for n, p in parameters.items() if p.default not in (p.empty, None, ())}

    def add(flag: str, help: str = "", **options: Any) -> None:
        default = known.get(flag.removeprefix("--").replace("-", "_"))
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction, "default": default} | options
        elif default is not None:
            kind = {"type": type(default)} if isinstance(default, int | float) else {}
            options = {"default": default} | kind | options
            listed = " ".join(default) if isinstance(default, tuple) else default
            help = f"{help} (default: {listed})" if help else f"default: {listed}"
        parser.add_argument(flag, help=help, **options)

    return add


def _quickstart(commands: argparse._SubParsersAction) -> None:
    from geomkd.quickstart import quickstart

    start = commands.add_parser(
        "quickstart", help="a teacher, its ranked layers and students, on bundled digits"
    )
    add = _adder(start, quickstart)
    add("--seeds", "students of each method")
    add("--epochs", "of a student")
    _add_common(start, quickstart)


def _layers(commands: argparse._SubParsersAction) -> None:
    layers = commands.add_parser("layers", help="list the layers of a model, without any data")
    layers.add_argument("model", help=FORMS)
    add = _adder(layers, score_layers)
    add("--weights", WEIGHTS)
    add("--layers", "names or patterns (default: blocks, activations, head input)", nargs="+")
    _add_granularity(layers)
    add("--image-size", "of the example that tells the shapes", type=int)
    add("--seed")


def _score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser("score", help="rank the layers of a model of yours")
    add = _adder(score, score_layers)
    add("--model", FORMS, required=True)
    add("--weights", WEIGHTS)
    add("--data", DATA, required=True)
    _add_images(score)
    add("--layers", "names or patterns (default: blocks, activations, head input)", nargs="+")
    _add_granularity(score)
    add("--subsamples", "half-samples behind the ranks")
    add("--sweep", "smaller sample sizes to score beside", type=int, nargs="+")
    _add_scoring(score)
    add("--device", "where to run (default: where the model is)")
    add("--report", "write report.html as well, a page to show", action="store_true")
    _add_common(score, score_layers)


def _distill(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("distill", help="train a student of a teacher of yours")
    add = _adder(parser, distill)
    path = os.path.abspath
    add("--config", "options by their names; the command line overrides", metavar="FILE.toml")
    for role in ("teacher", "student"):
        add(f"--{role}", FORMS)
        add(f"--{role}-weights", WEIGHTS, type=_weights)
    add("--data", DATA, type=path)
    _add_images(parser)
    add("--val-data", "validation data (default: none)", type=path)
    add("--val-split", "which arrays of --val-data, or without it of --data, to validate on")
    add("--objective", choices=OBJECTIVES)
    add("--set", "options of the objective", nargs="+", metavar="NAME=VALUE")
    auto = "auto (evenly spaced up to the head's input; with --by or other scoring: by scores)"
    add("--layers", f"of the teacher: {auto}, even, last or names (default: auto)", nargs="+")
    add("--pairs", "of teacher and student layers, in place of --layers", nargs="+", metavar="T:S")
    _add_granularity(parser)
    add("--scores", "of the teacher's layers, in place of scoring", type=path, metavar="FILE.npz")
    _add_scoring(parser)
    add("--epochs")
    add("--batch-size", "over all processes")
    add("--accumulate", "parts of a process's batch")
    add("--lr", "largest rate of the cycle")
    add("--weight-decay")
    add("--clip-norm", "of the gradients of backbone and projectors", type=float)
    add("--head-clip-norm", "of the head's gradients (default: --clip-norm)", type=float)
    add("--precision", choices=PRECISIONS)
    add("--compile", "the student")
    add("--channels-last", "memory format of images")
    add("--cache", "teacher features", action=argparse.BooleanOptionalAction, default=False)
    add("--cache-dir", "where to (default: under the results)", type=path)
    add("--cache-dtype", "default: the teacher's", choices=[*filter(None, CACHE_DTYPES)])
    add("--checkpoint-steps", "checkpoints between those of the epochs", type=int)
    add("--log-dir", "folder for TensorBoard's scalars", type=path)
    add("--device", "where to run (default: this process's accelerator, if there is one)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if any")
    _add_common(parser, distill)
    return parser


def _weights(text: str) -> str:
    """Make the path of a file absolute; a name of weights, such as DEFAULT, stays."""
    is_name = text.split(".")[-1].isupper() and not os.path.exists(text)
    return text if is_name else os.path.abspath(text)


def _add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", help="which arrays of an npz or IDX set (default: train)")
    add("--image-size", type=int, help="resize the shorter side and cut out the centre (folders)")
    add("--mean", type=float, nargs="+", help="one number, or one a channel")
    add("--std", type=float, nargs="+", help="one number, or one a channel")


def _add_granularity(parser: argparse.ArgumentParser) -> None:
    choices = ["blocks", "stages"]
    _adder(parser, score_layers)("--granularity", "of layers not named", choices=choices)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    add = _adder(parser, score_layers)
    add("--samples", "most images that are scored")
    add("--protocol", "paper: all of the published sampling of Q", choices=["paper"])
    add("--definition", "published or robust")
    add("--pool", "flatten (default), mean, max, cls, last or published")
    add("--measures", f"of {', '.join(NAMES)}", nargs="+")
    _adder(parser, LayerScores.select)("--k", "layers to select")
    add("--by", "score to select by, or sqrt_si, or loes (default: quality or the first)")
    add("--memory", "most memory of scoring beside model and data")


def _add_common(parser: argparse.ArgumentParser, function: Callable) -> None:
    _adder(parser, function)("--seed")
    parser.add_argument("--out", help="new folder for the results")
    quiet = {"action": argparse.BooleanOptionalAction, "default": False}
    parser.add_argument("--quiet", help="no progress bars", **quiet)
