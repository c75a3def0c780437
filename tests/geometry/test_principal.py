"""Principal coordinates against numpy's singular value decomposition."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from geomkd.geometry.principal import COLUMNS, of_gram, principal

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


def test_gram_on_a_device_that_does_not_exist():
    """Up to the choice of eigenvalues, whose number is data."""
    from geomkd.geometry.principal import _centred, _positive, _raw_sum

    with FakeTensorMode(allow_non_fake_inputs=False):
        x = torch.empty(20, 2000, device="cuda:0")
        values = torch.empty(20, device="cuda:0", dtype=torch.float64)
        kept = _positive(values, _raw_sum(x, 0.5), 20)
        assert kept.device == _centred(x, 0.5, True).device == x.device
