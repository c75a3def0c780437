"""The subset of a sample that is kept: which rows, and their Gram matrix, against numpy."""

import itertools

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from geomkd.geometry.gram import column_slices
from geomkd.geometry.principal import principal
from geomkd.geometry.subset_gram import MOST, SubsetGram, balanced, nested, parts_of, unpacked

UNEQUAL = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [2, 30, 68])))
SIZES = [2, 30, 68]


def filled(x, rows, scale=1.0):
    subset = SubsetGram(rows, scale)
    columns = subset.watching(lambda: column_slices(x, scale))
    pieces = [piece.clone() for piece in columns()]
    return subset, pieces, columns


def gaussian(n, d, *, offset=0.0):
    rng = np.random.default_rng(d)
    return torch.from_numpy(rng.standard_normal((n, d)) + offset)


# ---- which rows ----------------------------------------------------------------------------------


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
    assert [UNEQUAL[part].bincount().tolist() for part in parts[4:]] == [
        [2, 3, 3],
        [2, 20, 20],
        [2, 30, 68],  # more than are there: all of them
    ]
    assert all((part.diff() > 0).all() for part in parts)
    assert set(parts[4].tolist()) < set(parts[5].tolist())
    assert [len(part) for part in parts_of(UNEQUAL, 0, [], seed=0)] == [100]


# ---- their Gram matrix ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0**-6])
@pytest.mark.parametrize("d", [7, 1024, 2500])
def test_gram(d, scale):
    x, rows = gaussian(60, d, offset=2), torch.arange(3, 60, 2)
    subset, pieces, columns = filled(x, rows, scale)
    centred = x[rows] - x[rows].mean(dim=0)
    torch.testing.assert_close(subset.gram, centred @ centred.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(subset._raw_sq(), x[rows].square().sum(dim=1))
    assert subset.dim == d
    assert torch.equal(torch.cat(pieces, dim=1), x * scale)
    for _ in columns():  # a second reading adds nothing
        pass
    assert subset.dim == d
    torch.testing.assert_close(subset.gram, centred @ centred.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("d", [5, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_principal_of_a_part(dtype, d, center):
    """As from the features of these rows."""
    x, rows = gaussian(80, d, offset=1).to(dtype), torch.arange(0, 80, 2)
    subset, _, _ = filled(x, rows)
    for part in (torch.arange(40), torch.arange(5, 40, 3)):
        found = subset.principal(part, center=center)
        expected = principal(x[rows[part]], center=center)
        assert (found.n, found.dim) == (len(part), d)
        torch.testing.assert_close(found.sq_singular, expected.sq_singular, rtol=1e-8, atol=1e-8)
        grams = [p.coordinates @ p.coordinates.T for p in (found, expected)]
        torch.testing.assert_close(*grams, rtol=1e-8, atol=1e-8)


def test_principal_with_an_offset():
    """The kept matrix is about the mean: an offset costs the centred spectrum no digits."""
    x = gaussian(50, 20)
    far, _, _ = filled((x + 1e6).double(), torch.arange(50))
    part = torch.arange(10, 40)
    expected = principal(x[part])
    found = far.principal(part, center=True).sq_singular
    torch.testing.assert_close(found, expected.sq_singular, rtol=1e-8, atol=0)


def test_equal_rows_have_rank_0():
    x = torch.full((30, 9), 0.1)
    subset, _, _ = filled(x, torch.arange(30))
    assert subset.principal(torch.arange(30), center=True).sq_singular.shape == (0,)
    assert subset.principal(torch.arange(30), center=False).sq_singular.shape == (1,)


@pytest.mark.parametrize("scale", [1.0, 2.0**5])
def test_packed(scale):
    x, rows = gaussian(12, 5), torch.arange(1, 9)
    subset, _, _ = filled(x, rows, scale)
    packed = subset.packed()
    assert (packed.shape, packed.dtype) == ((36,), np.float32)
    grams = unpacked(np.stack([packed, 2 * packed]), 8)
    assert (grams.shape, grams.dtype) == ((2, 8, 8), np.float32)
    centred = (x[rows] - x[rows].mean(dim=0)).numpy()
    np.testing.assert_allclose(grams[0], centred @ centred.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(grams[1], 2 * grams[0])
    np.testing.assert_array_equal(grams[0], grams[0].T)


def test_equal_rows_are_packed_as_0():
    """Not as what is left of an offset that the mean cannot hold."""
    subset, _, _ = filled(torch.full((30, 9), 0.1, dtype=torch.float64), torch.arange(30))
    assert not subset.packed().any()


def test_most():
    assert MOST == 1000  # what the documentation says


def test_on_a_device_that_does_not_exist():
    with FakeTensorMode(allow_non_fake_inputs=False):
        own = torch.device("cuda", 0)
        index = torch.zeros(100, dtype=torch.int64, device=own)
        orders = nested(index, SIZES, 0)
        assert {order.device for order in orders} == {own}
        assert balanced(orders, 30).device == own
        subset = SubsetGram(torch.zeros(30, dtype=torch.int64, device=own))
        subset.add(torch.empty(100, 17, device=own))
        assert subset.gram.device == subset._to_mean.device == subset._mean_sq.device == own
