"""The main job on bundled data: teacher, ranked layers, students, in a minute and a half.

Real handwritten digits under noise. A small residual teacher learns from 1,000 of them, its
students from 10 a class, so that there is something to teach. Noise and number were set by
the teacher and a student of cross entropy alone (about 93 and 64 %), before any other student was
trained; what comes out is written down as it is, whichever way wins. It is of this budget alone:
in a trial with fewer epochs, students of features were behind cross entropy.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geomkd.common.checks import check_int
from geomkd.common.randomness import seeded
from geomkd.common.results_folder import (
    filled_folder,
    machine,
    write_frame,
    write_json,
    write_picture,
)
from geomkd.datasets import digits
from geomkd.distillation import DistillationResult, distill
from geomkd.distillation.pairing import evenly_spaced, pair_layers
from geomkd.geometry.precision import one_thread
from geomkd.plots import plot_accuracy
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.score_layers import score_layers

if TYPE_CHECKING:
    from pandas import DataFrame, Series

TEACHER = {"widths": (16, 32, 64), "blocks": 3}
STUDENT = {"widths": (4, 8, 16, 32), "blocks": 1}
TEACHER_EPOCHS, STUDENT_EPOCHS, LR = 10, 20, 0.0075
TEACHER_BATCH, STUDENT_BATCH = 64, 20
NOISE = 0.2  # standard deviation of what is added to pixels, which lie in [0, 1]
PER_CLASS = 10  # training images that students see
SELECTED = 4
METHODS = {
    "features, up to the head's input": "up to the head's input",
    "features, highest Q": "highest Q",
    "features, evenly spaced": "evenly spaced",
    "kd": None,
    "ce": None,
}


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut; halves the grid where the width grows."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if before != width or stride != 1:
            reduce = nn.Conv2d(before, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(reduce, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width, H / stride, W / stride)."""
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


def residual_network(
    *, widths: tuple[int, ...], blocks: int, seed: int, channels: int = 1, classes: int = 10
) -> nn.Sequential:
    """Small residual network: a stem, a stage of blocks for each width, a linear head.

    The second and third stages halve the grid.

    Examples
    --------
    >>> import torch
    >>> model = residual_network(widths=(4, 8), blocks=1, seed=0)
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    with seeded(seed):
        width = widths[0]
        layers = {"conv": nn.Conv2d(channels, width, 3, 1, 1, bias=False)}
        layers |= {"norm": nn.BatchNorm2d(width), "relu": nn.ReLU()}
        for i in range(blocks * len(widths)):
            before, width = width, widths[i // blocks]
            stride = 2 if i in (blocks, 2 * blocks) else 1
            layers[f"block{i + 1}"] = Residual(before, width, stride)
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return nn.Sequential(OrderedDict(layers, head=nn.Linear(width, classes)))


@dataclass(frozen=True, eq=False)
class Quickstart:
    """What the quickstart found."""

    folder: Path  # holds layers.csv, layers.png, training.png and summary.json
    scores: LayerScores  # of the teacher's layers
    layers: dict[str, list[str]]  # teacher layers that each choice takes
    runs: DataFrame  # method, seed, test_accuracy of the last epoch; a row a student
    summary: dict[str, Any]  # what summary.json holds


def quickstart(
    folder: Path | str | None = None,
    *,
    seed: int = 0,
    seeds: int = 3,
    epochs: int = STUDENT_EPOCHS,
    say: Callable[[str], Any] = lambda text: None,
    progress: bool = True,
) -> Quickstart:
    """Train a teacher on noisy digits, rank its layers, distil in five ways, write it down.

    Parameters
    ----------
    folder : path, optional
        Where to write layers.csv, layers.png, training.png and summary.json; must not exist. By
        default the next free ``geomkd-quickstart-N`` under the current folder.
    seed : int
        Seeds the split, the teacher, the sample of the scores; students take ``seed``,
        ``seed + 1``, ...
    seeds, epochs : int
        Students of each method, and their epochs.
    say : callable
        Takes each line of the story.
    progress : bool
        Show bars.
    """
    check_int(seed, "seed", least=0)
    check_int(seeds, "seeds", least=1)
    check_int(epochs, "epochs", least=1)
    started = time.perf_counter()
    with filled_folder(folder, "geomkd-quickstart") as folder:
        with one_thread():  # networks this small gain nothing from more, and numbers stay the same
            scores, layers, taught, runs = _trained(seed, seeds, epochs, say, progress)
        seconds = time.perf_counter() - started
        return _written(folder, scores, layers, taught, runs, seconds)


def _trained(
    seed: int, seeds: int, epochs: int, say: Callable[[str], Any], progress: bool
) -> tuple[LayerScores, dict[str, list[str]], DistillationResult, list]:
    train, few, test = noisy_digits(seed)
    teacher = residual_network(**TEACHER, seed=seed)
    options = {"val": test, "lr": LR, "progress": progress}
    say(f"1. teacher: {TEACHER_EPOCHS} epochs on {len(train[0])} noisy digits")
    own = {"objective": "ce", "epochs": TEACHER_EPOCHS, "batch_size": TEACHER_BATCH}
    taught = distill(teacher, None, train, seed=seed, **own, **options)
    say(f"   test accuracy {taught.accuracy:.1%} of {len(test[0])}")
    say("2. scores of its layers, on the training images")
    scores = score_layers(teacher, train, seed=seed, progress=progress)
    if scores.settings["partial"]:
        raise KeyboardInterrupt
    layers = chosen_layers(scores)
    told = f"{len(METHODS)} methods x {seeds} seeds, {epochs} epochs on {len(few[0])} digits"
    say(f"3. students: {told}")
    runs, options = [], options | {"epochs": epochs, "batch_size": STUDENT_BATCH}
    for method, choice in METHODS.items():
        for k in range(seed, seed + seeds):
            student = residual_network(**STUDENT, seed=k)
            pairs = pair_layers(layers[choice], student, few[0][:2]) if choice else None
            own = {"objective": method.split(",")[0], "pairs": pairs, "seed": k}
            result = distill(student, teacher, few, **own, **options)
            runs.append((method, k, result.history))
    return scores, layers, taught, runs


def noisy_digits(seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Images and labels: all of the training part, `PER_CLASS` a class of it, the test part."""
    data, generator = digits(seed=seed), torch.Generator().manual_seed(seed)
    train, test = (
        x + NOISE * torch.randn(x.shape, generator=generator) for x in (data.x_train, data.x_test)
    )
    y = data.y_train
    few = torch.cat([(y == label).nonzero()[:PER_CLASS, 0] for label in y.unique()])
    return (train, y), (train[few], y[few]), (test, data.y_test)


def chosen_layers(scores: LayerScores, k: int = SELECTED) -> dict[str, list[str]]:
    """Teacher layers by each way of choosing, in order of depth."""
    frame = scores.to_frame()
    *blocks, head = frame.loc[frame["role"].isin(["block", "head_input"]), "layer"]
    return {
        "up to the head's input": evenly_spaced([*blocks, head], k),
        "highest Q": scores.select(k),
        "evenly spaced": evenly_spaced(blocks, k),
    }


def _written(
    folder: Path,
    scores: LayerScores,
    layers: dict[str, list[str]],
    taught: DistillationResult,
    runs: list[tuple[str, int, DataFrame]],
    seconds: float,
) -> Quickstart:
    import pandas

    ranked = scores.rank().rename(columns={"low": "quality_low", "high": "quality_high"})
    write_frame(folder / "layers.csv", scores.to_frame().merge(ranked.drop(columns="score")))
    write_picture(folder / "layers.png", scores.plot(k=SELECTED))
    curves: dict[str, list[Any]] = {}
    for method, _, history in runs:
        curves.setdefault(method, []).append(history["val_accuracy"].to_numpy())
    write_picture(folder / "training.png", plot_accuracy(curves, name="test accuracy"))
    last = [(method, seed, float(h["val_accuracy"].iloc[-1])) for method, seed, h in runs]
    table = pandas.DataFrame(last, columns=["method", "seed", "test_accuracy"])
    by_method = table.groupby("method", sort=False)["test_accuracy"]
    settings = {"teacher": TEACHER, "teacher_epochs": TEACHER_EPOCHS, "student": STUDENT}
    settings |= {"student_epochs": len(runs[0][2])}
    settings |= {"student_seeds": sorted({seed for _, seed, _ in runs})}
    settings |= {"student_images_per_class": PER_CLASS, "noise": NOISE, "lr": LR}
    settings |= {"batch_size": {"teacher": TEACHER_BATCH, "student": STUDENT_BATCH}}
    settings |= {"threads": 1, "scores": scores.settings}
    summary = {
        "teacher_test_accuracy": taught.accuracy,
        "layers": layers,
        "pairs_of": "blocks of the student, evenly spaced",
        "test_accuracy_last_epoch": {method: _figures(a) for method, a in by_method},
        "data": "scikit-learn digits under noise: 1,000 training and 500 test images",
        "settings": settings,
        "seconds": round(seconds, 1),
        "machine": machine(),
    }
    write_json(folder / "summary.json", summary)
    return Quickstart(folder, scores, layers, table, summary)


def _figures(accuracies: Series) -> dict[str, Any]:
    deviation = float(accuracies.std()) if len(accuracies) > 1 else None
    return {"mean": float(accuracies.mean()), "sd": deviation, "all": accuracies.tolist()}
