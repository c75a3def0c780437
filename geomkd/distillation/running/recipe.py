"""The numbers of a run: checked, and made into what trains the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from geomkd.common.checks import check_choice, check_int, check_number
from geomkd.common.distributed import world
from geomkd.distillation.running.order import Order
from geomkd.network.forward import unwrap

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 0.3  # share of the steps in which the rate rises


@dataclass(frozen=True)
class Recipe:
    """How a student is trained: options of :func:`geomkd.distill`, whose defaults they have."""

    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    lr_scale: Mapping[str, float] | None
    weight_decay: float
    clip_norm: float | None
    head_clip_norm: float | None
    seed: int
    precision: str

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "accumulate": 1, "seed": 0}.items():
            check_int(getattr(self, name), name, least=least)
        check_number(self.lr, "lr", above=0)
        check_number(self.weight_decay, "weight_decay", least=0)
        for name in ("clip_norm", "head_clip_norm"):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name, above=0)
        if self.lr_scale is not None:
            if not isinstance(self.lr_scale, Mapping):
                raise TypeError(
                    "lr_scale must map prefixes of parameter names to factors; got "
                    f"{type(self.lr_scale).__name__}"
                )
            for prefix, factor in self.lr_scale.items():
                check_number(factor, f"lr_scale[{prefix!r}]", above=0)
        check_choice(self.precision, "precision", PRECISIONS)

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
        """One AdamW and one one-cycle schedule of so many steps a group, `Networks.groups`.

        Apart, so that under fp16 a gradient of the logits that overflows does not make the backbone
        skip its step.
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
