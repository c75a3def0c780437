"""Layers shared out among the processes of a run, and their rows brought together."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from geomkd.common.distributed import World, gathered, world
from geomkd.data.sample import Sample
from geomkd.scoring.plan import Plan, Stored, grouped
from geomkd.scoring.rows import Row
from geomkd.scoring.settings import Settings


def together(act: Callable[[Share], None]) -> tuple[list[Row], Settings]:
    """Fill this process's share of a run by ``act``, and bring together what all of them have done.

    Rows are in order of execution; after Ctrl-C in any process those that were done, marked
    partial. What the first layer that failed raised, or Ctrl-C before any, is raised in all.
    """
    share = Share()
    try:
        act(share)
    except (Exception, KeyboardInterrupt) as error:
        shares = gathered(replace(share, error=_portable(error)))
        if share.world.rank in _ending(shares):
            raise
    else:
        shares = gathered(share)
    for rank in _ending(shares):
        raise shares[rank].error from None
    rows = sorted((r for s in shares for r in s.rows), key=lambda r: r.stored.layer.order)
    partial = any(s.error is not None for s in shares)
    return rows, replace(_settings(shares), partial=partial)


@dataclass(eq=False)
class Share:
    """One process's share of a run, as far as it has come; in the end told to the others."""

    world: World = field(default_factory=world)
    settings: Settings | None = None  # once they are known
    layers: list[str] = field(default_factory=list)  # all that are planned
    plan: Plan = field(default_factory=lambda: Plan([], 0, 0, 0))  # of its own layers, if any
    sliced: frozenset[str] = frozenset()  # layers that are read in slices of their features
    rows: list[Row] = field(default_factory=list)  # what is done, in order of execution
    error: BaseException | None = None

    @property
    def place(self) -> int:
        """Place in order of execution of the layer in hand; -1 before any."""
        waiting = [s for group in self.plan.groups for s in group][len(self.rows) :]
        return waiting[0].layer.order if waiting else -1

    def take(self, plan: Plan, sample: Sample) -> None:
        """Take this process's layers out of the plan for all of them.

        Which layers are sliced, the width of a slice and the samples of a batch stay as planned for
        all: the last bits of a score depend on them.
        """
        alone = [group[0] for group in plan.groups if len(group) == 1]
        self.sliced = frozenset(s.layer.name for s in alone if s.dim > plan.width)
        self.plan, self.layers = plan, [s.layer.name for group in plan.groups for s in group]
        if self.world.size > 1:
            groups = self._groups(plan, sample)
            passes = sum(
                -(-g[0].dim // plan.width) if g[0].layer.name in self.sliced else 1 for g in groups
            )
            self.plan = plan._replace(groups=groups, passes=passes)

    def _groups(self, plan: Plan, sample: Sample) -> list[list[Stored]]:
        layers = [s for group in plan.groups for s in group]
        sizes = sample.entropy_sizes
        rows, squares = max(len(sample), *sizes), 8 * sum(m * m for m in sizes)
        room = plan.width * rows * max(s.dtype.itemsize for s in layers) + squares  # of a slice
        # A layer's cost is n^2 d flops, and n is the same for all.
        own = shared_out([s.dim for s in layers], self.world.size)[self.world.rank]
        return grouped([layers[i] for i in own], rows, squares, room, self.sliced)


def shared_out(costs: Sequence[float], size: int) -> list[list[int]]:
    """Items of each process: the dearest first, each to the one with least to do."""
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += costs[i]
    return [sorted(share) for share in shares]


def _ending(shares: list[Share]) -> list[int]:
    """Ranks of those whose error ends the run: of the first layer, or Ctrl-C before any."""
    failed = [rank for rank, share in enumerate(shares) if isinstance(share.error, Exception)]
    if failed:
        return [min(failed, key=lambda rank: shares[rank].place)]
    stopped = [rank for rank, share in enumerate(shares) if share.error is not None]
    return [] if any(share.rows for share in shares) else stopped


def _portable(error: BaseException) -> BaseException:
    """Return the error where other processes can read it, else one of the same words."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever the caller's own class of errors does
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _settings(shares: list[Share]) -> Settings:
    """Return the settings that all processes share; one that was stopped early may have none."""
    known = [share for share in shares if share.layers]
    given = [asdict(share.settings) | {"layers": share.layers} for share in known]
    for share, other in zip(known, given, strict=True):
        differ = [key for key in other if other[key] != given[0][key]]
        if differ:
            raise ValueError(
                "every process must call score_layers with the same arguments; "
                f"{', '.join(differ)} of process {share.world.rank} differ from those of process "
                f"{known[0].world.rank}"
            )
    return known[0].settings
