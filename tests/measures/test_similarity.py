"""CKA and Procrustes distance against plain numpy and closed forms, and what changes them."""

import numpy as np
import pytest
import scipy.linalg
import torch
from alike import pair, plain_cka

from geomkd.geometry.precision import exact_arithmetic, scale_of
from geomkd.measures import similarity
from geomkd.measures.similarity import (
    cka,
    cka_from,
    procrustes_distance,
    triangle_of,
    triangle_products,
)

both = pytest.mark.parametrize("debiased", [True, False])
# Narrow layers; n x n with one block and with two; one layer narrow and one wide; n = 4.
SHAPES = [(300, 20, 30), (120, 200, 90), (530, 300, 700), (90, 5, 400), (4, 3, 2), (4, 1, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def plain_procrustes(x, y):
    x, y = (np.asarray(t, dtype=float) for t in (x, y))
    x, y = (t - t.mean(axis=0) for t in (x, y))
    x, y = (t / np.linalg.norm(t) for t in (x, y))
    return np.sqrt(2 - 2 * np.linalg.norm(x.T @ y, "nuc"))


# ---- CKA -----------------------------------------------------------------------------------------


@both
@shapes
def test_cka_is_the_formula(shape, debiased):
    x, y = pair(*shape)
    value = cka(x, y, debiased=debiased)
    assert value.dtype is torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(plain_cka(x, y, debiased), abs=1e-12)


@both
def test_both_sides_of_the_product_agree(monkeypatch, debiased):
    x, y = pair(600, 40, 30)
    narrow = cka(x, y, debiased=debiased)
    monkeypatch.setattr(similarity, "_narrow_products", None)
    with exact_arithmetic(x.device):
        left, right = (triangle_of(t, scale_of(t)) for t in (x, y))
        wide = triangle_products([left], [right], debiased).ratio()
    assert wide.shape == (1, 1)
    assert wide.item() == pytest.approx(narrow.item(), abs=1e-12)


@both
@pytest.mark.parametrize("shape", [(300, 20, 30), (300, 400, 500), (600, 900, 700)], ids=str)
def test_float32_far_from_the_origin(shape, debiased):
    x, y = pair(*shape, dtype=torch.float32)
    offset = 1000 / np.sqrt(shape[1])
    x = x / np.sqrt(shape[1]) + offset
    expected = cka(x.double(), y.double(), debiased=debiased)
    assert cka(x, y, debiased=debiased).item() == pytest.approx(expected.item(), abs=1e-4)
    assert expected.item() == pytest.approx(
        plain_cka(x.double() - x.double().mean(0), y, debiased), abs=1e-9
    )


def test_float32_so_far_that_the_mean_has_more_digits():
    x, y = (t.float() for t in (t + 1e6 + torch.arange(t.shape[1]) for t in pair(40, 60, 70)))
    expected = cka(x.double(), y.double()).item()
    assert cka(x, y).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_it_is(dtype):
    x, y = pair(dtype=dtype)
    assert cka(x, y).item() == pytest.approx(cka(x.double(), y.double()).item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [10, 300])
def test_one_sample_far_from_all_others(d, dtype):
    """Unbiased HSIC: its row is centred away, if no large sums cancel before."""
    x, y = pair(100, d, d, dtype)
    x[0] += 1000
    expected = plain_cka(x, y)
    assert cka(x, y).item() == pytest.approx(expected, abs=1e-4 if dtype is torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 20, 30), (50, 60, 70)], ids=str)
def test_squares_that_leave_the_type(shape, dtype):
    x, y = pair(*shape, dtype=dtype)
    expected = cka(x, y).item()
    top = 2.0**120 if dtype is torch.float32 else 2.0**1000
    for factor in (top, 1 / top):
        assert cka(x * factor, y / factor).item() == pytest.approx(expected, abs=1e-6)


def test_independent_layers():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 100, 4096, generator=generator)
    assert cka(x, y, debiased=False).item() == pytest.approx(0.976, abs=5e-4)
    drawn = [cka(*torch.randn(2, 100, 4096, generator=generator)).item() for _ in range(20)]
    assert abs(np.mean(drawn)) < 0.01 and min(drawn) < 0 < max(drawn)  # and not cut off at 0


def test_rank_one_closed_form():
    """Biased CKA of two single features is their squared correlation."""
    x, y = pair(50, 1, 1)
    r = np.corrcoef(x[:, 0], y[:, 0])[0, 1]
    assert cka(x, y, debiased=False).item() == pytest.approx(r**2, abs=1e-12)


@both
def test_gram_matrices_give_the_same(debiased):
    x, y = pair(60, 30, 90)
    expected = cka(x, y, debiased=debiased).item()
    raw = [t @ t.T for t in (x + 3, y)]
    centred = [(t - t.mean(0)) @ (t - t.mean(0)).T for t in (x, y)]
    for grams in (raw, centred):
        assert cka_from(*grams, debiased=debiased).item() == pytest.approx(expected, abs=1e-11)
    assert cka_from(*(g.float() for g in centred), debiased=debiased).item() == pytest.approx(
        expected, abs=1e-5
    )


@both
def test_gram_matrices_of_many_draws(debiased):
    x, y = pair(60, 30, 90)
    grams = [t @ t.T for t in (x, y)]
    draws = [torch.randperm(60, generator=torch.Generator().manual_seed(s))[:30] for s in range(3)]
    k, l = (torch.stack([g[i][:, i] for i in draws]) for g in grams)  # noqa: E741
    expected = [plain_cka(x[i], y[i], debiased) for i in draws]
    assert cka_from(k, l, debiased=debiased).tolist() == pytest.approx(expected, abs=1e-11)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 20, 30), (50, 60, 70)], ids=str)
def test_constant_features_have_nothing_in_common(shape, dtype, debiased):
    x, y = pair(*shape, dtype=dtype)
    constant = torch.full_like(x, 0.1)
    for one, other in ((constant, y), (y, constant), (constant, constant), (0 * x, y)):
        assert cka(one, other, debiased=debiased).item() == 0
    if dtype is not torch.float16:
        k, l = constant @ constant.T, y @ y.T  # noqa: E741
        assert cka_from(k, l, debiased=debiased).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_at_equal_distances(dtype):
    """Off its diagonal their centred Gram matrix is constant: HSIC with itself is 0."""
    x, y = torch.eye(60, dtype=dtype) * 0.7, pair(60, 90, 5, dtype)[0]
    assert cka(x, y).item() == 0
    assert cka_from(x @ x.T, y @ y.T).item() == 0
    assert 0 < cka(x, y, debiased=False).item() < 1


@both
def test_duplicate_rows(debiased):
    x, y = pair(40, 60, 70)
    x, y = torch.cat([x, x[:10]]), torch.cat([y, y[:10]])
    assert cka(x, y, debiased=debiased).item() == pytest.approx(plain_cka(x, y, debiased), 1e-10)


def test_input_is_left_alone_and_flattened():
    x, y = pair(40, 60, 70)
    before = x.clone(), y.clone()
    expected = cka(x, y)
    assert torch.equal(cka(x.reshape(40, 3, 4, 5), y.numpy()), expected)
    procrustes_distance(x, y)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


# ---- Procrustes distance -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:], ids=str)
def test_procrustes_is_the_formula(shape):
    x, y = pair(*shape)
    for one, other in ((x, y), (y, x)):
        expected = plain_procrustes(one, other)
        assert procrustes_distance(one, other).item() == pytest.approx(expected, abs=1e-7)


def test_procrustes_is_the_best_rotation_of_scipy():
    x, y = pair(50, 6, 6)
    x, y = (((t - t.mean(0)) / torch.linalg.norm(t - t.mean(0))).numpy() for t in (x, y))
    rotation, _ = scipy.linalg.orthogonal_procrustes(x, y)
    expected = np.linalg.norm(x @ rotation - y)
    got = procrustes_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_small_distances_keep_their_digits():
    """First order: of a small step, what is not a rotation or a scale; 2 - 2 |X'Y|_* loses it."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    for step in (1e-4, 1e-9):
        y = x * torch.tensor([1 + step, 1 - step], dtype=torch.float64)
        expected = step  # singular values (1 +- step) / sqrt(2 + ...), each off by step / sqrt(2)
        assert procrustes_distance(x, y).item() == pytest.approx(expected, rel=1e-6)


def test_procrustes_float32_far_from_the_origin():
    x, y = pair(100, 30, 200, torch.float32)
    x = x + 1000 / np.sqrt(30)
    expected = procrustes_distance(x.double(), y.double())
    assert procrustes_distance(x, y).item() == pytest.approx(expected.item(), abs=1e-4)
    assert expected.item() == pytest.approx(plain_procrustes(x, y), abs=1e-4)


def test_procrustes_is_a_metric():
    x, y = pair(30, 5, 9)
    z = pair(30, 7, 3, seed=1)[0]
    d = procrustes_distance
    assert d(x, z) <= d(x, y) + d(y, z)
    assert d(x, y).item() == pytest.approx(d(y, x).item(), abs=1e-12)
    assert d(x, x).item() < 1e-14


def test_procrustes_of_constant_features():
    x, y = pair(30, 5, 9)
    constant = torch.full((30, 4), 0.1)
    assert procrustes_distance(x, constant).item() == pytest.approx(1)
    assert procrustes_distance(constant, y).item() == pytest.approx(1)
    assert procrustes_distance(constant, constant.double()).item() == 0


# ---- invariances ---------------------------------------------------------------------------------


def rotated(x):
    generator = torch.Generator().manual_seed(5)
    square = torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=x.dtype)
    return x @ torch.linalg.qr(square).Q


ORDER = torch.randperm(120, generator=torch.Generator().manual_seed(3))
UNCHANGED = {
    "rotation": lambda x, y: (rotated(x), y),
    "isotropic scale": lambda x, y: (x, 7 * y),
    "translation": lambda x, y: (x + torch.arange(x.shape[1]), y - 5),
    "sample permutation": lambda x, y: (x[ORDER], y[ORDER]),
    "order": lambda x, y: (y, x),
    "columns of zeros": lambda x, y: (torch.cat([x, torch.zeros_like(x)], dim=1), y),
}
CHANGED = {
    "per-feature scale": lambda x, y: (x * torch.linspace(0, 3, x.shape[1]), y),
    "permutation of one side": lambda x, y: (x[ORDER], y),
    "general linear map": lambda x, y: (x.cumsum(dim=1), y),
}
MEASURES = {
    "cka": cka,
    "biased cka": lambda x, y: cka(x, y, debiased=False),
    "procrustes": procrustes_distance,
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("sizes", [(20, 15), (200, 90)], ids=str)
def test_invariances(name, sizes):
    x, y = pair(120, *sizes)
    value = MEASURES[name](x, y).item()
    for what, change in UNCHANGED.items():
        assert MEASURES[name](*change(x, y)).item() == pytest.approx(value, abs=1e-9), what
    for what, change in CHANGED.items():
        assert abs(MEASURES[name](*change(x, y)).item() - value) > 1e-3, what


# ---- checks and devices --------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_input_is_checked(measure):
    x, y = pair(10, 3, 4)
    with pytest.raises(ValueError, match=r"x and y must hold the same samples; got n = 10 and 9$"):
        measure(x, y[:9])
    with pytest.raises(ValueError, match=r"one device; got cpu and meta"):
        measure(x, y.to("meta"))
    with pytest.raises(TypeError, match=r"y must be float64, .*; got int64"):
        measure(x, y.long())
    with pytest.raises(ValueError, match=r"at least [24] samples are needed; got n = 1"):
        measure(x[:1], y[:1])
    for bad in (torch.nan, torch.inf, -torch.inf):
        wrong = y.clone()
        wrong[7, 2] = bad
        with pytest.raises(ValueError, match=r"y must be finite; .* 1 of 10 rows, first in row 7"):
            measure(x, wrong)


def test_debiased_needs_four_samples():
    x, y = pair(3, 5, 5)
    with pytest.raises(ValueError, match=r"at least 4 samples are needed; got n = 3"):
        cka(x, y)
    assert 0 < cka(x, y, debiased=False).item() <= 1


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_nothing_is_built_on_another_device(dtype, debiased, elsewhere):
    for n, d in ((600, 40), (600, 1300)):
        x, y = (torch.empty(n, d, dtype=dtype, device=elsewhere) for _ in range(2))
        found = similarity.products_of([x], [y, x], debiased)
        assert {t.device for t in found} == {elsewhere}
        assert found.ratio().shape == (1, 2)
    gram = torch.empty(3, 50, 50, dtype=torch.float32, device=elsewhere)
    assert cka_from(gram, gram, debiased=debiased).device == elsewhere
