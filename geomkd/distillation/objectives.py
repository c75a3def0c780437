"""What a student is trained for: small loss objects that see the tensors of one step.

Any object will do that has the attributes ``name`` (str), ``uses_features`` (teacher and student
features of the paired layers), ``uses_teacher_logits`` and ``detaches_head`` (bool), and that,
called with a :class:`StepTensors`, returns the loss and a dict of its named parts. Where it trains
modules of its own, ``make_projectors(meeting)`` makes them; else it is given one linear projector a
pair. Objectives can be added: ``Features() + LogitDistillation(ce_weight=0)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from geomkd.common.checks import check_choice, check_number
from geomkd.distillation.feature_matching import PAIRINGS, Matching
from geomkd.distillation.losses import (
    DISTANCES,
    NORMALIZATIONS,
    cross_entropy,
    softened_divergence,
    standardized_rows,
)
from geomkd.distillation.projectors import PROJECTORS, Meeting, linear_projectors
from geomkd.network.masks import Masks

Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class StepTensors:
    """What one training step offers to an objective, for a batch of B samples.

    Attributes
    ----------
    labels : Tensor, shape (B,) or (B, n_classes)
        Class indices, or probabilities.
    logits : Tensor, shape (B, n_classes)
        The student's.
    teacher_logits : Tensor, shape (B, n_classes), or None
        The teacher's, where the objective uses them.
    student_features, teacher_features : sequence of Tensor
        Features of each pair of layers, as the layers give them, at least in float32, padded
        positions 0.
    projectors : nn.Module
        What the objective's ``make_projectors`` made.
    mask : Tensor, shape (B, T), a mapping with a decoder's, or None, or a pair of these
        True at tokens; of the student's inputs and of the teacher's where each has its own.
        Projectors take it third, and give each token as a sample of its own.
    """

    labels: Tensor
    logits: Tensor
    teacher_logits: Tensor | None = None
    student_features: Sequence[Tensor] = ()
    teacher_features: Sequence[Tensor] = ()
    projectors: nn.Module = field(default_factory=nn.ModuleList)
    mask: Masks = None


class Objective:
    """What the objectives here have in common.

    Attributes
    ----------
    name : str
        As in ``distill(..., objective=name)``.
    uses_features, uses_teacher_logits : bool
        What is asked of the networks.
    detaches_head : bool
        Whether the student goes on with detached features behind its last paired layer.
    full_batches : bool
        Whether a shorter last batch has to be left out.
    uses_teacher_head : bool
        Whether the student gets the teacher's head in place of its own.
    """

    name: ClassVar[str]
    uses_features: ClassVar[bool] = False
    uses_teacher_logits: ClassVar[bool] = False
    detaches_head: bool = False
    full_batches: bool = False
    uses_teacher_head: ClassVar[bool] = False

    def make_projectors(self, meeting: Meeting) -> nn.Module:
        """Modules that are trained beside the student; none by default."""
        return nn.ModuleList()

    def __add__(self, other: Any) -> Sum:
        return Sum((*_terms(self), *_terms(other))) if callable(other) else NotImplemented

    def __radd__(self, other: Any) -> Sum:
        return Sum((*_terms(other), *_terms(self))) if callable(other) else NotImplemented


class Sum(Objective):
    """Sum of objectives, each with its own weights and projectors.

    The losses are added as they are: where both have a cross entropy, it counts twice. The head is
    detached if one of them detaches it.

    Parameters
    ----------
    terms : sequence of objectives
        Usually made by ``+``.

    Examples
    --------
    >>> both = Features() + LogitDistillation(ce_weight=0.0)
    >>> both.name, both.uses_teacher_logits, both.detaches_head
    ('features+kd', True, True)
    """

    def __init__(self, terms: Sequence[Any]) -> None:
        self.terms = tuple(terms)
        for term in self.terms:
            if getattr(term, "uses_teacher_head", False):
                raise ValueError(f"objective {term.name!r} replaces the head: it stands alone")
        self.name = "+".join(term.name for term in self.terms)
        for flag in ("uses_features", "uses_teacher_logits", "detaches_head", "full_batches"):
            setattr(self, flag, any(getattr(term, flag, False) for term in self.terms))

    def make_projectors(self, meeting: Meeting) -> nn.ModuleList:
        """Make one module of projectors per term."""
        return nn.ModuleList(
            projectors_of(term, meeting) if term.uses_features else nn.ModuleList()
            for term in self.terms
        )

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step, and its parts with the number of their term: ``1_features``."""
        total, parts = 0.0, {}
        # Without features there were no layers to make projectors of.
        each = step.projectors if self.uses_features else [step.projectors for _ in self.terms]
        for i, (term, projectors) in enumerate(zip(self.terms, each, strict=True), 1):
            loss, own = term(replace(step, projectors=projectors))
            total = total + loss
            parts |= {f"{i}_{name}": part for name, part in own.items()}
        return total, parts

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross entropy on the labels: the student's baseline, no teacher.

    Examples
    --------
    >>> import torch
    >>> step = StepTensors(labels=torch.tensor([0]), logits=torch.zeros(1, 2))
    >>> loss, parts = CrossEntropy()(step)
    >>> round(float(loss), 4)
    0.6931
    """

    name: ClassVar[str] = "ce"

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its part ``cross_entropy``."""
        loss = cross_entropy(step.logits, step.labels)
        return loss, {"cross_entropy": loss}


@dataclass(frozen=True)
class LogitDistillation(Objective):
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

    Examples
    --------
    >>> import torch
    >>> step = StepTensors(torch.tensor([0]), torch.zeros(1, 2), torch.tensor([[1.1, 0.0]]))
    >>> {name: round(float(part), 4) for name, part in LogitDistillation()(step)[1].items()}
    {'cross_entropy': 0.6931, 'kd': 0.1498}
    """

    temperature: float = 4.0
    ce_weight: float = 0.1
    kd_weight: float = 0.9

    name: ClassVar[str] = "kd"
    uses_teacher_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``cross_entropy`` and ``kd``."""
        ce = cross_entropy(step.logits, step.labels)
        kd = self.divergence(step)
        return self.ce_weight * ce + self.kd_weight * kd, {"cross_entropy": ce, "kd": kd}

    def divergence(self, step: StepTensors) -> Tensor:
        """Divergence of the softened predictions."""
        return softened_divergence(step.logits, step.teacher_logits, self.temperature)


@dataclass(frozen=True)
class StandardizedLogitDistillation(LogitDistillation):
    """Logit distillation on logits that are standardised row by row.

    References
    ----------
    Sun et al.: Logit standardization in knowledge distillation. arXiv:2403.01427.
    """

    temperature: float = 2.0
    kd_weight: float = 9.0

    name: ClassVar[str] = "kd_standardized"

    def divergence(self, step: StepTensors) -> Tensor:
        """Divergence of the softened predictions, of standardised logits."""
        student, teacher = map(standardized_rows, (step.logits, step.teacher_logits))
        return softened_divergence(student, teacher, self.temperature)


@dataclass(frozen=True)
class Features(Objective):
    """Error of paired features for the backbone, cross entropy for the head.

    The head is everything after the last paired student layer. It trains on features detached
    there, so that no logit loss reaches the backbone.

    Parameters
    ----------
    normalize : {"none", "channel"}
        ``"channel"`` standardises each channel of the targets over the batch and its positions.
    pairing : {"one_to_one", "all", "attention"}
        Which student layer learns from which teacher layer: the pairs as given; each from all of
        them; or each from all, weighted by learned attention (see `LayerAttention`).
    projector : {"linear", "mlp", "pca", "none"}
        How student features meet teacher features, see `Projector`.
    distance : {"mse", "cosine", "huber"}
        Error of the projected features.
    detaches_head : bool
        False lets the cross entropy reach the backbone too.

    Notes
    -----
    With k pairs, ``sum(MSE(projector(f_student), f_teacher)) / k + CE``. The standardisation, and
    the attention, see the samples of one process and one accumulated part of a batch.

    References
    ----------
    Cooper et al.: Logit-based losses limit the effectiveness of feature knowledge distillation.
    arXiv:2511.14981.
    """

    normalize: str = "none"
    pairing: str = "one_to_one"
    projector: str = "linear"
    distance: str = "mse"
    detaches_head: bool = True

    name: ClassVar[str] = "features"
    uses_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choices = (NORMALIZATIONS, PAIRINGS, PROJECTORS, DISTANCES)
        options = ("normalize", "pairing", "projector", "distance")
        for option, allowed in zip(options, choices, strict=True):
            check_choice(getattr(self, option), option, allowed)

    @property
    def full_batches(self) -> bool:
        """Attention has a fixed batch size."""
        return self.pairing == "attention"

    def make_projectors(self, meeting: Meeting) -> Matching:
        """Projectors, and the attention where there is one."""
        return Matching(meeting, pairing=self.pairing, projector=self.projector)

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``features`` and ``cross_entropy``."""
        how = {"mask": step.mask, "distance": self.distance, "normalize": self.normalize}
        features = step.projectors(step.student_features, step.teacher_features, **how)
        ce = cross_entropy(step.logits, step.labels)
        return features + ce, {"features": features, "cross_entropy": ce}


def projectors_of(objective: object, meeting: Meeting) -> nn.Module:
    """Make what the objective makes, or one linear projector a pair if it makes nothing itself."""
    make = getattr(objective, "make_projectors", None)
    return linear_projectors(meeting) if make is None else make(meeting)


def _terms(objective: Any) -> tuple[Any, ...]:
    return objective.terms if isinstance(objective, Sum) else (objective,)


def check_temperature(temperature: float) -> None:
    """Check that a temperature is finite and above 0."""
    check_number(temperature, "temperature", above=0)
