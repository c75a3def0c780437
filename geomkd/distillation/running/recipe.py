"""The numbers of a run: checked, and made into what trains the parameters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from geomkd.common.checks import check_int
from geomkd.common.distributed import world
from geomkd.distillation.running.order import Order
from geomkd.network.forward import unwrap

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 0.3  # share of the steps in which the rate rises


@dataclass(frozen=True)
class Recipe:
    """How a student is trained; the options of :func:`geomkd.distill` of the same names.

    Raises
    ------
    TypeError, ValueError
        An option of another type, or out of its range.
    """

    epochs: int = 50
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.0075
    lr_scale: Mapping[str, float] | None = None
    weight_decay: float = 0.01
    clip_norm: float | None = None
    head_clip_norm: float | None = None
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_int(self.epochs, "epochs", least=1)
        check_int(self.batch_size, "batch_size", least=1)
        check_int(self.accumulate, "accumulate", least=1)
        check_int(self.seed, "seed", least=0)
        _check_number(self.lr, "lr")
        _check_number(self.weight_decay, "weight_decay", zero=True)
        for name in ("clip_norm", "head_clip_norm"):
            if getattr(self, name) is not None:
                _check_number(getattr(self, name), name)
        if self.lr_scale is not None:
            if not isinstance(self.lr_scale, Mapping):
                raise TypeError(
                    "lr_scale must map prefixes of parameter names to factors; got "
                    f"{type(self.lr_scale).__name__}"
                )
            for prefix, factor in self.lr_scale.items():
                _check_number(factor, f"lr_scale[{prefix!r}]")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}; got {self.precision!r}")

    @property
    def clip_norms(self) -> tuple[float | None, float | None]:
        """Largest norms of the gradients of backbone and projectors, and of the head."""
        own = self.head_clip_norm
        return self.clip_norm, self.clip_norm if own is None else own

    @property
    def part_size(self) -> int:
        """Samples that the loss sees at a time: a process's share of a batch, or a part of it."""
        return max(1, self.batch_size // (self.accumulate * world().size))

    def training_order(self, objective: Any) -> Callable[[int], Order]:
        """Return what makes the order of so many training samples."""
        here, full = world(), getattr(objective, "full_batches", False)
        if self.batch_size < 2 * here.size and here.size > 1:
            raise ValueError(
                f"batch_size must be at least 2 for each of {here.size} processes; "
                f"got {self.batch_size}"
            )
        if full and self.batch_size % (self.accumulate * here.size):
            raise ValueError(
                f"objective {objective.name!r} needs a batch_size that {here.size} processes x "
                f"{self.accumulate} accumulated parts divide; got {self.batch_size}"
            )
        return partial(
            Order,
            batch_size=self.batch_size,
            seed=self.seed,
            world=here,
            parts=self.accumulate,
            full=full,
        )

    def validation_order(self, total: int) -> Order:
        """Order of so many validation samples."""
        return Order(total, self.batch_size, seed=self.seed, world=world(), shuffle=False)

    def autocast(self, device: torch.device) -> Callable[[], AbstractContextManager]:
        """Return what makes the context of forward passes."""
        dtype = PRECISIONS[self.precision]
        if dtype is None:
            return nullcontext
        return lambda: torch.autocast(device.type, dtype=dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Scaler of the loss, which does nothing but for fp16."""
        return torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    def optimisers(
        self, student: nn.Module, groups: list[list[nn.Parameter]], steps: int
    ) -> tuple[list[Optimizer], list[LRScheduler]]:
        """One AdamW and one one-cycle schedule per group of parameters.

        Parameters
        ----------
        student : nn.Module
            For the names of the parameters.
        groups : list of list of nn.Parameter
            Backbone with projectors, and head: apart, so that under fp16 a gradient of the logits
            that overflows does not make the backbone skip its step.
        steps : int
            Length of the schedule.
        """
        factors = self._factors(student)
        optimisers, schedules = [], []
        for group in groups:
            by_rate: dict[float, list[nn.Parameter]] = {}
            for parameter in group:
                rate = self.lr * factors.get(id(parameter), 1.0)
                by_rate.setdefault(rate, []).append(parameter)
            parts = [{"params": part, "lr": rate} for rate, part in by_rate.items()]
            optimisers.append(AdamW(parts, lr=self.lr, weight_decay=self.weight_decay))
            schedules.append(
                OneCycleLR(optimisers[-1], list(by_rate), total_steps=steps, pct_start=WARM_UP)
            )
        return optimisers, schedules

    def _factors(self, student: nn.Module) -> dict[int, float]:
        if not self.lr_scale:
            return {}
        names = {name: id(p) for name, p in unwrap(student).named_parameters()}
        found = {}
        for prefix in sorted(self.lr_scale, key=len):  # the longest prefix has the last word
            fitting = [name for name in names if name.startswith(prefix)]
            if not fitting:
                raise ValueError(
                    f"lr_scale must name parameters of the student; none begins with {prefix!r}, "
                    f"the first is {next(iter(names))!r}"
                )
            found |= {names[name]: float(self.lr_scale[prefix]) for name in fitting}
        return found


def _check_number(value: Any, name: str, *, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    if not 0 <= value < math.inf or (value == 0 and not zero):
        least = "at least 0" if zero else "above 0"
        raise ValueError(f"{name} must be finite and {least}; got {value}")
