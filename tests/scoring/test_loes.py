"""LOES against closed forms, and written down on features in plain numpy."""

from itertools import combinations

import numpy as np
import pytest
import torch

from geomkd.scoring.loes import loes, redundancy

RNG = np.random.default_rng


EYE = np.eye


def gram_of(features, dtype=np.float64):
    centred = [np.asarray(x, float) - np.mean(x, axis=0) for x in features]
    return np.stack([x @ x.T for x in centred]).astype(dtype)


def a_network(n, widths, classes=4, seed=0):
    """Layers that tell the classes more or less well and share some of their features."""
    rng = RNG(seed)
    y = np.arange(n) % classes
    shared = rng.standard_normal((n, 5))
    layers = []
    for depth, d in enumerate(widths):
        told = 0.4 * depth * rng.standard_normal((classes, d))[y]
        mixed = shared @ rng.standard_normal((5, d)) / 2
        layers.append(told + mixed + rng.standard_normal((n, d)) * rng.uniform(0.3, 2, d) + 3)
    return layers, y


# ---- LOES by its formulas on features ------------------------------------------------------------


def ridge_fit(x, target, ridge):
    return x @ np.linalg.solve(x.T @ x + ridge * EYE(x.shape[1]), x.T @ target)


def isotropy_of(x):
    values = np.linalg.svd(x, compute_uv=False) ** 2 / len(x)  # min(n, d) of them
    return values.mean() / (values.std() + 1e-6)


def orthogonal_part(x, chosen):
    """X - S (S'S + l I)^-1 S'X: l of the code, or the mean eigenvalue where S spans the sample."""
    s = np.hstack(chosen)
    shrinkage = (s**2).sum() / len(s) if s.shape[1] >= len(s) - 1 else 1e-6
    return x - ridge_fit(s, x, shrinkage)


def mean_area(x, y):
    """By Heron's formula, from the sides."""
    centroids = [x[y == name].mean(axis=0) for name in np.unique(y)]
    areas = []
    for corners in combinations(centroids, 3):
        a, b, c = (np.linalg.norm(p - q) for p, q in combinations(corners, 2))
        areas.append(np.sqrt((a + b + c) * (-a + b + c) * (a - b + c) * (a + b - c)) / 4)
    return np.mean(areas)


def likeness(a, b):
    return np.linalg.norm(a.T @ b) / (np.linalg.norm(a) * np.linalg.norm(b))


def direct_loes(layers, y, classes, k, alpha=1.0, gamma=0.5, eta=0.1, ridge=1e-3):
    """Rows (layer, objective, isotropy, redundancy, loss, area); label-free where y is None."""
    layers = [x - x.mean(axis=0) for x in layers]
    labelled = y is not None
    left = EYE(classes)[y] - EYE(classes)[y].mean(axis=0) if labelled else None
    rows = []
    while len(rows) < k:
        chosen = [layers[row[0]] for row in rows]
        best = None
        for a, x in enumerate(layers):
            if a in [row[0] for row in rows]:
                continue
            isotropy, red = isotropy_of(x), max([likeness(x, s) for s in chosen], default=0)
            objective, loss, area, fit = alpha * (1 - isotropy) + gamma * red, None, None, None
            if labelled:
                part = orthogonal_part(x, chosen) if chosen else x
                fit = ridge_fit(part, left, ridge)
                loss = ((left - fit) ** 2).mean()
                area = mean_area(part, y) if chosen else 0.0
                objective += loss - eta * area
            if best is None or objective < best[0][1]:
                best = (a, objective, isotropy, red, loss, area), fit
        rows.append(best[0])
        left = left - best[1] if labelled else None
    return rows


def agree(steps, rows, tolerance=1e-4):
    assert [step.layer for step in steps] == [row[0] for row in rows]
    found = np.array([step[1:] for step in steps], dtype=float)
    np.testing.assert_allclose(found, np.array(rows, float)[:, 1:], rtol=tolerance, atol=1e-9)


NARROW, CROSSING, SQUARE, WIDE = (80, 8), (60, 25), (30, 29), (24, 40)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("n", "d"), [NARROW, CROSSING, SQUARE, WIDE])
@pytest.mark.parametrize("weights", [{"eta": 0.0}, {}, {"alpha": 0.05, "gamma": 2.0, "eta": 0.01}])
def test_loes_is_its_formulas_on_features(n, d, weights, dtype):
    layers, y = a_network(n, [d] * 6)
    steps = loes(gram_of(layers, dtype), y, 4, 4, dims=[d] * 6, **weights)
    agree(steps, direct_loes(layers, y, 4, 4, **weights))


@pytest.mark.parametrize("alpha", [1.0, 0.01])
def test_loes_of_layers_of_unequal_widths(alpha):
    widths = [3, 70, 1, 12, 30, 200]
    layers, y = a_network(64, widths, seed=3)
    steps = loes(gram_of(layers), y, 4, 6, dims=widths, alpha=alpha)
    agree(steps, direct_loes(layers, y, 4, 6, alpha=alpha))
    assert sorted(step.layer for step in steps) == list(range(6))


@pytest.mark.parametrize(("n", "d"), [NARROW, WIDE])
def test_label_free_form_knows_isotropy_and_redundancy_alone(n, d):
    layers, _ = a_network(n, [d] * 6)
    steps = loes(gram_of(layers), None, None, 4, dims=[d] * 6, eta=7.0, ridge=9.0)
    agree(steps, direct_loes(layers, None, None, 4))
    assert {(step.loss, step.triangle_area) for step in steps} == {(None, None)}


def test_loes_of_a_float32_gram_with_dead_features():
    """Rounding of eigenvalues that are 0 must not serve as features: it would fit the labels."""
    layers, y = a_network(200, [12] * 4, seed=5)
    for x in layers:
        x *= 300
        x[:, :5] = 0.0
    options = {"alpha": 1e-3, "eta": 1e-6}
    steps = loes(gram_of(layers, np.float32), y, 4, 4, dims=[12] * 4, **options)
    agree(steps, direct_loes(layers, y, 4, 4, **options))
    assert steps[0].loss > 0.01


# ---- closed forms --------------------------------------------------------------------------------


def test_ridge_loss_of_one_feature_that_tells_two_classes():
    """One-hot labels are 1/2 off their mean, the fit is m / (m + ridge) of that."""
    y = np.arange(10) % 2
    grams = gram_of([(2.0 * y - 1)[:, None]])
    (step,) = loes(grams, y, 2, 1, dims=[1], ridge=30.0)
    assert step.loss == pytest.approx((30 / 40) ** 2 / 4, rel=1e-12)
    (of_three,) = loes(grams, y, 3, 1, dims=[1], ridge=30.0)  # a class that no sample is of
    assert of_three.loss == pytest.approx((30 / 40) ** 2 / 4 * 2 / 3, rel=1e-12)


def test_isotropy_of_known_variances():
    """Variances 3 and 1: mean 2, population standard deviation 1; with two zeros 1 and 1.22."""
    x = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt([3.0, 1.0])
    (step,) = loes(gram_of([x]), None, None, 1, dims=[2], alpha=0.5)
    assert step.isotropy == pytest.approx(2 / (1 + 1e-6), rel=1e-12)
    assert step.objective == pytest.approx(0.5 * (1 - step.isotropy), rel=1e-12)
    (wider,) = loes(gram_of([x]), None, None, 1, dims=[7])  # min(m, d) = 4 eigenvalues
    assert wider.isotropy == pytest.approx(1 / (np.sqrt(1.5) + 1e-6), rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_second_layer_of_known_loss_redundancy_and_triangle(scale):
    """First a layer that says nothing of the classes, then their corners of a regular triangle."""
    y = np.arange(12) % 3
    silent = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[np.arange(12) // 3]
    grams = gram_of([scale * EYE(3)[y], silent])
    first, second = loes(grams, y, 3, 2, dims=[3, 2], eta=0.3, ridge=4.0)
    assert (first.layer, second.layer) == (1, 0)
    assert (first.redundancy, first.triangle_area) == (0.0, 0.0)
    assert first.loss == pytest.approx(2 / 9, rel=1e-12)
    # The centred one-hot labels have the eigenvalues 4, 4, 0.
    assert second.loss == pytest.approx(2 / 9 / (scale**2 + 1) ** 2, rel=1e-6)
    assert second.redundancy == pytest.approx(0.0, abs=1e-7)
    assert second.triangle_area == pytest.approx(scale**2 * np.sqrt(3) / 2, rel=1e-6)
    terms = second.loss + 1 - second.isotropy - 0.3 * second.triangle_area
    assert second.objective == pytest.approx(terms, rel=1e-6)


def test_mean_over_all_triangles_of_four_classes():
    """Corners 0, 3, 4 and 3 + 4 of a rectangle: four right triangles of area 6."""
    y = np.arange(16) % 4
    corners = np.array([[0.0, 0], [3, 0], [0, 4], [3, 4]])
    silent = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[np.arange(16) // 4]
    steps = loes(gram_of([silent, corners[y]]), y, 4, 2, dims=[2, 2])
    assert steps[1].triangle_area == pytest.approx(6, rel=1e-6)
    two = loes(gram_of([silent, corners[y]]), y % 2, 2, 2, dims=[2, 2])
    assert two[1].triangle_area == 0.0  # two classes have no triangle


@pytest.mark.parametrize("copied", [8, 60])
def test_a_copy_tells_nothing_new(copied):
    """What a narrow copy adds is nothing: the loss stays. A wide one keeps its weak directions."""
    layers, y = a_network(40, [copied])
    first, second = loes(gram_of(layers * 2), y, 4, 2, dims=[copied] * 2, ridge=10.0)
    assert (first.layer, second.layer) == (0, 1)
    if copied == 8:
        assert second.loss == pytest.approx(first.loss, rel=1e-9)
        assert second.triangle_area == pytest.approx(0.0, abs=1e-9)
    else:
        assert second.loss < 0.99 * first.loss


@pytest.mark.parametrize("with_labels", [True, False])
def test_large_gamma_takes_what_is_least_like_the_first(with_labels):
    layers, y = a_network(60, [6] * 4, seed=2)
    layers = [layers[3], layers[3] * 2, layers[0]]
    y, classes = (y, 4) if with_labels else (None, None)
    steps = loes(gram_of(layers), y, classes, 2, dims=[6] * 3, gamma=1e3)
    assert {step.layer for step in steps} in ({0, 2}, {1, 2})


def test_order_of_samples_and_features_does_not_matter():
    layers, y = a_network(50, [9] * 5, seed=4)
    steps = loes(gram_of(layers), y, 4, 5, dims=[9] * 5)
    order = RNG(0).permutation(50)
    turn = np.linalg.qr(RNG(1).standard_normal((9, 9)))[0]
    turned = gram_of([x[order] @ turn + 7.0 for x in layers])
    agree(loes(turned, y[order], 4, 5, dims=[9] * 5), steps, tolerance=1e-6)


def test_a_layer_that_does_not_vary_is_chosen_last():
    layers, y = a_network(40, [6, 6, 6])
    layers[1][:] = 3.0
    steps = loes(gram_of(layers), y, 4, 3, dims=[6] * 3)
    assert steps[2].layer == 1
    assert steps[2].isotropy == steps[2].redundancy == steps[2].triangle_area == 0.0


def test_input_is_left_as_it_was_and_may_be_a_tensor():
    layers, y = a_network(30, [5, 5, 5])
    grams = gram_of(layers)
    before = grams.copy()
    steps = loes(grams, y, 4, 3, dims=np.array([5, 5, 5]))
    assert (grams == before).all()
    assert steps == loes(torch.tensor(grams), torch.tensor(y), 4, 3, dims=[5, 5, 5])


# ---- redundancy ----------------------------------------------------------------------------------


def test_redundancy_is_its_formula_on_features():
    layers, _ = a_network(300, [4, 350, 30])  # 300 x 300 numbers are more than a piece
    centred = [x - x.mean(axis=0) for x in layers]
    expected = [[likeness(a, b) for b in centred] for a in centred]
    found = redundancy(gram_of(layers))
    assert (found.dtype, tuple(found.shape)) == (torch.float64, (3, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(redundancy(gram_of(layers, np.float32)), expected, rtol=1e-5)
    scaled = gram_of([x * s for x, s in zip(layers, (1e-3, 1.0, 1e4), strict=True)])
    np.testing.assert_allclose(redundancy(scaled), expected, rtol=1e-10)


def test_redundancy_of_copies_and_of_orthogonal_layers():
    """A copy of a layer of r equal directions is 1 / sqrt r redundant, an orthogonal layer not."""
    basis = np.linalg.qr(RNG(0).standard_normal((20, 8)))[0]
    one, three, four = (cols @ cols.T for cols in (basis[:, :1], basis[:, 1:4], basis[:, 4:]))
    found = redundancy(np.stack([one, 5 * one, three, four, np.zeros((20, 20))]))
    expected = np.diag([1, 1, 1 / np.sqrt(3), 1 / 2, 0])
    expected[0, 1] = expected[1, 0] = 1
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert float(found.max()) <= 1.0


# ---- errors --------------------------------------------------------------------------------------


GRAMS, Y = gram_of(a_network(20, [3, 3])[0]), np.arange(20) % 4


def broken(value):
    grams = GRAMS.copy()
    grams[1, 3, 4] = value
    return grams


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be between 1 and the 2 layers to choose from; got 0"),
        ({"k": 3}, ValueError, "k must be between 1 and the 2 layers to choose from; got 3"),
        ({"k": 1.0}, TypeError, "k must be an integer; got float 1.0"),
        ({"grams": GRAMS[0]}, ValueError, r"grams must be \(L, m, m\) .* got \(20, 20\)"),
        ({"grams": GRAMS[:, :5]}, ValueError, r"grams must be \(L, m, m\) .* got \(2, 5, 20\)"),
        ({"grams": GRAMS.astype(int)}, TypeError, "grams must be float32 or float64; got"),
        ({"grams": broken(np.nan)}, ValueError, r"NaN or Inf in those of layers \[1\]"),
        ({"grams": broken(np.inf)}, ValueError, r"NaN or Inf in those of layers \[1\]"),
        ({"dims": [3]}, ValueError, "dims must be one for each of 2 grams; got 1"),
        ({"dims": [3, 0]}, ValueError, "dims must be at least 1; got 0"),
        ({"index": Y[:9]}, ValueError, "labels must be as many as the features, n = 20; got 9"),
        ({"n_classes": 3}, ValueError, "index must be 0 ... n_classes - 1 = 2; got 0 ... 3"),
        ({"n_classes": None}, TypeError, "n_classes must be an integer"),
        ({"ridge": 0.0}, ValueError, "ridge must be finite and above 0; got 0.0"),
        ({"gamma": -0.1}, ValueError, "gamma must be finite and at least 0; got -0.1"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite and at least 0; got nan"),
    ],
)
def test_loes_refuses(change, error, message):
    options = {"grams": GRAMS, "index": Y, "n_classes": 4, "k": 2, "dims": [3, 3]} | change
    with pytest.raises(error, match=message):
        loes(**options)
    if "grams" in change:
        with pytest.raises(error, match=message):
            redundancy(change["grams"])
