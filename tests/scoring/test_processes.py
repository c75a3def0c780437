"""Which layers a process takes, and how it groups them; no other process is needed for that."""

import itertools

import pytest
import torch

from geomkd.common.distributed import World
from geomkd.data.sample import Sample
from geomkd.network.layers import Layer
from geomkd.scoring.plan import Plan, Stored, plan_of
from geomkd.scoring.processes import Share, shared_out

N = 48


def sample(**options):
    return Sample((torch.zeros(N, 1), torch.arange(N) % 4), N, seed=0, **options)


def stored(*dims, dtypes=(torch.float32,)):
    """Layers of these widths in order of execution, types in turn."""
    place = torch.empty(0).device
    return [
        Stored(Layer(str(i), "vector", (d,), order=i), d, dtype, place)
        for i, (d, dtype) in enumerate(zip(dims, itertools.cycle(dtypes), strict=False))
    ]


def names(layers):
    return [s.layer.name for s in layers]


# ---- who takes what ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_against_the_best_of_all_partitions(size):
    generator = torch.Generator().manual_seed(size)
    for _ in range(20):
        costs = torch.randint(1, 30, (7,), generator=generator).tolist()
        shares = shared_out(costs, size)
        assert sorted(itertools.chain(*shares)) == list(range(7))
        assert all(share == sorted(share) for share in shares)
        best = min(
            max(sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in owners)
            for owners in itertools.product([0], *[range(size)] * 6)  # the first is anyone's
        )
        worst = max(sum(costs[i] for i in share) for share in shares)
        assert best <= worst <= (4 / 3 - 1 / (3 * size)) * best  # Graham (1969)


def test_fewer_items_than_processes():
    assert shared_out([1, 1], 4) == [[0], [1], [], []]
    assert shared_out([], 2) == [[], []]


@pytest.mark.parametrize("entropy", [{}, {"entropy_per_class": 10}])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("more", [0, 1_500_000, 2_500_000, 5_000_000, 10**9])
def test_every_process_reads_as_planned_for_all(more, dtypes, entropy):
    chosen, generator = sample(**entropy), torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 5, 20) * 4:
        dims = (2 ** (8 + 7 * torch.rand(14, generator=generator))).int().tolist()
        layers = stored(*dims, dtypes=dtypes)
        check_shares(size, layers, chosen, plan_with(more, layers, chosen))


def plan_with(more, layers, chosen):
    """Plan of layers in this many bytes above the least."""
    with pytest.raises(ValueError, match="memory must be at least") as caught:
        plan_of(layers, chosen, 1, 10_000, halves=True)
    least = int(str(caught.value).split()[5]) * 10**6
    return plan_of(layers, chosen, least + more, 10_000, halves=True)


def check_shares(size, layers, chosen, plan):
    alone = {g[0].layer.name for g in plan.groups if len(g) == 1 and g[0].dim > plan.width}
    # What the plan for all lets a group take, told by its widest slice and its fullest group.
    most = max(size_of(group, plan, alone, chosen) for group in plan.groups)
    most = max(most, room_of(plan, layers, chosen))
    seen = []
    for rank in range(size):
        share = Share(World(rank, size))
        share.take(plan, chosen)
        groups = share.plan.groups
        own = names(itertools.chain(*groups))
        assert own == [name for name in names(layers) if name in own]
        assert share.plan[1:3] == plan[1:3]
        assert share.sliced == alone
        assert all(len(g) == 1 for g in groups if alone & set(names(g)))
        assert all(size_of(g, plan, alone, chosen) <= most for g in groups)
        passes = [-(-g[0].dim // plan.width) if g[0].layer.name in alone else 1 for g in groups]
        assert share.plan.passes == sum(passes) <= plan.passes
        seen += own
    assert sorted(seen) == sorted(names(layers))


def squares_of(chosen):
    return 8 * sum((chosen.entropy_size(a) or 0) ** 2 for a in range(4))


def size_of(group, plan, alone, chosen):
    """Bytes that a group holds: its features, or a slice of them, and its classes' products."""
    widths = [plan.width if s.layer.name in alone else s.dim for s in group]
    features = sum(N * w * s.dtype.itemsize for w, s in zip(widths, group, strict=True))
    return features + len(group) * squares_of(chosen)


def room_of(plan, layers, chosen):
    """Bytes of the widest slice that the plan allows."""
    return plan.width * N * max(s.dtype.itemsize for s in layers) + squares_of(chosen)


def test_one_process_takes_the_plan_as_it_is():
    layers = stored(5, 3)
    plan = Plan([layers[:1], layers[1:]], 4, 7, 3)
    share = Share()
    share.take(plan, sample())
    assert share.plan is plan and share.sliced == {"0"}
