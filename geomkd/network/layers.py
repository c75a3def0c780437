"""Which layers a model offers: its blocks, its activations, its head."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from geomkd.network.forward import (
    Forward,
    call,
    evaluating,
    first_tensor,
    modules_by_name,
    replace_first_tensor,
    unwrap,
)
from geomkd.network.hooks import capture, check_names, features_of, target_of, watching

__all__ = [
    "Layer",
    "call",
    "candidate_layers",
    "capture",
    "describe_layers",
    "evaluating",
    "features_of",
    "first_tensor",
    "replace_first_tensor",
    "unwrap",
]

CONVOLUTION = nn.modules.conv._ConvNd
NO_ACTIVATION = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
ACTIVATION_NAME = re.compile("elu|glu|silu|swish|mish|tanh|sigmoid|softplus", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """A place in a model where features can be read.

    Attributes
    ----------
    name : str
        Path of the module; ``"fc.input"`` is the input of module ``fc``, ``"relu#2"`` what
        ``relu`` returns when it is called the second time in one forward pass.
    kind : str
        ``"map"`` (B, C, H, W), ``"map_last"`` (B, H, W, C), ``"tokens"`` (B, T, C), ``"vector"``
        (B, C) or ``"other"``. A one-dimensional convolution's output (B, C, L) is called tokens.
    shape : tuple of int
        Of one sample, without the batch axis.
    role : str
        ``"block"``, ``"activation"``, ``"head_input"``, ``"head"`` (an activation after the
        head's input) or ``"named"`` (none of these; asked for by name).
    order : int
        Grows with the order of execution; not compared.

    Examples
    --------
    >>> from geomkd.network.layers import Layer
    >>> Layer("layer1.0", "map", (64, 8, 8), "block").dim
    4096
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    role: str = "named"
    order: int = field(default=0, repr=False, compare=False)

    @property
    def dim(self) -> int:
        """Number of features of one sample."""
        return math.prod(self.shape)


def candidate_layers(
    model: nn.Module, example_input: Any, *, forward: Forward | None = None
) -> list[Layer]:
    """List the layers of a model that are worth scoring, in order of execution.

    Parameters
    ----------
    model : torch.nn.Module
        The model; of a compiled or data-parallel one the module inside is run.
    example_input : Tensor, tuple, list or mapping
        A batch: one argument, positional arguments or keyword arguments. Two samples or more,
        so that a batch axis can be told from an axis of length one.
    forward : callable, optional
        ``forward(model, example_input)`` runs the model instead.

    Returns
    -------
    list of Layer
        The blocks, the activation modules outside them and the input of the head, each where
        its call ends; then the activations inside the head. Layers that are not run in
        evaluation mode, are not floating point or do not have the batch axis first are left out.

    Raises
    ------
    TypeError
        If `model` is not a module or `example_input` holds no tensor.
    ValueError
        If there is neither a block nor an activation module.

    Notes
    -----
    A block is an outermost module with children and a ``forward`` of its own, not from
    ``torch.nn`` (its transformer layers excepted), whose class occurs at least twice in the
    model. The head begins at the first ``nn.Linear`` that is called after the last block or
    convolution; in a model with neither, at the last one. The model is run once and left as it was.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd.network.layers import candidate_layers
    >>> body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    >>> model = nn.Sequential(body, nn.Linear(8 * 6 * 6, 10))
    >>> for layer in candidate_layers(model, torch.zeros(2, 3, 8, 8)):
    ...     print(layer)
    Layer(name='0.1', kind='map', shape=(8, 6, 6), role='activation')
    Layer(name='1.input', kind='vector', shape=(288,), role='head_input')
    """
    modules = modules_by_name(model)
    blocks = _blocks(modules)
    events = _run(model, example_input, forward, blocks)
    names = {module: name for name, module in reversed(modules.items())}
    roles = _roles(events, blocks)
    layers = [
        _layer(names[event.module] + event.suffix, event, role, modules)
        for event, role in roles.items()
        if event.fault is None
    ]
    if all(layer.role == "head_input" for layer in layers):
        raise ValueError(_nothing_found(model, events, roles, names))
    return layers


def describe_layers(
    model: nn.Module,
    names: Iterable[str],
    example_input: Any,
    *,
    forward: Forward | None = None,
) -> list[Layer]:
    """Describe layers chosen by hand.

    Parameters
    ----------
    model : torch.nn.Module
        The model; of a compiled or data-parallel one the module inside is run.
    names : iterable of str
        Names of modules, ``"fc.input"`` and ``"relu#2"`` as in `Layer`.
    example_input : Tensor, tuple, list or mapping
        A batch, as in `candidate_layers`.
    forward : callable, optional
        ``forward(model, example_input)`` runs the model instead.

    Returns
    -------
    list of Layer
        In the order of `names`; ``Layer.order`` tells the order of execution. One that
        `candidate_layers` lists has its role there, any other the role ``"named"``.

    Raises
    ------
    TypeError
        If `model` is not a module, `names` not a list of strings, or `example_input` holds no
        tensor.
    ValueError
        If there is no module of a name, it is not run, or its tensor is not floating point or
        does not have the batch axis first.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd.network.layers import describe_layers
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> describe_layers(model, ["0"], torch.zeros(2, 3))
    [Layer(name='0', kind='vector', shape=(4,), role='named')]
    """
    modules, names = modules_by_name(model), check_names(names)
    targets = {name: target_of(name, modules) for name in names}
    blocks = _blocks(modules)
    events = _run(model, example_input, forward, blocks)
    roles = _roles(events, blocks)
    calls = {(event.module, event.is_input, event.number): event for event in events}
    described = {}
    for name, (module, is_input, number) in targets.items():
        event = calls.get((module, is_input, number or 1))
        if event is None:
            times = sum(event.module is module and event.is_input == is_input for event in events)
            raise ValueError(f"layer {name!r}: {_not_run(times)}")
        if event.fault is not None:
            raise ValueError(f"layer {name!r}: {event.fault}")
        described[name] = _layer(name, event, roles.get(event, "named"), modules)
    return [described[name] for name in names]


def _not_run(times: int) -> str:
    if times == 0:
        return "its module is never run in a forward pass in evaluation mode"
    return f"its module is run only {times} time{'s' * (times > 1)} in a forward pass"


@dataclass(frozen=True, eq=False)
class Event:
    """The begin or the end of a module's call, with what it said about the tensor there."""

    module: nn.Module
    is_input: bool
    number: int
    inside: bool  # of a block that is being run
    shape: tuple[int, ...]
    fault: str | None  # why no layer can be here
    order: int

    @property
    def suffix(self) -> str:
        """What a layer's name adds to the module's."""
        return ".input" * self.is_input + f"#{self.number}" * (self.number > 1)


def _run(
    model: nn.Module, example_input: Any, forward: Forward | None, blocks: set[nn.Module]
) -> list[Event]:
    """Run the model once and return the begin and the end of every call in it."""
    root = unwrap(model)
    n = _batch_size(example_input)
    events: list[Event] = []
    running: list[nn.Module] = []

    def restart() -> None:
        events.clear()
        running.clear()

    def see(module: nn.Module, is_input: bool, number: int, value: Any) -> None:
        if module in blocks and not is_input:
            running.pop()
        shape, fault = _shape_and_fault(value, n)
        inside = bool(running)
        events.append(Event(module, is_input, number, inside, shape, fault, len(events)))
        if module in blocks and is_input:
            running.append(module)

    with evaluating(model), watching(root, modules_by_name(root).values(), see, restart):
        call(root, example_input, forward)
    return events


def _batch_size(example_input: Any) -> int:
    try:
        tensor = first_tensor(example_input)
    except TypeError as error:
        raise TypeError(f"example_input: {error}") from None
    if tensor.ndim == 0:
        raise ValueError("example_input must have a batch axis; got a tensor of shape ()")
    return len(tensor)


def _shape_and_fault(value: Any, n: int) -> tuple[tuple[int, ...], str | None]:
    try:
        tensor = first_tensor(value)
    except TypeError as error:
        return (), str(error)
    if not tensor.is_floating_point():
        return (), f"expected floating-point features; got {tensor.dtype}"
    if tensor.is_nested or tensor.ndim == 0 or len(tensor) != n:
        shape = "a nested tensor" if tensor.is_nested else tuple(tensor.shape)
        return (), f"expected the batch axis first, ({n}, ...); got {shape}"
    return tuple(tensor.shape[1:]), None


def _blocks(modules: Mapping[str, nn.Module]) -> set[nn.Module]:
    """Return the modules that are blocks unless another block runs them."""
    root = modules[""]
    distinct = set(modules.values())
    times = Counter(map(type, distinct))
    return {m for m in distinct if m is not root and times[type(m)] > 1 and _has_own_forward(m)}


def _has_own_forward(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return True
    if type(module).__module__.startswith("torch.nn.") or not any(module.children()):
        return False
    return type(module).forward not in (nn.Module.forward, nn.Sequential.forward)


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, NO_ACTIVATION):
        return False
    if any(base.__module__ == nn.modules.activation.__name__ for base in type(module).__mro__):
        return True
    # Other libraries have their own: GELUActivation, HardSwish, QuickGELU and more.
    bare = not any(module.children()) and not any(True for _ in module.parameters())
    return bare and ACTIVATION_NAME.search(type(module).__name__) is not None


def _roles(events: list[Event], blocks: set[nn.Module]) -> dict[Event, str]:
    """Return the events where there is a layer, in order, with the layers' roles."""
    outside = [event for event in events if not event.inside]
    body = [e for e in outside if e.module in blocks or isinstance(e.module, CONVOLUTION)]
    linear = [e for e in outside if isinstance(e.module, nn.Linear) and e.is_input]
    after = [e for e in linear if e.order > body[-1].order] if body else linear[-1:]
    head = after[0] if after else None
    roles: dict[Event, str] = {}
    for event in outside:
        if event is head:
            roles[event] = "head_input"
        elif event.is_input:
            continue
        elif event.module in blocks:
            roles[event] = "block"
        elif _is_activation(event.module):
            roles[event] = "head" if head and event.order > head.order else "activation"
    return roles


def _layer(name: str, event: Event, role: str, modules: Mapping[str, nn.Module]) -> Layer:
    kinds = {1: "vector", 2: "tokens", 3: "map" if _is_map(event, modules) else "map_last"}
    return Layer(name, kinds.get(len(event.shape), "other"), event.shape, role, event.order)


def _is_map(event: Event, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer of three axes has its channels first."""
    if len(event.shape) == 3:
        first, middle, last = event.shape
        if (first == middle) != (middle == last):  # the square grid is told from the channels
            return middle == last
    return _is_convolutional(event, modules)


def _is_convolutional(event: Event, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module, else the nearest one around it that shows, works with channels first."""
    path = next(name for name, module in modules.items() if module is event.module)
    while True:
        around = list(modules[path].modules())
        if any(isinstance(m, CONVOLUTION | nn.BatchNorm2d) for m in around):
            return True
        # Not isinstance: LayerNorm2d classes derive from nn.LayerNorm and take channels first.
        if any(type(m) in (nn.Linear, nn.LayerNorm) for m in around):
            return False
        if not path:
            return True
        path = path.rpartition(".")[0]


def _nothing_found(
    model: nn.Module, events: list[Event], roles: Mapping[Event, str], names: Mapping
) -> str:
    kind = type(unwrap(model)).__name__
    left_out = [event for event, role in roles.items() if role != "head_input"]
    if left_out:
        name = names[left_out[0].module] + left_out[0].suffix
        found = f"no usable block or activation module; layer {name!r}: {left_out[0].fault}"
    else:
        found = "no block and no activation module"
    usable = [names[e.module] + e.suffix for e in events if not e.fault and not e.is_input]
    example = [name for name in usable if name][:2] or ["name"]
    return f"{kind} has {found}; name modules in layers=, for example layers={example}"
