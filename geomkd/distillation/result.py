"""What a distillation gives back."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geomkd.common.files import atomic_write
from geomkd.network.forward import unwrap
from geomkd.plots import plot_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class DistillationResult:
    """A trained student and how it was trained.

    Attributes
    ----------
    student : nn.Module
        The student that was given, trained in place, in evaluation mode.
    projectors : nn.ModuleList
        One per pair; empty for objectives without features.
    history : DataFrame
        A row per epoch: epoch, loss, its named parts, train_accuracy (over the epoch's batches as
        they were trained on, in training mode), val_accuracy where there was validation data,
        lr (of the last step) and seconds.
    pairs : list of (str, str)
        Teacher layer and student layer.
    objective : str
        Name of the objective.
    stopped : bool
        Whether a callback ended the run before its last epoch.
    """

    student: nn.Module
    projectors: nn.ModuleList
    history: DataFrame
    pairs: list[tuple[str, str]]
    objective: str
    stopped: bool = False

    @property
    def accuracy_on(self) -> str:
        """Data that ``accuracy`` is of: ``"val"`` where there was any, else ``"train"``."""
        return "val" if "val_accuracy" in self.history else "train"

    @property
    def accuracy(self) -> float:
        """Accuracy of the last epoch, not of the best."""
        return float(self.history[f"{self.accuracy_on}_accuracy"].iloc[-1])

    @property
    def best_val_accuracy(self) -> float | None:
        """Highest validation accuracy of any epoch; None without validation data."""
        return float(self.history["val_accuracy"].max()) if self.accuracy_on == "val" else None

    def save(self, path: str | os.PathLike) -> None:
        """Write the student's ``state_dict``, whole or not at all.

        Parameters
        ----------
        path : str or path-like
            File that ``torch.load(path, weights_only=True)`` can read afterwards.
        """
        with atomic_write(path) as file:
            torch.save(unwrap(self.student).state_dict(), file)

    def to_html(self, path: str | os.PathLike, **options: Any) -> Path:
        """Write a page to show, one file; ``options`` are those of `geomkd.report.page`."""
        from geomkd.report import page

        return page(self, path, **options)

    def plot(self, ax: Axes | None = None, *, teacher_accuracy: float | None = None) -> Axes:
        """Draw accuracy and loss by epoch; see `geomkd.plots.plot_training`."""
        return plot_training(self.history, self.objective, ax, teacher=teacher_accuracy)

    def __repr__(self) -> str:
        return (
            f"DistillationResult(objective={self.objective!r}, pairs={len(self.pairs)}, "
            f"epochs={len(self.history)}{', stopped' * self.stopped}, "
            f"{self.accuracy_on}_accuracy={self.accuracy:.4f})"
        )

    def _repr_html_(self) -> str:
        last = self.history.tail(1).to_html(index=False, float_format="{:.4g}".format, border=0)
        pairs = "".join(f"<li>{html.escape(f'{a} → {b}')}</li>" for a, b in self.pairs)
        return f"<p><code>{html.escape(repr(self), quote=False)}</code></p>{last}<ul>{pairs}</ul>"
