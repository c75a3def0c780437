"""What students of a set of layers are trained for, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.parametrizations import orthogonal

from benchmarks.evidence.moments import Moments
from benchmarks.evidence.students import Standardised
from geomkd.distillation.losses import feature_error
from geomkd.distillation.objectives import CrossEntropy, Features, LogitDistillation, StepTensors
from geomkd.distillation.projectors import Alignment, Meeting, channels, linear_projectors
from geomkd.distillation.rivals import OBJECTIVES as PUBLISHED
from geomkd.distillation.rivals import FeatureKD, FitNet, SemCKD, SimKD

FEATURES, CE, KD = "features", "ce", "kd"
STANDARDISED, LAST = "features, targets standardised", "last only, normalised"
WEIGHTS = (1, 10, 100, 1000)
WEIGHTED = {  # by arm, the objective of each weight of the features
    "CE + KD + w features": {w: f"CE + KD + {w} features" for w in WEIGHTS},
    "CE + w features": {w: f"CE + {w} features" for w in WEIGHTS},
}
WITH_KD, WITHOUT_KD = WEIGHTED
RIVALS = ("kd_standardized", "attention_transfer", "similarity_preserving", "relational")


@dataclass(frozen=True)
class StandardisedSet:
    """Mean over the pairs of `Standardised`'s error, and cross entropy on the detached head."""

    pairs: tuple[Standardised, ...]

    name = FEATURES
    uses_features = True
    uses_teacher_logits = False
    detaches_head = True
    make_projectors = staticmethod(linear_projectors)

    def __call__(self, step: StepTensors) -> tuple[Tensor, dict[str, Tensor]]:
        errors = []
        for i, objective in enumerate(self.pairs):
            one = {"projectors": step.projectors[i : i + 1]}
            one |= {"student_features": step.student_features[i : i + 1]}
            one |= {"teacher_features": step.teacher_features[i : i + 1]}
            _, parts = objective(replace(step, **one))
            errors.append(parts["features"])
        features, ce = torch.stack(errors).mean(), parts["cross_entropy"]
        return features + ce, {"features": features, "cross_entropy": ce}


class OrthogonalPooled(nn.Module):
    """Both sides of a pair averaged over positions; the student's is projected without distortion.

    The projector's matrix has orthonormal columns (rows, where the student is wider).
    """

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        teacher, student = meeting.pairs[-1]
        self.align = Alignment(student, teacher)
        project = skip_init(nn.Linear, channels(student), channels(teacher), bias=False)
        nn.init.orthogonal_(project.weight, generator=meeting.generator)
        self.project = orthogonal(project, orthogonal_map="matrix_exp")

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = (side.mean(dim=(2, 3)) for side in self.align(student, teacher))
        return self.project(student), teacher


class LastNormalised:
    """Smooth L1 of the last pair, pooled: projected student against layer-normed teacher.

    The projector is orthogonal (Miles et al. 2024, arXiv:2403.06213). As in `Features`, nothing but
    this reaches the backbone; there, cross entropy does too.
    """

    name = "last_normalised"
    uses_features = True
    uses_teacher_logits = False
    detaches_head = True
    make_projectors = OrthogonalPooled

    def __call__(self, step: StepTensors) -> tuple[Tensor, dict[str, Tensor]]:
        projected, target = step.projectors(step.student_features[-1], step.teacher_features[-1])
        target = F.layer_norm(target, target.shape[1:])
        features = feature_error(projected, target, distance="huber").mean()
        ce = F.cross_entropy(step.logits, step.labels)
        return features + ce, {"features": features, "cross_entropy": ce}


def _weighted(arm: str, kd_weight: float) -> dict[str, FeatureKD]:
    options = {"kd_weight": kd_weight}
    return {name: FeatureKD(**options, feature_weight=w) for w, name in WEIGHTED[arm].items()}


GIVEN: dict[str, Any] = {
    FEATURES: Features(),
    **_weighted(WITH_KD, 1.0),
    **_weighted(WITHOUT_KD, 0.0),
    "fitnet": FitNet(),
    "semckd": SemCKD(),
    "simkd": SimKD(),
    CE: CrossEntropy(),
    KD: LogitDistillation(),
    LAST: LastNormalised(),
    **{name: PUBLISHED[name]() for name in RIVALS},
}
COMPARED = (FEATURES, STANDARDISED, *(name for name in GIVEN if name not in (FEATURES, *RIVALS)))


def objective_of(name: str, statistics: Callable[[], Iterable[Moments]]) -> Any:
    """Objective of a name; ``statistics`` gives those of the targets of each pair, if needed."""
    if name != STANDARDISED:
        return GIVEN[name]
    found = [Standardised(held.mean.float(), held.std.float()) for held in statistics()]
    return StandardisedSet(tuple(found))


def uses_features(name: str) -> bool:
    return name == STANDARDISED or GIVEN[name].uses_features
