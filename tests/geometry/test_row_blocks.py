"""Whole rows of a Gram matrix and what is read from them, against numpy and scikit-learn."""

import numpy as np
import pytest
import torch
from oracle import clusters

from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.row_blocks import (
    NearestRows,
    full_rows,
    nearest_rows,
    sums_over_classes,
    sums_over_labels,
    walk,
)
from geomkd.measures.quality_statistics import nearest_in_draws

UNEQUAL = np.repeat([0, 1, 2, 3], [3, 31, 16, 10])


def gram_of(x, y):
    """Gram matrix, its rows in float64 as it sorts and scales them, and their classes."""
    gram = ClassGram.of(torch.as_tensor(x), torch.as_tensor(y))
    order = gram.order.numpy()
    rows = torch.as_tensor(x).double().flatten(1).numpy()[order] * gram.scale
    return gram, rows, np.asarray(y)[order]


def sq_distances(x):
    return ((x[:, None] - x) ** 2).sum(axis=2)


@pytest.mark.parametrize("seed", range(3))
def test_equal_rows_are_at_no_distance(seed):
    x = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x.repeat(2, 1) + 100
    gram = ClassGram.of(x, torch.arange(80) % 2)
    distance = torch.cat([d for _, _, d in full_rows(gram, 16)])
    own = gram.order % 40
    assert torch.equal(distance == 0, own == own.unsqueeze(1))


def check(gram, x, k, among=None, *, rel=1e-5):
    """Neighbours against a k-d tree of the rows that may be found."""
    found = nearest_rows(gram, k, among)
    at, sq = found.index.numpy(), found.sq_distance.numpy()
    own = np.arange(len(x))
    inside = own if among is None else own[among.numpy()]
    far = np.full((len(x), k), np.inf)
    for i in own:
        others = inside[inside != i]
        m = min(k, len(others))
        if m:
            far[i, :m] = np.sort(((x[others] - x[i]) ** 2).sum(axis=1))[:m]
    np.testing.assert_allclose(sq, far, rtol=rel)
    there = np.isfinite(far)
    named = ((x[at] - x[:, None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(sq[there], named[there], rtol=rel)
    assert np.isin(at[there], inside).all()
    assert (at != own[:, None])[there].all()
    assert all(len(set(row[ok])) == ok.sum() for row, ok in zip(at, there, strict=True))
    return found


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "height"), [(90, 1), (300, 37), (513, 512), (1100, 37), (1100, 512), (1100, 700)]
)
def test_full_rows(n, height):
    x, y = clusters(n, 9, 4)
    gram, x, _ = gram_of(x.astype(np.float64) + 2, y)
    centred = x - x.mean(axis=0)
    covered = []
    for rows, dots, distance in full_rows(gram, height):
        np.testing.assert_allclose(dots.numpy(), centred[rows] @ centred.T, atol=1e-11)
        expected = ((x[rows, None] - x) ** 2).sum(axis=2)
        np.testing.assert_allclose(distance.numpy(), expected, atol=1e-11)
        own = np.arange(n)[rows]
        assert (distance.numpy()[own - own[0], own] == 0).all()
        assert (distance.numpy() >= 0).all()
        covered += own.tolist()
    assert covered == list(range(n))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 5), (500, 530), (511, 512), (512, 1030), (0, 1100)]
)
def test_rows_of_dots(start, stop):
    x, y = clusters(1100, 11, 5)
    gram, x, _ = gram_of(x, y)
    centred = x - x.mean(axis=0)
    dots = gram.rows_of_dots(slice(start, stop))
    assert (dots.shape, dots.dtype) == ((stop - start, 1100), torch.float64)
    np.testing.assert_allclose(dots.numpy(), centred[start:stop] @ centred.T, atol=2e-5)


def test_rows_near_the_mean():
    """Rows whose products cancel are taken from float64 in rows of dots too."""
    x, y = clusters(600, 40, 3, sep=0.0)
    x[::50] *= np.float32(1e-5)
    x[300:] = -x[:300]  # so that their mean is 0, but not those of the classes
    y = np.where(np.arange(600) < 300, y, (y + 1) % 3)
    gram, x, _ = gram_of(x, y)
    centred = x - x.mean(axis=0)
    small = np.flatnonzero(np.linalg.norm(centred, axis=1) < 0.01)
    assert len(small) == 12
    dots = gram.rows_of_dots(slice(0, 600)).numpy()
    expected = centred @ centred.T
    bound = np.linalg.norm(centred, axis=1)[:, None] * np.linalg.norm(centred, axis=1)
    assert (np.abs(dots - expected)[small] < 1e-6 * bound[small]).all()
    assert (np.abs(dots - expected)[:, small] < 1e-6 * bound[:, small]).all()


def test_between_sq():
    x, y = clusters(90, 7, 4)
    gram, x, y = gram_of(x.astype(np.float64), y)
    mean = x.mean(axis=0)
    expected = sum((y == a).sum() * ((x[y == a].mean(axis=0) - mean) ** 2).sum() for a in range(4))
    assert gram.between_sq.item() == pytest.approx(expected, rel=1e-12)


def test_walk_shows_every_row_to_every_reader():
    x, y = clusters(700, 5, 3)
    gram, _, _ = gram_of(x, y)
    for sums in (1, 100_000, 10**9):
        seen = [[], []]

        def reader(which, seen=seen):
            return lambda rows, dots, distance: seen[which].append((rows.start, rows.stop))

        walk(gram, [reader(0), reader(1)], sums=sums)
        assert seen[0] == seen[1]
        assert [stop for _, stop in seen[0][:-1]] == [start for start, _ in seen[0][1:]]
        assert (seen[0][0][0], seen[0][-1][1]) == (0, 700)
        assert seen[0][0][1] == {1: 512, 100_000: 40, 10**9: 16}[sums]


# ---- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 21, 59])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_rows(k, dtype):
    x = np.random.default_rng(0).standard_normal((60, 6)).astype(dtype)
    gram, rows, _ = gram_of(x, UNEQUAL)
    check(gram, rows, k)


@pytest.mark.parametrize("inside", [1, 4, 30, 500])
def test_nearest_rows_among(inside):
    """Of some rows only; fewer than k leave infinite distances."""
    x, y = clusters(600, 8, 4)
    gram, x, _ = gram_of(x, y)
    among = torch.zeros(600, dtype=torch.bool)
    among[torch.from_numpy(np.random.default_rng(0).permutation(600)[:inside])] = True
    found = check(gram, x, 9, among)
    assert found.sq_distance.isinf().any() == (inside < 10)


def test_more_neighbours_than_rows():
    gram, x, _ = gram_of(*clusters(20, 3, 2))
    assert nearest_rows(gram, 100).index.shape == (20, 19)
    check(gram, x, 19)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.1])
def test_tight_groups_among(spread, few):
    """In every class, larger than what is kept; or some of one, fewer than the neighbours."""
    rng = np.random.default_rng(0)
    group = np.arange(240) // 80
    x = 100 * rng.standard_normal((3, 20))[group] + spread * rng.standard_normal((240, 20))
    gram, rows, _ = gram_of(x.astype(np.float32), np.arange(240) % 4)
    among = rng.random(240) < 0.6
    if few:
        among &= (gram.order.numpy() < 80) & (rng.random(240) < 0.15)
        assert 4 < among.sum() < 10
    check(gram, rows, 10, torch.from_numpy(among))


def test_several_readers_share_a_pass():
    x, y = clusters(600, 8, 4)
    gram, _, _ = gram_of(x, y)
    among = torch.arange(600) % 3 > 0
    readers = [NearestRows(gram, 7), NearestRows(gram, 3, among)]
    walk(gram, readers)
    for reader, own in zip(
        readers, [nearest_rows(gram, 7), nearest_rows(gram, 3, among)], strict=True
    ):
        found = reader.found()
        assert torch.equal(found.sq_distance, own.sq_distance)
        assert torch.equal(found.index, own.index)


# ---- nearest of another class --------------------------------------------------------------------


def test_nearest_other_among():
    x, y = clusters(700, 6, 4)
    gram, x, y = gram_of(x.astype(np.float64), y)
    among = np.random.default_rng(0).random(700) < 0.4
    sq, at = gram.nearest_other(3, torch.from_numpy(among))
    expected = sq_distances(x)
    expected[y[:, None] == y] = np.inf
    expected[:, ~among] = np.inf
    expected[~among] = np.inf  # rows outside find nothing
    np.testing.assert_allclose(sq.numpy(), np.sort(expected, axis=1)[:, :3], rtol=1e-9)
    assert among[at[among].numpy()].all()


@pytest.mark.parametrize("definition", ["published", "robust"])
@pytest.mark.parametrize("tight", [False, True])
def test_nearest_in_a_smaller_sample(definition, tight):
    """One draw of few rows: no neighbour outside it hides one inside."""
    x, y = clusters(600, 10, 3)
    if tight:  # each row of the draw has dozens of nearer neighbours outside it
        x[60:] = x[:60].repeat(9, axis=0) + np.float32(1e-3) * x[60:]
    gram, x, y = gram_of(x, y)
    member = torch.from_numpy(gram.order.numpy() < 60)
    draws = Draws.one([member[s:e].nonzero().T for s, e in gram.spans], gram.classes.sizes)
    found = nearest_in_draws(gram, draws, definition).numpy()
    inside = member.numpy()
    expected = sq_distances(x)
    expected[(y[:, None] == y) | ~inside] = np.inf
    assert found.shape == (600, 1)
    assert np.isinf(found[~inside]).all()
    np.testing.assert_allclose(found[inside, 0], expected[inside].min(axis=1), rtol=1e-5)


# ---- sums over classes ---------------------------------------------------------------------------


def test_sums():
    rng = np.random.default_rng(0)
    x, y = clusters(60, 5, 4)
    gram, _, y = gram_of(x, UNEQUAL)
    values, weights = rng.standard_normal((7, 60)), rng.random((60, 3))
    expected = np.stack([values[:, y == a] @ weights[y == a] for a in range(4)], axis=1)
    by_class = sums_over_classes(gram, torch.from_numpy(weights))(torch.from_numpy(values))
    np.testing.assert_allclose(by_class.numpy(), expected, rtol=1e-12)
    index = torch.from_numpy(y)[:, None].expand(-1, 3)
    by_label = sums_over_labels(index, torch.from_numpy(weights), 4)(torch.from_numpy(values))
    np.testing.assert_allclose(by_label.numpy(), expected, rtol=1e-12)


def test_sums_over_labels_of_each_column():
    rng = np.random.default_rng(1)
    values, weights = rng.standard_normal((7, 60)), rng.random((60, 3))
    labels = rng.integers(4, size=(60, 3))
    expected = np.zeros((7, 4, 3))
    for i in range(60):
        for q in range(3):
            expected[:, labels[i, q], q] += values[:, i] * weights[i, q]
    sums = sums_over_labels(torch.from_numpy(labels), torch.from_numpy(weights), 4)
    np.testing.assert_allclose(sums(torch.from_numpy(values)).numpy(), expected, rtol=1e-11)
