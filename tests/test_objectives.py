"""Losses against the same formulas in plain numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from geomkd.distillation.objectives import (
    OBJECTIVES,
    CrossEntropy,
    Features,
    LogitDistillation,
    StepTensors,
    softened_divergence,
    standardize_channels,
)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(z, y):
    return -np.log(softmax(z)[np.arange(len(y)), y]).mean()


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) * 3, np.array([0, 2, 1, 1, 0])


class Same(nn.Module):
    """A projector that leaves both sides as they are."""

    def forward(self, student, teacher):
        return student, teacher


def step_of(student, teacher, **more):
    options = {"labels": torch.tensor([0, 1]), "logits": torch.zeros(2, 2, dtype=torch.float64)}
    projectors = nn.ModuleList(Same() for _ in student)
    return StepTensors(
        student_features=student, teacher_features=teacher, projectors=projectors, **options | more
    )


def test_names():
    assert {name: type(make()) for name, make in OBJECTIVES.items()} == {
        "features": Features,
        "ce": CrossEntropy,
        "kd": LogitDistillation,
    }


def test_cross_entropy_on_labels(logits):
    z, _, y = logits
    loss, parts = CrossEntropy()(StepTensors(torch.tensor(y), torch.tensor(z)))
    assert float(loss) == pytest.approx(cross_entropy(z, y), rel=1e-12)
    assert list(parts) == ["cross_entropy"] and parts["cross_entropy"] == loss


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_t_squared_kl_of_teacher_from_student(logits, temperature):
    z, zt, y = logits
    p, q = softmax(zt / temperature), softmax(z / temperature)
    kl = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    step = StepTensors(torch.tensor(y), torch.tensor(z), teacher_logits=torch.tensor(zt))
    loss, parts = LogitDistillation(temperature=temperature)(step)
    assert float(parts["kd"]) == pytest.approx(kl, rel=1e-10)
    assert float(loss) == pytest.approx(0.1 * cross_entropy(z, y) + 0.9 * kl, rel=1e-10)


def test_kd_defaults_and_weights(logits):
    z, zt, y = logits
    step = StepTensors(torch.tensor(y), torch.tensor(z), teacher_logits=torch.tensor(zt))
    assert LogitDistillation() == LogitDistillation(4.0, 0.1, 0.9)
    loss, parts = LogitDistillation(ce_weight=1.0, kd_weight=0.0)(step)
    assert float(loss) == pytest.approx(float(parts["cross_entropy"]))


def test_kd_worked_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
    teacher = torch.tensor([[np.log(3.0), 0.0]])
    kl = softened_divergence(torch.zeros(1, 2, dtype=torch.float64), teacher, 1.0)
    assert float(kl) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-10)


def test_kd_vanishes_for_equal_logits_up_to_a_constant(logits):
    z = torch.tensor(logits[0])
    assert float(softened_divergence(z, z + 7, 4.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_is_checked(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0; got"):
        LogitDistillation(temperature=temperature)


def test_features_are_the_mean_of_the_pairs_errors_plus_cross_entropy():
    student = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)]
    teacher = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.full((2, 1), 3.0)]
    loss, parts = Features()(step_of(student, teacher))
    # Errors (0 + 4 + 0 + 16) / 4 = 5 and 9; two equal logits cost ln 2.
    assert float(parts["features"]) == pytest.approx(7.0)
    assert float(loss) == pytest.approx(7.0 + np.log(2))


def test_channel_targets_are_standardised():
    rng = np.random.default_rng(1)
    s, t = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 4, 4)) * 5 + 2
    standard = (t - t.mean((0, 2, 3), keepdims=True)) / t.std((0, 2, 3), keepdims=True)
    step = step_of([torch.tensor(s)], [torch.tensor(t)])
    _, parts = Features(normalize="channel")(step)
    assert float(parts["features"]) == pytest.approx(((s - standard) ** 2).mean(), rel=1e-4)
    _, plain = Features()(step)
    assert float(plain["features"]) == pytest.approx(((s - t) ** 2).mean(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_standardised_channels_do_not_depend_on_scale(scale):
    t = torch.randn(8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        standardize_channels(scale * t), standardize_channels(t), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
def test_a_constant_channel_becomes_zero(constant):
    assert standardize_channels(torch.full((64, 1, 7, 7), constant)).abs().max() < 0.05


def test_half_precision_is_widened():
    big = torch.full((2, 2), 300.0, dtype=torch.float16)  # its square overflows in float16
    loss, _ = Features()(step_of([big], [torch.zeros_like(big)], logits=big))
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(90000.0 + np.log(2))


def test_normalize_is_checked():
    with pytest.raises(ValueError, match="normalize must be 'none' or 'channel'; got 'batch'"):
        Features(normalize="batch")
