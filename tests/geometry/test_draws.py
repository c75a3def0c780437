"""How samples are drawn, and that statistics of a half-sample are those of the subset."""

import itertools

import numpy as np
import pytest
import torch
from oracle import DEFINITIONS, clusters, values_of

from geomkd import knowledge_quality
from geomkd.geometry.draws import MOST, Draws, balanced, halvings, held_out, nested, parts_of
from geomkd.geometry.gram import ClassGram
from geomkd.measures.quality import quality_from
from geomkd.measures.quality_statistics import (
    STATISTICS,
    Robust,
    least_in_draws,
    statistics_of_sample,
)

CPU = torch.empty(0).device
both = pytest.mark.parametrize("definition", DEFINITIONS)


def test_halves_of_every_class():
    draws = Draws.halves([2, 3, 4, 9, 100], 40, seed=0, device=CPU)
    assert draws.sizes == [2, 2, 2, 5, 50]
    assert not draws.whole
    start = 0
    for a, size in enumerate(draws.class_sizes):
        inside, chosen = draws.member[start : start + size], draws.of_class(a)
        assert torch.equal(inside.T.nonzero()[:, 1].reshape(chosen.shape), chosen)
        assert (chosen.diff(dim=1) > 0).all()
        start += size
    assert start == len(draws.member)


def test_every_subset_is_as_likely():
    chosen = Draws.halves([4], 6000, seed=0, device=CPU).of_class(0)
    counts = torch.unique(chosen, dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 150  # five standard deviations


@pytest.mark.parametrize(
    ("n_classes", "draws", "count"),
    [(1, 50, 0), (2, 50, 0), (3, 50, 17), (10, 50, 5), (100, 50, 5), (1000, 50, 5), (100, 10, 0)],
)
def test_halvings_give_as_many_degrees_of_freedom_as_draws(n_classes, draws, count):
    assert halvings(n_classes, draws) == count
    assert count == 0 or (n_classes * count >= draws and 2 * count < draws)


def test_of_many_classes_a_draw_takes_both_halves_in_turn():
    sizes = [8] * 10 + [7, 3]
    draws = Draws.halves(sizes, 50, seed=0, device=CPU)
    count = 2 * halvings(12, 50)
    assert all(len(part) == count for part in draws.parts)
    for size, part in zip(sizes, draws.parts, strict=True):
        for one, other in zip(part[: count // 2], part[count // 2 :], strict=True):
            both = torch.cat([one, other]).unique()
            assert torch.equal(both, torch.arange(size))  # an odd one in both
    for taken in draws.taken:
        assert taken.bincount().tolist() == [50 // count] * count
    assert len(draws.member.T.unique(dim=0)) == 50
    # So whatever adds up over rows has the sample's mean.
    assert (draws.member[:80].double().mean(dim=1) == 0.5).all()


def test_seed_alone_decides():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Draws.halves([5, 8], 7, seed=3, device=CPU).member
    assert torch.equal(torch.get_rng_state(), state)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = Draws.halves([5, 8], 7, seed=3, device=CPU).member
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(first, again)
    assert not torch.equal(first, Draws.halves([5, 8], 7, seed=4, device=CPU).member)


def test_all_of():
    draws = Draws.all_of([2, 3], CPU)
    assert draws.whole
    assert draws.sizes == [2, 3]
    assert draws.member.tolist() == [[True]] * 5
    torch.testing.assert_close(
        draws.weights().squeeze(1), torch.tensor([1 / 2] * 2 + [1 / 3] * 3, dtype=torch.float64)
    )


def test_weights_sum_to_one_per_class():
    draws = Draws.halves([4, 7], 3, seed=0, device=CPU)
    weights = draws.weights()
    assert weights.dtype is torch.float64
    torch.testing.assert_close(weights[:4].sum(dim=0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(weights[4:].sum(dim=0), torch.ones(3, dtype=torch.float64))
    assert torch.equal(weights > 0, draws.member)


def test_pairs_come_a_few_at_a_time():
    draws = Draws.halves([3, 1200], 5, seed=0, device=CPU)
    square = torch.arange(1200.0**2).reshape(1200, 1200)
    parts = list(draws.pairs(draws.of_class(1), square))
    assert [len(part) for _, part in parts] == [2, 2, 1]
    for rows, part in parts:
        for one, chosen in zip(part, draws.of_class(1)[rows], strict=True):
            assert torch.equal(one, square[chosen][:, chosen])


# ---- held-out rows -------------------------------------------------------------------------------

TESTED = [1, 2, 3, 10, 25]


def labels(sizes=TESTED, seed=0):
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.3, [0, 1, 1, 3, 8]), (0.5, [0, 1, 2, 5, 13]), (1e-9, [0, 1, 1, 1, 1])],
)
def test_share_of_every_class(share, expected):
    index = labels()
    train, test = held_out(index, 5, share, seed=0)
    assert index[test].bincount(minlength=5).tolist() == expected
    assert torch.equal(train, ~test)


def test_every_class_keeps_a_training_row():
    train, _ = held_out(labels(), 5, 1 - 1e-9, seed=0)
    assert labels()[train].bincount().tolist() == [1, 1, 1, 1, 1]


def test_seeds_of_a_split():
    index, state = labels(), torch.get_rng_state()
    first, again, other = (held_out(index, 5, 0.3, seed=s)[1] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_every_row_is_as_likely_held_out():
    """Of 2,000 seeds, each of ten rows is held out in 30 %; five standard errors."""
    index = torch.zeros(10, dtype=torch.int64)
    drawn = torch.stack([held_out(index, 1, 0.3, seed=s)[1] for s in range(2000)])
    assert (drawn.double().mean(dim=0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_class_numbers_do_not_enter():
    index = labels()
    renamed = torch.tensor([3, 0, 4, 1, 2])[index]
    assert torch.equal(held_out(index, 5, 0.3, 0)[1], held_out(renamed, 5, 0.3, 0)[1])


def test_a_split_on_a_device_that_does_not_exist(elsewhere):
    index = torch.zeros(20, dtype=torch.int64, device=elsewhere)
    train, test = held_out(index, 3, 0.3, seed=0)
    assert train.device == test.device == elsewhere
    assert train.shape == test.shape == (20,)
    assert train.dtype == test.dtype == torch.bool


# ---- smaller samples -----------------------------------------------------------------------------

UNEQUAL = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [2, 30, 68])))
SIZES = [2, 30, 68]


def test_nested_orders_every_class():
    orders = nested(UNEQUAL, SIZES, seed=0)
    for a, order in enumerate(orders):
        assert torch.equal(order.sort().values, (a == UNEQUAL).nonzero().flatten())
    again, other = nested(UNEQUAL, SIZES, seed=0), nested(UNEQUAL, SIZES, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(orders, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(orders, other, strict=True))


def test_nested_is_a_fair_draw():
    """Each of 30 rows is as often the first of its class."""
    first = torch.stack([nested(UNEQUAL, SIZES, seed)[1][0] for seed in range(900)])
    counts = first.bincount(minlength=100)[UNEQUAL == 1]
    assert ((counts - 30) ** 2 / 30).sum() < 58.3  # chi-square of 29 degrees, 0.1 %


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(0, [2, 2, 2]), (9, [2, 3, 3]), (60, [2, 20, 20]), (99, [2, 30, 33]), (1000, [2, 30, 68])],
)
def test_balanced(samples, expected):
    rows = balanced(nested(UNEQUAL, SIZES, seed=0), samples)
    assert UNEQUAL[rows].bincount().tolist() == expected
    assert (rows.diff() > 0).all()


def test_smaller_samples_are_parts_of_larger_ones():
    orders = nested(UNEQUAL, SIZES, seed=3)
    chain = [set(balanced(orders, samples).tolist()) for samples in (6, 20, 50, 100)]
    assert all(small < large for small, large in itertools.pairwise(chain))


def test_global_state_is_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    before = nested(UNEQUAL, SIZES, 0)
    torch.set_default_dtype(torch.float64)
    try:
        after = nested(UNEQUAL, SIZES, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_parts():
    """All, half of every class at a time, then nested smaller samples."""
    parts = parts_of(UNEQUAL, 3, [9, 60, 5000], seed=0)
    assert len(parts) == 7
    assert parts[0].tolist() == list(range(100))
    halves = [UNEQUAL[part].bincount().tolist() for part in parts[1:4]]
    assert halves == [[2, 15, 34]] * 3
    assert len({tuple(part.tolist()) for part in parts[1:4]}) == 3
    assert [UNEQUAL[part].bincount().tolist() for part in parts[4:6]] == [[2, 3, 3], [2, 20, 20]]
    assert parts[6] is None  # more than are there tell nothing, but as many are all of them
    assert torch.equal(parts_of(UNEQUAL, 0, [100], seed=0)[1], parts[0])
    assert all((part.diff() > 0).all() for part in parts[:6])
    assert parts_of(torch.arange(8) % 4, 2, [], seed=0)[1:] == [None, None]  # half of two are two
    assert set(parts[4].tolist()) < set(parts[5].tolist())
    assert [len(part) for part in parts_of(UNEQUAL, 0, [], seed=0)] == [100]


def test_most():
    assert MOST == 1000  # what the documentation says


def test_smaller_samples_on_a_device_that_does_not_exist(elsewhere):
    orders = nested(torch.zeros(100, dtype=torch.int64, device=elsewhere), SIZES, 0)
    assert {order.device for order in orders} == {elsewhere}
    assert balanced(orders, 30).device == elsewhere


# ---- a draw's statistics are those of knowledge_quality on the subset ----------------------------


def ordinary():
    x, _ = clusters(300, 40, 4, relu=True)
    return x, np.random.default_rng(0).permutation(np.repeat([3, 1, 2, 0], [150, 90, 40, 20]))


def over_blocks():
    x, _ = clusters(1300, 12, 3)
    return x, np.repeat([0, 1, 2], [700, 590, 10])


def offset():
    x, y = ordinary()
    return x + np.float32(100), y


def collapsed():
    rng = np.random.default_rng(1)
    x, y = clusters(200, 30, 5, sep=3.0, noise=0.0)
    return x + (1e-3 * rng.standard_normal(x.shape)).astype(np.float32), y


def two_a_class():
    return clusters(40, 16, 20)


def two_features():
    return clusters(90, 2, 3)


def near_duplicates():
    """Twins of the other class 1e-3 away, which x^2 + y^2 - 2xy cannot measure."""
    rng = np.random.default_rng(2)
    base = rng.standard_normal((80, 64)) + 10
    x = np.concatenate([base, base + 1e-4 * rng.standard_normal((80, 64))])
    return x.astype(np.float32), np.repeat([0, 1], 80)


def small_rows():
    x, y = clusters(200, 40, 4, relu=True, sep=2.0)
    x[[3, 4, 50, 51]] *= np.float32(1e-5)
    return x, y


def nearly_dead():
    """Most samples of a class are alike, so that some half-samples of it hold no variance."""
    x, _ = clusters(100, 400, 5, noise=3.0)
    y = np.repeat(np.arange(5), 20)
    alike = np.arange(100) % 20 < 18
    x[alike] = x[y[alike] * 20]
    return x, y


def more_features_than_samples():
    return clusters(60, 40, 5)


def wider_than_a_draw():
    return clusters(120, 100, 3)


INPUTS = [
    ordinary,
    wider_than_a_draw,
    over_blocks,
    offset,
    collapsed,
    two_a_class,
    two_features,
    near_duplicates,
    small_rows,
    nearly_dead,
    more_features_than_samples,
]


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
def test_draws_equal_their_subsets(make, dtype, definition):
    x, y = make()
    x, y = torch.from_numpy(x.astype(dtype)), torch.from_numpy(y)
    gram = ClassGram.of(x, y)
    draws = Draws.halves(gram.classes.sizes, 8, seed=0, device=gram.device)
    parts = quality_from(STATISTICS[definition](gram, draws), 5000.0)
    for r in range(8):
        rows = gram.order[draws.member[:, r]]
        q = knowledge_quality(x[rows], y[rows], dataset_size=5000, definition=definition)
        expected = values_of(q)
        assert parts.keys() == expected.keys()
        for name, value in expected.items():
            assert float(parts[name][r]) == pytest.approx(value, rel=1e-5, abs=3e-7), (r, name)


def hub(n=400, d=20):
    """One row of class 0 is the nearest of all rows of the others, and the rest lie far apart."""
    x, y = clusters(n, d, 8)
    x += 40 * np.eye(8, d, dtype=x.dtype)[y]
    x[0] = x.mean(axis=0)
    return x, y


def alike(n=400, d=6):
    """Rows in eights of equal rows of different classes, and all of one class equal."""
    x, y = clusters(n, d, 8)
    x[: n // 2] = x[: n // 2 : 8].repeat(8, axis=0)
    x[y == 3] = x[y == 3][0]
    return x, y


@pytest.mark.parametrize(
    "make", [lambda: clusters(300, 5, 3), lambda: clusters(900, 40, 12), hub, alike]
)
@pytest.mark.parametrize("first", [24, 1])
def test_least_distance_of_every_class_in_draws(monkeypatch, make, first):
    """Exact however few rows are read first, and where all their neighbours are one row."""
    monkeypatch.setattr("geomkd.measures.quality_statistics._FIRST_ROWS", first)
    x, y = make()
    gram = ClassGram.of(torch.from_numpy(x), torch.from_numpy(y))
    draws = Draws.halves(gram.classes.sizes, 50, seed=0, device=CPU)
    assert (halvings(gram.n_classes, 50) == 0) == (len(draws.parts[0]) == 50)
    x, y = x[gram.order].astype(float), y[gram.order]
    distance = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    distance[y[:, None] == y] = np.inf
    found = least_in_draws(gram, draws).numpy() / gram.scale**2
    for r, member in enumerate(draws.member.T.numpy()):
        nearest = distance[:, member].min(axis=1)
        expected = [nearest[member & (y == a)].min() for a in range(gram.n_classes)]
        np.testing.assert_allclose(found[:, r], expected, rtol=1e-5, atol=1e-9)


@both
def test_the_whole_sample_is_the_result(definition):
    x, y = (torch.from_numpy(t) for t in ordinary())
    gram = ClassGram.of(x, y)
    parts = quality_from(statistics_of_sample(gram, definition), 300.0)
    expected = values_of(knowledge_quality(x, y, definition=definition))
    assert {name: value.item() for name, value in parts.items()} == expected


def test_draws_that_miss_the_kept_neighbours_keep_a_bound(monkeypatch):
    monkeypatch.setattr("geomkd.measures.quality_statistics.NEIGHBOURS", 1)
    x, y = (torch.from_numpy(t) for t in ordinary())
    gram = ClassGram.of(x, y)
    draws = Draws.halves(gram.classes.sizes, 8, seed=0, device=gram.device)
    parts = quality_from(Robust(gram, draws), 300.0)
    whole = knowledge_quality(x, y, definition="robust").details["nearest_other_class_distance"]
    assert parts["nearest_other_class_distance"].isfinite().all()
    assert (parts["nearest_other_class_distance"] / whole - 1).abs().max() < 0.1
