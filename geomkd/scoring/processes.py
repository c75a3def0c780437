"""Layers shared out among the processes of a run, and their rows brought together."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from geomkd.common.distributed import World, gathered, world
from geomkd.data.sample import Sample
from geomkd.scoring.plan import Plan, Stored


class Row(NamedTuple):
    """What is known of one layer.

    Attributes
    ----------
    stored : Stored
        The layer.
    values : dict of str to float
        Columns of the frame.
    draws, sweep : dict of str to list of float
        Columns in the half-samples, and in the smaller samples.
    gram : ndarray
        Packed Gram matrix of the kept subset; see `geomkd.geometry.principal`.
    """

    stored: Stored
    values: dict[str, float]
    draws: dict[str, list[float]]
    sweep: dict[str, list[float]]
    gram: np.ndarray


@dataclass(eq=False)
class Share:
    """One process's part of a run, a context in which it is done; then the whole of the run.

    At its end every process waits for the others, however its own part ended, and ends as they do:
    with the rows of all layers, or with the error that one process would have met first.

    Attributes
    ----------
    world : World
        This process among the others.
    plan : Plan
        Of this process's layers; of none where there are fewer layers than processes.
    sliced : frozenset of str
        Layers that are read in slices of their features.
    rows : list of Row
        What is done, in order of execution; at the end, of all processes.
    settings : dict
        How the scores are made; at the end, whether they are ``"partial"`` too.

    Raises
    ------
    Exception
        At the end, of the first layer that failed, in every process.
    ValueError
        At the end, processes that were given different arguments.
    KeyboardInterrupt
        At the end, Ctrl-C before any layer was done.
    """

    world: World = field(default_factory=world)
    plan: Plan = field(default_factory=lambda: Plan([], 0, 0, 0))
    sliced: frozenset[str] = frozenset()
    rows: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def take(self, plan: Plan, sample: Sample) -> None:
        """Take this process's layers out of the plan for all of them.

        Which layers are sliced, the width of a slice and the samples of a batch stay as planned for
        all: the last bits of a score depend on them.
        """
        alone = [group[0] for group in plan.groups if len(group) == 1]
        self.sliced = frozenset(s.layer.name for s in alone if s.dim > plan.width)
        self.settings["layers"] = [s.layer.name for group in plan.groups for s in group]
        self.plan = plan
        if self.world.size > 1:
            groups = self._groups(plan, sample)
            slices = [-(-g[0].dim // plan.width) for g in groups if g[0].layer.name in self.sliced]
            passes = len(groups) - len(slices) + sum(slices)
            self.plan = plan._replace(groups=groups, passes=passes)

    def _groups(self, plan: Plan, sample: Sample) -> list[list[Stored]]:
        layers = [s for group in plan.groups for s in group]
        sizes = [sample.entropy_size(a) or 0 for a in range(len(sample.classes.sizes))]
        rows, squares = max(len(sample), *sizes), 8 * sum(m * m for m in sizes)
        room = plan.width * rows * max(s.dtype.itemsize for s in layers) + squares  # of a slice
        groups: list[list[Stored]] = []
        free = 0
        for i in shared_out([s.dim for s in layers], self.world.size)[self.world.rank]:
            sliced = layers[i].layer.name in self.sliced
            need = rows * layers[i].dim * layers[i].dtype.itemsize + squares
            if sliced or need > free:
                groups.append([])
                free = room
            groups[-1].append(layers[i])
            free = 0 if sliced else free - need
        return groups

    def __enter__(self) -> Share:
        return self

    def __exit__(self, kind: Any, raised: BaseException | None, trace: Any) -> bool:
        if not isinstance(raised, Exception | KeyboardInterrupt | None):
            return False
        parts = gathered(self._part(raised))
        failed = [rank for rank, part in enumerate(parts) if part.error is not None]
        if failed:
            rank = min(failed, key=lambda rank: parts[rank].place)
            if rank != self.world.rank:
                raise parts[rank].error from None
            return False
        self.rows = sorted((row for part in parts for row in part.rows), key=_order)
        partial = any(part.stopped for part in parts)
        if partial and not self.rows:
            if raised is None:
                raise KeyboardInterrupt
            return False
        self.settings = _settings([part.settings for part in parts]) | {"partial": partial}
        return True

    def _part(self, raised: Exception | KeyboardInterrupt | None) -> _Part:
        stopped = isinstance(raised, KeyboardInterrupt)
        error = None if stopped else raised
        if error is not None and self.world.size > 1:
            error = _portable(error)
        waiting = [s.layer.order for group in self.plan.groups for s in group][len(self.rows) :]
        return _Part(self.rows, self.settings, stopped, error, waiting[0] if waiting else -1)


def shared_out(costs: Sequence[float], size: int) -> list[list[int]]:
    """Share out items among processes: the dearest first, each to the one that has least to do.

    Parameters
    ----------
    costs : sequence of float
        Of every item. A layer's is n^2 d flops, and n is the same for all: d will do.
    size : int
        Number of processes.

    Returns
    -------
    list of list of int
        The items of every process, rising.

    Examples
    --------
    >>> shared_out([8, 8, 4, 2], 2)
    [[0, 2], [1, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += costs[i]
    return [sorted(share) for share in shares]


class _Part(NamedTuple):
    """What a process tells the others at the end of its part."""

    rows: list[Row]
    settings: dict[str, Any]
    stopped: bool
    error: Exception | None
    place: int  # in order of execution, of the layer that failed; -1 before any


def _order(row: Row) -> int:
    return row.stored.layer.order


def _portable(error: Exception) -> Exception:
    """Return the error where other processes can read it, else one of the same words."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever the caller's own class of errors does
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _settings(given: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that all processes share; one that was stopped early may have none."""
    known = [(rank, settings) for rank, settings in enumerate(given) if "layers" in settings]
    first, own = known[0]
    for rank, other in known[1:]:
        differ = [key for key in own if other[key] != own[key]]
        if differ:
            raise ValueError(
                "every process must call score_layers with the same arguments; "
                f"{', '.join(differ)} of process {rank} differ from those of process {first}"
            )
    return {key: value for key, value in own.items() if key != "layers"}
