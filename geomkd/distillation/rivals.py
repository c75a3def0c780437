"""Published rivals of feature distillation, each with its definition and default weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from geomkd.distillation.feature_matching import Matching
from geomkd.distillation.losses import (
    angles,
    attention_map,
    batch_similarity,
    cross_entropy,
    feature_error,
    relative_distances,
    softened_divergence,
)
from geomkd.distillation.objectives import (
    CrossEntropy,
    Features,
    LogitDistillation,
    Loss,
    Objective,
    StandardizedLogitDistillation,
    StepTensors,
    check_temperature,
)
from geomkd.distillation.projectors import Alignment, Meeting, check_map, make_projector
from geomkd.network.layers import Layer


@dataclass(frozen=True)
class FitNet(Objective):
    """Cross entropy, and a hint: MSE(ReLU(BN(conv1x1(f_student))), f_teacher) of the middle pair.

    ``CE + weight * hint``, in one stage, the hint of pair floor(k / 2), counted from 0.

    References
    ----------
    Romero et al.: FitNets: hints for thin deep nets. arXiv:1412.6550.
    """

    weight: float = 100.0

    name: ClassVar[str] = "fitnet"
    uses_features: ClassVar[bool] = True

    def make_projectors(self, meeting: Meeting) -> nn.Module:
        """Make the regressor of the middle pair."""
        middle = len(meeting.pairs) // 2
        return make_projector("hint", meeting, middle, middle)

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``cross_entropy`` and ``hint``."""
        middle = len(step.student_features) // 2
        features = step.student_features[middle], step.teacher_features[middle]
        hint = step.projectors.error(*features, step.mask).mean()
        ce = cross_entropy(step.logits, step.labels)
        return ce + self.weight * hint, {"cross_entropy": ce, "hint": hint}


@dataclass(frozen=True)
class AttentionTransfer(Objective):
    """Cross entropy, and the difference of the attention maps of every pair of maps.

    ``CE + weight * sum over pairs of mean((a_student - a_teacher)^2)``, a the mean over channels of
    the squared features, flattened, L2-normalised; the larger grid is average-pooled first.

    References
    ----------
    Zagoruyko, Komodakis: Paying more attention to attention. arXiv:1612.03928.
    """

    weight: float = 1000.0

    name: ClassVar[str] = "attention_transfer"
    uses_features: ClassVar[bool] = True

    def make_projectors(self, meeting: Meeting) -> nn.Module:
        """Make what brings two maps to one grid; nothing is trained."""
        _need_maps(self, *meeting.pairs)
        return nn.ModuleList(Alignment(student, teacher) for teacher, student in meeting.pairs)

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``cross_entropy`` and ``attention``."""
        pairs = zip(step.projectors, step.student_features, step.teacher_features, strict=True)
        errors = []
        for align, student, teacher in pairs:
            ours, theirs = map(attention_map, align(student, teacher))
            errors.append((ours - theirs).square().mean())
        ce, attention = cross_entropy(step.logits, step.labels), torch.stack(errors).sum()
        return ce + self.weight * attention, {"cross_entropy": ce, "attention": attention}


@dataclass(frozen=True)
class SimilarityPreserving(Objective):
    """Cross entropy, and the difference of the batch's similarities in the last pair.

    ``CE + weight * ||G_student - G_teacher||_F^2 / B^2``, G = F F^T of the flattened features with
    every row L2-normalised. B is the samples of one process and one accumulated part of a batch.

    References
    ----------
    Tung, Mori: Similarity-preserving knowledge distillation. arXiv:1907.09682.
    """

    weight: float = 3000.0

    name: ClassVar[str] = "similarity_preserving"
    uses_features: ClassVar[bool] = True

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``cross_entropy`` and ``similarity``."""
        ours = batch_similarity(step.student_features[-1])
        theirs = batch_similarity(step.teacher_features[-1]).to(ours.dtype)
        ce, similarity = cross_entropy(step.logits, step.labels), (ours - theirs).square().mean()
        return ce + self.weight * similarity, {"cross_entropy": ce, "similarity": similarity}


@dataclass(frozen=True)
class Relational(Objective):
    """Cross entropy, and the distances and angles between the samples of a batch in the last pair.

    ``CE + distance_weight * H(d_student, d_teacher) + angle_weight * H(a_student, a_teacher)``, H
    the Huber loss (quadratic within 1), d the distances over their mean, a the cosines of the
    angles of all triples; features are averaged over positions first.

    References
    ----------
    Park et al.: Relational knowledge distillation. arXiv:1904.05068.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    name: ClassVar[str] = "relational"
    uses_features: ClassVar[bool] = True

    def make_projectors(self, meeting: Meeting) -> nn.Module:
        """Make what averages over positions; nothing is trained."""
        (theirs, ours), one = meeting.pairs[-1], Layer("mean", "vector", (1,))
        return nn.ModuleList([Alignment(ours, one), Alignment(one, theirs)])

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``cross_entropy``, ``distance`` and ``angle``."""
        pool_student, pool_teacher = step.projectors
        one = step.logits.new_zeros(1, 1)
        ours = pool_student(step.student_features[-1], one, step.mask)[0].flatten(1)
        theirs = pool_teacher(one, step.teacher_features[-1], step.mask)[1].flatten(1)
        theirs = theirs.to(ours.dtype)
        ce = cross_entropy(step.logits, step.labels)
        distance = F.smooth_l1_loss(relative_distances(ours), relative_distances(theirs))
        angle = F.smooth_l1_loss(angles(ours), angles(theirs))
        loss = ce + self.distance_weight * distance + self.angle_weight * angle
        return loss, {"cross_entropy": ce, "distance": distance, "angle": angle}


@dataclass(frozen=True)
class FeatureKD(Objective):
    """Cross entropy, softened predictions and paired features, all of them on the whole student.

    ``CE + kd_weight * KD + feature_weight * mean over pairs of MSE(projector(f_student),
    f_teacher)``, KD with its T^2 as in `LogitDistillation`; the "Base FKD" that the paper compares
    with. The weight 16 of its released code, whose divergence has no factor, is T^2 for T = 4.

    Parameters
    ----------
    all_pairs : bool
        Every student layer learns from every teacher layer: the fully connected form.

    References
    ----------
    Cooper et al.: Logit-based losses limit the effectiveness of feature knowledge distillation.
    arXiv:2511.14981.
    """

    all_pairs: bool = False
    temperature: float = 4.0
    kd_weight: float = 1.0
    feature_weight: float = 1.0

    name: ClassVar[str] = "feature_kd"
    uses_features: ClassVar[bool] = True
    uses_teacher_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def make_projectors(self, meeting: Meeting) -> Matching:
        """Make a linear projector per pair, or per combination."""
        pairing = "all" if self.all_pairs else "one_to_one"
        return Matching(meeting, pairing=pairing, projector="linear")

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its parts ``cross_entropy``, ``kd`` and ``features``."""
        ce = cross_entropy(step.logits, step.labels)
        kd = softened_divergence(step.logits, step.teacher_logits, self.temperature)
        features = step.projectors(step.student_features, step.teacher_features, mask=step.mask)
        loss = ce + self.kd_weight * kd + self.feature_weight * features
        return loss, {"cross_entropy": ce, "kd": kd, "features": features}


@dataclass(frozen=True)
class SemCKD(Objective):
    """Cross entropy, softened predictions, and features weighted by learned attention.

    ``CE + KD + feature_weight * sum of alpha * MSE``: for each student layer the attention alpha
    weighs all teacher layers; averaged over student layers and samples. Projectors are 1x1, 3x3
    and 1x1 convolutions. A shorter last batch is left out of training, for alpha comes from rows
    of the batch's Gram matrix.

    References
    ----------
    Chen et al.: Cross-layer distillation with semantic calibration. arXiv:2012.03236.
    """

    temperature: float = 4.0
    kd_weight: float = 1.0
    feature_weight: float = 400.0

    name: ClassVar[str] = "semckd"
    uses_features: ClassVar[bool] = True
    uses_teacher_logits: ClassVar[bool] = True
    full_batches: ClassVar[bool] = True

    __post_init__ = FeatureKD.__post_init__
    __call__ = FeatureKD.__call__

    def make_projectors(self, meeting: Meeting) -> Matching:
        """Make a projector per combination, and the attention."""
        return Matching(meeting, pairing="attention", projector="mlp")


@dataclass(frozen=True)
class SimKD(Objective):
    """The teacher's head on the student's projected last map, which learns the teacher's map.

    ``MSE(projector(f_student), f_teacher)`` of the last pair; neither cross entropy nor softened
    predictions. The student that comes out is a `WithTeacherHead`. Its projector ends in ReLU, as
    published: negative values of a teacher's map are out of its reach.

    References
    ----------
    Chen et al.: Knowledge distillation with the reused teacher classifier. arXiv:2203.14001.
    """

    name: ClassVar[str] = "simkd"
    uses_features: ClassVar[bool] = True
    uses_teacher_head: ClassVar[bool] = True

    def make_projectors(self, meeting: Meeting) -> nn.Module:
        """Make what brings the teacher's map to the projected one's grid; nothing is trained."""
        _need_maps(self, meeting.pairs[-1])
        teacher, projected = meeting.pairs[-1]
        return Alignment(projected, teacher)

    def __call__(self, step: StepTensors) -> Loss:
        """Loss of the step and its part ``features``."""
        aligned = step.projectors(step.student_features[-1], step.teacher_features[-1])
        loss = feature_error(*aligned).mean()
        return loss, {"features": loss}


def _need_maps(objective: Objective, *pairs: tuple[Layer, Layer]) -> None:
    for layer in (layer for pair in pairs for layer in pair):
        check_map(layer, f"objective {objective.name!r} needs maps")


OURS = (Features, CrossEntropy, LogitDistillation, StandardizedLogitDistillation)
RIVALS = (FitNet, AttentionTransfer, SimilarityPreserving, Relational, FeatureKD, SemCKD, SimKD)
OBJECTIVES = {objective.name: objective for objective in (*OURS, *RIVALS)}
