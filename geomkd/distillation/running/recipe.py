"""The numbers of a run: checked, and made into what trains the parameters."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from geomkd.common.checks import check_choice, check_int, check_number
from geomkd.common.distributed import world
from geomkd.distillation.running.order import Order
from geomkd.network.forward import unwrap

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 0.3  # share of the steps in which the rate rises
ADAMW = (0.0075, 0.01)  # its lr and weight_decay, if none are given


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
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None
    schedule: Callable[[Optimizer, int], LRScheduler] | None = None

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "accumulate": 1, "seed": 0}.items():
            check_int(getattr(self, name), name, least=least)
        for name in ("optimizer", "schedule"):
            if not (callable(value := getattr(self, name)) or value is None):
                raise TypeError(f"{name} must be callable; got {type(value).__name__}")
        if self.optimizer and (self.lr, self.weight_decay) != ADAMW:
            raise ValueError("lr and weight_decay are AdamW's: leave them out beside optimizer=")
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
        options = {"batch_size": self.batch_size, "parts": self.accumulate, "full": full}
        return partial(Order, seed=self.seed, world=here, **options)

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
        """One optimiser and one schedule a group, `Networks.groups`, for so many steps an epoch.

        Apart, so that under fp16 a gradient of the logits that overflows does not make the backbone
        skip its step.
        """
        factors, optimisers, schedules = self._factors(student), [], []
        make = self.optimizer or partial(AdamW, lr=self.lr, weight_decay=self.weight_decay)
        for parameters in groups:
            optimisers.append(optimiser := make(list(parameters)))
            parts = getattr(optimiser, "param_groups", ())
            if {id(p) for part in parts for p in part["params"]} != set(map(id, parameters)):
                what = "an Optimizer of all the parameters that it is given, and of no others"
                raise ValueError(f"optimizer= must return {what}; got {optimiser!r}")
            split = defaultdict(list)
            for i, p in ((i, p) for i, part in enumerate(parts) for p in part["params"]):
                split[i, factors.get(id(p), 1.0)].append(p)
            parts[:] = [
                parts[i] | {"params": own, "lr": parts[i]["lr"] * factor}
                for (i, factor), own in split.items()
            ]
            schedules.append(schedule := (self.schedule or self._one_cycle)(optimiser, steps))
            of_another = getattr(schedule, "optimizer", None) is not optimiser
            if of_another or isinstance(schedule, ReduceLROnPlateau):
                what = "an LRScheduler of the optimizer it is given that needs no metric"
                raise TypeError(f"schedule= must return {what}; got {type(schedule).__name__}")
        return optimisers, schedules

    def _one_cycle(self, optimiser: Optimizer, steps: int) -> LRScheduler:
        rates = [group["lr"] for group in optimiser.param_groups]
        options = {"total_steps": self.epochs * steps, "pct_start": WARM_UP}
        return OneCycleLR(optimiser, rates, cycle_momentum=self.optimizer is None, **options)

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
