"""One forward pass of a model, told as the begin and the end of every module's call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from geomkd.common.randomness import random_fingerprint
from geomkd.network.dataflow import Dataflow
from geomkd.network.forward import (
    Forward,
    evaluating,
    first_tensor,
    modules_by_name,
    tensors_in,
    tried,
    unwrap,
)
from geomkd.network.hooks import Target, watching


@dataclass(frozen=True, eq=False)
class Event:
    """The begin or the end of a module's call, and the tensor there."""

    module: nn.Module
    is_input: bool
    number: int
    order: int
    shape: tuple[int, ...]  # of one sample
    dtype: torch.dtype | None
    device: torch.device | None
    nbytes: int
    fault: str | None  # why no layer can be here
    tensor: int  # its number in the dataflow: the same where it is this very tensor, unchanged
    begin: Self | None  # of the call that ends here

    def holds(self, other: Self) -> bool:
        """Whether the call that ends here begins before another event, and ends after it."""
        return self.begin is not None and self.begin.order < other.order < self.order

    @property
    def suffix(self) -> str:
        """What a layer's name adds to the module's."""
        return ".input" * self.is_input + f"#{self.number}" * (self.number > 1)


def events_of(
    model: nn.Module, example_input: Any, forward: Forward | None
) -> tuple[list[Event], Dataflow, int, bool]:
    """Run a model once; give its last call's events, and what was made from what in the pass.

    Then the bytes of a sample, an estimate of what the widest place of a forward pass needs, and
    whether the model draws, which changes a global random state.
    """
    n = _batch_size(example_input)
    root, events, start, flow = unwrap(model), [], 0, Dataflow()
    running: list[tuple[Event, tuple[int, ...]]] = []  # calls, and what they were given

    def restart() -> None:
        nonlocal start
        start = len(events)

    @flow.paused()  # what is asked of a tensor here is no part of the pass
    def see(module: nn.Module, is_input: bool, number: int, value: Any) -> None:
        begin, behind = None, ()
        while not is_input and begin is None:
            begin, behind = running.pop()
            if begin.module is not module:  # a call ended by an exception that the model caught
                begin = None
        tensor = flow.number(next(tensors_in(value), None), behind)
        told = module, is_input, number, len(events), *_tensor(value, n), tensor, begin
        events.append(Event(*told))
        if is_input:
            running.append((events[-1], flow.known(tensors_in(value))))

    devices = {parameter.device for parameter in root.parameters()}
    with evaluating(model), watching(root, modules_by_name(root).values(), see, restart):
        before = random_fingerprint(*devices)
        for x in decoder_inputs(example_input):
            flow.number(x)
        with flow:
            tried(root, example_input, forward)
        draws = random_fingerprint(*devices) != before
    widest, given = 0, 0
    for event in events:
        if not any(event.module.children()):
            if event.is_input:
                given = event.nbytes
            else:
                widest = max(widest, given + event.nbytes)
    # Twice: the input and output that a residual branch and the kernels' own layouts hold besides.
    return events[start:], flow, max(1, 2 * widest // n), draws


def decoder_inputs(example_input: Any) -> list[torch.Tensor]:
    """Find what a decoder is given beside its encoder, by its names in transformers."""
    named = example_input if isinstance(example_input, Mapping) else {}
    inputs = (named.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    return [x for x in inputs if isinstance(x, torch.Tensor)]


def event_at(name: str, target: Target, events: list[Event]) -> Event:
    """Find the event that a layer's name stands for."""
    module, is_input, number = target
    number = number or 1
    calls = [event for event in events if event.module is module and event.is_input == is_input]
    if not calls:
        fault = "its module is never run in a forward pass in evaluation mode"
    elif len(calls) < number:
        s = "s" * (len(calls) > 1)
        fault = f"its module is run only {len(calls)} time{s} in a forward pass"
    else:
        fault = calls[number - 1].fault
    if fault is not None:
        raise ValueError(f"layer {name!r}: {fault}")
    return calls[number - 1]


def _batch_size(example_input: Any) -> int:
    try:
        tensor = first_tensor(example_input)
    except TypeError as error:
        raise TypeError(f"example_input: {error}") from None
    if tensor.ndim == 0:
        raise ValueError("example_input must have a batch axis; got a tensor of shape ()")
    return len(tensor)


def _tensor(value: Any, n: int) -> tuple[Any, ...]:
    """Shape of a sample, type, device and bytes of a value's first tensor, and what is wrong."""
    try:
        tensor = first_tensor(value)
    except TypeError as error:
        return (), None, None, 0, str(error)
    own = tensor.dtype, tensor.device, tensor.nbytes if tensor.layout is torch.strided else 0
    if not tensor.is_floating_point():
        return (), *own, f"expected floating-point features; got {tensor.dtype}"
    if tensor.is_nested or tensor.ndim == 0 or len(tensor) != n:
        shape = "a nested tensor" if tensor.is_nested else tuple(tensor.shape)
        return (), *own, f"expected the batch axis first, ({n}, ...); got {shape}"
    return tuple(tensor.shape[1:]), *own, None
