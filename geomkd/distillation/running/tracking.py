"""What a run reports of itself: means of an epoch, and TensorBoard's scalars."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomkd.common.distributed import agreed, summed, world


class Means:
    """Means of an epoch's losses and accuracy, weighted by the sizes of the batches.

    They gather on the device and are read now and then, since each reading waits for the device.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.unread: Tensor | None = None
        self.sums: list[float] = []
        self.n_samples = 0

    def add(self, n_samples: int, **values: Tensor) -> None:
        """Take the means of one more batch."""
        self.names = list(values)
        dtype = torch.promote_types(values["loss"].dtype, torch.float32)
        batch = torch.stack([value.detach().to(dtype) for value in values.values()]) * n_samples
        self.unread = batch if self.unread is None else self.unread + batch
        self.n_samples += n_samples

    def read(self, epoch: int) -> dict[str, float]:
        """Means so far of this process; ``RuntimeError`` if one is NaN or infinite."""
        unread = [] if self.unread is None else self.unread.tolist()
        before = self.sums or [0.0] * len(unread)
        self.sums = [a + b for a, b in zip(before, unread or [0.0] * len(before), strict=True)]
        self.unread = None
        pairs = list(zip(self.names, self.sums, strict=True))
        broken = [name for name, total in pairs if not math.isfinite(total)]
        if broken:
            part = next((name for name in broken if name != "loss"), "loss")
            raise RuntimeError(
                f"loss part {part!r} became NaN or infinite in epoch {epoch}; a smaller lr or "
                "clip_norm=1.0 may help"
            )
        return {name: total / self.n_samples for name, total in pairs}

    def of_all_processes(self, epoch: int, device: torch.device) -> dict[str, float]:
        """Means over every process's samples; called by all of them."""
        own = self.read(epoch)
        if world().size == 1:
            return own
        sums = torch.tensor([*self.sums, self.n_samples], dtype=torch.float64, device=device)
        *totals, n_samples = summed(sums).tolist()
        return {name: total / n_samples for name, total in zip(self.names, totals, strict=True)}

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, once everything is read."""
        return {"names": self.names, "sums": self.sums, "n_samples": self.n_samples}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.names, self.sums = list(state["names"]), list(state["sums"])
        self.n_samples, self.unread = state["n_samples"], None


def warn_at_chance(accuracy: float, labels: Tensor | None, n_classes: int, n: int) -> None:
    """Warn where an accuracy on n samples is not two standard errors above naming one label."""
    chance = 1 / n_classes
    if labels is not None:
        labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
        chance = max(labels.unique(return_counts=True)[1].tolist()) / len(labels)
    error = math.sqrt(chance * (1 - chance) / n)
    if accuracy <= chance + 2 * error and world().is_first:
        what = f"its training accuracy in the last epoch, {accuracy:.3f}, is not above chance"
        by = f"{chance:.3f}, by more than two standard errors of {error:.3f}: train longer, or look"
        message = f"the student's head has learned nothing: {what}, {by} at rate, inputs and labels"
        warnings.warn(message, stacklevel=3)


def told(callbacks: Sequence[Callable], row: Mapping[str, Any]) -> bool:
    """Tell a row to the callbacks, in the first process; whether one returns True, in all."""

    def tell() -> bool:
        answers = [callback(dict(row)) for callback in callbacks]
        return any(isinstance(a, bool | np.bool_) and bool(a) for a in answers)  # not just truthy

    return agreed(tell, first_only=True)


@contextmanager
def scalars(folder: str | os.PathLike | None) -> Iterator[list[Callable]]:
    """Make what writes rows for TensorBoard, in the first process; nothing without a folder."""
    if folder is None or not world().is_first:
        yield []
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ImportError("log_dir= needs TensorBoard: geomkd[tensorboard]") from error

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    with SummaryWriter(os.fspath(folder)) as writer:
        yield [write]
