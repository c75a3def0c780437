"""Principal coordinates, of features and of a kept Gram matrix, against numpy."""

import numpy as np
import pytest
import torch

from geomkd.geometry.columns import column_slices
from geomkd.geometry.precision import COLUMNS, scale_of
from geomkd.geometry.principal import (
    SubsetGram,
    _exact,
    _positive,
    of_gram,
    principal,
    unpacked,
)

shapes = pytest.mark.parametrize("shape", [(40, 7), (30, 30), (20, 90), (12, COLUMNS + 300)])


def gaussian(n, d, *, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * np.linspace(3, 0.3, d) + offset


def check(found, x, *, center=True, rel=1e-9):
    """Dot products and spectrum of ``x``, its axes in order and orthogonal."""
    exact = x - x.mean(axis=0) if center else x
    n, d = x.shape
    singular = np.linalg.svd(exact, compute_uv=False)
    rank = (singular > 1e-9 * singular[0]).sum()
    singular = singular[:rank]
    coordinates, sq = found.coordinates.numpy(), found.sq_singular.numpy()
    assert (found.n, found.dim) == (n, d)
    assert coordinates.shape == (n, rank)
    np.testing.assert_allclose(sq, singular**2, rtol=rel)
    top = singular[0] ** 2
    np.testing.assert_allclose(coordinates @ coordinates.T, exact @ exact.T, atol=rel * top)
    np.testing.assert_allclose(coordinates.T @ coordinates, np.diag(sq), atol=rel * top)
    assert (np.diff(sq) <= 0).all()
    assert (sq > 0).all()


@pytest.mark.parametrize("center", [True, False])
@shapes
def test_singular_values(shape, center):
    x = gaussian(*shape, offset=0.5)
    check(principal(x, center=center), x, center=center)


@shapes
def test_ranks_below_full(shape):
    n, d = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 4)) @ rng.standard_normal((4, d))
    found = principal(x)
    assert found.sq_singular.shape == (4,)
    check(found, x)
    twice = np.concatenate([x, x])
    check(principal(twice), twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@shapes
def test_types(shape, dtype):
    """In float64 of the values given, however they are stored."""
    x = torch.from_numpy(gaussian(*shape, offset=1)).to(dtype)
    before = x.clone()
    found = principal(x)
    assert found.coordinates.dtype == found.sq_singular.dtype == torch.float64
    check(found, x.double().numpy())
    assert torch.equal(x, before)


@shapes
def test_float32_with_an_offset(shape):
    x = gaussian(*shape, offset=1000).astype(np.float32)
    check(principal(x), x.astype(np.float64), rel=1e-8)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e30])
@pytest.mark.parametrize("d", [5, 90])
def test_equal_rows_have_rank_0(d, value):
    x = np.full((30, d), value)
    x[:, 0] *= 3.7
    found = principal(x)
    assert (found.coordinates.shape, found.sq_singular.shape) == ((30, 0), (0,))
    assert (found.n, found.dim) == (30, d)
    assert principal(x, center=False).sq_singular.shape == (int(value != 0),)


def test_one_row():
    assert principal(np.ones((1, 5))).coordinates.shape == (1, 0)
    assert principal(np.ones((1, 5)), center=False).sq_singular.item() == pytest.approx(5)


@pytest.mark.parametrize("d", [6, 60])
@pytest.mark.parametrize("power", [-900, -450, 450, 900])
def test_scales_whose_squares_leave_float64(power, d):
    """Times a power of two."""
    x = gaussian(20, d)
    found, expected = principal(np.ldexp(x, power)), principal(x)
    ratio = (found.sq_singular / expected.sq_singular).numpy()
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    assert np.log2(ratio[0]) == pytest.approx(round(np.log2(ratio[0])), abs=1e-9)
    again = (found.coordinates @ found.coordinates.T).numpy() / ratio[0]
    exact = x - x.mean(axis=0)
    np.testing.assert_allclose(again, exact @ exact.T, atol=1e-9 * expected.sq_singular[0])


def test_scales_within_float64_are_kept():
    x = gaussian(20, 6)
    found = principal(x * 2.0**300).sq_singular / principal(x).sq_singular
    assert torch.allclose(found, torch.full_like(found, 4.0**300))


def test_both_sides_agree():
    """One more column turns X'X into XX'."""
    x = gaussian(30, 29)
    narrow, wide = principal(x), principal(np.pad(x, [(0, 0), (0, 1)]))
    torch.testing.assert_close(narrow.sq_singular, wide.sq_singular)
    one, other = (p.coordinates @ p.coordinates.T for p in (narrow, wide))
    torch.testing.assert_close(one, other)


def test_of_gram():
    x = gaussian(20, 50)
    exact = x - x.mean(axis=0)
    check(of_gram(torch.from_numpy(exact @ exact.T), 50), x)


def test_of_gram_tells_variance_from_rounding():
    x = 1e-16 * gaussian(20, 5)
    gram = torch.from_numpy(x @ x.T)
    assert len(of_gram(gram, 5).sq_singular) == 5
    assert len(of_gram(gram, 5, raw_sum=20.0).sq_singular) == 0


def test_maps():
    x = gaussian(20, 24)
    assert torch.equal(principal(x.reshape(20, 6, 2, 2)).sq_singular, principal(x).sq_singular)


def test_features_must_be_finite():
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 4 rows, first in row 2"):
        principal(torch.tensor([[0.0], [1], [torch.nan], [3]]))


def test_on_a_device_that_does_not_exist(elsewhere):
    """Up to the choice of eigenvalues, whose number is data."""
    x = torch.empty(20, 2000, device=elsewhere)
    values = torch.empty(20, device=elsewhere, dtype=torch.float64)
    scale = scale_of(x, torch.float64, beyond=400)
    exact, means_sq = _exact(x, scale, True)
    assert exact.device == means_sq.device == _positive(values, means_sq, 20).device == elsewhere
    subset = SubsetGram(torch.zeros(30, dtype=torch.int64, device=elsewhere))
    subset.add(torch.empty(100, 17, device=elsewhere))
    assert subset.gram.device == subset._to_mean.device == subset._mean_sq.device == elsewhere


# ---- the subset whose Gram matrix is kept --------------------------------------------------------


def filled(x, rows, scale=1.0):
    subset = SubsetGram(rows, scale)
    columns = subset.watching(lambda: column_slices(x, scale))
    pieces = [piece.clone() for piece in columns()]
    return subset, pieces, columns


def offset_gaussian(n, d, *, offset=0.0):
    return torch.from_numpy(gaussian(n, d, seed=d, offset=offset))


@pytest.mark.parametrize("scale", [1.0, 2.0**-6])
@pytest.mark.parametrize("d", [7, 1024, 2500])
def test_gram_of_a_subset(d, scale):
    x, rows = offset_gaussian(60, d, offset=2), torch.arange(3, 60, 2)
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
    x, rows = offset_gaussian(80, d, offset=1).to(dtype), torch.arange(0, 80, 2)
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
    x = offset_gaussian(50, 20)
    far, _, _ = filled((x + 1e6).double(), torch.arange(50))
    part = torch.arange(10, 40)
    expected = principal(x[part])
    found = far.principal(part, center=True).sq_singular
    torch.testing.assert_close(found, expected.sq_singular, rtol=1e-8, atol=0)


def test_equal_rows_of_a_subset_have_rank_0():
    x = torch.full((30, 9), 0.1)
    subset, _, _ = filled(x, torch.arange(30))
    assert subset.principal(torch.arange(30), center=True).sq_singular.shape == (0,)
    assert subset.principal(torch.arange(30), center=False).sq_singular.shape == (1,)


@pytest.mark.parametrize("scale", [1.0, 2.0**5])
def test_packed(scale):
    x, rows = offset_gaussian(12, 5), torch.arange(1, 9)
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
