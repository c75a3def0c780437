"""Measures of the spectrum, against numpy's SVD, scipy's entropy, closed forms and simulation."""

from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import torch

from geomkd.geometry.principal import Principal, principal
from geomkd.measures import spectrum
from geomkd.measures.spectrum import (
    effective_rank,
    isotropy,
    participation_ratio,
    pca_dimension,
    power_law_alpha,
    spectral_entropy,
)


def debiased(x):
    return participation_ratio(x, debiased=True)


def entropy_of_eigenvalues(x):
    return spectral_entropy(x, on="eigenvalues")


def rank_of_eigenvalues(x):
    return effective_rank(x, on="eigenvalues")


def alpha(x):
    return power_law_alpha(x, fit=(2, 8))


MEASURES = (
    pca_dimension,
    participation_ratio,
    debiased,
    spectral_entropy,
    entropy_of_eigenvalues,
    effective_rank,
    rank_of_eigenvalues,
    alpha,
    isotropy,
)
measures = pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)
SHAPES = [(80, 12), (40, 40), (30, 200), (30, 5, 6, 7)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def falling(n, *shape, seed=0, rate=0.7):
    """Gaussian features with unequal variances and an offset."""
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    x = rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -rate
    return (x @ np.linalg.qr(rng.standard_normal((d, d)))[0] + 3.0).reshape(n, *shape)


def singular_values(x, center=True):
    x = x.reshape(len(x), -1)
    s = np.linalg.svd(x - x.mean(axis=0) * center, compute_uv=False)
    return s, s[s > 1e-7 * s[0]]  # all min(n, d) of them, and those that are not rounding


def of_variances(*variances, dim=None, offset=0.0):
    """Rows +- along each axis, so that the population variances are exactly these."""
    axes = np.diag(np.sqrt(np.array(variances, dtype=float) * len(variances)))
    axes = np.pad(axes, ((0, 0), (0, (dim or len(variances)) - len(variances))))
    return np.concatenate([axes, -axes]) + offset


# ---- oracles -------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("center", [True, False])
def test_numpy_and_scipy(shape, center):
    x = falling(*shape)
    _, s = singular_values(x, center)
    option = {"center": center}
    reached = np.cumsum(s**2) / np.sum(s**2)
    for threshold in (0.05, 0.5, 0.9, 0.99):
        expected = np.flatnonzero(reached >= threshold)[0] + 1
        assert pca_dimension(x, threshold=threshold, **option).item() == expected
    assert pca_dimension(x, threshold=1, **option).item() == len(s)
    for on, power in (("singular", 1), ("eigenvalues", 2)):
        expected = scipy.stats.entropy(s**power)
        entropy, rank = spectral_entropy(x, on=on, **option), effective_rank(x, on=on, **option)
        assert entropy.item() == pytest.approx(expected, rel=1e-9)
        assert rank.item() == pytest.approx(np.exp(expected), rel=1e-9)
    for first, last in ((1, 2), (3, 10)):
        j = np.arange(first, last + 1)
        slope = np.polyfit(np.log(j), np.log(s[j - 1] ** 2), 1, w=j**-0.5)[0]  # squared by numpy
        found = power_law_alpha(x, fit=(first, last), **option)
        assert found.item() == pytest.approx(-slope, rel=1e-9)


@shapes
def test_participation_ratio_and_isotropy_of_the_covariance(shape):
    """Straight from the covariance matrix, its zero eigenvalues included."""
    x = falling(*shape)
    variances = singular_values(x)[0] ** 2 / len(x)
    flat = x.reshape(len(x), -1)
    c = np.cov(flat, rowvar=False, bias=True)
    assert len(variances) == min(flat.shape)
    assert participation_ratio(x).item() == pytest.approx(np.trace(c) ** 2 / np.sum(c * c))
    expected = variances.mean() / (variances.std() + 1e-6)
    assert isotropy(x).item() == pytest.approx(expected, rel=1e-9)


def test_defaults():
    x = falling(150, 200)
    assert pca_dimension(x) == pca_dimension(x, threshold=0.9, center=True)
    assert participation_ratio(x) == participation_ratio(x, debiased=False)
    for measure in (spectral_entropy, effective_rank):
        assert measure(x) == measure(x, on="singular", center=True)
    assert power_law_alpha(x) == power_law_alpha(x, fit=(11, 100), center=True)


# ---- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [10, 2048])
def test_ten_equal_variances(dim):
    """Ties of rounding: 0.9 is reached after nine of ten tenths."""
    x = of_variances(*10 * [3.0], dim=dim, offset=2.0)
    for on in spectrum.SPECTRA:
        assert effective_rank(x, on=on).item() == pytest.approx(10, rel=1e-12)
    assert participation_ratio(x).item() == pytest.approx(10, rel=1e-12)
    sizes = [pca_dimension(x, threshold=k / 10).item() for k in range(1, 11)]
    assert sizes == list(range(1, 11))
    assert pca_dimension(x, threshold=0.9001).item() == 10


def test_no_constant_is_added_to_the_shares():
    """1e-5 beside every one of 2,048 shares turns ten equal directions into 12.65."""
    sq_singular = torch.zeros(2048, dtype=torch.float64)
    sq_singular[:10] = 7.0
    p = sq_singular / sq_singular.sum() + 1e-5
    assert (-(p * p.log()).sum()).exp().item() == pytest.approx(12.65, abs=0.01)
    for on in spectrum.SPECTRA:
        found = spectrum.effective_rank_from(sq_singular, on)
        assert found.item() == pytest.approx(10, rel=1e-12)


def test_known_variances():
    """Variances 6, 2, 1, 1, in four dimensions and in seven, of eight rows."""
    x = of_variances(6, 2, 1, 1)
    assert pca_dimension(x, threshold=0.8).item() == 2
    assert participation_ratio(x).item() == pytest.approx(100 / 42)
    p = np.array([0.6, 0.2, 0.1, 0.1])
    assert entropy_of_eigenvalues(x).item() == pytest.approx(-(p * np.log(p)).sum())
    p = np.sqrt([6, 2, 1, 1]) / np.sqrt([6, 2, 1, 1]).sum()
    assert spectral_entropy(x).item() == pytest.approx(-(p * np.log(p)).sum())
    assert isotropy(x).item() == pytest.approx(2.5 / (np.sqrt(42 / 4 - 2.5**2) + 1e-6))
    wider = of_variances(6, 2, 1, 1, dim=7)  # three more variances, which are 0
    mean = 10 / 7
    assert isotropy(wider).item() == pytest.approx(mean / (np.sqrt(42 / 7 - mean**2) + 1e-6))
    assert isotropy(of_variances(3, 3)).item() == pytest.approx(3e6)  # no spread but the 1e-6


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("fit", [(1, 2), (1, 60), (11, 40), (11, 100), [59, 60]], ids=str)
def test_power_law(exponent, fit):
    x = of_variances(*np.arange(1, 61) ** -exponent, dim=90)
    assert power_law_alpha(x, fit=fit).item() == pytest.approx(exponent, abs=1e-9)
    assert fit in [(1, 2), (1, 60), (11, 40), (11, 100), [59, 60]]  # as it was


def test_ranks_outside_the_fit_do_not_matter():
    variances = np.arange(1, 41) ** -1.5
    variances[:3] *= 100
    variances[20:] *= 0.01
    x = of_variances(*variances)
    assert power_law_alpha(x, fit=(4, 20)).item() == pytest.approx(1.5, abs=1e-9)
    for fit in ((3, 20), (4, 21)):
        assert abs(power_law_alpha(x, fit=fit).item() - 1.5) > 0.05


# ---- small samples -------------------------------------------------------------------------------


def over_distinct_rows(x):
    """The two means over every four distinct rows, one by one."""
    squares, dots = [], []
    for i, j, k, m in permutations(range(len(x)), 4):
        a, b = x[i] - x[j], x[k] - x[m]
        squares.append(a @ a * (b @ b) / 4)
        dots.append((a @ b) ** 2 / 4)
    return np.mean(squares), np.mean(dots)


@pytest.mark.parametrize("n", [4, 5, 9])
@pytest.mark.parametrize("d", [1, 3, 40])
def test_debiased_is_the_ratio_of_means_over_distinct_rows(n, d):
    x = falling(n, d)
    square_of_trace, trace_of_square = over_distinct_rows(x)
    assert debiased(x).item() == pytest.approx(square_of_trace / trace_of_square, rel=1e-8)
    found = principal(x)
    unit = found.sq_singular.sum().item() ** 2
    parts = [part.item() * unit for part in spectrum._distinct_rows(found)[:2]]
    assert parts == pytest.approx([square_of_trace, trace_of_square], rel=1e-8)


def draws(kind, n, d, count):
    """Samples, and the variances of the distribution: Gaussian or not, equal or not."""
    rng = np.random.default_rng(0)
    white = kind == "white"
    variances = np.ones(d) if white else np.arange(1, d + 1) ** -0.8
    draw = rng.standard_exponential if kind == "skewed" else rng.standard_normal
    return [draw((n, d)) * np.sqrt(variances) + 2.0 for _ in range(count)], variances


@pytest.mark.parametrize("kind", ["white", "falling", "skewed"])
def test_debiased_in_expectation(kind):
    """Both means are within 3 standard errors of the truth; the plain ratio is far below it."""
    samples, variances = draws(kind, 30, 100, 800)
    truth = np.array([variances.sum() ** 2, (variances**2).sum()])
    estimates, plain, ratios = [], [], []
    for x in samples:
        found = principal(x)
        unit = found.sq_singular.sum().item() ** 2
        estimates.append([p.item() * unit for p in spectrum._distinct_rows(found)[:2]])
        ratios.append(spectrum.debiased_participation_ratio_from(found).item())
        plain.append(spectrum.participation_ratio_from(found.sq_singular).item())
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / np.sqrt(len(samples))
    assert (np.abs(mean - truth) < 3 * error).all()
    assert (error < 0.02 * truth).all()
    ratio = truth[0] / truth[1]
    assert mean[0] / mean[1] == pytest.approx(ratio, rel=0.03)
    assert np.mean(ratios) == pytest.approx(ratio, rel=0.15)
    assert np.mean(plain) < 0.6 * ratio
    if kind == "white":
        assert ratio == 100
        assert np.mean(ratios) == pytest.approx(100, rel=0.015)
        assert np.mean(plain) == pytest.approx(30 * 100 / 130, rel=0.05)


def test_debiased_agrees_with_the_plain_one_in_large_samples():
    x = falling(3000, 6)
    assert debiased(x).item() == pytest.approx(participation_ratio(x).item(), rel=0.01)


@pytest.mark.parametrize("n", [4, 6, 40])
def test_simplex_has_no_bound(n):
    x = 5.0 + np.linalg.qr(np.random.default_rng(0).standard_normal((n + 3, n)))[0].T
    assert participation_ratio(x).item() == pytest.approx(n - 1)
    assert debiased(x).item() == np.inf


@pytest.mark.parametrize("d", [3, 50])
def test_one_row_unlike_the_others(d):
    """No two differences of distinct rows both differ from 0."""
    x = np.full((6, d), 1000.0) + np.pad(np.ones((1, d)), ((2, 3), (0, 0)))
    assert debiased(x).item() == 0
    assert participation_ratio(x).item() == pytest.approx(1)
    x[4] += 1
    assert debiased(x).item() == pytest.approx(1)  # on a line


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 30])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
def test_constant_features(d, value):
    x = np.full((7, d), value)
    for measure in set(MEASURES) - {alpha}:
        assert measure(x).item() == 0.0, measure
    assert alpha(x).isnan()
    for measure in (pca_dimension, effective_rank):  # uncentred: one direction, or none at all
        assert measure(x, center=False).item() == pytest.approx(float(value > 0))
    assert str(spectral_entropy(x, center=False).item()) == "0.0"  # nor -0


def test_one_row():
    for measure in (pca_dimension, participation_ratio, spectral_entropy, effective_rank, isotropy):
        assert measure(np.ones((1, 4))).item() == 0.0
    assert alpha(np.ones((1, 4))).isnan()


def test_one_feature():
    x = falling(20, 1)
    for measure in (pca_dimension, participation_ratio, effective_rank, debiased):
        assert measure(x).item() == pytest.approx(1)
    assert isotropy(x).item() == pytest.approx(x.var() / 1e-6, rel=1e-9)  # one has no spread
    assert alpha(x).isnan()


def test_fewer_ranks_than_the_fit():
    x = of_variances(*range(12, 0, -1))
    assert power_law_alpha(x) == power_law_alpha(x, fit=(11, 12))
    assert power_law_alpha(x, fit=(12, 100)).isnan()
    assert power_law_alpha(falling(11, 300)).isnan()  # rank 10


@pytest.mark.parametrize("d", [5, 60])
def test_duplicate_rows(d):
    """Twice the same sample has the same variances, but its rows are not independent."""
    x = falling(20, d)
    twice = np.concatenate([x, x])
    for measure in set(MEASURES) - {debiased, isotropy}:
        assert measure(twice).item() == pytest.approx(measure(x).item(), rel=1e-9), measure
    n = min(40, d)
    variances = np.zeros(n)
    variances[: min(20, d)] = singular_values(x)[0] ** 2 / 20
    expected = variances.mean() / (variances.std() + 1e-6)
    assert isotropy(twice).item() == pytest.approx(expected, rel=1e-9)
    assert debiased(twice) < 0.99 * debiased(x)


@pytest.mark.parametrize("shape", [(60, 20), (40, 1500)], ids=str)
@measures
def test_float32_with_an_offset(measure, shape):
    x = (falling(*shape) + 1000).astype(np.float32)
    expected = measure(x.astype(np.float64)).item()
    found = measure(torch.from_numpy(x))
    assert (found.dtype, found.shape) == (torch.float64, ())
    assert found.item() == pytest.approx(expected, rel=1e-4)
    exact = x.astype(np.float64)
    assert measure(exact - exact.mean(axis=0)).item() == pytest.approx(expected, rel=1e-4)


@measures
def test_input_is_left_alone(measure):
    x = torch.from_numpy(falling(30, 12)).requires_grad_()
    before = x.detach().clone()
    assert not measure(x).requires_grad
    assert torch.equal(x, before)


# ---- what must leave it as it is, and what must change it ----------------------------------------


def changed(x):
    rng = np.random.default_rng(5)
    rotation = np.linalg.qr(rng.standard_normal((x.shape[1],) * 2))[0]
    return {
        "rotation": x @ rotation,
        "translation": x + 10 * rng.standard_normal(x.shape[1]),
        "sample permutation": x[rng.permutation(len(x))],
        "scale": 300.0 * x,
        "feature scales": x * 10.0 ** rng.uniform(-1, 1, x.shape[1]),
    }


@pytest.mark.parametrize("d", [16, 64])
@measures
def test_invariances(measure, d):
    x = falling(50, d)
    expected = measure(x).item()
    for name, other in changed(x).items():
        rel = 1e-4 if (measure, name) == (isotropy, "scale") else 1e-8  # its 1e-6
        same = measure(other).item() == pytest.approx(expected, rel=rel)
        assert same == (name != "feature scales"), name


def test_isotropy_of_tiny_features_depends_on_scale():
    x = falling(50, 16)
    assert isotropy(1e-4 * x) < 0.5 * isotropy(x)


@pytest.mark.parametrize("width", [8, 80])
def test_isotropy_where_squares_leave_float64(width):
    x = torch.from_numpy(falling(50, width))
    variances = torch.linalg.svdvals(x - x.mean(0)) ** 2 / 50
    for scale in (1e-160, 1e-150, 1e-130, 1e-100):  # their spread is nothing beside the 1e-6
        expected = variances.mean().item() * scale * scale / 1e-6
        assert isotropy(scale * x).item() == pytest.approx(expected, rel=1e-9, abs=1e-310)
    expected = (variances.mean() / variances.std(correction=0)).item()
    assert isotropy(1e160 * x).item() == pytest.approx(expected, rel=1e-9)
    assert isotropy(torch.full((5, 3), 1e160, dtype=torch.float64)) == 0


@pytest.mark.parametrize(
    "measure", [pca_dimension, spectral_entropy, effective_rank, power_law_alpha]
)
def test_uncentred_translation(measure):
    x = falling(120, 130) - 3
    options = {"fit": (1, 20)} if measure is power_law_alpha else {}
    before, after = (measure(y, center=False, **options).item() for y in (x, x + 5))
    assert before != pytest.approx(after, rel=0.01)
    assert pca_dimension(x + 1000, center=False).item() == 1


@pytest.mark.parametrize("scale", [2.0**-600, 2.0**600])
def test_extreme_scales(scale):
    x = falling(40, 12)
    for measure in set(MEASURES) - {isotropy}:  # which knows an absolute scale
        assert measure(x * scale).item() == pytest.approx(measure(x).item(), rel=1e-9), measure


# ---- errors and devices --------------------------------------------------------------------------


@measures
def test_bad_features(measure):
    with pytest.raises(ValueError, match="must be finite; got NaN or Inf in 1 of 5 rows"):
        measure(np.where(np.eye(5) * np.arange(5) == 2, np.nan, 1.0))
    with pytest.raises(ValueError, match=r"at least 2-d; got shape \(5,\)"):
        measure(np.ones(5))
    with pytest.raises(TypeError, match="got int64"):
        measure(np.ones((5, 3), dtype=np.int64))


def test_bad_options():
    x = falling(10, 4)
    for threshold in (0, 1.5, -1, np.nan):
        with pytest.raises(ValueError, match="threshold must be above 0 and at most 1; got"):
            pca_dimension(x, threshold=threshold)
    for threshold in ("0.9", True, None):
        with pytest.raises(TypeError, match="threshold must be a number; got"):
            pca_dimension(x, threshold=threshold)
    for measure in (spectral_entropy, effective_rank):
        with pytest.raises(ValueError, match=r"on must be one of \('singular', 'eigenvalues'\); g"):
            measure(x, on="variances")
    for fit in (5, (1, 2, 3), "12"):
        with pytest.raises(TypeError, match=r"fit must be two ranks \(first, last\), counted from"):
            power_law_alpha(x, fit=fit)
    with pytest.raises(TypeError, match="the last rank of fit must be an integer; got float"):
        power_law_alpha(x, fit=(1, 3.0))
    with pytest.raises(ValueError, match="the first rank of fit must be at least 1; got 0"):
        power_law_alpha(x, fit=(0, 3))
    with pytest.raises(ValueError, match="the last rank of fit must be at least 4; got 3"):
        power_law_alpha(x, fit=(3, 3))
    with pytest.raises(ValueError, match="debiased=True needs features of at least 4 rows; got n"):
        debiased(x[:3])


@pytest.mark.parametrize("rank", [0, 1, 25])
def test_cores_stay_on_the_device(rank, elsewhere):
    kind = {"dtype": torch.float64, "device": elsewhere}
    found = Principal(torch.empty(30, rank, **kind), torch.empty(rank, **kind), 64)
    s = found.sq_singular
    results = [
        spectrum.pca_dimension_from(s, found.n, found.dim, 0.9),
        spectrum.participation_ratio_from(s),
        spectrum.debiased_participation_ratio_from(found),
        *(spectrum.spectral_entropy_from(s, on) for on in spectrum.SPECTRA),
        *(spectrum.effective_rank_from(s, on) for on in spectrum.SPECTRA),
        spectrum.power_law_alpha_from(s, spectrum.FIT),
        spectrum.isotropy_from(s, found.n, found.dim),
    ]
    assert {(r.device, r.dtype, r.shape) for r in results} == {(kind["device"], torch.float64, ())}
