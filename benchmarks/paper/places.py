"""Where runs leave their files: results to keep, and what unfinished ones work with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.recipes import Combination
from geomkd.common.distributed import world
from geomkd.common.results_folder import write_json


@dataclass(frozen=True)
class Place:
    """Folders and device of runs; their results do not depend on it.

    Attributes
    ----------
    out : Path
        Folder of finished runs: one JSON file each, in a folder for each data set.
    work : Path
        Folder of checkpoints and of the teachers' weights.
    device : torch.device
        Where to train.
    imagenet : dict of str to Path
        Files of ImageNet weights, for the teachers that have one.
    progress : bool
        Show bars.
    say : callable
        Takes the lines to print.
    """

    out: Path
    work: Path
    device: torch.device
    imagenet: dict[str, Path]
    progress: bool = True
    say: Callable[[str], Any] = print

    def student(self, combination: Combination, seed: int) -> Path:
        """File of a finished student."""
        return self.out / slug(combination.dataset) / f"{combination.name}-seed={seed}.json"

    def teacher(self, combination: Combination) -> Path:
        """File of a finished teacher."""
        name = f"teacher-{combination.teacher}{combination.recipe.suffix}.json"
        return self.out / slug(combination.dataset) / name

    def checkpoints(self, result: Path) -> Path:
        """Folder of the checkpoints of the run whose result goes into a file."""
        return self.work / result.parent.name / result.stem

    def weights(self, teacher: Path) -> Path:
        """File of the weights of the teacher whose result is in a file."""
        return self.work / teacher.parent.name / f"{teacher.stem}.pt"

    def finish(self, path: Path, content: dict[str, Any]) -> None:
        """Write a result, then remove its checkpoints; the first process does."""
        if world().is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            shutil.rmtree(self.checkpoints(path), ignore_errors=True)


def slug(dataset: str) -> str:
    """Data set's name as a folder.

    Examples
    --------
    >>> slug("npz:some/where/images.npz"), slug("npz:images.npz")
    ('npz-images', 'npz-images')
    """
    file = dataset.removeprefix("npz:")
    return dataset if file == dataset else f"npz-{Path(file).stem}"


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a result's file; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def file_hash(path: Path) -> str:
    """First eight digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
