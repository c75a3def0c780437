"""Half-samples: how they are drawn, and that statistics of a draw are those of the subset."""

import numpy as np
import pytest
import torch
from oracle import DEFINITIONS, clusters, values_of

from geomkd import knowledge_quality
from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import ClassGram
from geomkd.measures.quality import quality_from
from geomkd.measures.quality_statistics import STATISTICS, Robust, statistics_of_sample

CPU = torch.empty(0).device
both = pytest.mark.parametrize("definition", DEFINITIONS)


def test_halves_of_every_class():
    draws = Draws.halves([2, 3, 4, 9, 100], 40, seed=0, device=CPU)
    assert draws.sizes == [2, 2, 2, 5, 50]
    assert not draws.whole
    start = 0
    for size, chosen in zip(draws.class_sizes, draws.of_class, strict=True):
        inside = draws.member[start : start + size]
        assert torch.equal(inside.T.nonzero()[:, 1].reshape(chosen.shape), chosen)
        assert (chosen.diff(dim=1) > 0).all()
        start += size
    assert start == len(draws.member)


def test_every_subset_is_as_likely():
    chosen = Draws.halves([4], 6000, seed=0, device=CPU).of_class[0]
    counts = torch.unique(chosen, dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 150  # five standard deviations


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
    parts = list(draws.pairs(1, square))
    assert [len(part) for _, part in parts] == [2, 2, 1]
    for rows, part in parts:
        for one, chosen in zip(part, draws.of_class[1][rows], strict=True):
            assert torch.equal(one, square[chosen][:, chosen])


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
