"""The cut between backbone and head, so that no logit loss reaches the backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.hooks import capture, target_of
from geomkd.layers import Layer
from geomkd.models import (
    Forward,
    call,
    evaluating,
    first_tensor,
    modules_by_name,
    replace_first_tensor,
    unwrap,
)


@dataclass(frozen=True)
class Split:
    """A student cut in two at its last paired layer.

    Attributes
    ----------
    cut : str
        Name of that layer.
    backbone, head : list of nn.Parameter
        Parameters that the paired features reach, and those that the logits behind the cut reach.
    """

    cut: str
    backbone: list[nn.Parameter]
    head: list[nn.Parameter]


def student_outputs(
    student: nn.Module,
    inputs: Any,
    names: Sequence[str],
    *,
    cut: str | None = None,
    forward: Forward | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Live features of the named layers, and the logits.

    Parameters
    ----------
    student : nn.Module
        Run once, in the mode it is in.
    inputs : Any
        A batch of inputs.
    names : sequence of str
        Layers whose features are wanted, with their graph.
    cut : str, optional
        Layer behind which the model goes on with a detached copy.
    forward : callable, optional
        ``forward(student, inputs)`` for students that are not simply called.
    """
    if not names:
        return {}, first_tensor(call(student, inputs, forward))
    root = unwrap(student)
    # Hooks run in the order they were registered: what is captured at the cut is still live.
    with (
        capture(root, names, detach=False) as captured,
        nullcontext() if cut is None else _cut_at(root, cut),
    ):
        logits = first_tensor(call(root, inputs, forward))
    return {name: captured[name] for name in names}, logits


def split_student(
    student: nn.Module,
    inputs: Any,
    layers: Sequence[Layer],
    *,
    forward: Forward | None = None,
) -> Split:
    """Find backbone and head of a student from a probe batch.

    Parameters
    ----------
    student : nn.Module
        Run in evaluation mode; parameters, gradients, buffers and random state stay as they are.
    inputs : Any
        A batch of inputs.
    layers : sequence of Layer
        The paired layers. The one that is run last is where the student is cut.
    forward : callable, optional
        ``forward(student, inputs)`` for students that are not simply called.

    Raises
    ------
    ValueError
        No trainable parameter before or behind the cut, or one that the logits reach although the
        paired features do too, so that the cut is no cut.
    """
    cut = max(layers, key=lambda layer: layer.order).name
    names = [layer.name for layer in layers]
    parameters = {n: p for n, p in unwrap(student).named_parameters() if p.requires_grad}
    with evaluating(student), torch.enable_grad():
        features, logits = student_outputs(student, inputs, names, cut=cut, forward=forward)
        backbone = _reached(parameters, list(features.values()))
        head = _reached(parameters, [logits])
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


@contextmanager
def _cut_at(root: nn.Module, name: str) -> Iterator[None]:
    """Within, what follows the layer in a forward pass gets a detached copy of its features."""
    module, is_input, number = target_of(name, modules_by_name(root))
    calls = 0

    def restart(module: nn.Module, args: tuple) -> None:
        nonlocal calls
        calls = 0

    def is_the_call() -> bool:
        nonlocal calls
        calls += 1
        return calls == (number or 1)

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return _detached(output) if is_the_call() else None

    def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return _detached((args, kwargs)) if is_the_call() else None

    handles = [root.register_forward_pre_hook(restart)]
    if is_input:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detached(structure: Any) -> Any:
    # A copy: an in-place operation that follows must not touch what the feature losses go back to.
    return replace_first_tensor(structure, first_tensor(structure).detach().clone())
