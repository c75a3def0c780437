"""The bar of a long piece of work; only here it is known what draws it."""

import sys
import warnings
from typing import Any

from tqdm import TqdmWarning
from tqdm import tqdm as Bar

from geomkd.common.distributed import world

SECONDS = 10  # from one line to the next


class _Lines(Bar):
    """What a file or a pipe is given: a line now and then, and one at the end."""

    def display(self, msg: Any = None, pos: Any = None) -> None:
        if hasattr(self, "start_t"):  # not before anything is done
            self.fp.write(f"{self}\n")


def bar_of(total: int, name: str, *, show: Any, leave: bool = False, **options: Any) -> Bar:
    """Bar over ``total`` pieces of work, of the first process; in files a line now and then."""
    kind = Bar
    if "ipykernel" in type(sys.stderr).__module__:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # ipywidgets need not be there
            from tqdm.auto import tqdm as kind
    elif not getattr(sys.stderr, "isatty", bool)():
        kind = _Lines
        leave, options = False, options | {"mininterval": SECONDS, "miniters": 1}
    options |= {"unit_scale": True, "smoothing": 0.1, "disable": not (show and world().is_first)}
    return kind(total=total, desc=name, leave=leave, **options)
