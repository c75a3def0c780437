"""Every rival's loss against its formula in plain numpy, with the weights of its publication."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from formulas import (
    PAIRS,
    attention,
    distances,
    huber,
    kd,
    layer,
    maps,
    meeting_of,
    mse,
    on_one_grid,
    projected,
    triples,
    unit_rows,
    weights_of,
    worked,
)

from geomkd.distillation.losses import (
    angles,
    attention_map,
    batch_similarity,
    relative_distances,
)
from geomkd.distillation.objectives import StepTensors
from geomkd.distillation.rivals import (
    OBJECTIVES,
    AttentionTransfer,
    FeatureKD,
    FitNet,
    Relational,
    SemCKD,
    SimilarityPreserving,
    SimKD,
)

exactly = {"rel": 1e-10}

DEFAULTS = {
    "features": {
        "normalize": "none",
        "pairing": "one_to_one",
        "projector": "linear",
        "distance": "mse",
        "detaches_head": True,
    },
    "ce": {},
    "kd": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    "kd_standardized": {"temperature": 2.0, "ce_weight": 0.1, "kd_weight": 9.0},
    "fitnet": {"weight": 100.0},
    "attention_transfer": {"weight": 1000.0},
    "similarity_preserving": {"weight": 3000.0},
    "relational": {"distance_weight": 25.0, "angle_weight": 50.0},
    "feature_kd": {
        "all_pairs": False,
        "temperature": 4.0,
        "kd_weight": 1.0,
        "feature_weight": 1.0,
    },
    "semckd": {"temperature": 4.0, "kd_weight": 1.0, "feature_weight": 400.0},
    "simkd": {},
}
# What each asks for: features, teacher logits, a cut head, full batches, the teacher's head.
FLAGS = {
    "features": "f.c..",
    "ce": ".....",
    "kd": ".l...",
    "kd_standardized": ".l...",
    "fitnet": "f....",
    "attention_transfer": "f....",
    "similarity_preserving": "f....",
    "relational": "f....",
    "feature_kd": "fl...",
    "semckd": "fl.b.",
    "simkd": "f...h",
}
ATTRIBUTES = {
    "f": "uses_features",
    "l": "uses_teacher_logits",
    "c": "detaches_head",
    "b": "full_batches",
    "h": "uses_teacher_head",
}


def test_names_and_default_weights_are_the_published_ones():
    assert {name: asdict(make()) for name, make in OBJECTIVES.items()} == DEFAULTS
    assert all(make().name == name for name, make in OBJECTIVES.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_each_asks_for(name):
    objective = OBJECTIVES[name]()
    asked = {flag: getattr(objective, attribute) for flag, attribute in ATTRIBUTES.items()}
    assert asked == {flag: flag in FLAGS[name] for flag in ATTRIBUTES}


# ---- fitnet ----


@pytest.mark.parametrize(("options", "weight"), [({}, 100), ({"weight": 3.0}, 3)])
@pytest.mark.parametrize(("pairs", "middle"), [(PAIRS, 1), (PAIRS[:2], 1), (PAIRS[:1], 0)])
def test_fitnet(pairs, middle, options, weight):
    a = worked(FitNet(**options), pairs)
    s, t = on_one_grid(a.s[middle], a.t[middle])
    hint = mse(projected(s, "hint", weights_of(a.projectors)), t)
    assert a.parts == pytest.approx({"cross_entropy": a.ce, "hint": hint}, **exactly)
    assert a.loss == pytest.approx(a.ce + weight * hint, **exactly)


# ---- attention transfer ----


def energy_map(x):
    return unit_rows((x**2).mean(axis=1).reshape(len(x), -1))


@pytest.mark.parametrize(("options", "weight"), [({}, 1000), ({"weight": 3.0}, 3)])
def test_attention_transfer_sums_over_the_pairs(options, weight):
    a = worked(AttentionTransfer(**options), PAIRS)
    pairs = [on_one_grid(s, t) for s, t in zip(a.s, a.t, strict=True)]
    error = sum(mse(energy_map(s), energy_map(t)) for s, t in pairs)
    assert a.parts == pytest.approx({"cross_entropy": a.ce, "attention": error}, **exactly)
    assert a.loss == pytest.approx(a.ce + weight * error, **exactly)


def test_attention_transfer_takes_channels_last():
    a = worked(AttentionTransfer(), [(layer("map_last", 3, 3, 5), maps(4, 3))])
    expected = mse(energy_map(a.s[0]), energy_map(np.moveaxis(a.t[0], -1, 1)))
    assert a.parts["attention"] == pytest.approx(expected, **exactly)


def test_attention_map_worked_by_hand():
    # Squares (9, 16) and (0, 0) over the channels, mean (4.5, 8), of length sqrt(84.25).
    x = torch.tensor([[[[3.0, 4.0]], [[0.0, 0.0]]]], dtype=torch.float64)
    expected = np.array([[4.5, 8.0]]) / 84.25**0.5
    np.testing.assert_allclose(attention_map(x), expected, rtol=1e-12)


# ---- similarity preserving ----


def similarity(x):
    x = x.reshape(len(x), -1)
    return unit_rows(x @ x.T)


@pytest.mark.parametrize(("options", "weight"), [({}, 3000), ({"weight": 3.0}, 3)])
def test_similarity_preserving_looks_at_the_last_pair(options, weight):
    a = worked(SimilarityPreserving(**options), PAIRS)
    error = ((similarity(a.s[-1]) - similarity(a.t[-1])) ** 2).sum() / 8**2
    assert a.parts == pytest.approx({"cross_entropy": a.ce, "similarity": error}, **exactly)
    assert a.loss == pytest.approx(a.ce + weight * error, **exactly)


def test_similarity_worked_by_hand():
    # Rows (1, 0) and (1, 1): products ((1, 1), (1, 2)), rows over their lengths.
    found = batch_similarity(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    expected = [[0.5**0.5, 0.5**0.5], [0.2**0.5, 0.8**0.5]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# ---- relational ----


@pytest.mark.parametrize(
    ("options", "weights"),
    [({}, (25, 50)), ({"distance_weight": 2.0, "angle_weight": 3.0}, (2, 3))],
)
def test_relational_compares_pooled_features_of_the_last_pair(options, weights):
    a = worked(Relational(**options), PAIRS)
    s, t = a.s[-1].mean((2, 3)), a.t[-1].mean((2, 3))
    d, angle = huber(distances(s), distances(t)), huber(triples(s), triples(t))
    expected = {"cross_entropy": a.ce, "distance": d, "angle": angle}
    assert a.parts == pytest.approx(expected, **exactly)
    assert a.loss == pytest.approx(a.ce + weights[0] * d + weights[1] * angle, **exactly)


def test_relational_pools_tokens_without_the_class_token():
    a = worked(Relational(), [(layer("tokens", 5, 6), layer("map_last", 2, 2, 3))])
    s, t = a.s[0].mean((1, 2)), a.t[0][:, 1:].mean(1)
    assert a.parts["distance"] == pytest.approx(huber(distances(s), distances(t)), **exactly)


def test_relations_worked_by_hand():
    # A triangle of sides 3, 4 and 5, whose mean is 4.
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    expected = [[0, 0.75, 1], [0.75, 0, 1.25], [1, 1.25, 0]]
    np.testing.assert_allclose(relative_distances(x), expected, rtol=1e-12)
    found = angles(x)
    assert [found[0, 1, 2], found[1, 0, 2], found[2, 0, 1]] == pytest.approx([0, 0.6, 0.8])
    assert (found[0, 1, 1], found[0, 0, 2]) == (1, 0)


@pytest.mark.parametrize("equal", [slice(0, 2), slice(0, None)], ids=["two rows", "all rows"])
def test_relations_of_equal_rows_have_a_finite_gradient(equal):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[equal] = x[0].clone()
    student, teacher = x.requires_grad_(), x.detach().flip(1) ** 2
    step = StepTensors(
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, 2, dtype=torch.float64),
        None,
        [student],
        [teacher],
        Relational().make_projectors(meeting_of([(layer("vector", 3), layer("vector", 3))])),
    )
    loss, _ = Relational()(step)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_distances_of_close_rows_do_not_cancel():
    x = torch.tensor([[1000.0, 0.0], [1000.01, 0.0], [1000.03, 0.0]])
    exact = distances(x.double().numpy())
    np.testing.assert_allclose(relative_distances(x), exact, rtol=1e-5)


# ---- feature_kd and semckd ----


@pytest.mark.parametrize(
    ("options", "weights", "temperature"),
    [
        ({}, (1, 1), 4),
        ({"kd_weight": 2.0, "temperature": 3.0}, (2, 1), 3),
        ({"feature_weight": 100.0}, (1, 100), 4),
    ],
)
def test_feature_kd(options, weights, temperature):
    a = worked(FeatureKD(**options), PAIRS)
    errors = []
    for s, t, w in zip(a.s, a.t, weights_of(a.projectors), strict=True):
        s, t = on_one_grid(s, t)
        errors.append(mse(projected(s, "linear", [w]), t))
    softened, error = kd(a.z, a.teacher_z, temperature), np.mean(errors)
    expected = {"cross_entropy": a.ce, "kd": softened, "features": error}
    assert a.parts == pytest.approx(expected, **exactly)
    assert a.loss == pytest.approx(a.ce + weights[0] * softened + weights[1] * error, **exactly)


def test_feature_kd_is_as_released_where_the_divergence_has_no_factor():
    a = worked(FeatureKD(), PAIRS)
    log_student = a.z / 4 - np.log(np.exp(a.z / 4).sum(axis=1, keepdims=True))
    teacher = np.exp(a.teacher_z / 4) / np.exp(a.teacher_z / 4).sum(axis=1, keepdims=True)
    bare = (teacher * (np.log(teacher) - log_student)).sum(axis=1).mean()
    assert a.loss == pytest.approx(a.ce + 16 * bare + a.parts["features"], **exactly)


def test_feature_kd_of_all_pairs():
    a = worked(FeatureKD(all_pairs=True), PAIRS)
    weights, errors = iter(weights_of(a.projectors)), []
    for each_s in a.s:
        for each_t in a.t:
            s, t = on_one_grid(each_s, each_t)
            errors.append(mse(projected(s, "linear", [next(weights)]), t))
    assert len(errors) == 9 and next(weights, None) is None
    assert a.parts["features"] == pytest.approx(np.mean(errors), **exactly)


@pytest.mark.parametrize(
    ("options", "weights", "temperature"),
    [
        ({}, (1, 400), 4),
        ({"kd_weight": 2.0, "feature_weight": 3.0, "temperature": 5.0}, (2, 3), 5),
    ],
)
def test_semckd(options, weights, temperature):
    a = worked(SemCKD(**options), PAIRS)
    kernels, total = iter(weights_of(a.projectors)), 0.0
    alpha = attention(a.s, a.t, a.projectors.attention)
    for i, each_s in enumerate(a.s):
        for j, each_t in enumerate(a.t):
            s, t = on_one_grid(each_s, each_t)
            ours = projected(s, "mlp", [next(kernels) for _ in range(3)])
            total += (alpha[:, i, j] * ((ours - t) ** 2).mean((1, 2, 3))).sum() / (8 * 3)
    softened = kd(a.z, a.teacher_z, temperature)
    expected = {"cross_entropy": a.ce, "kd": softened, "features": total}
    assert a.parts == pytest.approx(expected, **exactly)
    assert a.loss == pytest.approx(a.ce + weights[0] * softened + weights[1] * total, **exactly)
    assert np.ptp(alpha) > 0.01  # equal weights would hide a wrong order


# ---- simkd ----


@pytest.mark.parametrize("projected_side", [2, 4, 6])
def test_simkd_is_the_error_of_the_last_map_alone(projected_side):
    a = worked(SimKD(), [PAIRS[0], (maps(5, 4), maps(5, projected_side))])
    error = mse(*on_one_grid(a.s[-1], a.t[-1]))
    assert a.parts == pytest.approx({"features": error}, **exactly)
    assert a.loss == pytest.approx(error, **exactly)
    assert not list(a.projectors.parameters())


# ---- what is refused ----


@pytest.mark.parametrize("objective", [AttentionTransfer(), SimKD()])
@pytest.mark.parametrize("side", [0, 1])
def test_objectives_of_maps_refuse_tokens(objective, side):
    pair = [maps(4, 3, "map"), maps(4, 3, "map")]
    pair[side] = layer("tokens", 9, 4, name="encoder.2")
    text = (
        rf"objective '{objective.name}' needs maps; layer 'encoder.2' gives tokens features of "
        r"shape \(9, 4\) a sample"
    )
    with pytest.raises(ValueError, match=text):
        objective.make_projectors(meeting_of([tuple(pair)]))


@pytest.mark.parametrize("objective", [FitNet(), Relational(), FeatureKD(), SemCKD()])
def test_features_without_channels_are_refused(objective):
    pair = layer("other", 2, 3, 4, 4, name="video"), maps(4, 3)
    with pytest.raises(
        ValueError, match=r"layer 'video' must give maps, tokens, sequences or vectors; got"
    ):
        objective.make_projectors(meeting_of([pair]))


def test_relational_refuses_tokens_without_a_grid():
    pair = maps(4, 3), layer("tokens", 7, 4, name="encoder.2")
    with pytest.raises(ValueError, match=r"layer 'encoder.2': tokens must form a square grid"):
        Relational().make_projectors(meeting_of([pair]))


@pytest.mark.parametrize("make", [FeatureKD, SemCKD])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_is_checked(make, temperature):
    with pytest.raises(ValueError, match="temperature must be finite and above 0; got"):
        make(temperature=temperature)
