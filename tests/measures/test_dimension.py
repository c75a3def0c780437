"""Dimension from neighbours: scikit-dimension's figures, plain numpy, and what duplicates do."""

import math
import warnings

import numpy as np
import pytest
import torch
from oracle import clusters
from scipy.special import gammainc
from sklearn.neighbors import NearestNeighbors

from geomkd.measures import mle_dimension, two_nn
from geomkd.measures.dimension import first_of_equals, mle_dimension_from, two_nn_from

# ---- samples of known dimension, as scikit-dimension draws them ----------------------------------


def ball(rng, n, d):
    """Uniform in the unit ball: the norm of a Gaussian through its distribution function."""
    x = rng.randn(n, d)
    sq = (x**2).sum(axis=1)
    return x * (gammainc(d / 2, sq / 2) ** (1 / d) / np.sqrt(sq))[:, None]


def sphere(rng, n, d):
    x = rng.randn(n, d + 1)
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True))


def circles(rng, n, d, copies):
    """Angles on d circles, the radius of each the next one's angle."""
    p = rng.rand(d, n)
    radius, angle = np.roll(p, -1, axis=0), 2 * np.pi * p
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.tile(pairs.reshape(2 * d, n).T, copies)


def swiss_roll(rng, n):
    t = 1.5 * np.pi * (1 + 2 * rng.rand(n))
    return np.stack([t * np.cos(t), 21 * rng.rand(n), t * np.sin(t)], axis=1)


def cube_faces(rng, n, d):
    parts = []
    for axis in range(d + 1):
        for side in (0, 1):
            face = rng.rand(d + 1, n // (2 * (d + 1)) + 1)
            face[axis] = side
            parts.append(face.T)
    return np.concatenate(parts)[:n]


def beta(rng, n, d):
    x = rng.beta(10, 0.5, (n, d))
    sine, cosine = np.sin(2 * np.pi * x), np.cos(2 * np.pi * x)
    return np.tile(np.concatenate([x * np.sin(cosine), x * np.cos(sine)], axis=1), 2)


def fixture(name):
    if name == "ball5_in10":
        return np.pad(ball(np.random.RandomState(0), 300, 5), [(0, 0), (0, 5)])
    return sphere(np.random.RandomState(1), 300, 4)


# Of both arrays: what scikit-dimension returns.
PUBLISHED = {
    "linear": (two_nn, {}, 4.362176532655348, 3.2212051304386806),
    "mle": (two_nn, {"method": "mle"}, 4.113138917297787, 3.3280716110069095),
    "harmonic": (mle_dimension, {}, 4.4358235, 3.7712506),
    "arithmetic": (mle_dimension, {"average": "arithmetic"}, 4.6711009, 4.0131793),
}


@pytest.mark.parametrize("which", [0, 1], ids=["ball5_in10", "sphere4_in5"])
@pytest.mark.parametrize("case", PUBLISHED)
def test_published_values(case, which):
    measure, options, *expected = PUBLISHED[case]
    x = fixture(["ball5_in10", "sphere4_in5"][which])
    value = measure(x, **options)
    assert (value.shape, value.dtype) == ((), torch.float64)
    assert value.item() == pytest.approx(expected[which], rel=1e-6 if measure is two_nn else 1e-7)
    assert measure(x.astype(np.float32), **options).item() == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"), [("ball5_in10", 4.2023591), ("sphere4_in5", 3.5727637)]
)
def test_less_biased_divisor(name, expected):
    """Published with k - 2 in place of k - 1 as well: the same sum of logarithms."""
    assert mle_dimension(fixture(name)).item() * 18 / 19 == pytest.approx(expected, rel=1e-7)


# scikit-dimension's BenchmarkManifolds, n = 1,000: mean and SD over seeds 0 to 4 of its own values
# of two_nn "linear", "mle" and of mle_dimension. Biased above ten dimensions.
MANIFOLDS = {
    "M1": (lambda r: sphere(r, 1000, 10), (9.41, 0.15), (9.50, 0.13), (8.73, 0.13)),
    "M4": (lambda r: circles(r, 1000, 4, 1), (3.89, 0.11), (3.92, 0.15), (4.13, 0.05)),
    "M7": (lambda r: swiss_roll(r, 1000), (2.02, 0.11), (2.00, 0.10), (1.91, 0.02)),
    "M8": (lambda r: circles(r, 1000, 12, 3), (13.32, 0.58), (13.24, 0.53), (13.24, 0.13)),
    "M9": (lambda r: (5 * r.rand(20, 1000) - 2.5).T, (15.25, 0.85), (15.31, 0.65), (13.89, 0.16)),
    "M10b": (lambda r: cube_faces(r, 1000, 17), (13.81, 0.47), (13.85, 0.39), (12.70, 0.17)),
    "M10d": (lambda r: cube_faces(r, 1000, 70), (38.95, 1.35), (39.28, 1.49), (33.21, 0.23)),
    "M12": (lambda r: r.randn(1000, 20), (16.36, 0.64), (16.44, 0.58), (14.54, 0.08)),
    "Mbeta": (lambda r: beta(r, 1000, 10), (6.16, 0.30), (6.14, 0.21), (5.50, 0.09)),
}


@pytest.mark.parametrize("name", MANIFOLDS)
def test_benchmark_manifolds(name):
    make, *expected = MANIFOLDS[name]
    values = []
    for seed in range(5):
        x = make(np.random.RandomState(seed))
        values.append(
            [two_nn(x).item(), two_nn(x, method="mle").item(), mle_dimension(x, k=20).item()]
        )
    found = np.stack([np.mean(values, axis=0), np.std(values, axis=0, ddof=1)], axis=1)
    assert found == pytest.approx(np.array(expected), abs=0.00501)


# ---- plain numpy ---------------------------------------------------------------------------------


def distances(x, k):
    return NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(x).kneighbors()[0]


@pytest.mark.parametrize("n", [3, 10, 47, 200])
@pytest.mark.parametrize("discard", [0.0, 0.1, 0.5])
def test_two_nn_formula(n, discard):
    x = np.random.default_rng(n).random((n, 5))
    r = distances(x, 2)
    mu = np.sort(r[:, 1] / r[:, 0])
    assert two_nn(x, method="mle").item() == pytest.approx((n - 1) / np.log(mu).sum())
    kept = min(math.floor(n * (1 - discard) + 1e-9), n - 1)
    y = -np.log(1 - np.arange(1, kept + 1) / n)
    slope = np.linalg.lstsq(np.log(mu[:kept, None]), y, rcond=None)[0][0]
    assert two_nn(x, discard=discard).item() == pytest.approx(slope)


def test_two_nn_by_hand():
    log_mu = torch.tensor([3.0, 1.0, 2.0, 7.0], dtype=torch.float64)
    y = [math.log(4 / 3), math.log(2), math.log(4)]
    slope = (1 * y[0] + 2 * y[1] + 3 * y[2]) / 14
    assert two_nn_from(log_mu, discard=0.0).item() == pytest.approx(slope)
    assert two_nn_from(log_mu, discard=0.25).item() == pytest.approx(slope)
    assert two_nn_from(log_mu, discard=0.5).item() == pytest.approx((y[0] + 2 * y[1]) / 5)
    assert two_nn_from(log_mu, method="mle").item() == pytest.approx(3 / 13)


@pytest.mark.parametrize("k", [2, 5, 20, 79])
def test_mle_formula(k):
    x = np.random.default_rng(k).standard_normal((80, 6))
    t = distances(x, k)
    own = 1 / (np.log(t[:, -1:] / t[:, :-1]).sum(axis=1) / (k - 1))
    local = mle_dimension(x, k=k, pointwise=True)
    np.testing.assert_allclose(local.numpy(), own, rtol=1e-10)
    harmonic, arithmetic = (
        mle_dimension(x, k=k, average=name).item() for name in ("harmonic", "arithmetic")
    )
    assert harmonic == pytest.approx(1 / np.mean(1 / own))
    assert arithmetic == pytest.approx(np.mean(own))
    assert arithmetic > harmonic


def test_mle_by_hand():
    excess = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert mle_dimension_from(excess, 5).item() == 2
    assert mle_dimension_from(excess, 5, average="arithmetic").item() == pytest.approx(8 / 3)
    assert mle_dimension_from(excess, 5, pointwise=True).tolist() == pytest.approx([4, 4 / 3])


# ---- duplicates and degenerate samples -----------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("measure", [two_nn, mle_dimension], ids=lambda f: f.__name__)
def test_duplicates_do_not_change_the_dimension(measure, share):
    x = fixture("ball5_in10").astype(np.float32)
    again = int(300 * share)
    order = np.random.default_rng(0).permutation(300 + again)
    twice = np.concatenate([x, x[:again]])[order]
    message = rf"^{again} of {300 + again} feature rows equal another and were dropped$"
    with pytest.warns(UserWarning, match=message) as seen:
        value = measure(twice)
    assert [w.filename for w in seen] == [__file__]
    assert value.item() == pytest.approx(measure(x).item(), rel=1e-6)


def test_pointwise_keeps_the_order_of_distinct_rows():
    x = np.random.default_rng(0).standard_normal((60, 4))
    twice = np.concatenate([x[:30], x[10:20], x[30:]])
    with pytest.warns(UserWarning, match="^10 of 70 feature rows"):
        local = mle_dimension(twice, k=5, pointwise=True)
    torch.testing.assert_close(local, mle_dimension(x, k=5, pointwise=True))


def test_rows_that_differ_little_are_distinct():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32) + 100
    x[1] = np.nextafter(x[0], np.float32(1000))
    assert two_nn(x).isfinite()


def test_first_of_equals():
    x = torch.tensor([[1.0, 0.0], [2, 0], [1, -0.0], [0, 0], [2, 0], [-0.0, 0]])
    assert first_of_equals(x).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("measure", "least"), [(two_nn, 3), (mle_dimension, 21)])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_too_few_distinct_rows(measure, least, n):
    x = torch.zeros(n, 4)
    x[-1] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = rf"at least {least} distinct feature rows are needed; got {min(n, 2)} of {n}$"
        with pytest.raises(ValueError, match=message):
            measure(x)


def test_three_rows_are_enough():
    assert two_nn(torch.tensor([[0.0], [1.0], [3.0]]), method="mle").item() == pytest.approx(
        2 / (math.log(3) + math.log(2) + math.log(3 / 2))
    )


def test_equally_far_neighbours_have_no_bound():
    """Corners of a simplex."""
    x = torch.eye(8, dtype=torch.float64)
    assert two_nn(x).isinf()
    assert two_nn(x, method="mle").isinf()
    assert mle_dimension(x, k=4).isinf()
    assert mle_dimension(x, k=4, pointwise=True).isinf().all()


# ---- types, scales, options ----------------------------------------------------------------------


@pytest.mark.parametrize("measure", [two_nn, mle_dimension], ids=lambda f: f.__name__)
@pytest.mark.parametrize("power", [-700, -300, -40, 40, 300, 700])
def test_extreme_scales(measure, power):
    x = np.random.default_rng(0).standard_normal((100, 5))
    assert measure(np.ldexp(x, power)).item() == pytest.approx(measure(x).item(), rel=1e-10)


@pytest.mark.parametrize("measure", [two_nn, mle_dimension], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_and_maps(measure, dtype):
    x = torch.from_numpy(clusters(200, 48)[0]).to(dtype)
    before = x.clone()
    value = measure(x.reshape(200, 3, 4, 4))
    assert value.item() == pytest.approx(measure(x.double()).item(), rel=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("measure", "options", "error", "message"),
    [
        (
            two_nn,
            {"method": "fit"},
            ValueError,
            r"method must be one of \('linear', 'mle'\); got 'f",
        ),
        (two_nn, {"discard": 1.0}, ValueError, "discard must be at least 0 and below 1; got 1"),
        (two_nn, {"discard": -0.1}, ValueError, "discard must be at least 0 .*; got -0.1"),
        (mle_dimension, {"k": 1}, ValueError, "k must be at least 2; got 1"),
        (mle_dimension, {"k": 2.0}, TypeError, "k must be an integer; got float"),
        (mle_dimension, {"average": "mean"}, ValueError, "average must be one of .*; got 'mean'"),
        (
            mle_dimension,
            {"k": 40},
            ValueError,
            "at least 41 distinct feature rows .*; got 40 of 40",
        ),
    ],
)
def test_options(measure, options, error, message):
    with pytest.raises(error, match=message):
        measure(torch.rand(40, 3, generator=torch.Generator().manual_seed(0)), **options)
