"""The cut between backbone and head, so that no logit loss reaches the backbone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.network.forward import (
    Forward,
    call,
    evaluating,
    first_tensor,
    modules_by_name,
    replace_first_tensor,
    unwrap,
)
from geomkd.network.hooks import as_written, target_of
from geomkd.network.layers import Layer


@dataclass(frozen=True)
class Split:
    """What of a student is trained, and where it is cut in two, if it is."""

    cut: str | None  # the layer behind which the head begins
    backbone: list[nn.Parameter]  # that the paired features reach; without a cut, all
    head: list[nn.Parameter]  # that the logits behind the cut reach


@contextmanager
def tapped(
    student: nn.Module, names: Sequence[str], *, cut: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Live features of named layers, of every forward pass with gradients within the context.

    Behind the layer ``cut`` the student, a model without wrapper, goes on with a detached copy. The
    features come with their graph; each new call of the student empties them first. The hooks are
    plain enough for ``torch.compile``.
    """
    features: dict[Any, Any] = {}  # and, of each hook, how often it was called

    def restart(module: nn.Module, args: tuple) -> None:
        features.clear()

    handles = [student.register_forward_pre_hook(restart)]
    modules = modules_by_name(student)

    def hook(name: str, act: Callable[[Any], Any]) -> None:
        module, is_input, number = target_of(name, modules)
        key = len(handles), name

        def at_call(_: nn.Module, *values: Any) -> Any:
            if not torch.is_grad_enabled():  # validation
                return None
            features[key] = features.get(key, 0) + 1
            value = values if is_input else values[-1]  # arguments, or arguments and output
            return act(value) if features[key] == (number or 1) else None

        if is_input:
            handles.append(module.register_forward_pre_hook(at_call, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(at_call))

    def take(name: str, value: Any) -> None:
        # A copy: an in-place operation that follows must not touch it.
        features[name] = first_tensor(value).clone()

    try:
        for name in dict.fromkeys(names):
            hook(name, partial(take, name))
        if cut is not None:  # hooks run in the order they were registered: taken before it is cut
            hook(cut, _detached)
        yield features
    finally:
        for handle in handles:
            handle.remove()


def student_outputs(
    student: nn.Module,
    inputs: Any,
    names: Sequence[str],
    *,
    cut: str | None = None,
    forward: Forward | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Live features of the named layers, as in `tapped`, and the logits of one batch."""
    root = unwrap(student)
    with as_written(), tapped(root, names, cut=cut) as features:
        logits = first_tensor(call(root, inputs, forward))
    return dict(zip(names, taken(features, names), strict=True)), logits


def taken(features: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Features of layers, in order; ``ValueError`` where one was not run with gradients."""
    missing = [name for name in names if name not in features]
    if missing:
        raise ValueError(
            f"student layer {missing[0]!r} is not run with gradients in training; within an "
            "activation checkpoint it may not be: pair a layer outside of it"
        )
    return [features[name] for name in names]


def split_student(
    student: nn.Module,
    inputs: Any,
    layers: Sequence[Layer],
    *,
    cut_head: bool = True,
    forward: Forward | None = None,
) -> Split:
    """Find what of a student is trained, from a probe batch; it stays as it is.

    With ``cut_head`` it is cut in two at that of the paired layers that is run last.

    Raises
    ------
    ValueError
        No trainable parameter, or none on one side of the cut; one that the logits reach although
        paired features do too, so that the cut is no cut.
    """
    cut = max(layers, key=lambda layer: layer.order).name if cut_head else None
    names = [layer.name for layer in layers]
    parameters = {n: p for n, p in unwrap(student).named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the student has no parameter to train: none has requires_grad")
    with evaluating(student), torch.enable_grad():
        features, logits = student_outputs(student, inputs, names, cut=cut, forward=forward)
        backbone = _reached(parameters, list(features.values()))
        head = _reached(parameters, [logits])
    if cut is None:
        return Split(None, list((backbone | head).values()), [])
    if around := [name for name in parameters if name in backbone and name in head]:
        raise ValueError(
            f"logit gradients reach the backbone: a path from parameter {around[0]!r} to the "
            f"logits avoids {cut!r}, the last paired student layer ({len(around)} such "
            "parameters); pair a layer that every path runs through"
        )
    for side, reached in (("before", backbone), ("behind", head)):
        if not reached:
            raise ValueError(
                f"the student has no trainable parameter {side} {cut!r}, its last paired layer"
            )
    return Split(cut, list(backbone.values()), list(head.values()))


def _reached(parameters: dict[str, nn.Parameter], outputs: list[Tensor]) -> dict[str, nn.Parameter]:
    outputs = [output.float().sum() for output in outputs if output.requires_grad]
    if not outputs:
        return {}
    # The two graphs share nodes just where the cut is no cut.
    gradients = torch.autograd.grad(
        sum(outputs), list(parameters.values()), allow_unused=True, retain_graph=True
    )
    pairs = zip(parameters.items(), gradients, strict=True)
    return {name: parameter for (name, parameter), gradient in pairs if gradient is not None}


def _detached(structure: Any) -> Any:
    # A copy: an in-place operation that follows must not touch what the feature losses go back to.
    return replace_first_tensor(structure, first_tensor(structure).detach().clone())
