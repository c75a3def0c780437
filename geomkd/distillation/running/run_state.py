"""Where a run (the loop's `Run`) stands: taken for a checkpoint, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from geomkd.common.distributed import gathered, world
from geomkd.common.randomness import random_modules
from geomkd.distillation.running.batches import Batches
from geomkd.distillation.running.fingerprints import (
    data_fingerprint,
    shapes_fingerprint,
    weights_fingerprint,
)
from geomkd.distillation.running.recipe import Recipe
from geomkd.distillation.running.setup import Networks
from geomkd.distillation.running.tracking import Means
from geomkd.network.forward import unwrap


@dataclass
class Progress:
    """How far a run is.

    Attributes
    ----------
    epoch : int
        The epoch that is trained now, from 1.
    step : int
        Steps of it that are done.
    means : Means
        Of these steps.
    seconds : float
        That they took.
    rows : list of dict
        History of the finished epochs.
    """

    epoch: int = 1
    step: int = 0
    means: Means = field(default_factory=Means)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def state_of(run: Any, at: Progress) -> dict[str, Any]:
    """Everything that the rest of a run depends on; called by every process."""
    own = {
        "rng": [module.get_rng_state() for module in random_modules(run.device)],
        "means": at.means.state(),
    }
    return {
        "epoch": at.epoch,
        "epoch_step": at.step,
        "seconds": at.seconds,
        "rows": at.rows,
        "student": unwrap(run.networks.student).state_dict(),
        "projectors": run.networks.projectors.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in run.optimisers],
        "schedules": [schedule.state_dict() for schedule in run.schedules],
        "scaler": run.scaler.state_dict(),
        "processes": gathered(own),
    }


def restore(run: Any, at: Progress, state: Mapping[str, Any]) -> None:
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


def config_of(
    networks: Networks, train: Batches, recipe: Recipe, **more: Any
) -> dict[str, str | int | float | bool | None]:
    """Describe what two runs must share for one to go on from the other's checkpoint."""
    objective = repr(networks.objective)
    if " at 0x" in objective:  # of no use in another process
        objective = networks.objective.name
    numbers = asdict(recipe)
    numbers["lr_scale"] = repr(recipe.lr_scale)
    return {
        "objective": objective,
        "pairs": repr(networks.pairs),
        **numbers,
        **more,
        "processes": world().size,
        "student": shapes_fingerprint(networks.student),
        "teacher": networks.teacher and weights_fingerprint(networks.teacher),
        "train": data_fingerprint(train),
    }
