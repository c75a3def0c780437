"""Which layers a model offers: its blocks, its activations, its head."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from geomkd.common.checks import check_choice, check_names
from geomkd.network.blocks import roles_of
from geomkd.network.calls import Event, decoder_inputs, event_at, events_of
from geomkd.network.dataflow import Dataflow
from geomkd.network.forward import Forward, modules_by_name, unwrap
from geomkd.network.hooks import target_of
from geomkd.network.kinds import kind_and_place
from geomkd.network.masks import under_mask


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
        ``"block"``, ``"transition"`` (between two blocks), ``"activation"``, ``"head_input"``,
        ``"head"`` (behind the head's input) or ``"named"`` (none of these; asked for by name).
    place : str
        Of tokens and sequences: ``"input"`` where there is one for each of the integer inputs,
        ``"decoder"`` where they are made from the inputs of a decoder; else ``"grid"`` for tokens
        of square images, ``"oblong"`` of others, ``"line"`` for all else, or under a mask what
        `geomkd.network.masks.under_mask` finds; not compared.
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
    model: nn.Module,
    example_input: Any,
    *,
    granularity: str = "blocks",
    forward: Forward | None = None,
) -> list[Layer]:
    """List the layers of a model that are worth scoring, in order of execution.

    Parameters
    ----------
    model : torch.nn.Module
        The model; of a compiled or data-parallel one the module inside is run.
    example_input : Tensor, tuple, list or mapping
        A batch: one argument, positional arguments or keyword arguments. Two samples or more,
        so that a batch axis can be told from an axis of length one.
    granularity : {"blocks", "stages"}
        "stages" keeps, of layers of one shape that follow from one another, the last alone.
    forward : callable, optional
        ``forward(model, example_input)`` runs the model instead.

    Returns
    -------
    list of Layer
        The blocks and what stands between them, the activation modules outside them and the input
        of the head, each where its call ends; then the activations inside the head, not the class
        scores. A module that is called again, such as a shared block, is a layer each time. Layers
        that are not run in evaluation mode, are not floating point or do not have the batch axis
        first are left out; of several that are the same tensor, such as an activation and the input
        of the head right behind it, the first stands for all.

    Raises
    ------
    TypeError
        If `model` is not a module or `example_input` holds no tensor.
    ValueError
        If there is neither a block nor an activation module.

    Notes
    -----
    Blocks are the innermost calls of modules of one class, with parts and a ``forward`` of their
    own, that are a chain: each is made of the one before it and nothing beside, whatever may have
    changed the shape between them, and one at least keeps the shape; towers are chains side by
    side. What stands in a row of modules with them is a block too, what stands between two of them
    a transition. Without a chain, the outermost modules whose class occurs twice are the blocks,
    or else those in a ``nn.ModuleList``.

    The head begins behind the last block or convolution, at the first ``nn.Linear`` that all goes
    through; of several heads at the first; with none, at a last convolution that has a channel a
    class. In a model with neither blocks nor convolutions it is the last ``nn.Linear``. The model
    is run once and left as it was.

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
    return survey(model, example_input, granularity=granularity, forward=forward).layers


def describe_layers(
    model: nn.Module, names: Iterable[str], example_input: Any, *, forward: Forward | None = None
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
    return survey(model, example_input, names, expand=False, forward=forward).layers


def survey(
    model: nn.Module,
    example_input: Any,
    names: list[str] | None = None,
    *,
    granularity: str = "blocks",
    expand: bool = True,
    forward: Forward | None = None,
) -> Survey:
    """Describe layers, the candidates or those of some names, from a forward pass.

    With `expand`, names may be patterns: ``"encoder.layer.*"`` is every module that is run there.
    """
    check_choice(granularity, "granularity", ("blocks", "stages"))
    if names is not None and granularity != "blocks":
        raise ValueError(
            f"layers= names the layers: granularity={granularity!r} has none to choose"
        )
    modules = modules_by_name(model)
    fixed = [n for n in names or () if not (expand and _is_pattern(n, modules))]
    targets = {name: target_of(name, modules) for name in fixed}  # before the model is run
    events, flow, sample_bytes, draws = events_of(model, example_input, forward)
    first_names = {module: name for name, module in reversed(modules.items())}
    if names is not None and len(fixed) < len(names):
        matched = ([n] if n in targets else _matches(n, events, first_names) for n in names)
        names = list(dict.fromkeys(chain.from_iterable(matched)))
        targets = {name: target_of(name, modules) for name in names}
    roles = roles_of(events, flow, modules)
    offered = {event: role for event, role in roles.items() if event.fault is None}
    if set(offered.values()) <= {"head_input", "head"}:
        offered = {}  # neither a block nor an activation tells where the head begins
    head_input = next((e for e, role in offered.items() if role == "head_input"), None)
    if names is None:
        if not offered:
            raise ValueError(_nothing_found(model, events, roles, first_names))
        offered = _stages(offered, flow) if granularity == "stages" else offered
        firsts = {e.tensor: e for e in reversed(offered)}
        found = {
            first_names[e.module] + e.suffix: (e, role)
            for e, role in offered.items()
            if firsts[e.tensor] is e
        }
    else:
        head = math.inf if head_input is None else head_input.order
        at_names = {name: event_at(name, target, events) for name, target in targets.items()}
        found = {
            name: (event, roles.get(event, "head" if event.order > head else "named"))
            for name, event in at_names.items()
        }
    fed = head_input.tensor if head_input is not None and names is None else None
    given = set(flow.known(decoder_inputs(example_input)))
    layers = []
    for name in names or found:
        event, role = found[name]
        decoded = bool(given and flow.found_behind(event.tensor, given))
        kind, place = kind_and_place(event, events, modules, example_input, decoded)
        own = event.order, event.dtype, event.device
        feeds_head = role == "head_input" or event.tensor == fed
        layers.append(Layer(name, kind, event.shape, role, *own, feeds_head, place))
    return Survey(under_mask(model, layers, example_input, forward), sample_bytes, draws)


def _is_pattern(name: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(character in name for character in "*?[") and name not in modules


def _matches(pattern: str, events: list[Event], names: Mapping[nn.Module, str]) -> list[str]:
    """Names that a pattern stands for, in order of execution; it is matched part by part."""
    parts = pattern.split(".")
    of_inputs = parts[-1].partition("#")[0] == "input"
    found = []
    for event in events:
        name = names[event.module] + event.suffix
        own = name.split(".")  # ["", "input"] of the model itself
        fits = event.is_input == of_inputs and event.fault is None and own[0]
        if fits and len(own) == len(parts) and all(map(fnmatchcase, own, parts)):
            found.append(name)
    if not found:
        raise ValueError(f"layer {pattern!r}: no layer that is run has such a name")
    return found


def _stages(offered: dict[Event, str], flow: Dataflow) -> dict[Event, str]:
    """Keep the last of each run of layers of one shape, each made of the one before."""
    kept: list[Event] = []
    for event, role in offered.items():
        same = kept and role not in ("head_input", "head") and kept[-1].shape == event.shape
        if same and flow.found_behind(event.tensor, {kept[-1].tensor}):
            kept.pop()
        kept.append(event)
    return {event: offered[event] for event in kept}


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
