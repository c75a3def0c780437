"""What a run leaves behind, and whether it is this run's: a folder, tables, JSON, pictures."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomkd.common.files import atomic_write


def new_folder(folder: str | os.PathLike | None, stem: str) -> Path:
    """Make a folder that was not there: the one named, or the next free ``stem-N`` here."""
    if folder is not None:
        check_new(folder)
        Path(folder).mkdir(parents=True)
        return Path(folder)
    number = 1
    while True:
        try:
            Path(f"{stem}-{number}").mkdir()
            return Path(f"{stem}-{number}")
        except FileExistsError:
            number += 1


@contextmanager
def filled_folder(folder: str | os.PathLike | None, stem: str) -> Iterator[Path]:
    """`new_folder`, which is gone again where nothing came into it."""
    made = new_folder(folder, stem)
    try:
        yield made
    finally:
        with suppress(OSError):  # it holds something
            made.rmdir()


def check_new(folder: str | os.PathLike | None) -> None:
    """Refuse, before any work, a folder for results that is there already."""
    if folder is not None and Path(folder).exists():
        raise FileExistsError(f"{folder} is there already; results go into a new folder")


def check_same_run(
    path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], *, remedy: str
) -> None:
    """Refuse to go on from a file of another run; ``ValueError`` names what differs."""
    differing = [
        f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in dict.fromkeys([*ours, *theirs])
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ValueError(f"{path} belongs to another run: {'; '.join(differing)}; {remedy}")


def machine() -> dict[str, Any]:
    """Machine and versions that a figure was measured with."""
    import pandas
    import scipy
    import sklearn

    import geomkd

    modules = (geomkd, torch, np, scipy, sklearn, pandas)
    return {
        "processor": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **{module.__name__: module.__version__ for module in modules},
    }


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def write_frame(path: str | os.PathLike, frame: Any) -> None:
    """Write a DataFrame as CSV, whole or not at all."""
    with atomic_write(path) as file:
        file.write(frame.to_csv(index=False).encode())


def write_picture(path: str | os.PathLike, ax: Any) -> None:
    """Write the figure of an Axes as PNG and close it."""
    from matplotlib import pyplot

    with atomic_write(path) as file:
        ax.figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(ax.figure)
