"""What a distillation run is made of, checked before any training."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.checks import check_int
from geomkd.distillation.cut import split_student, student_outputs
from geomkd.distillation.objectives import OBJECTIVES
from geomkd.distillation.projectors import make_projectors
from geomkd.hooks import capture, features_of
from geomkd.layers import Layer, describe_layers
from geomkd.models import Forward, call, evaluating, first_tensor, unwrap

Pairs = list[tuple[str, str]]
ATTRIBUTES = ("name", "uses_features", "uses_teacher_logits", "detaches_head")


@dataclass(frozen=True)
class Networks:
    """Student, teacher, and what joins them.

    Attributes
    ----------
    student, teacher : nn.Module
        ``teacher`` is None where the objective needs none.
    objective : callable
        One of :mod:`geomkd.distillation.objectives` or like them.
    pairs : list of (str, str)
        Teacher layer and student layer; empty where the objective uses no features.
    projectors : nn.ModuleList
        One per pair.
    cut : str or None
        Student layer behind which the head trains on detached features.
    groups : list of list of nn.Parameter
        What is trained: backbone with projectors, and head; one group where nothing is cut.
    n_classes : int
        Number of the student's logits.
    forward : callable or None
        ``forward(model, inputs)``, for models that are not simply called.
    """

    student: nn.Module
    teacher: nn.Module | None
    objective: Any
    pairs: Pairs
    projectors: nn.ModuleList
    cut: str | None
    groups: list[list[nn.Parameter]]
    n_classes: int
    forward: Forward | None

    def ask_teacher(self, inputs: Any) -> tuple[list[Tensor], Tensor | None]:
        """Features of the paired layers and logits, whichever the objective uses."""
        if self.teacher is None:
            return [], None
        names = [teacher_layer for teacher_layer, _ in self.pairs]
        with evaluating(self.teacher):
            if not self.objective.uses_teacher_logits:  # no further than the last paired layer
                features = features_of(self.teacher, inputs, names, forward=self.forward)
                return [features[name] for name in names], None
            with capture(self.teacher, names) as features:
                logits = first_tensor(call(self.teacher, inputs, self.forward))
        return [features[name] for name in names], logits

    def ask_student(self, inputs: Any) -> tuple[list[Tensor], Tensor]:
        """Live features of the paired layers, and logits behind the cut."""
        names = [student_layer for _, student_layer in self.pairs]
        features, logits = student_outputs(
            self.student, inputs, names, cut=self.cut, forward=self.forward
        )
        return [features[name] for name in names], logits


def join(
    student: nn.Module,
    teacher: nn.Module | None,
    objective: Any,
    pairs: Any,
    example: Any,
    *,
    seed: int = 0,
    forward: Forward | None = None,
) -> Networks:
    """Check that student, teacher and objective fit together, and join them.

    Parameters
    ----------
    student, teacher, objective, pairs, seed, forward
        As in :func:`geomkd.distill`.
    example : Any
        A small batch of inputs, on the student's device.

    Raises
    ------
    TypeError, ValueError
        As in :func:`geomkd.distill`.
    """
    n_classes = _n_logits(student, "student", example, forward)
    teacher = _checked_teacher(student, teacher, objective, example, n_classes, forward)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the student has no parameter to train: none has requires_grad")
    cut, groups, projectors = None, [trained], nn.ModuleList()
    pairs = checked_pairs(pairs) if objective.uses_features else []
    if objective.uses_features:
        layers = list(
            zip(
                _described(teacher, "teacher", [name for name, _ in pairs], example, forward),
                _described(student, "student", [name for _, name in pairs], example, forward),
                strict=True,
            )
        )
        projectors = make_projectors(layers, seed=seed).to(trained[0])
        if objective.detaches_head:
            split = split_student(student, example, [layer for _, layer in layers], forward=forward)
            cut, groups = split.cut, [split.backbone, split.head]
        groups[0] = groups[0] + list(projectors.parameters())
    return Networks(student, teacher, objective, pairs, projectors, cut, groups, n_classes, forward)


def as_objective(objective: Any) -> Any:
    """Objective of a name, or the object itself if it is like one."""
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {list(OBJECTIVES)}; got {objective!r}")
        return OBJECTIVES[objective]()
    missing = [name for name in ATTRIBUTES if not hasattr(objective, name)]
    if missing or not callable(objective) or isinstance(objective, type):
        raise TypeError(
            f"objective must be a name or an object with {', '.join(ATTRIBUTES)} that can be "
            f"called; got {objective!r}" + (f" without {', '.join(missing)}" if missing else "")
        )
    return objective


def checked_pairs(pairs: Any) -> Pairs:
    """Pairs as a list of (teacher layer, student layer)."""
    if pairs is None:
        raise ValueError("this objective needs pairs=[(teacher layer, student layer), ...]")
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise TypeError(f"pairs must be a list of pairs of names; got {type(pairs).__name__}")
    for pair in pairs:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or not all(isinstance(name, str) for name in pair):
            raise TypeError(f"pairs must hold (teacher layer, student layer) names; got {pair!r}")
    pairs = [tuple(pair) for pair in pairs]
    if not pairs:
        raise ValueError("pairs must hold at least one (teacher layer, student layer); got none")
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"pairs must differ from each other; got {pairs}")
    return pairs


def check_options(
    epochs: Any, batch_size: Any, seed: Any, lr: Any, weight_decay: Any, clip_norm: Any
) -> None:
    """Check the numbers among the options of a run."""
    check_int(epochs, "epochs", least=1)
    check_int(batch_size, "batch_size", least=1)
    check_int(seed, "seed", least=0)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("clip_norm", clip_norm)):
        if name == "clip_norm" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
        if not 0 <= value < math.inf or (value == 0 and name != "weight_decay"):
            least = "at least 0" if name == "weight_decay" else "above 0"
            raise ValueError(f"{name} must be finite and {least}; got {value}")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, the random draws of layers and data sets follow the seed; afterwards as before."""
    on_accelerator = device.index is not None
    devices = range(torch.get_device_module(device).device_count()) if on_accelerator else ()
    with torch.random.fork_rng(devices, device_type=device.type):
        # torch.manual_seed seeds accelerators as well: not when none takes part.
        (torch.manual_seed if on_accelerator else torch.default_generator.manual_seed)(seed)
        yield


def device_of(student: nn.Module) -> torch.device:
    """Device of the student's first parameter."""
    for parameter in student.parameters():
        return parameter.device
    raise ValueError("the student has no parameters")


def _checked_teacher(
    student: nn.Module,
    teacher: nn.Module | None,
    objective: Any,
    example: Any,
    n_classes: int,
    forward: Forward | None,
) -> nn.Module | None:
    """Return the teacher, or None where it is not needed."""
    if not (objective.uses_features or objective.uses_teacher_logits):
        return None
    if teacher is None:
        raise ValueError(f"objective {objective.name!r} needs a teacher; got None")
    owned = {id(parameter) for parameter in unwrap(teacher).parameters()}
    for name, parameter in unwrap(student).named_parameters():
        if id(parameter) in owned:
            raise ValueError(
                f"the student trains, so it may share no parameter with the teacher; "
                f"got the student's {name!r} in both"
            )
    if objective.uses_teacher_logits:
        width = _n_logits(teacher, "teacher", example, forward)
        if width != n_classes:
            raise ValueError(
                f"objective {objective.name!r} needs as many teacher logits as student logits; "
                f"got {width} from the teacher and {n_classes} from the student"
            )
    return teacher


def _n_logits(model: nn.Module, name: str, example: Any, forward: Forward | None) -> int:
    with evaluating(model):
        logits = first_tensor(call(model, example, forward))
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"the {name} must return logits of shape (B, n_classes); got shape "
            f"{tuple(logits.shape)} of {str(logits.dtype).removeprefix('torch.')}"
        )
    return logits.shape[1]


def _described(
    model: nn.Module, name: str, layers: list[str], example: Any, forward: Forward | None
) -> list[Layer]:
    try:
        return describe_layers(model, layers, example, forward=forward)
    except ValueError as error:
        raise ValueError(f"pairs, {name} {error}") from None
