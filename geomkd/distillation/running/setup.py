"""What a distillation run is made of, checked before any training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from geomkd.common.checks import check_choice
from geomkd.distillation.detached_head import split_student
from geomkd.distillation.objectives import projectors_of
from geomkd.distillation.projectors import Meeting
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.distillation.running.batches import part_of
from geomkd.distillation.teacher_head import WithTeacherHead
from geomkd.network.forward import (
    Forward,
    check_loaded,
    evaluating,
    first_tensor,
    frozen_modules,
    modules_by_name,
    tensors_in,
    tried,
    unwrap,
)
from geomkd.network.hooks import features_of, has_layer
from geomkd.network.layers import Layer, describe_layers
from geomkd.network.masks import masks_in, one_by_one, warn_of_padding

Pairs = list[tuple[str, str]]
ATTRIBUTES = ("name", "uses_features", "uses_teacher_logits", "detaches_head")


@dataclass(frozen=True)
class Networks:
    """Student, teacher, and what joins them."""

    student: nn.Module  # the one that was given, or it with its teacher's head
    teacher: nn.Module | None  # None where the objective needs none
    objective: Any
    pairs: Pairs  # teacher layer and student layer; none where the objective uses no features
    layers: list[tuple[Layer, Layer]]  # those pairs, described
    student_layers: list[str]  # whose features the objective sees, one a pair
    projectors: nn.Module  # what the objective trains beside the student
    cut: str | None  # student layer behind which the head trains on detached features
    groups: list[list[nn.Parameter]]  # backbone with projectors, and head if there is a cut
    n_classes: int  # the student's logits
    n_heads: int  # tensors of logits that the student returns in evaluation mode
    frozen: list[nn.Module]  # parts of the student that stay in evaluation mode
    forward: Forward | None

    @property
    def teacher_layers(self) -> list[str]:
        """Layers of the teacher whose features the objective sees, one per pair."""
        return [name for name, _ in self.pairs]


def join(
    student: nn.Module,
    teacher: nn.Module | None,
    objective: Any,
    pairs: Any,
    example: Any,
    *,
    batch_size: int = 1,
    samples: Any = None,
    seed: int = 0,
    forward: Forward | None = None,
) -> Networks:
    """Check that student, teacher and objective fit together, and join them.

    Parameters
    ----------
    student, teacher, objective, pairs, seed, forward
        As in :func:`geomkd.distill`, which tells the errors too.
    example : Any
        A small batch of inputs, on the student's device.
    batch_size : int
        Samples that the loss sees at a time.
    samples : callable, optional
        Returns batches of inputs that principal components are fitted on; by default the example.
    """
    inputs = samples or partial(iter, [example])
    example, seen = part_of(example, "student"), part_of(example, "teacher")
    n_classes, n_heads = _logits(student, "student", example, forward)
    frozen = frozen_modules(student)
    teacher = _checked_teacher(student, teacher, objective, seen, n_classes, forward)
    generator = Generator().manual_seed(seed)
    pairs = checked_pairs(pairs) if objective.uses_features else []
    student_layers = [name for _, name in pairs]
    _check_sides(pairs, teacher, student)
    theirs = _described(teacher, "teacher", [name for name, _ in pairs], seen, forward)
    ours = _described(student, "student", student_layers, example, forward)
    if getattr(objective, "uses_teacher_head", False):
        options = {"forward": forward, "generator": generator}
        student = WithTeacherHead(student, teacher, pairs[-1], example, **options)
        pairs, theirs, student_layers = pairs[-1:], theirs[-1:], ["projector"]
        student = student.to(next(student.parameters()))
        ours = _described(student, "student", student_layers, example, forward)
        n_classes, n_heads = _logits(student, "student", example, forward)
    split = split_student(student, example, ours, cut_head=objective.detaches_head, forward=forward)
    projectors, met = nn.ModuleList(), list(zip(theirs, ours, strict=True))
    looked_at = [(student, [*ours, *theirs] if seen is example else ours, example, "student")]
    looked_at += [(teacher, theirs, seen, "teacher")] * (seen is not example and bool(theirs))
    for *told, network in looked_at:
        warn_of_padding(*told, (part_of(x, network) for x in inputs()), stacklevel=3)
    if pairs:
        meeting = Meeting(met, batch_size, generator, _asked_once(teacher, theirs, inputs, forward))
        first = split.backbone[0]
        at_least = torch.promote_types(first.dtype, torch.float32)
        projectors = projectors_of(objective, meeting).to(first.device, at_least)
    groups = [split.backbone + list(projectors.parameters())]
    groups += [split.head] if split.head else []
    joined = (student, teacher, objective, pairs, met, student_layers, projectors, split.cut)
    return Networks(*joined, groups, n_classes, n_heads, frozen, forward)


def as_objective(objective: Any) -> Any:
    """Objective of a name, or the object itself if it is like one."""
    if isinstance(objective, str):
        return OBJECTIVES[check_choice(objective, "objective", OBJECTIVES)]()
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


def placed(
    student: nn.Module,
    teacher: nn.Module | None,
    device: torch.device | str | None,
    *,
    channels_last: bool = False,
) -> torch.device:
    """Move both models where they are trained, and return the device of the student."""
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) and not (name == "teacher" and model is None):
            raise TypeError(f"{name} must be a torch.nn.Module; got {type(model).__name__}")
        if model is not None:
            check_loaded(model, name)
    options = {"memory_format": torch.channels_last} if channels_last else {}
    student.to(device, **options)
    for parameter in student.parameters():
        if teacher is not None:
            teacher.to(parameter.device, **options)
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
        width, _ = _logits(teacher, "teacher", example, forward)
        if width != n_classes:
            raise ValueError(
                f"objective {objective.name!r} needs as many teacher logits as student logits; "
                f"got {width} from the teacher and {n_classes} from the student"
            )
    return teacher


def _asked_once(
    teacher: nn.Module, layers: list[Layer], samples: Callable[[], Any], forward: Forward | None
) -> Callable[[], list[Tensor]]:
    """Return what gives the features of samples, and computes them when it is first asked."""

    @cache
    def features() -> list[Tensor]:
        parts, names = [], [layer.name for layer in layers]
        with evaluating(teacher):
            for x in (part_of(x, "teacher") for x in samples()):
                found, mask = features_of(teacher, x, names, forward=forward), masks_in(x)
                parts.append([one_by_one(found[layer.name], layer, mask) for layer in layers])
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    return features


def n_alike(output: Any) -> int:
    """Count the tensors in a model's output that have the shape of the first."""
    shape = first_tensor(output).shape
    return sum(tensor.shape == shape for tensor in tensors_in(output))


def _logits(model: nn.Module, name: str, example: Any, forward: Forward | None) -> tuple[int, int]:
    """Width of a model's logits, and how many tensors of such it returns."""
    with evaluating(model):
        output = tried(model, example, forward)
    logits = first_tensor(output)
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(
            f"the {name} must return logits of shape (B, n_classes); got shape "
            f"{tuple(logits.shape)} of {str(logits.dtype).removeprefix('torch.')}"
        )
    return logits.shape[1], n_alike(output)


def _check_sides(pairs: Pairs, teacher: nn.Module | None, student: nn.Module) -> None:
    """Refuse a name that only the other network has: pairs are easily turned round."""
    models = {"teacher": teacher, "student": student} if pairs else {}
    known = {side: modules_by_name(model) for side, model in models.items()}
    for pair in pairs:
        for name, side, other in zip(pair, models, reversed(models), strict=True):
            if not has_layer(name, known[side]) and has_layer(name, known[other]):
                raise ValueError(
                    f"pairs must hold (teacher layer, student layer), in this order; got {pair}, "
                    f"and {name!r} is a layer of the {other}, not of the {side}"
                )


def _described(
    model: nn.Module | None, name: str, layers: list[str], example: Any, forward: Forward | None
) -> list[Layer]:
    if not layers:
        return []
    try:
        return describe_layers(model, layers, example, forward=forward)
    except ValueError as error:
        raise ValueError(f"pairs, {name} {error}") from None
