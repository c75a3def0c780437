"""What a student is trained for: small loss objects that see the tensors of one step.

Any object will do that has the attributes ``name`` (str), ``uses_features`` (teacher and student
features of the paired layers), ``uses_teacher_logits`` and ``detaches_head`` (bool), and that,
called with a :class:`StepTensors`, returns the loss and a dict of its named parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class StepTensors:
    """What one training step offers to an objective, for a batch of B samples.

    Attributes
    ----------
    labels : Tensor, shape (B,)
        Class indices.
    logits : Tensor, shape (B, n_classes)
        The student's.
    teacher_logits : Tensor, shape (B, n_classes), or None
        The teacher's, where the objective uses them.
    student_features, teacher_features : sequence of Tensor
        Features of each pair of layers, as the layers give them.
    projectors : nn.ModuleList
        One module per pair; ``projector(student, teacher)`` gives projected features and target.
    """

    labels: Tensor
    logits: Tensor
    teacher_logits: Tensor | None = None
    student_features: Sequence[Tensor] = ()
    teacher_features: Sequence[Tensor] = ()
    projectors: nn.ModuleList = field(default_factory=nn.ModuleList)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy on the labels: the student's baseline, no teacher.

    Examples
    --------
    >>> step = StepTensors(labels=torch.tensor([0]), logits=torch.zeros(1, 2))
    >>> loss, parts = CrossEntropy()(step)
    >>> round(float(loss), 4)
    0.6931
    """

    name: ClassVar[str] = "ce"
    uses_features: ClassVar[bool] = False
    uses_teacher_logits: ClassVar[bool] = False
    detaches_head: ClassVar[bool] = False

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its part ``cross_entropy``."""
        loss = cross_entropy(step)
        return loss, {"cross_entropy": loss}


@dataclass(frozen=True)
class LogitDistillation:
    """Cross entropy on the labels and on the teacher's softened predictions.

    ``ce_weight * CE + kd_weight * T^2 * KL(teacher || student)``, both averaged over the batch.

    Parameters
    ----------
    temperature : float
        T, which softens both distributions.
    ce_weight, kd_weight : float
        Weights of the two parts; the history shows the parts without them.

    References
    ----------
    Hinton, Vinyals, Dean: Distilling the knowledge in a neural network. arXiv:1503.02531.
    """

    temperature: float = 4.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9

    name: ClassVar[str] = "kd"
    uses_features: ClassVar[bool] = False
    uses_teacher_logits: ClassVar[bool] = True
    detaches_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}")

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``cross_entropy`` and ``kd``."""
        ce = cross_entropy(step)
        kd = softened_divergence(step.logits, step.teacher_logits, self.temperature)
        return self.ce_weight * ce + self.kd_weight * kd, {"cross_entropy": ce, "kd": kd}


@dataclass(frozen=True)
class Features:
    """Mean squared error on paired features for the backbone, cross entropy for the head.

    The head is everything after the last paired student layer. It trains on features detached
    there, so that no logit loss reaches the backbone.

    Parameters
    ----------
    normalize : {"none", "channel"}
        ``"channel"`` standardises each channel of the targets over the batch and its positions.

    Notes
    -----
    With k pairs, ``sum(MSE(projector(f_student), f_teacher)) / k + CE``.
    """

    normalize: str = "none"

    name: ClassVar[str] = "features"
    uses_features: ClassVar[bool] = True
    uses_teacher_logits: ClassVar[bool] = False
    detaches_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.normalize not in ("none", "channel"):
            raise ValueError(f"normalize must be 'none' or 'channel'; got {self.normalize!r}")

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``features`` and ``cross_entropy``."""
        pairs = zip(step.projectors, step.student_features, step.teacher_features, strict=True)
        errors = []
        for projector, student, teacher in pairs:
            projected, target = map(at_least_float32, projector(student, teacher))
            if self.normalize == "channel":
                target = standardize_channels(target)
            errors.append(F.mse_loss(projected, target.to(projected.dtype)))
        features = torch.stack(errors).mean()
        ce = cross_entropy(step)
        return features + ce, {"features": features, "cross_entropy": ce}


OBJECTIVES = {
    objective.name: objective for objective in (Features, CrossEntropy, LogitDistillation)
}


def cross_entropy(step: StepTensors) -> Tensor:
    """Cross entropy of the student's logits, at least in float32, averaged over the batch."""
    return F.cross_entropy(at_least_float32(step.logits), step.labels)


def softened_divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Parameters
    ----------
    logits, teacher_logits : Tensor, shape (B, n_classes)
        Student's and teacher's.
    temperature : float
        T; the factor T^2 keeps the gradient's size independent of it.
    """
    student = F.log_softmax(at_least_float32(logits) / temperature, dim=1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=1)
    divergence = F.kl_div(
        student, teacher.to(student.dtype), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence


def standardize_channels(target: Tensor) -> Tensor:
    """Each channel, the second axis, with mean 0 and variance 1 over all other axes.

    Parameters
    ----------
    target : Tensor, shape (B, C, ...)
        A channel that is constant becomes 0.
    """
    axes = [axis for axis in range(target.ndim) if axis != 1]
    variance, mean = torch.var_mean(target, dim=axes, correction=0, keepdim=True)
    # Relative to the mean, so that rounding in a constant channel is not blown up to noise.
    return (target - mean) / (variance.sqrt() + 1e-5 * mean.abs() + 1e-12)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened for a loss; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
