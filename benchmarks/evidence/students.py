"""One student trained on one layer of a teacher: its arms, its loss, and what is kept of it."""

from __future__ import annotations

import base64
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.material import Material
from benchmarks.evidence.moments import Moments
from benchmarks.evidence.teachers import Teacher, beside, right
from geomkd import candidate_layers, capture, distill, pair_layers
from geomkd.distillation.objectives import StepTensors
from geomkd.distillation.projectors import linear_projectors
from geomkd.network.forward import evaluating

DIVERGED = "NaN or infinite"  # what `geomkd.distill` says of a loss
ZERO_LINE = "cross entropy alone"  # in place of a layer's name


class Arm(NamedTuple):
    """A way of training students, beside the others.

    ``weight`` of the features; ``detached``: no cross entropy reaches the backbone; ``pooled``:
    targets are averaged over positions; ``times`` as many epochs; ``few``: five layers alone.
    """

    weight: float = 1.0
    detached: bool = True
    pooled: bool = False
    times: int = 1
    few: bool = False
    teachers: tuple[str, ...] | None = None  # all


_SOME = ("cifar10-resnet20", "tiny-resnet", "quick-resnet")
ARMS = {
    "features": Arm(),
    "labels": Arm(weight=100.0, detached=False, teachers=_SOME),
    "pooled": Arm(pooled=True, teachers=_SOME),
    "longer": Arm(times=3, few=True, teachers=(*_SOME, "cifar10-resnet-fitted")),
}


@dataclass(frozen=True)
class Standardised:
    """Error of the projected student features to targets standardised once, and cross entropy."""

    mean: Tensor  # (C,), of the training images
    std: Tensor
    weight: float = 1.0
    detaches_head: bool = True
    pooled: bool = False

    name = "features"
    uses_features = True
    uses_teacher_logits = False
    make_projectors = staticmethod(linear_projectors)

    def __call__(self, step: StepTensors) -> tuple[Tensor, dict[str, Tensor]]:
        projected, target = step.projectors[0](step.student_features[0], step.teacher_features[0])
        if self.pooled:  # a linear projector and the mean over positions change places
            projected, target = (
                side.mean(dim=(2, 3), keepdim=True) for side in (projected, target)
            )
        wide = (-1, 1, 1)
        target = (target - self.mean.view(wide)) / self.std.view(wide)
        features, ce = F.mse_loss(projected, target), F.cross_entropy(step.logits, step.labels)
        return self.weight * features + ce, {"features": features, "cross_entropy": ce}


def train_student(
    teacher: Teacher, model: nn.Module, material: Material, arm: Arm, layer: str,
    moments: Moments | None, seed: int, cache: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train a student on one layer, or on labels alone; accuracies and which images are right."""
    started, recipe = time.perf_counter(), teacher.recipe
    student = teacher.build_student(material, seed=seed)
    student.to(next(model.parameters()).device)
    x, y = teacher.students_images(material)
    options = {"epochs": arm.times * recipe.epochs, "batch_size": recipe.batch_size}
    options |= {"lr": recipe.lr, "seed": seed, "progress": False}
    if layer == ZERO_LINE:
        result = distill(student, None, (x, y), objective="ce", **options)
    else:
        statistics = moments.mean.float(), moments.std.float()
        objective = Standardised(*statistics, arm.weight, arm.detached, arm.pooled)
        pairs = pair_layers([layer], student, beside(student, x[:2]))
        options |= {"cache_dir": cache, "cache_dtype": "float16"}
        result = distill(student, model, (x, y), pairs=pairs, objective=objective, **options)
    losses = [round(v, 5) for v in result.history.filter(regex="features|cross").iloc[-1]]
    found = measured(student, student, (x, y), material) | {"losses": losses}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def measured(
    student: nn.Module, backbone: nn.Module, images: tuple[Tensor, Tensor], material: Material
) -> dict[str, Any]:
    """Accuracies of a trained student, and which test images it is right on.

    ``backbone`` is what a head is refitted on: the student, without a teacher's head in its place.
    """
    head = right(student, material.x_test, material.y_test)
    refitted = refit(backbone, images, material)
    return {
        "accuracy": float(head.double().mean()),
        "refitted_accuracy": float(refitted.double().mean()),
        "right": packed(head),
        "refitted_right": packed(refitted),
    }


def or_failed(train: Callable[[], dict[str, Any]], n: int) -> dict[str, Any]:
    """What a training gives; of one whose loss became NaN, that it is right on none of n images."""
    try:
        return train()
    except RuntimeError as error:
        if DIVERGED not in str(error):
            raise
        return failed(str(error), n)


def failed(why: str, n: int) -> dict[str, Any]:
    """What is kept of a run whose loss became NaN: it is right on no image."""
    nothing = packed(torch.zeros(n, dtype=torch.bool))
    found = {"failed": why, "accuracy": 0.0, "refitted_accuracy": 0.0}
    return found | {"right": nothing, "refitted_right": nothing}


def refit(student: nn.Module, images: tuple[Tensor, Tensor], material: Material) -> Tensor:
    """Whether a logistic regression on the frozen backbone is right, for each test image."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = candidate_layers(student, beside(student, material.x_test[:2]))
    name = next(layer.name for layer in found if layer.role == "head_input")

    def features(x: Tensor) -> np.ndarray:
        parts = []
        for batch in x.split(500):
            with evaluating(student), capture(student, [name]) as held:
                student(beside(student, batch))
            parts.append(held[name].flatten(1).cpu())
        return torch.cat(parts).double().numpy()

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an end before the optimum is the same for every layer
        model.fit(features(images[0]), images[1].numpy())
    return torch.from_numpy(model.predict(features(material.x_test))) == material.y_test


def packed(flags: Tensor) -> str:
    """Flags as eight a byte, in base64."""
    return base64.b64encode(np.packbits(flags.numpy()).tobytes()).decode()


def unpacked(text: str, n: int) -> np.ndarray:
    """Flags of `packed`, (n,) of bool."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool)
