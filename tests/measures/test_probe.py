"""The linear probe, against scikit-learn on the raw features and what noise must give."""

import numpy as np
import pytest
import torch
from oracle import clusters
from sklearn.linear_model import LogisticRegression

from geomkd.geometry.draws import held_out
from geomkd.geometry.principal import principal
from geomkd.measures import probe
from geomkd.measures.probe import linear_probe, linear_probe_from, standardised


def hard(n=200, d=6, classes=4, **options):
    """Classes that overlap, so that the accuracy is far from both ends."""
    return clusters(n, d, classes, **({"sep": 0.8} | options))


def by_scikit_learn(x, y, *, share=0.3, C=10.0, seed=0):
    """The same split; raw axes, another solver run to the end."""
    names, index = np.unique(y, return_inverse=True)
    train, test = (m.numpy() for m in held_out(torch.from_numpy(index), len(names), share, seed))
    x = x.reshape(len(x), -1).astype(np.float64)
    z = x - x[train].mean(axis=0)
    z /= np.sqrt((z[train] ** 2).sum(axis=1).mean())
    model = LogisticRegression(C=C, solver="lbfgs", tol=1e-10, max_iter=100_000)
    return model.fit(z[train], y[train]).score(z[test], y[test])


@pytest.mark.parametrize("d", [3, 6, 40])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("C", [0.1, 1, 100])
def test_scikit_learn_on_raw_features(d, classes, C):
    x, y = hard(d=d, classes=classes, seed=d)
    for seed in range(3):
        value = linear_probe(x, torch.from_numpy(y), C=C, seed=seed)
        assert value.item() == pytest.approx(by_scikit_learn(x, y, C=C, seed=seed), abs=1e-12)
        assert value.shape == ()
        assert value.dtype is torch.float64


def test_scikit_learn_with_its_own_standardised_features():
    """One scale for all features is enough where all have the same variance: C is C / d there."""
    x, y = hard(d=4)
    train, test = (m.numpy() for m in held_out(torch.from_numpy(y), 4, 0.3, 0))
    x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    model = LogisticRegression(C=2.5, tol=1e-10, max_iter=10_000).fit(x[train], y[train])
    assert linear_probe(x, torch.from_numpy(y)).item() == model.score(x[test], y[test])


@pytest.mark.parametrize("shape", [(60, 300), (60, 3, 10, 10), (300, 5)])
def test_wide_layers_and_unequal_classes(shape):
    rng = np.random.default_rng(0)
    y = np.repeat([7, -2, 3], [shape[0] // 2, shape[0] // 3, shape[0] // 6])
    x = rng.standard_normal(shape) + 0.4 * (y[:, None] == [7, -2, 3]).argmax(1).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    expected = by_scikit_learn(x, y, share=0.4, seed=2)
    assert linear_probe(x, torch.from_numpy(y), test_share=0.4, seed=2).item() == expected


def test_noise_is_chance():
    """What a probe scored on its training rows would call perfect."""
    x, y = clusters(500, 512, 10, sep=0.0)
    values = [linear_probe(x, torch.from_numpy(y), seed=s).item() for s in range(5)]
    assert np.mean(values) == pytest.approx(0.1, abs=0.05)
    z = (x - x.mean(axis=0)) / np.sqrt((x - x.mean(axis=0)).var(axis=0).sum())
    assert LogisticRegression(C=10.0, max_iter=1000).fit(z, y).score(z, y) == 1.0


def test_separable_classes():
    x, y = clusters(200, 20, 5, sep=10.0)
    assert linear_probe(x, torch.from_numpy(y)).item() == 1.0


def test_null():
    x, y = hard()
    value, mean, high, excess, _ = linear_probe(x, torch.from_numpy(y), null=20)
    assert value == linear_probe(x, torch.from_numpy(y))
    assert 0.15 < mean < 0.35
    assert mean < high < value
    assert excess == value - mean


# ---- what must leave it as it is, and what must change it ----------------------------------------

ROTATION = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x @ ROTATION,
        lambda x: 1e-3 * x,
        lambda x: 2.0**500 * x,
        lambda x: x + 1e3,
        lambda x: np.concatenate([x, np.ones((len(x), 9))], axis=1),
    ],
    ids=["rotation", "scale", "huge", "translation", "constant features"],
)
def test_invariance(change):
    x, y = hard()
    x, y = x.astype(np.float64), torch.from_numpy(y)
    for C in (0.1, 100.0):
        assert linear_probe(change(x), y, C=C).item() == linear_probe(x, y, C=C).item()


def test_class_names_do_not_matter():
    x, y = hard()
    renamed = np.array([40, -3, 0, 7])[y]
    expected = linear_probe(x, torch.from_numpy(y)).item()
    assert linear_probe(x, torch.from_numpy(renamed)).item() == expected
    assert linear_probe(x, torch.eye(4)[torch.from_numpy(y)]).item() == expected


def test_what_changes_it():
    """The scale of a feature (the penalty sees it), the split, the order of rows, C, the share."""
    x, y = hard()
    order = np.random.default_rng(0).permutation(len(x))
    changed = {
        "feature scale": linear_probe(x * [1e3, 1, 1, 1, 1, 1], torch.from_numpy(y)),
        "seed": linear_probe(x, torch.from_numpy(y), seed=2),
        "order": linear_probe(x[order], torch.from_numpy(y[order])),
        "C": linear_probe(x, torch.from_numpy(y), C=0.01),
        "share": linear_probe(x, torch.from_numpy(y), test_share=0.5),
    }
    assert linear_probe(x, torch.from_numpy(y)).item() not in {v.item() for v in changed.values()}


def test_float32_with_an_offset():
    x, y = hard(d=300)
    shifted = torch.from_numpy(x + np.float32(100))
    expected = linear_probe(shifted.double(), torch.from_numpy(y))
    assert linear_probe(shifted, torch.from_numpy(y)) == expected


# ---- edges ---------------------------------------------------------------------------------------


def test_constant_features_give_the_largest_class():
    y = torch.tensor([0] * 10 + [1] * 30)
    assert linear_probe(torch.full((40, 3), 7.1), y).item() == 9 / 12


@pytest.mark.parametrize("d", [3, 100])
def test_features_constant_over_the_training_rows(d):
    y = torch.tensor([0] * 10 + [1] * 30)
    _, test = held_out(y, 2, 0.3, seed=0)
    x = 5 + torch.from_numpy(clusters(40, d, 1)[0]) * test.unsqueeze(1)
    assert linear_probe(x, y).item() == 9 / 12


def test_duplicate_rows():
    x, y = hard(n=100)
    x, y = np.concatenate([x, x]), np.concatenate([y, y])
    assert linear_probe(x, torch.from_numpy(y)).item() == by_scikit_learn(x, y)


def test_classes_of_two():
    x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    assert linear_probe(x, torch.tensor([0, 0, 1, 1])).item() == 1.0


def test_input_is_left_alone():
    x, y = (torch.from_numpy(t) for t in hard())
    before, state = x.clone(), torch.get_rng_state()
    linear_probe(x, y, null=19)
    assert torch.equal(x, before)
    assert torch.equal(state, torch.get_rng_state())


def test_a_fit_that_has_not_converged_is_told(monkeypatch):
    x, y = (torch.from_numpy(t) for t in hard())
    monkeypatch.setattr(probe, "_ITERATIONS", 1)
    told = r"C = 10 ended away from its optimum, after 1 iterations: .* is \d\.\de-0\d, not 1e-06"
    with pytest.warns(UserWarning, match=told):
        linear_probe(x, y)


@pytest.mark.parametrize("classes", [2, 4])
def test_gradient_is_that_of_the_loss(classes):
    """Autograd through the loss as written, at a point that is no optimum."""
    x, y = hard(classes=classes)
    model = LogisticRegression(C=3.0, solver="newton-cg", tol=0.03).fit(x, y)
    slopes, free = (
        torch.tensor(p, dtype=torch.float64, requires_grad=True)
        for p in (model.coef_, model.intercept_)
    )
    logits = torch.from_numpy(x).double() @ slopes.T + free
    if classes == 2:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
    (loss + slopes.square().sum() / (2 * 3.0 * len(x))).backward()
    expected = max(slopes.grad.abs().max().item(), free.grad.abs().max().item())
    assert expected > 1e-5
    assert probe._largest_gradient(model, x.astype(np.float64), y) == pytest.approx(expected)


def test_only_training_rows_set_mean_and_scale():
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [100.0, -100.0]], dtype=torch.float64)
    z = standardised(x, torch.tensor([True, True, False]))
    assert torch.allclose(z, x.new_tensor([[-1.0, 0.0], [1.0, 0.0], [98.0, -105.0]]))


def test_held_out_rows_do_not_set_the_scale():
    x, y = (torch.from_numpy(t) for t in clusters(n=240, d=60, sep=0.3))
    test = held_out(y, 4, 0.3, 0)[1].nonzero().flatten()
    stretched = x.index_copy(0, test[:1], 1e4 * x[test[:1]])  # its own prediction may change
    assert abs(linear_probe(x, y) - linear_probe(stretched, y)) < 1.5 / len(test)


def test_core_takes_any_rows():
    x, y = (torch.from_numpy(t) for t in hard())
    whole, rows = principal(x), torch.arange(20, 150)
    part = whole._replace(coordinates=whole.coordinates[rows])
    assert linear_probe_from(part, y[rows], 4) == linear_probe(x[rows], y[rows])


def test_on_a_device_that_does_not_exist(elsewhere):
    """All but the fit, which is scikit-learn's."""
    x = torch.empty(20, 5, dtype=torch.float64, device=elsewhere)
    train = torch.empty(20, dtype=torch.bool, device=elsewhere)
    assert standardised(x, train).device == x.device


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"C": 0}, ValueError, "C must be finite and above 0; got 0"),
        ({"C": float("inf")}, ValueError, "C must be finite and above 0; got inf"),
        ({"C": "1"}, TypeError, "C must be a number; got str '1'"),
        ({"test_share": 1.0}, ValueError, r"test_share must be between 0 and 1; got 1\.0"),
        ({"null": -1}, ValueError, "null must be at least 0; got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer; got float 0.5"),
    ],
)
def test_options(options, error, message):
    x, y = hard()
    with pytest.raises(error, match=message):
        linear_probe(x, torch.from_numpy(y), **options)


@pytest.mark.parametrize("y", [[0, 0, 0, 0], [0, 0, 1, 2]])
def test_classes_too_few(y):
    with pytest.raises(ValueError, match=r"at least 2 (classes are needed|samples; got 1)"):
        linear_probe(torch.ones(4, 3), torch.tensor(y))


def test_features_must_be_finite():
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 4 rows, first in row 2"):
        linear_probe(torch.tensor([[0.0], [1], [torch.nan], [3]]), torch.tensor([0, 0, 1, 1]))
