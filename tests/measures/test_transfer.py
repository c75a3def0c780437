"""LogME, H-score and GBC, against dense formulas in numpy, scipy's optimiser and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracle import clusters
from scipy.linalg import helmert
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf

from geomkd.geometry.principal import Principal, principal
from geomkd.measures.null import WithNull
from geomkd.measures.transfer import (
    NOISE_FLOOR,
    VARIANCE_FLOOR,
    gbc,
    gbc_from,
    h_score,
    h_score_from,
    logme,
    logme_from,
)

MEASURES = (logme, h_score, gbc)
CORES = (logme_from, h_score_from, gbc_from)
UNEQUAL = np.repeat([0, 1, 2, 3], [3, 31, 16, 10])
every = pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)


def value(measure, x, y, **options):
    found = measure(x, torch.as_tensor(y), **options)
    assert (found.shape, found.dtype) == ((), torch.float64)
    return found.item()


def sample(n, d, sep, sizes="equal", offset=0.0):
    rng = np.random.default_rng(d)
    y = UNEQUAL if sizes == "unequal" else np.arange(n) % 4
    return offset + sep * rng.standard_normal((4, d))[y] + rng.standard_normal((n, d)), y


# ---- LogME ---------------------------------------------------------------------------------------


def most_evidence(x, targets, *, least_noise=NOISE_FLOOR, all_pairs=False):
    """Mean over columns of the largest log N(y; 0, I / beta + X X' / alpha) / n, n x n matrices."""
    n, gram, starts = len(x), x @ x.T, [(-4.0, 4.0), (0.0, 6.0)]
    gram = gram / np.linalg.eigvalsh(gram)[-1]
    found = []
    for y in targets.T:

        def loss(logs, y=y):
            factor = np.linalg.cholesky(np.exp(-logs[1]) * np.eye(n) + np.exp(-logs[0]) * gram)
            z = np.linalg.solve(factor, y)
            return z @ z / 2 + np.log(np.diag(factor)).sum() + n / 2 * np.log(2 * np.pi)

        bounds = [(-20, 40), (-10, -np.log(least_noise * y @ y / n))]
        tight = {"xatol": 1e-8, "fatol": 1e-11, "maxiter": 400}
        pairs = itertools.product(*starts) if all_pairs else zip(*starts, strict=True)
        searched = [
            minimize(loss, s, method="Nelder-Mead", bounds=bounds, options=tight) for s in pairs
        ]
        found.append(-min(s.fun for s in searched) / n)
    return np.mean(found)


def one_hot(y):
    return np.eye(y.max() + 1)[y]


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize(
    ("d", "sep", "offset"), [(6, 1, 0), (6, 4, 2), (60, 0.3, 0), (150, 1, 3), (150, 0.2, 0)]
)
def test_logme_is_the_largest_evidence(d, sep, offset, sizes):
    x, y = sample(60, d, sep, sizes, offset)
    assert value(logme, x, y) == pytest.approx(most_evidence(x, one_hot(y)), abs=1e-7)


@pytest.mark.parametrize("d", [6, 150])
def test_logme_with_an_intercept_is_of_contrasts(d):
    """The evidence of orthonormal contrasts between the samples (Helmert's)."""
    x, y = sample(60, d, 1.0, "unequal", 2.0)
    contrasts = helmert(60)
    expected = most_evidence(contrasts @ x, contrasts @ one_hot(y))
    assert value(logme, x, y, center=True) == pytest.approx(expected, abs=1e-7)


def test_least_noise_is_felt_only_where_there_is_next_to_none():
    """Features as wide as to reproduce the labels, and the evidence without a floor."""
    x, y = sample(60, 150, 1.0)
    exact = most_evidence(x, one_hot(y), least_noise=1e-13)
    assert exact > value(logme, x, y) > exact - 1e-4
    x, y = sample(60, 6, 4.0)
    exact = most_evidence(x, one_hot(y), least_noise=1e-13)
    assert value(logme, x, y) == pytest.approx(exact, abs=1e-7)


def test_width_enters_through_the_rank_alone():
    """Adding features that are zero changes nothing, and (d - k) log alpha left out does."""
    x, y = sample(30, 100, 0.0)
    y = np.arange(30) % 3
    padded = np.concatenate([x, np.zeros((30, 400))], axis=1)
    assert value(logme, padded, y) == pytest.approx(value(logme, x, y), abs=1e-12)


def fixed_point(x, y, t=1.0, steps=2000):
    """The iteration of You et al. (2022) for one target, from alpha / beta = t."""
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    s, sq = singular**2, (left.T @ y) ** 2
    outside = y @ y - sq.sum() if len(s) < len(y) else 0.0
    for _ in range(steps):
        gamma = (s / (s + t)).sum()
        residual = (sq * (t / (t + s)) ** 2).sum() + outside
        t = gamma / (s * sq / (t + s) ** 2).sum() * residual / (len(y) - gamma)
    misfit = (sq * t / (t + s)).sum() + outside
    log_det = np.log1p(s / t).sum()
    return (len(y) * (np.log(len(y) / misfit / 2 / np.pi) - 1) - log_det) / 2 / len(y)


@pytest.mark.parametrize("d", [8, 40, 90])
def test_logme_is_a_fixed_point(d):
    x, y = sample(80, d, 0.7)
    expected = np.mean([fixed_point(x, target) for target in one_hot(y).T])
    assert value(logme, x, y) == pytest.approx(expected, abs=1e-5 if d > 80 else 1e-10)


@pytest.mark.parametrize(("scale", "wide", "narrow", "higher"), [(3e2, 0.3, 5, 0), (1e4, 1, 3, 1)])
def test_logme_takes_the_higher_of_two_maxima(scale, wide, narrow, higher):
    """A wide axis says something, a narrow one too; an iteration stays on the side it starts."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.standard_normal((60, 30))
    x[:, :7] *= scale
    x[:, 0] += scale * wide * (2 * y - 1)
    x[:, 20] += narrow * (2 * y - 1)
    x -= x.mean(axis=0)
    targets = one_hot(y)[:, :1] - 0.5  # the other class's has the other sign
    ends = [fixed_point(x, targets[:, 0], start) for start in (1e-6, 1e10)]
    assert ends[higher] > ends[1 - higher] + 0.05
    contrasts = helmert(60)
    expected = most_evidence(contrasts @ x, contrasts @ targets, all_pairs=True)
    assert value(logme, x, y, center=True) == pytest.approx(expected, abs=1e-7)
    assert expected > min(ends) + 0.05


def without_signal(share):
    """log N(y; 0, y'y / n I) / n of a target with that mean square."""
    return -0.5 * math.log(2 * math.pi * share) - 0.5


def test_logme_of_features_that_say_nothing():
    y = np.arange(40) % 4
    zero = np.zeros((40, 5))
    assert value(logme, zero, y) == pytest.approx(without_signal(1 / 4), abs=1e-12)
    expected = without_signal(1 / 4 * 3 / 4 * 40 / 39)
    for same in (zero, zero + 7.1):
        assert value(logme, same, y, center=True) == pytest.approx(expected, abs=1e-12)
    x = np.kron(np.ones((10, 1)), np.kron([[1.0], [1.0], [-1.0], [-1.0]], [[1.0, 2.0]]))
    x = x * np.repeat([1, -1], 20)[:, None]  # orthogonal to every target
    assert value(logme, x, y) == pytest.approx(without_signal(1 / 4), abs=1e-9)


def test_logme_of_equal_rows_is_that_of_an_intercept():
    y = np.arange(40) % 4
    expected = most_evidence(np.ones((40, 1)), one_hot(y))
    assert value(logme, np.full((40, 30), 7.1), y) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("d", [8, 300])
def test_logme_of_collapsed_classes_is_bounded(d):
    """n log(beta) has no other end than the least noise; the rest is of order C log(n) / n."""
    x, y = sample(400, d, 1.0)
    x = np.random.default_rng(0).standard_normal((4, d))[np.arange(400) % 4]
    most = -0.5 * math.log(2 * math.pi * NOISE_FLOOR / 4)
    assert most - 0.2 < value(logme, x, y) < most
    assert value(logme, 1e6 * x, y) == pytest.approx(value(logme, x, y), abs=1e-9)


def test_a_repeated_row_of_a_wide_layer():
    """The rank falls below n, and the evidence would have no bound."""
    x, y = sample(60, 200, 1.0)
    x[4] = x[0]
    assert value(logme, x, y) == pytest.approx(most_evidence(x, one_hot(y)), abs=1e-6)
    distinct = value(logme, *sample(60, 200, 1.0))
    assert abs(value(logme, x, y) - distinct) < 0.3


# ---- H-score -------------------------------------------------------------------------------------


def h_score_by_formula(x, y, shrinkage):
    """d x d matrices; scikit-learn's shrinkage."""
    centred = x - x.mean(axis=0)
    total = centred.T @ centred / len(x)
    if shrinkage == "ledoit_wolf":
        shrunk, alpha = ledoit_wolf(centred, assume_centered=True)
    else:
        alpha, d = shrinkage, x.shape[1]
        shrunk = (1 - alpha) * total + alpha * np.trace(total) / d * np.eye(d)
    means = np.stack([centred[y == k].mean(axis=0) for k in range(y.max() + 1)])[y]
    between = means.T @ means / len(x)
    return np.trace(np.linalg.pinv(shrunk, rcond=1e-11, hermitian=True) @ ((1 - alpha) * between))


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("shrinkage", ["ledoit_wolf", 0, 0.25, 1.0])
@pytest.mark.parametrize(
    ("d", "sep"), [(1, 1), (5, 1), (59, 0.5), (60, 2), (200, 1), (200, 0), (20, 0)]
)
def test_h_score_formula(d, sep, shrinkage, sizes):
    x, y = sample(60, d, sep, sizes, 5.0)
    expected = h_score_by_formula(x, y, shrinkage)
    assert value(h_score, x, y, shrinkage=shrinkage) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_h_score_closed_forms():
    """One feature: the share of the variance between classes. Three apart classes: 2."""
    x = np.array([-2.0, -1, 1, 2, 0, 0])[:, None]
    y = np.array([0, 0, 1, 1, 2, 2])
    assert value(h_score, x, y) == pytest.approx((4 * 2.25) / 10)
    assert value(h_score, np.eye(3)[y], y, shrinkage=0.0) == pytest.approx(2.0)


def test_h_score_of_noise_needs_the_shrinkage():
    x, y = clusters(200, 2000, 10, sep=0.0)
    assert value(h_score, x, y, shrinkage=0.0) == pytest.approx(9.0)
    assert value(h_score, x, y) < 1.5
    apart, y = clusters(200, 2000, 10, sep=3.0)
    assert 8.5 < value(h_score, apart, y) <= 9.0


def test_h_score_without_variance_and_without_shape():
    y = np.arange(12) % 3
    assert value(h_score, np.full((12, 5), 7.1), y) == 0.0
    assert value(h_score, np.full((12, 5), 7.1), y, shrinkage=0.0) == 0.0
    corners = np.array([[i, j] for i in (-1.0, 1.0) for j in (-1.0, 1.0)])[np.arange(12) % 4]
    expected = h_score_by_formula(corners, np.arange(12) % 4, 0.0)
    assert expected == pytest.approx(2.0)
    assert value(h_score, corners, np.arange(12) % 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shrinkage", "error", "message"),
    [
        ("oas", TypeError, r"unless \"ledoit_wolf\", must be a number; got str 'oas'"),
        (1.5, ValueError, "must be at least 0 and at most 1; got 1.5"),
        (math.nan, ValueError, "must be at least 0 and at most 1; got nan"),
        (True, TypeError, "must be a number; got bool True"),
        (None, TypeError, "got NoneType None"),
    ],
)
def test_shrinkage_that_is_none(shrinkage, error, message):
    with pytest.raises(error, match=f"shrinkage.*{message}"):
        h_score(*clusters(20, 3), shrinkage=shrinkage)


# ---- GBC -----------------------------------------------------------------------------------------


def gbc_by_formula(x, y, components=64):
    """Loops over ordered pairs of classes, on numpy's singular vectors."""
    x = x - x.mean(axis=0)
    _, singular, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[singular > 1e-9 * singular[0]][:components]
    x = x @ axes.T
    floor = VARIANCE_FLOOR * x.var(axis=0).mean()
    classes = [x[y == k] for k in range(y.max() + 1)]
    of = [(c.mean(axis=0), np.maximum(c.var(axis=0), floor)) for c in classes]
    total = 0.0
    for i, (a, u) in enumerate(of):
        for j, (b, v) in enumerate(of):
            if i != j:
                mean = (u + v) / 2
                apart = ((a - b) ** 2 / mean).sum() / 8
                total -= np.exp(-apart - 0.5 * np.log(mean / np.sqrt(u * v)).sum())
    return total


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("components", [3, 64])
@pytest.mark.parametrize(("d", "sep"), [(1, 0.5), (5, 0.5), (100, 0.3), (100, 0), (1000, 0)])
def test_gbc_formula(d, sep, components, sizes):
    x, y = sample(60, d, sep, sizes, 5.0)
    expected = gbc_by_formula(x, y, components)
    assert value(gbc, x, y, components=components) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_gbc_default_keeps_64():
    x, y = sample(100, 80, 0.0)
    assert value(gbc, x, y) == pytest.approx(value(gbc, x, y, components=64), rel=1e-12)
    assert value(gbc, x, y) != pytest.approx(value(gbc, x, y, components=65), rel=1e-3)


def test_gbc_closed_form():
    """One axis, variances 1 and 4, means 5 apart: exp(-5 / 4) sqrt(2 * 2 / 5), twice."""
    x = np.array([-1.0, 1.0, 3.0, 7.0])[:, None]
    expected = -2 * math.exp(-25 / (8 * 2.5)) * math.sqrt(4 / 5)
    assert value(gbc, x, [0, 0, 1, 1]) == pytest.approx(expected)


def test_gbc_of_many_classes_goes_by_blocks():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(150), 4)
    x = 0.2 * rng.standard_normal((150, 20))[y] + rng.standard_normal((600, 20))
    assert 150 * 150 * 20 > 2**16
    assert value(gbc, x, y) == pytest.approx(gbc_by_formula(x, y), rel=1e-8)


def test_gbc_of_classes_that_do_not_vary():
    """Their variance is the floor, 1e-4 of the variance that all samples have."""
    x = np.array([-0.01, -0.01, 0.01, 0.01, 1.0, -1.0])[:, None]
    y = np.array([0, 0, 1, 1, 2, 2])
    floor = VARIANCE_FLOOR * x.var()
    near = math.exp(-(0.02**2) / (8 * floor))
    far = math.exp(-(0.01**2) / (4 * (1 + floor))) * math.sqrt(2 * math.sqrt(floor) / (1 + floor))
    assert value(gbc, x, y) == pytest.approx(-2 * near - 4 * far)
    assert value(gbc, np.eye(3)[y], y) == 0.0


def test_gbc_core_takes_a_class_of_one_sample():
    x, y = sample(60, 5, 0.3, "unequal")
    y = np.where(np.arange(60) == 40, 4, y)
    found = gbc_from(principal(x), torch.from_numpy(y), 5)
    assert found.item() == pytest.approx(gbc_by_formula(x, y), rel=1e-8)


def test_gbc_without_variance():
    assert value(gbc, np.full((12, 5), 7.1), np.arange(12) % 3) == -6.0


@pytest.mark.parametrize(("components", "error"), [(0, ValueError), (2.0, TypeError)])
def test_components_that_are_none(components, error):
    with pytest.raises(error, match="components must be"):
        gbc(*clusters(20, 3), components=components)


# ---- what must leave them as they are, and what must change them ---------------------------------


def turned(x, y):
    return x @ np.linalg.qr(np.random.default_rng(1).standard_normal((x.shape[1],) * 2))[0], y


def scaled(x, y):
    return 1e-3 * x, y


def moved(x, y):
    return x + 2.0, y


def stretched(x, y):
    return x * np.linspace(0.2, 3, x.shape[1]), y


def reordered(x, y):
    order = np.random.default_rng(2).permutation(len(x))
    return x[order], y[order]


def renamed(x, y):
    return x, np.array([9, -4, 3, 0])[y]


def relabelled(x, y):
    return x, np.random.default_rng(3).permutation(y)


def centred_logme(x, y):
    return logme(x, y, center=True)


def plain_h_score(x, y):
    return h_score(x, y, shrinkage=0.0)


ALWAYS = {turned, scaled, reordered, renamed}
LEAVES = {
    logme: ALWAYS,  # an offset is what the model has for an intercept, as published
    centred_logme: ALWAYS | {moved},
    h_score: ALWAYS | {moved},
    plain_h_score: ALWAYS | {moved, stretched},
    gbc: ALWAYS | {moved},
}
CHANGES = [turned, scaled, moved, stretched, reordered, renamed, relabelled]


@pytest.mark.parametrize("d", [12, 90])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("measure", LEAVES, ids=lambda f: f.__name__)
def test_invariances(measure, change, d):
    x, y = sample(80, d, 0.4, offset=0.5)
    before, after = value(measure, x, y), value(measure, *change(x, y))
    if change in LEAVES[measure] or (measure is plain_h_score and d == 90):  # C - 1 of any labels
        assert after == pytest.approx(before, rel=1e-8)
    else:
        assert abs(after / before - 1) > 1e-3


# ---- common to all -------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("d", [24, 500])
def test_float32_with_an_offset(measure, d):
    x, y = clusters(120, d, 4, sep=0.2)
    x = x + np.float32(1000)
    single, double = (value(measure, x.astype(t), y) for t in (np.float32, np.float64))
    assert single == pytest.approx(double, rel=1e-4)
    about = x.astype(np.float64) - 1000.0
    if measure is not logme:
        assert single == pytest.approx(value(measure, about, y), rel=1e-6)


def test_logme_with_an_offset_against_singular_values():
    x, y = sample(60, 20, 1.0, offset=1000.0)
    expected = np.mean([fixed_point(x, target) for target in one_hot(y).T])
    assert value(logme, x, y) == pytest.approx(expected, abs=1e-7)


@every
def test_extreme_scales(measure):
    x, y = clusters(sep=0.3)
    x = x.astype(np.float64)
    for scale in (2.0**-600, 2.0**600):
        assert value(measure, x * scale, y) == pytest.approx(value(measure, x, y), rel=1e-10)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_maps(measure, dtype):
    x, y = (torch.from_numpy(t) for t in clusters(80, 24, sep=0.3))
    x, before = x.to(dtype).reshape(80, 6, 2, 2), x.to(dtype).clone()
    assert value(measure, x, y) == pytest.approx(value(measure, x.double(), y), rel=1e-12)
    assert torch.equal(x.flatten(1), before)


@every
def test_null(measure):
    x, y = (torch.from_numpy(t) for t in clusters(100, 20, sep=1.0))
    state = torch.get_rng_state()
    found = measure(x, y, null=30, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(found, WithNull)
    assert found.value == measure(x, y)
    assert found.value > found.null_95 > found.null_mean
    assert found.excess == found.value - found.null_mean
    assert found.null_mean == measure(x, y, null=30, seed=1).null_mean
    assert found.null_mean != measure(x, y, null=30, seed=2).null_mean
    noise = measure(*(torch.from_numpy(t) for t in clusters(100, 20, sep=0.0)), null=200)
    assert abs(noise.excess) < 3 * (noise.null_95 - noise.null_mean)


@every
def test_scores_as_labels(measure):
    x, y = clusters(60, 10, sep=0.3)
    assert value(measure, x, one_hot(y)) == value(measure, x, y)


@every
def test_duplicate_rows(measure):
    """Each row twice: finite; H-score without shrinkage and GBC do not see it."""
    x, y = clusters(60, 10, sep=0.3)
    twice = np.concatenate([x, x]), np.concatenate([y, y])
    assert math.isfinite(value(measure, *twice))
    if measure is gbc:
        assert value(gbc, *twice) == pytest.approx(value(gbc, x, y), rel=1e-9)
    if measure is h_score:
        plain = value(h_score, x, y, shrinkage=0.0)
        assert value(h_score, *twice, shrinkage=0.0) == pytest.approx(plain, rel=1e-9)


@every
@pytest.mark.parametrize("y", [[0, 0, 0, 0], [0, 0, 1, 2]])
def test_classes_too_few(measure, y):
    with pytest.raises(ValueError, match=r"at least 2 (classes are needed|samples; got 1)"):
        measure(torch.ones(4, 3), torch.tensor(y))


@every
def test_features_must_be_finite(measure):
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 4 rows, first in row 2"):
        measure(torch.tensor([[0.0], [1], [torch.nan], [3]]), torch.tensor([0, 0, 1, 1]))


@every
def test_labels_must_fit(measure):
    with pytest.raises(ValueError, match="labels must be as many as the features, n = 4; got 3"):
        measure(torch.ones(4, 3), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("core", CORES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("r", [0, 2, 60])
def test_core_on_a_device_that_does_not_exist(core, r, elsewhere):
    own = {"device": elsewhere, "dtype": torch.float64}
    fake = Principal(torch.empty(60, r, **own), torch.empty(r, **own), 90)
    index = torch.empty(60, device=elsewhere, dtype=torch.int64)
    found = core(fake, index, 10)
    assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float64, ())
