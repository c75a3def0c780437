"""The command line: parse, call, print."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from geomkd.cli.distill import distilled
from geomkd.cli.layers import listed
from geomkd.cli.parser import options_of, parsed
from geomkd.cli.score import ranked_table, scored
from geomkd.common.distributed import ERRORS, world

WAIT = 5.0  # seconds, in which torchrun ends the processes that are left when one has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 when the input was wrong, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = " ".join(["geomkd", *arguments[:1]])
    commands = {"quickstart": _quickstart, "layers": listed}
    commands |= {"score": scored, "distill": distilled}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _noted
            options = parsed(arguments)
            commands[options.command](options, print)
    except ERRORS as error:
        if world().size > 1:
            _wait_to_be_ended(error)
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if world().size > 1:
            os._exit(2)  # to leave the group in order may take longer than the others wait
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _noted(message: Warning | str, *where: Any) -> None:
    print(f"note: {message}", file=sys.stderr, flush=True)  # no line of code


def _wait_to_be_ended(error: Exception) -> None:
    """Wait where another process may be the one to tell: when that ends, torchrun ends this one.

    What all of them raise the first one tells. A ``RuntimeError`` may be due to a process that has
    failed before, and told of it.
    """
    time.sleep(WAIT * ((not world().is_first) + isinstance(error, RuntimeError)))


def _quickstart(options: argparse.Namespace, say: Callable[[str], Any]) -> None:
    from geomkd.quickstart import quickstart

    given = options_of(quickstart, options)
    found = quickstart(options.out, say=say, progress=not options.quiet, **given)
    say("\n" + ranked_table(found.scores, found.scores.rank()))
    for choice, layers in found.layers.items():
        say(f"{choice:<24}{', '.join(layers)}")
    say(f"\n{'student trained by':<34}test accuracy, last epoch, mean ± SD (each seed)")
    for method, a in found.summary["test_accuracy_last_epoch"].items():
        runs = ", ".join(f"{100 * value:.1f}" for value in a["all"])
        deviation = "" if a["sd"] is None else f" ± {100 * a['sd']:.1f}"
        say(f"{method:<34}{100 * a['mean']:>12.1f}{deviation} %   ({runs})")
    say(f"\n{found.summary['seconds']:.0f} s; wrote layers.csv, layers.png, training.png and")
    say(f"summary.json to {found.folder}")
