"""Label-permutation nulls against a count over all permutations and plain numpy."""

import itertools

import numpy as np
import pytest
import torch
from oracle import clusters

from geomkd.measures import (
    WithNull,
    fisher_ratio,
    gbc,
    h_score,
    knn_accuracy,
    linear_probe,
    logme,
    nearest_class_mean,
    silhouette,
)
from geomkd.measures.null import against_null, beside_null, permutations

SUPERVISED = (
    fisher_ratio,
    gbc,
    h_score,
    knn_accuracy,
    linear_probe,
    logme,
    nearest_class_mean,
    silhouette,
)
every = pytest.mark.parametrize("measure", SUPERVISED, ids=lambda f: f.__name__)


def gap(index):
    """Difference between the class means of 0, 1, 2, ..."""
    place = torch.arange(len(index), dtype=torch.float64)
    return place[index == 1].mean() - place[index == 0].mean()


def test_permutations_are_seeded_and_whole():
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    drawn = permutations(index, 50, seed=3)
    assert all(torch.equal(p.sort().values, index) for p in drawn)
    assert len({tuple(p.tolist()) for p in drawn}) > 20
    again, other = permutations(index, 50, seed=3), permutations(index, 50, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn, other, strict=True))
    more = permutations(index, 60, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(drawn, more[:50], strict=True))


def test_against_all_permutations():
    """Of six places, two are of class 1: fifteen equally likely ways."""
    index = torch.tensor([0, 0, 0, 0, 1, 1])
    pairs = itertools.combinations(range(6), 2)
    all_ways = np.array([np.mean(p) - (15 - sum(p)) / 4 for p in pairs])
    found = against_null(gap, index, null=4000, seed=0)
    assert found.value.item() == 3.0
    assert found.null_mean.item() == pytest.approx(all_ways.mean(), abs=4 * all_ways.std() / 63)
    assert found.null_95.item() == pytest.approx(np.quantile(all_ways, 0.95), abs=0.76)
    assert found.excess == found.value - found.null_mean


def test_mean_and_quantile_of_what_was_drawn():
    index = torch.tensor([0, 0, 0, 1, 1])
    drawn = np.array([gap(p).item() for p in permutations(index, 25, seed=5)])
    found = against_null(gap, index, null=25, seed=5)
    assert found.null_mean.item() == pytest.approx(drawn.mean())
    assert found.null_95.item() == pytest.approx(sorted(drawn)[24])  # of 25, ceil(0.95 * 26) = 25
    assert found.p_value.item() == (1 + (drawn >= found.value.item()).sum()) / 26


@pytest.mark.parametrize(("null", "place"), [(19, 19), (20, 20), (39, 38), (99, 95), (100, 96)])
def test_quantile_of_few_permutations(null, place):
    """The ceil(0.95 (R + 1))-th smallest: beyond it lies at most one in twenty of no meaning."""
    drawn = torch.arange(1.0, null + 1, dtype=torch.float64).flip(0)
    found = beside_null(torch.tensor(place + 0.5, dtype=torch.float64), drawn)
    assert found.null_95 == place
    assert found.p_value == (1 + null - place) / (null + 1) <= 0.05


def test_too_few_permutations_for_a_quantile():
    index = torch.tensor([0, 0, 0, 1, 1])
    with pytest.warns(UserWarning, match=r"^null_95 is NaN: .* null=19 .* or more; got 18$"):
        found = against_null(gap, index, null=18, seed=0)
    assert found.null_95.isnan() and found.null_mean.isfinite() and found.p_value <= 1


def test_noise_lies_beyond_in_one_of_twenty():
    rng = np.random.default_rng(0)
    beyond = 0
    for _ in range(400):
        drawn = torch.from_numpy(rng.standard_normal(20))
        beyond += bool(beside_null(drawn[0], drawn[1:]).null_95 < drawn[0])
    assert beyond / 400 < 0.08  # with interpolation about 0.1


def test_no_null_is_the_bare_score():
    index = torch.tensor([0, 1])
    found = against_null(gap, index, null=0, seed=0)
    assert isinstance(found, torch.Tensor)
    assert found.item() == 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"null": -1, "seed": 0}, ValueError, "null must be at least 0; got -1"),
        ({"null": True, "seed": 0}, TypeError, "null must be an integer; got bool True"),
        ({"null": 19, "seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"null": 19, "seed": 1.5}, TypeError, "seed must be an integer; got float 1.5"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        against_null(gap, torch.tensor([0, 1]), **options)


def test_permutations_go_to_the_labels_device(elsewhere):
    index = torch.zeros(20, dtype=torch.int64, device=elsewhere)
    assert {p.device for p in permutations(index, 3, 0)} == {index.device}


# ---- every supervised measure --------------------------------------------------------------------


@every
def test_null_of_a_measure(measure):
    x, y = clusters(90, 12, 3, sep=0.8)
    bare = measure(x, torch.from_numpy(y))
    state = torch.get_rng_state()
    found = measure(x, torch.from_numpy(y), null=19, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(found, WithNull)
    assert {(t.shape, t.dtype) for t in found} == {((), torch.float64)}
    seeded = measure is nearest_class_mean or measure is linear_probe
    own = measure(x, torch.from_numpy(y), seed=2) if seeded else bare
    assert found.value == own
    assert found.excess == found.value - found.null_mean
    assert found.null_95 > found.null_mean
    assert found.excess > 0
    assert found == measure(x, torch.from_numpy(y), null=19, seed=2)
    assert found.null_mean != measure(x, torch.from_numpy(y), null=19, seed=3).null_mean


@every
def test_warning_of_too_few_permutations_names_the_callers_file(measure):
    x, y = clusters(90, 12, 3, sep=0.8)
    with pytest.warns(UserWarning, match="^null_95 is NaN") as seen:
        measure(x, torch.from_numpy(y), null=1)
    assert [w.filename for w in seen] == [__file__]


@every
def test_null_is_the_score_of_permuted_labels(measure):
    """With rows sorted by class, so that permuting inside is permuting the labels given."""
    x, y = clusters(60, 8, 3)
    order = np.argsort(y, kind="stable")
    x, y = x[order].astype(np.float64), torch.from_numpy(y[order])
    found = measure(x, y, null=19, seed=1)
    options = {"seed": 1} if measure in (nearest_class_mean, linear_probe) else {}
    drawn = [measure(x, labels, **options).item() for labels in permutations(y, 19, 1)]
    assert found.null_mean.item() == pytest.approx(np.mean(drawn), rel=1e-9)
    assert found.null_95.item() == pytest.approx(max(drawn), rel=1e-9)


@every
def test_labels_without_meaning_are_in_the_null(measure):
    """Value, mean and 95 % quantile of features that know nothing of the classes."""
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(3, size=120))
    found = measure(rng.standard_normal((120, 10)), y, null=30 if measure is linear_probe else 60)
    spread = found.null_95 - found.null_mean
    assert abs(found.excess) < 2.5 * spread


def test_what_has_no_score_is_not_significant():
    value = torch.tensor(torch.nan)
    assert beside_null(value, torch.full((19,), torch.nan)).p_value == 1
