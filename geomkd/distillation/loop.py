"""The distillation loop, from top to bottom: run, epoch, step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

from geomkd.distillation.batches import Batches
from geomkd.distillation.networks import (
    Networks,
    as_objective,
    check_options,
    device_of,
    join,
    seeded,
)
from geomkd.distillation.objectives import StepTensors
from geomkd.distillation.result import DistillationResult
from geomkd.models import Forward, call, evaluating, first_tensor

if TYPE_CHECKING:
    from pandas import DataFrame

STEPS_BETWEEN_READINGS = 20  # of the losses: each reading waits for the device


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Any,
    *,
    pairs: list[tuple[str, str]] | None = None,
    objective: Any = "features",
    val: Any = None,
    epochs: int = 50,
    batch_size: int = 128,
    lr: float = 0.0075,
    weight_decay: float = 0.01,
    clip_norm: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    input_key: str | None = None,
    label_key: str | None = None,
    progress: bool = True,
) -> DistillationResult:
    """Train a student, in place, on a frozen teacher's features and on labels.

    Parameters
    ----------
    student : nn.Module
        Returns logits (B, n_classes). Parameters without ``requires_grad`` are not trained.
    teacher : nn.Module or None
        Run in evaluation mode and left bit for bit as it is, but for its device. None will do for
        objectives without a teacher.
    train : pair of tensors, map-style Dataset, or DataLoader
        Inputs and class indices 0 ... n_classes - 1. Of a DataLoader the data set, ``collate_fn``,
        ``num_workers`` and ``worker_init_fn`` are used; batches and their order are made here.
    pairs : list of (str, str), optional
        Teacher layer and student layer, such as :func:`geomkd.pair_layers` gives; required by
        objectives that use features, ignored by the others.
    objective : str or object
        ``"features"``: mean squared error on the pairs for the backbone, cross entropy for the
        head. ``"ce"``: cross entropy. ``"kd"``: softened logits. Or an object like those of
        :mod:`geomkd.distillation.objectives`.
    val : optional
        Validation data in any form that ``train`` may have; no validation without it.
    epochs, batch_size : int
        Length of the run. A last training batch of one sample is left out.
    lr, weight_decay : float
        Of AdamW; ``lr`` is the largest rate of a one-cycle schedule with 30 % warm-up.
    clip_norm : float, optional
        Largest norm of the gradient: of backbone and projectors on the one hand, and of the head
        on the other, so that logit gradients cannot change the backbone's step.
    seed : int
        Seeds the order of the samples, the projectors, and the draws of layers such as dropout.
    device : torch.device or str, optional
        Where to train; the student's own by default. Both models are moved there and stay.
    forward : callable, optional
        ``forward(model, inputs)`` for models that are not simply called.
    input_key, label_key : str, optional
        Where inputs and labels are in batches that are mappings. Without ``input_key`` everything
        but the labels goes to the model as keyword arguments.
    progress : bool
        Show a progress bar.

    Returns
    -------
    DistillationResult
        With ``student``, the module that was given, in evaluation mode.

    Raises
    ------
    TypeError
        An argument of another type than these.
    ValueError
        Before any training: data, labels, pairs or models that do not fit together; a student in
        which a path from backbone to logits avoids the last paired layer.
    RuntimeError
        During training: a loss that is NaN or infinite.

    Notes
    -----
    With an objective that detaches the head (``"features"``), no logit loss reaches the backbone:
    behind the last paired student layer the student goes on with a detached copy of its features.
    Parameters that neither the paired features nor the logits behind them reach are left alone.

    The global random state is afterwards what it was before, also after an error or Ctrl-C.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd.distillation import distill
    >>> def network(width):
    ...     return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0).long()
    >>> result = distill(network(8), network(16), (x, y), pairs=[("1", "1")], epochs=2,
    ...                  progress=False)
    >>> list(result.history)[:5]
    ['epoch', 'loss', 'features', 'cross_entropy', 'train_accuracy']
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) and not (name == "teacher" and model is None):
            raise TypeError(f"{name} must be a torch.nn.Module; got {type(model).__name__}")
    check_options(epochs, batch_size, seed, lr, weight_decay, clip_norm)
    objective = as_objective(objective)
    device = device_of(student.to(device))
    if teacher is not None:
        teacher.to(device)
    keys = {"device": device, "input_key": input_key, "label_key": label_key}
    with seeded(seed, device):
        train = Batches(train, batch_size, seed=seed, name="train", **keys)
        if val is not None:
            val = Batches(val, batch_size, name="val", **keys)
        networks = join(
            student, teacher, objective, pairs, train.example(), seed=seed, forward=forward
        )
        for batches in filter(None, (train, val)):
            batches.check_labels(networks.n_classes)
        optimiser = AdamW(
            [{"params": group} for group in networks.groups], lr=lr, weight_decay=weight_decay
        )
        schedule = OneCycleLR(optimiser, lr, total_steps=epochs * len(train), pct_start=0.3)
        run = Run(networks, optimiser, schedule, clip_norm)
        history = fit(run, train, val, epochs, progress)
    return DistillationResult(
        student.eval(), networks.projectors, history, networks.pairs, objective.name
    )


@dataclass(frozen=True)
class Run:
    """The networks with what trains them."""

    networks: Networks
    optimiser: Optimizer
    schedule: LRScheduler
    clip_norm: float | None = None


def fit(run: Run, train: Batches, val: Batches | None, epochs: int, progress: bool) -> DataFrame:
    """Train for some epochs; a row of the history for each."""
    import pandas

    student, rows = run.networks.student, []
    total = epochs * train.n_samples
    try:
        with tqdm(
            total=total, desc="distill", unit=" samples", unit_scale=True, disable=not progress
        ) as bar:
            for epoch in range(1, epochs + 1):
                started = time.perf_counter()
                means, lr = train_epoch(run, train, epoch, bar)
                row = {"epoch": epoch, **means}
                if val is not None:
                    row["val_accuracy"] = accuracy(student, val, run.networks.forward)
                rows.append({**row, "lr": lr, "seconds": time.perf_counter() - started})
    finally:
        run.optimiser.zero_grad(set_to_none=True)
    return pandas.DataFrame(rows)


def train_epoch(run: Run, train: Batches, epoch: int, bar: tqdm) -> tuple[dict, float]:
    """Train on every batch once; means over the epoch, and the last step's learning rate."""
    run.networks.student.train()
    means = Means(epoch)
    for step, (inputs, labels) in enumerate(train, start=1):
        lr = run.schedule.get_last_lr()[0]
        means.add(len(labels), **train_step(run, inputs, labels))
        bar.update(len(labels))
        if step % STEPS_BETWEEN_READINGS == 0 or step == len(train):
            now = means.read()
            bar.set_postfix(
                epoch=epoch, loss=f"{now['loss']:.4g}", accuracy=f"{now['train_accuracy']:.3f}"
            )
    return now, lr


def train_step(run: Run, inputs: Any, labels: Tensor) -> dict[str, Tensor]:
    """One step on one batch; the loss, its parts and the accuracy, still on the device."""
    networks = run.networks
    teacher_features, teacher_logits = networks.ask_teacher(inputs)
    student_features, logits = networks.ask_student(inputs)  # detached behind the cut, if any
    loss, parts = networks.objective(
        StepTensors(
            labels, logits, teacher_logits, student_features, teacher_features, networks.projectors
        )
    )
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if run.clip_norm is not None:
        for group in networks.groups:
            nn.utils.clip_grad_norm_(group, run.clip_norm)
    run.optimiser.step()
    run.schedule.step()
    return {"loss": loss, **parts, "train_accuracy": (logits.argmax(1) == labels).float().mean()}


def accuracy(model: nn.Module, batches: Batches, forward: Forward | None = None) -> float:
    """Share of the samples whose largest logit is their label's, in evaluation mode."""
    correct = []
    with evaluating(model):
        for inputs, labels in batches:
            logits = first_tensor(call(model, inputs, forward))
            correct.append((logits.argmax(1) == labels).sum())
    return int(torch.stack(correct).sum()) / batches.n_samples


class Means:
    """Means of an epoch's losses and accuracy, weighted by the sizes of the batches.

    They gather on the device and are read now and then, since each reading waits for the device.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch, self.names = epoch, []
        self.unread: Tensor | None = None
        self.sums: list[float] = []
        self.n_samples = 0

    def add(self, n_samples: int, **values: Tensor) -> None:
        """Take the means of one more batch."""
        self.names = list(values)
        batch = torch.stack([value.detach().float() for value in values.values()]) * n_samples
        self.unread = batch if self.unread is None else self.unread + batch
        self.n_samples += n_samples

    def read(self) -> dict[str, float]:
        """Means so far, as Python numbers; ``RuntimeError`` if one is NaN or infinite."""
        unread = self.unread.tolist()
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(unread), unread, strict=True)]
        self.unread = None
        broken = [
            name
            for name, total in zip(self.names, self.sums, strict=True)
            if not math.isfinite(total)
        ]
        if broken:
            part = next((name for name in broken if name != "loss"), "loss")
            raise RuntimeError(
                f"loss part {part!r} became NaN or infinite in epoch {self.epoch}; a smaller lr or "
                "clip_norm=1.0 may help"
            )
        return {n: total / self.n_samples for n, total in zip(self.names, self.sums, strict=True)}
