"""Neighbours, found in features and in Gram matrices, against scikit-learn's trees in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from geomkd.geometry import neighbours
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import Neighbours, Rows, keep_nearest, search, smallest, unsure
from geomkd.geometry.precision import BLOCK
from geomkd.geometry.row_blocks import nearest_rows

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def nearest(features, k):
    """As `search` finds them, distances unscaled."""
    rows = Rows(features)
    sq, at = search(rows, k)
    return Neighbours(sq / rows.scale / rows.scale, at)


def nearest_by_gram(features, k):
    """As a layer's Gram matrix of four classes gives them: classes in turn, in the given order."""
    x = torch.as_tensor(features)
    gram = ClassGram.of(x, torch.arange(len(x)) % 4)
    back = torch.argsort(gram.order)
    sq, at = (found[back] for found in nearest_rows(gram, k))
    return Neighbours(sq / gram.scale / gram.scale, gram.order[at])


sources = pytest.mark.parametrize("find", [nearest, nearest_by_gram])


def check(features, k, *, find=nearest, rel=1e-5):
    """Compare with a k-d tree, which takes differences; return what was found."""
    x = torch.as_tensor(features)
    found = find(features, k)
    n, x = len(x), x.double().flatten(1).numpy()
    assert (found.sq_distance.shape, found.index.shape) == ((n, k), (n, k))
    assert (found.sq_distance.dtype, found.index.dtype) == (torch.float64, torch.int64)
    at, sq = found.index.numpy(), found.sq_distance.numpy()
    tree = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(x)
    np.testing.assert_allclose(np.sqrt(sq), tree.kneighbors()[0], rtol=rel / 2)
    # The rows named are that far away, whichever of equals they are; none twice, none itself.
    np.testing.assert_allclose(sq, ((x[at] - x[:, None]) ** 2).sum(axis=2), rtol=rel)
    assert (np.diff(sq, axis=1) >= 0).all()
    named = np.sort(np.concatenate([at, np.arange(n)[:, None]], axis=1), axis=1)
    assert (np.diff(named, axis=1) > 0).all()
    return found


def gaussian(n=200, d=20, *, seed=0, offset=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) + offset


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 30, 58, 59])
@pytest.mark.parametrize("d", [1, 3, 200])
def test_any_number_of_neighbours(k, d):
    x = gaussian(60, d)
    check(x, k)
    check(x.astype(np.float32), k)


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_more_rows_than_a_block(n):
    check(gaussian(n, 6).astype(np.float32), 12)


@pytest.mark.parametrize("tile", [1, 7, 30, 64])
def test_tiles(monkeypatch, tile):
    """Smaller ones than a sample of 100, also than the number of neighbours."""
    x = gaussian(100, 6).astype(np.float32)
    x[50:60] = x[40:50]
    monkeypatch.setattr(neighbours, "TILE", tile)
    check(x, 12)


@dtypes
def test_types(dtype):
    check(torch.from_numpy(gaussian(150, 10)).to(dtype), 5)


def test_maps_and_arrays():
    x = gaussian(40, 24)
    expected = nearest(x, 3)
    found = nearest(torch.from_numpy(x).reshape(40, 6, 2, 2), 3)
    assert torch.equal(found.sq_distance, expected.sq_distance)
    assert torch.equal(found.index, expected.index)


def test_known_distances():
    found = nearest(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]), 2)
    assert found.sq_distance.flatten().tolist() == pytest.approx([1, 25, 18, 25, 1, 18], rel=1e-6)
    assert found.index.tolist() == [[2, 1], [2, 0], [0, 1]]


# ---- where products cancel -----------------------------------------------------------------------


@sources
@dtypes
def test_equal_rows_are_exactly_zero_apart(dtype, find):
    """Among rows far from the origin; three copies of one, two of another."""
    x = torch.from_numpy(gaussian(100, 30, offset=50)).to(dtype)
    x[[5, 70]] = x[3].clone()
    x[9] = x[8].clone()
    sq, at = check(x, 3, find=find)
    assert sq[[3, 5, 70], :2].eq(0).all()
    assert sq[[8, 9], 0].eq(0).all()
    assert {*at[3, :2].tolist()} == {5, 70}
    assert (at[8, 0], at[9, 0]) == (9, 8)
    rest = [i for i in range(100) if i not in (3, 5, 70, 8, 9)]
    assert sq[rest].gt(0).all()


@sources
def test_more_equal_rows_than_are_kept(find):
    x = gaussian(60, 4).astype(np.float32)
    x[:40] = x[0]
    sq, _ = check(x, 3, find=find)
    assert sq[:40].eq(0).all()


@sources
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_near_twins(dtype, offset, find):
    """Pairs of different classes a few units in the last place of float32 apart."""
    x = gaussian(100, 30, offset=offset).astype(dtype)
    x[1::2] = x[::2] * (1 + 1e-6)
    sq, at = check(x, 2, find=find)
    assert at[:, 0].tolist() == [i ^ 1 for i in range(100)]
    assert sq[:, 0].gt(0).all()


@sources
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("apart", [10, 100, 1000])
@pytest.mark.parametrize("groups", [3, 40])
def test_tight_groups_far_apart(groups, apart, spread, find):
    """In every class, larger than what is kept and smaller: float32 products are noise within."""
    group = np.arange(240) % groups
    x = apart * gaussian(groups, 20, seed=1)[group] + spread * gaussian(240, 20)
    _, at = check(x.astype(np.float32), 5 if groups > 3 else 10, find=find)
    assert (group[at.numpy()] == group[:, None]).all()


@sources
def test_groups_of_different_widths(find):
    """Some rows can be had from products, others cannot."""
    x = gaussian(700, 8).astype(np.float32)
    x[100:160] = x[100] + 1e-4 * x[100:160]
    check(x, 6, find=find)


@sources
@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_offsets(offset, dtype, find):
    check(gaussian(150, 12, offset=offset).astype(dtype), 4, find=find)


@sources
@pytest.mark.parametrize("power", [-140, -70, -30, 30, 70, 120])
def test_scales_of_float32(power, find):
    x = gaussian(80, 10).astype(np.float32)
    check(x * np.float32(2.0**power), 3, find=find)  # of 2^-140 few bits are left


@pytest.mark.parametrize("power", [-1040, -700, -300, 300, 700, 1000])
def test_scales_of_float64(power):
    """Beyond 2^+-511 squares leave float64: order and ratios are right nevertheless."""
    x = gaussian(80, 10)
    scaled = np.ldexp(x, power)
    found, expected = nearest(scaled, 3), nearest(x, 3)
    if abs(power) < 500:
        back = found.sq_distance * 2.0**-power * 2.0**-power
        torch.testing.assert_close(back, expected.sq_distance, rtol=1e-12, atol=0)
    rows = Rows(scaled)
    sq, at = search(rows, 3)
    ratio = sq / sq[:, :1]
    own = expected.sq_distance / expected.sq_distance[:, :1]
    rel = 1e-12 if power > -1022 else 1e-3
    torch.testing.assert_close(ratio, own, rtol=rel, atol=0)
    assert torch.equal(at, expected.index)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    whole=st.booleans(),
    data=st.data(),
)
def test_any_sample(n, d, seed, whole, data):
    """Whole numbers: equal rows and many ties."""
    x = 2 * gaussian(n, d, seed=seed)
    x = (np.round(x) if whole else x).astype(np.float32)
    check(x, data.draw(st.integers(1, n - 1)))


# ---- the parts -----------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("power", [0, -30, 25])
def test_rows_leave_the_input_as_it_is(dtype, power):
    x = torch.from_numpy(gaussian(600, 5, offset=2)).to(dtype)
    x = x * 2.0 ** (power if dtype in (torch.float64, torch.float32) else 0)
    before, version = x.clone(), x._version
    Rows(x)
    nearest(x, 4)
    assert torch.equal(x, before)
    assert x._version == version


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [0, -30, 25])
def test_rows_are_about_one_centre(power, dtype):
    """About the mean, rounded: norms and products know the same one."""
    x = ((gaussian(600, 7) + 1e4) * 2.0**power).astype(dtype)
    rows, step = Rows(x), np.finfo(dtype).eps
    exact = x.astype(np.float64) * rows.scale
    mean = exact.mean(axis=0)
    assert 2.0**-21 < mean.max() < 2.0**20
    exact -= rows.centre.double().numpy()
    assert (np.abs(exact.mean(axis=0)) < step * np.abs(mean)).all()
    np.testing.assert_allclose(rows.centred_sq.numpy(), (exact**2).sum(axis=1), rtol=1e-12)
    centred = rows.centred(slice(0, 600)).numpy()
    assert centred.dtype == dtype
    np.testing.assert_allclose(centred, exact, rtol=step)


def test_triangle(monkeypatch):
    monkeypatch.setattr(neighbours, "TILE", 256)
    x = gaussian(600, 9, offset=1)
    rows = Rows(x)
    sq = ((x[:, None] - x) ** 2).sum(axis=2)
    seen = np.zeros_like(sq)
    for part, cols, distance in rows.triangle():
        if part == cols:  # no row is its own neighbour
            assert distance.diagonal().isinf().all()
            distance.fill_diagonal_(0)
        np.testing.assert_allclose(distance.numpy(), sq[part, cols], rtol=1e-12, atol=1e-12)
        seen[part, cols] += 1
        seen[cols, part] += part != cols
    assert (seen == 1).all()


def test_what_products_cannot_give():
    """By hand: no sample as near has a larger norm than it may by the triangle inequality."""
    residual_sq = torch.tensor([1.0, 4.0, 100.0], dtype=torch.float64)
    source = SimpleNamespace(
        residual_sq=residual_sq, centred_sq=residual_sq, apart=torch.tensor(3.0), dot_error=2.0**-20
    )
    sq = torch.tensor([[4.0, 1e6], [2.0, torch.inf], [1e-9, 4.0]], dtype=torch.float64)
    at = torch.tensor([[1, 2], [0, 2], [0, 1]])
    open_, error = unsure(source, Neighbours(sq, at))
    expected = torch.tensor([[9, 10], [2 * (2**0.5 + 8), 20], [100, 100]], dtype=torch.float64)
    torch.testing.assert_close(error, expected * 2.0**-19, rtol=1e-5, atol=0)
    assert open_.tolist() == [[False, False], [True, False], [True, True]]
    source.residual_sq = torch.zeros(3, dtype=torch.float64)  # then the norms' rounding is left
    open_, error = unsure(source, Neighbours(sq, at))
    torch.testing.assert_close(error[2, 0].item(), 101 * 2.0**-48)
    assert open_.tolist() == [[False, False], [False, False], [True, False]]


@pytest.mark.parametrize("k", [1, 3, 20, 64])
@pytest.mark.parametrize("n", [64, 65, 500, 2011])
def test_smallest(n, k):
    values = torch.from_numpy(gaussian(50, n))
    found, places = smallest(values, k)
    assert torch.equal(found, values.sort(dim=1).values[:, :k])
    assert torch.equal(values.gather(1, places), found)


@pytest.mark.parametrize("n", [40, 1000])
def test_smallest_of_ties(n):
    """Whichever of equals: no place twice, and inf where there is nothing else."""
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (30, n)).astype(float))
    values[:10] = 1.0
    values[10:20, 5:] = torch.inf
    found, places = smallest(values, 12)
    assert torch.equal(found, values.sort(dim=1).values[:, :12])
    assert torch.equal(values.gather(1, places), found)
    assert all(len(set(row)) == 12 for row in places.tolist())


def test_keep_nearest_merges():
    values = torch.from_numpy(gaussian(6, 50).__abs__())
    best = torch.full((8, 4), torch.inf, dtype=torch.float64)
    at = torch.zeros(8, 4, dtype=torch.int64)
    for start in (0, 20, 49):
        stop = {0: 20, 20: 49, 49: 50}[start]
        keep_nearest(best, at, slice(2, 8), start, values[:, start:stop])
    expected = values.sort(dim=1)
    found, order = best[2:].sort(dim=1)  # it keeps them in no order
    assert torch.equal(found, expected.values[:, :4])
    assert torch.equal(at[2:].gather(1, order), expected.indices[:, :4])
    assert best[:2].isinf().all()


# ---- errors --------------------------------------------------------------------------------------


def test_features_whose_range_leaves_the_type_are_finite():
    x = torch.tensor([[3e38, -3e38], [-3e38, 3e38], [1e38, 3e38]])
    assert nearest(x, 1).index.flatten().tolist() == [2, 2, 1]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_features_must_be_finite(bad):
    x = torch.zeros(4, 3)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 4 rows, first in row 2"):
        nearest(x, 1)


def test_settings_of_the_caller():
    x = torch.from_numpy(gaussian(100, 30).astype(np.float32)).requires_grad_()
    expected = nearest(x.detach(), 3).sq_distance
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with context:
            found = nearest(x, 3).sq_distance
        assert torch.equal(found, expected)
        assert not found.requires_grad
