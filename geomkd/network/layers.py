"""Which layers a model offers: its blocks, its activations, its head."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from geomkd.common.checks import check_names
from geomkd.network.calls import Event, event_at, events_of
from geomkd.network.forward import Forward, modules_by_name, unwrap
from geomkd.network.hooks import target_of
from geomkd.network.kinds import CONVOLUTION, kind_and_place

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
        ``"map"`` (B, C, H, W), ``"map_last"`` (B, H, W, C), ``"tokens"`` (B, T, C), ``"sequence"``
        (B, C, L), ``"vector"`` (B, C) or ``"other"``. Sequences are what the last convolution,
        normalisation, Linear, Embedding or recurrent module before, of as many channels, has so.
    shape : tuple of int
        Of one sample, without the batch axis.
    role : str
        ``"block"``, ``"activation"``, ``"head_input"``, ``"head"`` (behind the head's input) or
        ``"named"`` (none of these; asked for by name).
    place : str
        Of tokens and sequences: ``"input"`` where there is one for each of the integer inputs,
        else ``"grid"`` for tokens of images, ``"line"`` for all others; not compared.
    order : int
        Grows with the order of execution; not compared.
    dtype, device
        Of the tensor there; not compared.
    feeds_head : bool
        Whether it is the head's input, or stands for it as the same tensor; not compared.

    Examples
    --------
    >>> Layer("layer1.0", "map", (64, 8, 8), "block").dim
    4096
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    role: str = "named"
    order: int = field(default=0, repr=False, compare=False)
    dtype: torch.dtype | None = field(default=None, repr=False, compare=False)
    device: torch.device | None = field(default=None, repr=False, compare=False)
    feeds_head: bool = field(default=False, repr=False, compare=False)
    place: str = field(default="grid", repr=False, compare=False)

    @property
    def dim(self) -> int:
        """Number of features of one sample."""
        return math.prod(self.shape)


class Survey(NamedTuple):
    """What one forward pass tells of a model."""

    layers: list[Layer]
    sample_bytes: int  # that a sample's forward pass takes at its widest place: an estimate
    draws: bool  # whether it drew from a global random generator


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
        evaluation mode, are not floating point or do not have the batch axis first are left out;
        of several that are the same tensor, such as an activation and the input of the head right
        behind it, the first stands for all.

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
    return survey(model, example_input, forward=forward).layers


def describe_layers(
    model: nn.Module,
    names: Iterable[str],
    example_input: Any,
    *,
    forward: Forward | None = None,
) -> list[Layer]:
    """Describe layers chosen by hand, in the order of their names.

    A layer that `candidate_layers` lists has its role there. Of all others the role is "head"
    behind the head's input, "named" before it.

    Raises
    ------
    TypeError, ValueError
        As `candidate_layers`; if there is no module of a name, it is not run, or its tensor is not
        floating point or does not have the batch axis first.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> describe_layers(model, ["0"], torch.zeros(2, 3))
    [Layer(name='0', kind='vector', shape=(4,), role='named')]
    """
    names = check_names(names, "names", distinct=False)
    return survey(model, example_input, names, forward=forward).layers


def survey(
    model: nn.Module,
    example_input: Any,
    names: list[str] | None = None,
    *,
    forward: Forward | None = None,
) -> Survey:
    """Describe layers, the candidates or those of some names, from a single forward pass."""
    modules = modules_by_name(model)
    targets = {name: target_of(name, modules) for name in names or ()}
    events, sample_bytes, draws = events_of(model, example_input, forward)
    roles = _roles(events, _blocks(modules))
    offered = {event: role for event, role in roles.items() if event.fault is None}
    if set(offered.values()) <= {"head_input"}:
        offered = {}  # neither a block nor an activation tells where the head begins
    head_input = next((e for e, role in offered.items() if role == "head_input"), None)
    if names is None:
        first_names = {module: name for name, module in reversed(modules.items())}
        if not offered:
            raise ValueError(_nothing_found(model, events, roles, first_names))
        firsts = {e.origin: e for e in reversed(offered)}
        found = {
            first_names[e.module] + e.suffix: (e, role)
            for e, role in offered.items()
            if firsts[e.origin] is e
        }
    else:
        head = math.inf if head_input is None else head_input.order
        at_names = {name: event_at(name, target, events) for name, target in targets.items()}
        found = {
            name: (event, roles.get(event, "head" if event.order > head else "named"))
            for name, event in at_names.items()
        }
    fed = head_input.origin if head_input is not None and names is None else None
    told = partial(kind_and_place, events=events, modules=modules, example_input=example_input)
    layers = {name: _layer(name, *of, fed, told) for name, of in found.items()}
    return Survey([layers[name] for name in names or layers], sample_bytes, draws)


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
    outside, running = [], 0
    for event in events:
        running -= event.module in blocks and not event.is_input
        if not running:
            outside.append(event)
        running += event.module in blocks and event.is_input
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


def _layer(
    name: str, event: Event, role: str, fed: int | None, told: Callable[[Event], tuple[str, str]]
) -> Layer:
    (kind, place), feeds_head = told(event), role == "head_input" or event.origin == fed
    own = event.order, event.dtype, event.device, feeds_head, place
    return Layer(name, kind, event.shape, role, *own)


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
