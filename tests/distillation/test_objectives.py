"""Objectives against the same formulas in plain numpy, their sums, and what all of them keep to."""

import itertools
import re
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from formulas import (
    PAIRS,
    cosine_distance,
    huber,
    kd,
    layer,
    maps,
    meeting_of,
    mse,
    on_one_grid,
    projected,
    standardized_channels,
    weights_of,
    worked,
)
from small import run_mlp, same, seeded_model, state
from torch import nn

from geomkd.distillation import distill
from geomkd.distillation.losses import (
    feature_error,
    softened_divergence,
    standardize_channels,
    standardized_rows,
)
from geomkd.distillation.objectives import (
    CrossEntropy,
    Features,
    LogitDistillation,
    StandardizedLogitDistillation,
    StepTensors,
    Sum,
)
from geomkd.distillation.rivals import OBJECTIVES, FeatureKD, FitNet, SemCKD, SimKD
from geomkd.distillation.running.setup import join
from geomkd.distillation.running.student_step import student_step
from geomkd.distillation.running.teacher import LiveTeacher

exactly = {"rel": 1e-10}

# ---- logits ----


def test_cross_entropy_on_labels():
    a = worked(CrossEntropy())
    assert a.loss == pytest.approx(a.ce, **exactly)
    assert a.parts == {"cross_entropy": a.loss}


@pytest.mark.parametrize(
    ("options", "temperature", "weights"),
    [
        ({}, 4, (0.1, 0.9)),
        ({"temperature": 1.0}, 1, (0.1, 0.9)),
        ({"ce_weight": 2.0, "kd_weight": 3.0}, 4, (2, 3)),
    ],
)
def test_kd_is_t_squared_kl_of_teacher_from_student(options, temperature, weights):
    a = worked(LogitDistillation(**options))
    softened = kd(a.z, a.teacher_z, temperature)
    assert a.parts == pytest.approx({"cross_entropy": a.ce, "kd": softened}, **exactly)
    assert a.loss == pytest.approx(weights[0] * a.ce + weights[1] * softened, **exactly)


@pytest.mark.parametrize(
    ("options", "temperature", "weights"),
    [({}, 2, (0.1, 9)), ({"temperature": 3.0, "ce_weight": 2.0, "kd_weight": 1.0}, 3, (2, 1))],
)
def test_standardized_kd(options, temperature, weights):
    a = worked(StandardizedLogitDistillation(**options))
    z, teacher_z = (
        (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-7)
        for x in (a.z, a.teacher_z)
    )
    softened = kd(z, teacher_z, temperature)
    assert a.parts == pytest.approx({"cross_entropy": a.ce, "kd": softened}, **exactly)
    assert a.loss == pytest.approx(weights[0] * a.ce + weights[1] * softened, **exactly)


def test_kd_worked_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
    teacher = torch.tensor([[np.log(3.0), 0.0]])
    kl = softened_divergence(torch.zeros(1, 2, dtype=torch.float64), teacher, 1.0)
    assert kl.item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), **exactly)


def test_kd_vanishes_for_equal_logits_up_to_a_constant():
    z = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert softened_divergence(z, z + 7, 4.0).item() == pytest.approx(0, abs=1e-12)


def test_standardized_rows_worked_by_hand():
    # Mean 2, deviation 1 with n - 1, and next to none: where 1e-7 counts.
    z = torch.tensor([[1.0, 2.0, 3.0], [-1e-7, 0.0, 1e-7]], dtype=torch.float64)
    expected = [[-1 / (1 + 1e-7), 0, 1 / (1 + 1e-7)], [-0.5, 0, 0.5]]
    np.testing.assert_allclose(standardized_rows(z), expected, atol=1e-12)


def test_equal_logits_have_a_finite_gradient():
    z = torch.zeros(2, 3, requires_grad=True)
    step = StepTensors(torch.tensor([0, 1]), z, torch.randn(2, 3))
    StandardizedLogitDistillation()(step)[0].backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("make", [LogitDistillation, StandardizedLogitDistillation])
def test_temperature_is_checked(make, temperature):
    with pytest.raises(ValueError, match="temperature must be finite and above 0; got"):
        make(temperature=temperature)


# ---- features ----

DISTANCES = {"mse": mse, "cosine": cosine_distance, "huber": huber}
WIDE = [(maps(7, 6, "t0"), maps(4, 4, "s0")), (maps(5, 3, "t1"), maps(4, 4, "s1"))]
EQUAL = [(maps(4, 6, "t0"), maps(4, 4, "s0")), (maps(4, 3, "t1"), maps(4, 4, "s1"))]
N_KERNELS = {"linear": 1, "mlp": 3, "none": 0}


@pytest.mark.parametrize("normalize", ["none", "channel"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("projector", N_KERNELS)
@pytest.mark.parametrize("pairing", ["one_to_one", "all"])
def test_features(pairing, projector, distance, normalize):
    objective = Features(
        pairing=pairing, projector=projector, distance=distance, normalize=normalize
    )
    a = worked(objective, EQUAL if projector == "none" else WIDE)
    kernels = iter(weights_of(a.projectors))
    errors = []
    for i, j in [(0, 0), (1, 1)] if pairing == "one_to_one" else itertools.product((0, 1), (0, 1)):
        s, t = on_one_grid(a.s[i], a.t[j])
        s = projected(s, projector, [next(kernels) for _ in range(N_KERNELS[projector])])
        t = standardized_channels(t) if normalize == "channel" else t
        errors.append(DISTANCES[distance](s, t))
    error = np.mean(errors)
    # Standardising is guarded against division by 0, which costs a few parts in 1e5.
    close = {"rel": 1e-4 if normalize == "channel" else 1e-10}
    assert a.parts == pytest.approx({"features": error, "cross_entropy": a.ce}, **close)
    assert list(a.parts) == ["features", "cross_entropy"]
    assert a.loss == pytest.approx(error + a.ce, **close)


def test_principal_components_are_the_target():
    a = worked(Features(projector="pca"), WIDE)
    errors = []
    for s, t in zip(a.s, a.t, strict=True):
        rows = np.moveaxis(t, 1, -1).reshape(-1, t.shape[1])
        components = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
        largest = components[range(4), np.abs(components).argmax(1)]
        components = components * np.sign(largest)[:, None]
        s, t = on_one_grid(s, t)
        centred = t - rows.mean(0)[:, None, None]
        errors.append(mse(s, np.einsum("kc,bchw->bkhw", components, centred)))
    assert a.parts["features"] == pytest.approx(np.mean(errors), **exactly)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2), (3, 4, 2, 2)])
def test_an_error_for_each_sample(shape, distance):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=shape) * 2, rng.normal(size=shape)
    found = feature_error(torch.tensor(a), torch.tensor(b), distance=distance)
    expected = [DISTANCES[distance](x[None], y[None]) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_huber_worked_by_hand():
    # 1/2 within, on the border the same from both sides, |d| - 1/2 beyond.
    error = feature_error(torch.tensor([[0.5, 1.0, 3.0]]), torch.zeros(1, 3), distance="huber")
    assert error.item() == pytest.approx((0.125 + 0.5 + 2.5) / 3)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_standardised_channels_do_not_depend_on_scale(scale):
    t = torch.randn(8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        standardize_channels(scale * t), standardize_channels(t), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
def test_a_channel_that_is_constant_but_for_rounding_becomes_zero(constant):
    channel = torch.full((64, 1, 7, 7), constant)
    assert standardize_channels(channel).abs().max() < 0.05
    if constant:
        channel[::2] = torch.nextafter(channel[::2], torch.tensor(0.0))
        assert standardize_channels(channel).abs().max() < 0.05


@pytest.mark.parametrize(
    ("option", "wrong", "choices"),
    [
        ("normalize", "batch", "('none', 'channel')"),
        ("pairing", "some", "('one_to_one', 'all', 'attention')"),
        ("projector", "hint", "('linear', 'mlp', 'pca', 'none')"),
        ("distance", "l1", "('mse', 'cosine', 'huber')"),
        ("distance", None, "('mse', 'cosine', 'huber')"),
    ],
)
def test_options_are_checked(option, wrong, choices):
    text = re.escape(f"{option} must be one of {choices}; got {wrong!r}")
    with pytest.raises(ValueError, match=f"^{text}$"):
        Features(**{option: wrong})


def test_channels_that_do_not_fit_name_the_pair():
    objective = Features(projector="none")
    text = (
        r"pair \('t0', 's0'\): without a projector both layers need as many channels; got 4 of "
        "the student's 's0' and 6 of the teacher's 't0'"
    )
    with pytest.raises(ValueError, match=text):
        objective.make_projectors(meeting_of(PAIRS))


def test_only_attention_needs_full_batches():
    full = {p: Features(pairing=p).full_batches for p in ("one_to_one", "all", "attention")}
    assert full == {"one_to_one": False, "all": False, "attention": True}


# ---- sums ----


class Own:
    """An objective as anyone may write it, with no more than has to be there."""

    name = "own"
    uses_features = True
    uses_teacher_logits = False
    detaches_head = False

    def __call__(self, step):
        pairs = zip(step.projectors, step.student_features, step.teacher_features, strict=True)
        loss = torch.stack([feature_error(*p(s, t)).mean() for p, s, t in pairs]).mean()
        return loss, {"mse": loss}


def test_a_sum_adds_losses_and_numbers_the_parts():
    objective = Features(projector="mlp") + LogitDistillation(ce_weight=0.0) + FitNet(weight=2.0)
    a = worked(objective, PAIRS)
    first, _, third = a.projectors
    kernels, errors = iter(weights_of(first)), []
    for s, t in zip(a.s, a.t, strict=True):
        s, t = on_one_grid(s, t)
        errors.append(mse(projected(s, "mlp", [next(kernels) for _ in range(3)]), t))
    s, t = on_one_grid(a.s[1], a.t[1])
    hint = mse(projected(s, "hint", weights_of(third)), t)
    softened = kd(a.z, a.teacher_z, 4)
    expected = {
        "1_features": np.mean(errors),
        "1_cross_entropy": a.ce,
        "2_cross_entropy": a.ce,
        "2_kd": softened,
        "3_cross_entropy": a.ce,
        "3_hint": hint,
    }
    assert a.parts == pytest.approx(expected, **exactly) and list(a.parts) == list(expected)
    total = np.mean(errors) + a.ce + 0.9 * softened + a.ce + 2 * hint
    assert a.loss == pytest.approx(total, **exactly)


@pytest.mark.parametrize("left", [True, False])
def test_sums_are_flat(left):
    a, b, c = Features(), LogitDistillation(), CrossEntropy()
    total = (a + b) + c if left else a + (b + c)
    assert total.terms == (a, b, c) and total.name == "features+kd+ce"
    assert repr(total) == f"{a!r} + {b!r} + {c!r}"


@pytest.mark.parametrize(
    ("terms", "flags"),
    [
        ((CrossEntropy(), LogitDistillation()), (False, True, False, False)),
        ((FitNet(), CrossEntropy()), (True, False, False, False)),
        ((LogitDistillation(), Features()), (True, True, True, False)),
        ((FitNet(), Features(detaches_head=False)), (True, False, False, False)),
        ((FitNet(), SemCKD()), (True, True, False, True)),
        ((Features(pairing="attention"), CrossEntropy()), (True, False, True, True)),
        ((Own(), CrossEntropy()), (True, False, False, False)),
    ],
)
def test_a_sum_asks_for_what_any_term_asks_for(terms, flags):
    total = Sum(terms)
    names = ("uses_features", "uses_teacher_logits", "detaches_head", "full_batches")
    assert tuple(getattr(total, name) for name in names) == flags
    assert not total.uses_teacher_head


def test_an_objective_of_ones_own_is_added_on_either_side():
    first, second = worked(Own() + CrossEntropy(), PAIRS), worked(CrossEntropy() + Own(), PAIRS)
    assert first.parts["1_mse"] == second.parts["2_mse"] > 0
    assert first.loss == pytest.approx(first.parts["1_mse"] + first.ce, **exactly)
    with pytest.raises(TypeError, match="unsupported operand"):
        CrossEntropy() + 1


@pytest.mark.parametrize("add", [lambda o: SimKD() + o, lambda o: o + SimKD()])
def test_a_sum_refuses_to_replace_the_head(add):
    with pytest.raises(ValueError, match="objective 'simkd' replaces the head: it stands alone"):
        add(CrossEntropy())


@pytest.mark.parametrize(
    "objective",
    [
        Features() + LogitDistillation(ce_weight=0.0),
        CrossEntropy() + StandardizedLogitDistillation(),
        Features(pairing="attention") + Own(),
    ],
    ids=lambda o: o.name,
)
def test_training_with_a_sum_falls(objective):
    result = run_mlp(objective=objective, epochs=4, lr=0.01)
    losses = list(result.history["loss"])
    assert losses[-1] < 0.9 * losses[0]
    parts = [name for name in result.history if name[:2] in ("1_", "2_")]
    assert len(parts) >= 2 and result.history[parts].notna().all(axis=None)


# ---- what every objective keeps to ----


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.skip = nn.Conv2d(before, after, 1, stride=2)
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.skip(x))


class TinyResNet(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.blocks = nn.Sequential(*map(Block, (3, *widths), widths))
        self.fc = nn.Linear(widths[-1], 3)

    def forward(self, x):
        return self.fc(self.blocks(x).mean((2, 3)))


BLOCKS = [("blocks.0", "blocks.0"), ("blocks.1", "blocks.1")]
EVERY = {name: make() for name, make in OBJECTIVES.items()} | {
    "features, all pairs, cosine": Features(pairing="all", distance="cosine"),
    "features, attention, mlp": Features(pairing="attention", projector="mlp"),
    "features, pca, huber": Features(projector="pca", distance="huber", normalize="channel"),
    "feature_kd, all pairs": FeatureKD(all_pairs=True),
    "sum": Features() + LogitDistillation(),
}
every = pytest.mark.parametrize("objective", EVERY.values(), ids=EVERY.keys())


def tiny_pair():
    student = seeded_model(partial(TinyResNet, 4, 6))
    teacher = seeded_model(partial(TinyResNet, 6, 8), seed=1)
    return student, teacher


def pictures(n):
    x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 3
    return x + y[:, None, None, None] - 1, y


def one_step(objective, autocast=nullcontext):
    """Networks, loss and parts after one backward pass, as the loop goes about it."""
    student, teacher = tiny_pair()
    x, y = pictures(8)
    networks = join(student, teacher, objective, BLOCKS, x, batch_size=8)
    with student_step(networks, autocast) as model:
        model.train()
        loss, parts, _ = model(x, y, *LiveTeacher(networks, autocast)(x, list(range(8))))
        loss.backward()
    return networks, loss, parts


@every
def test_the_gradient_reaches_all_that_is_trained_and_nothing_of_the_teacher(objective):
    networks, _, _ = one_step(objective)
    trained = [p for group in networks.groups for p in group]
    assert all(p.grad.isfinite().all() for p in trained)
    # What batch normalisation subtracts again has a gradient of 0 but for rounding.
    biases = {id(m.bias) for m in networks.student.modules() if isinstance(m, nn.Conv2d)}
    assert all(p.grad.abs().max() > 1e-9 for p in trained if id(p) not in biases)
    ids = {id(p) for p in trained}
    assert {id(p) for p in networks.projectors.parameters()} <= ids
    assert {id(p) for p in tiny_part(networks.student).blocks.parameters()} <= ids
    if networks.teacher is not None:
        assert all(p.grad is None and p.requires_grad for p in networks.teacher.parameters())


def tiny_part(student):
    """The network that was given, also where it has its teacher's head."""
    return getattr(student, "student", student)


@every
def test_losses_are_float32_under_half_precision(objective):
    networks, loss, parts = one_step(objective, partial(torch.autocast, "cpu", torch.bfloat16))
    _, full, _ = one_step(objective)
    assert {x.dtype for x in (loss, *parts.values())} == {torch.float32}
    assert loss.item() == pytest.approx(full.item(), rel=0.1)
    assert all(p.dtype == torch.float32 for p in networks.projectors.parameters())


def test_half_precision_is_widened_before_it_overflows():
    big = torch.full((2, 2), 300.0, dtype=torch.float16)  # its square overflows in float16
    pair = layer("vector", 2), layer("vector", 2)
    projectors = Features(projector="none").make_projectors(meeting_of([pair]))
    step = StepTensors(torch.tensor([0, 1]), big, None, [big], [torch.zeros_like(big)], projectors)
    loss, _ = Features(projector="none")(step)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(90000 + np.log(2))
    kl = softened_divergence(big, big, 4.0)
    assert kl.dtype == standardized_rows(big).dtype == torch.float32


KINDS = {
    "maps": PAIRS,
    "tokens": [(layer("tokens", 5, 6), layer("tokens", 5, 4))],
    "mixed": [(layer("tokens", 17, 6), maps(4, 6)), (layer("map_last", 3, 3, 5), maps(4, 2))],
    "vectors": [(layer("vector", 6), layer("vector", 4))],
}
ON_META = [
    pytest.param(objective, pairs, id=f"{name}-{kind}")
    for (name, objective), (kind, pairs) in itertools.product(EVERY.items(), KINDS.items())
    if kind == "maps" or name not in ("attention_transfer", "simkd")
]


@pytest.mark.parametrize(("objective", "pairs"), ON_META)
def test_a_step_reads_no_number_from_the_device(objective, pairs):
    # Meta tensors hold no data: asking for a number, or mixing devices, raises.
    on_meta = partial(torch.empty, device="meta")
    theirs = [torch.randn(8, *teacher.shape) for teacher, _ in pairs]
    projectors = objective.make_projectors(meeting_of(pairs, features=theirs)).to("meta")
    student = [on_meta(8, *ours.shape, requires_grad=True) for _, ours in pairs]
    if objective.name == "simkd":  # whose student side is projected already
        student[-1] = on_meta(8, 5, 3, 3, requires_grad=True)
    logits = on_meta(8, 3, requires_grad=True)
    step = StepTensors(
        on_meta(8, dtype=torch.int64),
        logits,
        on_meta(8, 3),
        student,
        [t.to("meta") for t in theirs],
        projectors,
    )
    loss, parts = objective(step)
    loss.backward()
    assert all(x.is_meta and x.shape == () for x in (loss, *parts.values()))


@every
def test_training_falls_and_the_teacher_stays_as_it_is(objective):
    student, teacher = tiny_pair()
    before = state(teacher)
    options = {"pairs": BLOCKS, "objective": objective, "batch_size": 8, "progress": False}
    result = distill(student, teacher, pictures(16), epochs=5, lr=0.05, **options)
    losses = list(result.history["loss"])
    assert losses[-1] < 0.95 * losses[0]
    assert same(before, teacher.state_dict()) and teacher.training
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("objective", [SemCKD(), FitNet() + Features(pairing="attention")])
def test_a_shorter_last_batch_is_left_out_where_attention_needs_full_ones(objective):
    # 20 samples are two batches of 8; attention would refuse the last 4 samples.
    student, teacher = tiny_pair()
    options = {"pairs": BLOCKS, "objective": objective, "batch_size": 8, "progress": False}
    result = distill(student, teacher, pictures(20), epochs=2, **options)
    assert len(result.history) == 2 and np.isfinite(result.history["loss"]).all()
