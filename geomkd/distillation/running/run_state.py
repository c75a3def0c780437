"""What a run is and where it stands: taken for a checkpoint, and put back."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from geomkd.common.distributed import gathered, world
from geomkd.common.randomness import random_modules
from geomkd.distillation.running.batches import Batches
from geomkd.distillation.running.checkpoint import Checkpoints
from geomkd.distillation.running.fingerprints import (
    data_fingerprint,
    shapes_fingerprint,
    weights_fingerprint,
)
from geomkd.distillation.running.recipe import Recipe
from geomkd.distillation.running.setup import Networks
from geomkd.distillation.running.teacher import CachedTeacher, LiveTeacher
from geomkd.distillation.running.tracking import Means
from geomkd.network.forward import unwrap


@dataclass
class Run:
    """Everything that training takes, put together by `distill`."""

    networks: Networks
    train: Batches
    val: Batches | None
    recipe: Recipe
    device: torch.device
    model: nn.Module  # StudentStep, data-parallel and compiled as may be
    ask_teacher: LiveTeacher | CachedTeacher
    optimisers: list[Optimizer]  # of backbone and projectors, and of the head
    schedules: list[LRScheduler]
    scaler: torch.amp.GradScaler
    augment: Callable[[Any], Any] | None = None
    channels_last: bool = False
    callbacks: Sequence[Callable] = ()
    checkpoints: Checkpoints | None = None
    lr: float = 0.0  # of the last step

    def prepared(self, inputs: Any, *, augment: bool = False) -> Any:
        """Bring inputs to the memory format that is asked for, and augment them."""
        if self.channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.augment(inputs) if augment and self.augment is not None else inputs

    def advance(self) -> None:
        """Move the schedules on by a step."""
        self.lr = max(self.schedules[0].get_last_lr())
        with warnings.catch_warnings():
            # Under fp16 the first steps may be left out; the schedule goes on all the same.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for schedule in self.schedules:
                schedule.step()


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 1  # that is trained now
    step: int = 0  # steps of it that are done
    means: Means = field(default_factory=Means)  # of these steps
    seconds: float = 0.0  # that they took
    rows: list[dict[str, Any]] = field(default_factory=list)  # history of the finished epochs
    stopped: bool = False  # by a callback


def state_of(run: Run, at: Progress) -> dict[str, Any]:
    """Everything that the rest of a run depends on; called by every process."""
    rng = [module.get_rng_state() for module in random_modules(run.device)]
    own = {"rng": rng, "means": at.means.state()}
    state = {"epoch": at.epoch, "epoch_step": at.step, "seconds": at.seconds, "rows": at.rows}
    for name in ("optimisers", "schedules"):
        state[name] = [each.state_dict() for each in getattr(run, name)]
    state |= {"projectors": run.networks.projectors.state_dict(), "processes": gathered(own)}
    state["student"] = unwrap(run.networks.student).state_dict()
    return state | {"scaler": run.scaler.state_dict()}


def restore(run: Run, at: Progress, state: Mapping[str, Any]) -> None:
    """Put a run where it stood."""
    at.epoch, at.step = state["epoch"], state["epoch_step"]
    at.seconds, at.rows = state["seconds"], [dict(row) for row in state["rows"]]
    unwrap(run.networks.student).load_state_dict(state["student"])
    run.networks.projectors.load_state_dict(state["projectors"])
    for name in ("optimisers", "schedules"):
        for one, saved in zip(getattr(run, name), state[name], strict=True):
            one.load_state_dict(saved)
    run.scaler.load_state_dict(state["scaler"])
    own = state["processes"][world().rank]
    at.means.restore(own["means"])
    for module, saved in zip(random_modules(run.device), own["rng"], strict=True):
        module.set_rng_state(saved)


def config_of(run: Run) -> dict[str, str | int | float | bool | None]:
    """Describe what two runs must share for one to go on from the other's checkpoint."""
    networks, recipe = run.networks, run.recipe
    numbers = vars(recipe) | {"lr_scale": repr(recipe.lr_scale)}
    for name, made in (("optimizer", run.optimisers), ("schedule", run.schedules)):
        if numbers.pop(name) is not None:
            kind, states = type(made[0]).__name__, [each.state_dict() for each in made]
            numbers[name] = _plain(f"{kind} {[s.get('param_groups', s) for s in states]}", kind)
    return {
        "objective": _plain(repr(networks.objective), networks.objective.name),
        "pairs": repr(networks.pairs),
        **numbers,
        "augment": run.augment is not None,
        "forward": networks.forward is not None or None,  # of older checkpoints unknown
        "cached": run.ask_teacher.stored,
        "processes": world().size,
        "student": shapes_fingerprint(networks.student),
        "teacher": networks.teacher and weights_fingerprint(networks.teacher),
        "train": data_fingerprint(run.train),
    }


def _plain(text: str, name: str) -> str:
    """Return a text, or the name where it holds an address, of no use in another process."""
    return name if " at 0x" in text else text
