"""Neural collapse, against closed forms and numpy straight from the formulas."""

import numpy as np
import pytest
import torch
from oracle import clusters

from geomkd.geometry.principal import Principal, principal
from geomkd.measures.collapse import NeuralCollapse, neural_collapse, neural_collapse_from

UNEQUAL = np.repeat([0, 1, 2, 3], [5, 40, 20, 15])


def by_formula(x, y, weight=None, bias=0.0):
    """d x d matrices in float64; the pseudo-inverse of the C - 1 largest eigenvalues."""
    x = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    names = np.unique(y)
    c, d = len(names), x.shape[1]
    means = np.stack([x[y == k].mean(axis=0) for k in names])
    residual = x - means[np.searchsorted(names, y)]
    centred = means - means.mean(axis=0)
    within, between = residual.T @ residual / len(x), centred.T @ centred / c
    values, axes = np.linalg.eigh(between)
    k = min(c - 1, d)
    inverse = axes[:, -k:] / values[-k:] @ axes[:, -k:].T
    norms = np.linalg.norm(centred, axis=1)
    cosine = centred @ centred.T / np.outer(norms, norms)
    off = np.abs(cosine + 1 / (c - 1))[~np.eye(c, dtype=bool)]
    out = [np.trace(within @ inverse) / c, norms.std(ddof=1) / norms.mean(), off.mean()]
    if weight is None:
        return out
    w = weight[names] / np.linalg.norm(weight[names])
    sq_dist = ((x[:, None] - means) ** 2).sum(axis=2)
    chosen = (x @ weight.T + bias).argmax(axis=1)
    unlike = names[sq_dist.argmin(axis=1)] != chosen
    return [*out, np.linalg.norm(w - centred / np.linalg.norm(centred)) ** 2, unlike.mean()]


def values(x, y, **head):
    found = neural_collapse(x, torch.as_tensor(y), **head)
    assert {(v.shape, v.dtype) for v in found} == {((), torch.float64)}
    return [v.item() for v in found]


def simplex(c, d, scale=1.0):
    """Vertices of a simplex about the origin, rotated into d dimensions."""
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((d, c)))[0].T
    return scale * np.sqrt(c / (c - 1)) * (np.eye(c) - 1 / c) @ axes


# ---- oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(80, 5), (80, 24), (80, 300), (80, 5, 6, 7)])
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_formula(shape, sizes):
    rng = np.random.default_rng(shape[1])
    y = UNEQUAL if sizes == "unequal" else np.arange(80) % 4
    x = rng.standard_normal((4, *shape[1:]))[y] + 0.7 * rng.standard_normal(shape)
    d = int(np.prod(shape[1:]))
    weight, bias = rng.standard_normal((4, d)), rng.standard_normal(4)
    expected = by_formula(x, y, weight, bias)
    assert values(x, y, head_weight=weight, head_bias=bias) == pytest.approx(expected, rel=1e-8)
    bare = values(x, y)
    assert bare[:3] == pytest.approx(expected[:3], rel=1e-8)
    assert np.isnan(bare[3:]).all()


@pytest.mark.parametrize("d", [10, 400])
def test_simplex_is_collapsed(d):
    """All samples at the vertices of a simplex, the head their transpose."""
    y = np.arange(60) % 6
    x, weight = 3.0 + simplex(6, d, scale=5.0), simplex(6, d, scale=0.1)
    found = values(x[y], y, head_weight=weight, head_bias=-3.0 * weight.sum(axis=1))
    assert found == pytest.approx([0.0] * 5, abs=1e-12)


@pytest.mark.parametrize("c", [2, 3, 10])
def test_known_variance(c):
    """Samples at vertex +- s along each of the d axes: S_w = s^2 / d I, S_b = 1 / (C - 1) I."""
    d, s = 12, 0.3
    steps = s * np.concatenate([np.eye(d), -np.eye(d)])
    x = (simplex(c, d)[:, None] + steps).reshape(-1, d)
    expected = [(c - 1) ** 2 * s**2 / d / c, 0.0, 0.0]
    assert values(x, np.arange(c).repeat(2 * d))[:3] == pytest.approx(expected, abs=1e-12)


def test_known_means():
    """Means at -3, 0 and 6 on a line: m = 1, norms 4, 1 and 5, cosines 1, -1 and -1."""
    x = np.array([-4.0, -2, -1, 1, 5, 7])[:, None]
    nc1 = 1 / ((16 + 1 + 25) / 3) / 3
    expected = [nc1, np.std([4, 1, 5], ddof=1) / (10 / 3), (1.5 + 0.5 + 0.5) / 3]
    assert values(x, [0, 0, 1, 1, 2, 2])[:3] == pytest.approx(expected)


def test_classes_weigh_the_same_and_samples_too():
    """Class 0 is four samples at -1 +- 1, class 1 two at 1: S_w = 4/6, S_b = 1."""
    x = np.array([-2.0, 0, -2, 0, 1, 1])[:, None]
    assert values(x, [0, 0, 0, 0, 1, 1])[0] == pytest.approx(4 / 6 / 2)


def test_noise_looks_collapsed_in_many_dimensions():
    """Of independent noise NC1 is about (C - 1) / C n / d."""
    x, y = clusters(200, 8000, 10, sep=0.0)
    assert values(x, y)[0] == pytest.approx(0.9 * 200 / 8000, rel=0.1)


# ---- precision -----------------------------------------------------------------------------------


def collapsed():
    """A nearly collapsed layer of 64 features and 10 classes, with an offset."""
    rng = np.random.default_rng(0)
    y = np.arange(500) % 10
    x = 10 + rng.standard_normal((10, 64))[y] + 0.11 * rng.standard_normal((500, 64))
    return x.astype(np.float32), y


def test_pseudo_inverse_does_not_invert_rounding():
    """In float32, a cut-off of 1e-15 keeps the 55 eigenvalues that are 0 but for rounding."""
    x, y = collapsed()
    means = np.stack([x[y == k].mean(axis=0) for k in range(10)])
    residual, centred = x - means[y], means - means.mean(axis=0)
    within, between = residual.T @ residual / 500, centred.T @ centred / 10
    assert within.dtype == between.dtype == np.float32
    naive = np.trace(within @ np.linalg.pinv(between, rcond=1e-15)) / 10
    expected = by_formula(x, y)[0]
    assert expected == pytest.approx(0.0019, abs=0.0005)
    assert abs(naive) > 1e3
    single, double = (values(x.astype(t), y)[:3] for t in (np.float32, np.float64))
    assert single == pytest.approx(by_formula(x, y), rel=1e-8)
    assert single == pytest.approx(double, rel=1e-4)


@pytest.mark.parametrize("d", [24, 500])
def test_float32_with_an_offset(d):
    x, y = clusters(120, d, 4)
    x = x + np.float32(1000)
    weight = np.random.default_rng(0).standard_normal((4, d)).astype(np.float32)
    single = values(x, y, head_weight=weight)
    double = values(x.astype(np.float64), y, head_weight=weight.astype(np.float64))
    assert single == pytest.approx(double, rel=1e-4)


@pytest.mark.parametrize("d", [3, 300])
def test_a_small_direction_of_the_means_counts(d):
    """The means' spread along one axis is 1e-4 of that along the other, the samples' as well."""
    rng = np.random.default_rng(0)
    x = np.zeros((90, d))
    x[:, :2] = (rng.standard_normal((3, 2))[np.arange(90) % 3] + rng.standard_normal((90, 2))) * [
        1,
        1e-4,
    ]
    y = np.arange(90) % 3
    assert values(x, y)[0] == pytest.approx(by_formula(x[:, :2], y)[0], rel=1e-6)


def test_extreme_scales():
    x, y = clusters()
    x, weight = x.astype(np.float64), np.random.default_rng(0).standard_normal((4, 24))
    expected = values(x, y, head_weight=weight)
    for scale in (2.0**-600, 2.0**600):
        assert values(x * scale, y, head_weight=weight) == pytest.approx(expected, rel=1e-12)


# ---- what must leave it as it is, and what must change it ----------------------------------------


def case():
    x, y = clusters(80, 6)
    rng = np.random.default_rng(3)
    return x.astype(np.float64), y, rng.standard_normal((4, 6)), rng.standard_normal(4)


def test_means_and_variances_do_not_depend_on_axes():
    x, y, _, _ = case()
    expected = values(x, y)[:3]
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    order = np.random.default_rng(2).permutation(len(x))
    for changed in (x @ rotation, 1e-3 * x, x + 7.0):
        assert values(changed, y)[:3] == pytest.approx(expected, rel=1e-9)
    assert values(x[order], y[order])[:3] == pytest.approx(expected, rel=1e-9)
    assert values(x, np.array([9, -4, 3, 0])[y])[:3] == pytest.approx(expected, rel=1e-9)


def test_scale_of_a_feature():
    """NC1 with d < C is free of axes altogether; otherwise all three see a feature's scale."""
    x, y, _, _ = case()
    scale = [9.0, 1, 1, 1, 1, 1]
    assert not np.isclose(values(x * scale, y)[:3], values(x, y)[:3], rtol=0.01).any()
    x = x[:, :2]
    assert values(x * [9.0, 1.0], y)[0] == pytest.approx(values(x, y)[0])


def test_head_belongs_to_the_axes():
    x, y, weight, bias = case()
    expected = values(x, y, head_weight=weight, head_bias=bias)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    together = values(x @ rotation, y, head_weight=weight @ rotation, head_bias=bias)
    assert together == pytest.approx(expected)
    alone = values(x @ rotation, y, head_weight=weight, head_bias=bias)
    assert not np.isclose(alone[3:], expected[3:]).any()
    renamed = np.array([1, 0, 3, 2])
    again = np.argsort(renamed)
    same = values(x, renamed[y], head_weight=weight[again], head_bias=bias[again])
    assert same == pytest.approx(expected)
    other = values(x, renamed[y], head_weight=weight, head_bias=bias)
    assert not np.isclose(other[3:], expected[3:]).any()
    scaled = values(5.0 * x + 2.0, y, head_weight=3.0 * weight, head_bias=bias)
    assert scaled[3] == pytest.approx(expected[3])  # not nc4, for which the logits count
    assert values(x, y, head_weight=weight)[4] != expected[4]


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [8, 200])
def test_two_equal_means_cost_a_direction(d):
    """Classes 0 and 1 share their mean: S_b has rank 1, and only that direction counts."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((3, 10, d))
    x = np.concatenate([half, -half], axis=1) + np.array([0.0, 0.0, 3.0])[:, None, None]
    found = values(x.reshape(60, d), np.arange(3).repeat(20))
    # S_b = 2 d u u' of centred means -1, -1 and 2 times sqrt(d) u, u along (1, ..., 1).
    within = (x - x.mean(axis=1, keepdims=True)).sum(axis=2) ** 2 / d
    assert found[0] == pytest.approx(within.mean() / (2 * d) / 3)
    assert found[1] == pytest.approx(np.std([1, 1, 2], ddof=1) / (4 / 3))
    assert found[2] == pytest.approx((1.5 + 0.5 + 0.5) / 3)


@pytest.mark.parametrize("d", [4, 100])
def test_all_means_equal(d):
    half = np.random.default_rng(0).standard_normal((3, 10, d))
    x = 5 + np.concatenate([half, -half], axis=1).reshape(60, d)
    found = values(x, np.arange(3).repeat(20), head_weight=np.ones((3, d)))
    assert found[0] == np.inf
    assert np.isnan(found[1:4]).all()
    assert 0 <= found[4] <= 1


def test_a_mean_at_the_centre_has_no_direction():
    x = np.array([-1.0, -1, 0, 0, 1, 1])[:, None]
    expected = [0.0, np.std([1, 0, 1], ddof=1) / (2 / 3), (0.5 + 0.5 + 0.5) / 3]
    assert values(x, [0, 0, 1, 1, 2, 2])[:3] == pytest.approx(expected)


def test_a_mean_at_the_centre_but_for_rounding():
    """Its norm is about 1e-16; taken for a direction, it would have cosines of +-1."""
    half = np.random.default_rng(0).standard_normal((4, 10))
    x = np.concatenate([half, -half], axis=1) + np.array([-0.3, 0.0, 0.1, 0.2])[:, None]
    found = values(x.reshape(80, 1) + 0.1, np.arange(4).repeat(20))
    angles = (3 * 1 / 3 + 2 * 2 / 3 + 4 / 3) / 6  # cosines 0 three times, -1 twice, 1 once
    assert found[1:3] == pytest.approx([np.std([3, 0, 1, 2], ddof=1) / 1.5, angles])


def test_constant_features():
    found = values(np.full((6, 5), 7.1), [0, 0, 1, 1, 2, 2], head_weight=np.ones((3, 5)))
    assert np.isnan(found[:4]).all()


def test_two_classes_and_duplicate_rows():
    x, y = clusters(40, 6, 2)
    found = values(x, y)
    assert found[1:3] == pytest.approx([0, 0], abs=1e-12)
    twice = values(np.concatenate([x, x]), np.concatenate([y, y]))
    assert twice[:3] == pytest.approx(found[:3], rel=1e-9, abs=1e-12)


def test_head_of_more_classes_than_the_sample():
    x, y, _, _ = case()
    weight, bias = (np.random.default_rng(5).standard_normal(s) for s in ((9, 6), 9))
    names = np.array([8, 1, 4, 5])[y]
    expected = by_formula(x, names, weight, bias)
    assert values(x, names, head_weight=weight, head_bias=bias) == pytest.approx(expected)


def test_head_of_a_module_and_input_left_alone():
    x, y = (torch.from_numpy(t) for t in clusters(80, 6))
    head, before = torch.nn.Linear(6, 4), x.clone()
    found = neural_collapse(x, y, head_weight=head.weight, head_bias=head.bias)
    assert not found.nc3.requires_grad
    nearest = torch.cdist(x, torch.stack([x[y == k].mean(dim=0) for k in range(4)])).argmin(dim=1)
    assert found.nc4.item() == pytest.approx((head(x).argmax(1) != nearest).double().mean().item())
    assert torch.equal(x, before)


def test_core_takes_any_rows():
    x, y = (torch.from_numpy(t) for t in clusters())
    whole, rows = principal(x), torch.arange(20, 90)
    part = whole._replace(coordinates=whole.coordinates[rows])
    expected = torch.stack(neural_collapse(x[rows], y[rows]))[:3]
    assert torch.allclose(torch.stack(neural_collapse_from(part, y[rows], 4))[:3], expected)


@pytest.mark.parametrize("r", [0, 2, 30])
def test_core_on_a_device_that_does_not_exist(r, elsewhere):
    own = {"device": elsewhere, "dtype": torch.float64}
    fake = Principal(torch.empty(60, r, **own), torch.empty(r, **own), 90)
    index = torch.empty(60, device=elsewhere, dtype=torch.int64)
    found = neural_collapse_from(fake, index, 10)
    assert isinstance(found, NeuralCollapse)
    assert {(v.device.type, v.dtype, v.shape) for v in found} == {("cuda", torch.float64, ())}


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ({"head_bias": np.zeros(4)}, ValueError, "head_bias needs head_weight; got a bias alone"),
        ({"head_weight": np.ones((4, 5))}, ValueError, r"must be \(K, d\), d = 6; got \(4, 5\)"),
        (
            {"head_weight": np.ones((3, 6))},
            ValueError,
            r"rows of head_weight, 0 ... 2; got 0 ... 3",
        ),
        ({"head_weight": np.ones(6)}, ValueError, "head_weight must be .*at least 2-d"),
        ({"head_weight": np.full((4, 6), np.nan)}, ValueError, "head_weight must be finite"),
        ({"head_weight": np.ones((4, 6), int)}, TypeError, "head_weight must be float64"),
        ({"head_weight": [[1.0]]}, TypeError, "head_weight must be a torch.Tensor or"),
        (
            {"head_weight": np.ones((4, 6)), "head_bias": np.zeros(5)},
            ValueError,
            r"head_bias must be \(4,\) and finite; got shape \(5,\)",
        ),
    ],
)
def test_head_that_does_not_fit(head, error, message):
    x, y, _, _ = case()
    with pytest.raises(error, match=message):
        neural_collapse(x, torch.from_numpy(y), **head)


@pytest.mark.parametrize("y", [[0, 0, 0, 0], [0, 0, 1, 2]])
def test_classes_too_few(y):
    with pytest.raises(ValueError, match=r"at least 2 (classes are needed|samples; got 1)"):
        neural_collapse(torch.ones(4, 3), torch.tensor(y))


def test_features_must_be_finite():
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 4 rows, first in row 2"):
        neural_collapse(torch.tensor([[0.0], [1], [torch.nan], [3]]), torch.tensor([0, 0, 1, 1]))
