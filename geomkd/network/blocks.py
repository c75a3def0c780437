"""Which calls of a model's modules are its blocks, and where its head begins.

A call is told by the event at its end, which knows the event at its begin.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import nn

from geomkd.network.calls import Event
from geomkd.network.dataflow import Dataflow
from geomkd.network.kinds import CONVOLUTION

NORM = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
NO_ACTIVATION = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
ACTIVATION_NAME = re.compile("elu|glu|silu|swish|mish|tanh|sigmoid|softplus", re.IGNORECASE)


def roles_of(
    events: list[Event], flow: Dataflow, modules: Mapping[str, nn.Module]
) -> dict[Event, str]:
    """Give the roles of the events of a pass where there is a layer, in order."""
    calls = [event for event in events if event.begin is not None]
    blocks, transitions = _trunk(calls, flow, modules)
    roles = dict.fromkeys(blocks, "block") | dict.fromkeys(transitions, "transition")
    outside = [e for e in events if not any(call.holds(e) for call in roles)]
    body = [e for e in outside if e in roles or (e.begin and isinstance(e.module, CONVOLUTION))]
    head = _head(outside, body, flow, events[-1])
    active = [e for e in outside if e.begin and e not in roles and is_activation(e.module)]
    if head and not any(e.order < head.order for e in (*roles, *active)):
        head = None if active else head  # a network of one layer has no head
    weights = [e.order for e in outside if isinstance(e.module, nn.Linear | CONVOLUTION)]
    for event in active:
        if head is None or event.order < head.order:
            roles[event] = "activation"
        elif event.order < weights[-1]:  # behind the last of them are the class scores
            roles[event] = "head"
    if head is not None:
        roles[head] = "head_input"
    return {event: roles[event] for event in outside if event in roles}


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation, of torch or of a library that has its own."""
    if isinstance(module, NO_ACTIVATION):
        return False
    if any(base.__module__ == nn.modules.activation.__name__ for base in type(module).__mro__):
        return True
    # Other libraries have their own: GELUActivation, HardSwish, QuickGELU and more.
    bare = not any(module.children()) and not any(True for _ in module.parameters())
    return bare and ACTIVATION_NAME.search(type(module).__name__) is not None


def _trunk(
    calls: list[Event], flow: Dataflow, modules: Mapping[str, nn.Module]
) -> tuple[list[Event], list[Event]]:
    """Find the blocks, and what stands between two of them."""
    units = [call for call in calls if call.module is not modules[""] and _is_unit(call.module)]
    weighty = [c for c in calls if any(p.ndim > 1 for p in c.module.parameters(recurse=False))]
    by_class = defaultdict(list)
    for call in units:
        by_class[type(call.module)].append(call)
    places = {module: re.sub(r"\d+", "*", name) for name, module in reversed(modules.items())}
    rows = {call: places[call.module] for call in units if "*" in places[call.module]}
    chained = _chained(by_class.values(), weighty, {}, flow)
    chained = chained or _chained(by_class.values(), weighty, rows, flow)
    blocks = [c for c in chained if not any(c.holds(inner) for inner in chained)]
    if not blocks:
        return _repeated(units, calls, flow, modules), []
    opened = {c for c in units if any(c.holds(block) for block in blocks)}
    others = _outermost([c for c in units if c not in opened and c not in blocks], blocks)
    own = {places[block.module] for block in blocks}
    in_row = [c for c in others if rows.get(c) in own]
    kinds = {type(c.module) for c in in_row if c.order < max(block.begin.order for block in blocks)}
    alike = [c for c in in_row if type(c.module) in kinds]  # not a head at the end of the row
    blocks = sorted([*blocks, *alike], key=lambda call: call.order)
    between = [
        call
        for one, two in pairwise(blocks)
        for call in others
        if call not in alike
        and one.order < call.begin.order
        and call.order < two.begin.order
        and flow.found_behind(call.begin.tensor, {one.tensor})
        and flow.found_behind(two.begin.tensor, {call.tensor})
    ]
    return blocks, between


def _chained(
    by_class: Iterable[list[Event]], weighty: list[Event], rows: Mapping[Event, str], flow: Dataflow
) -> list[Event]:
    """Return the calls that are chains, modules in one row with them beside them or not."""
    found = []
    for calls in by_class:
        own = {rows[call] for call in calls if call in rows}
        beside = [call for call, row in rows.items() if row in own]
        weights = [c for c in weighty if not any(other.holds(c) for other in beside)]
        found += calls if _is_chain(calls, weights, flow) else []
    return found


def _is_chain(calls: list[Event], weighty: list[Event], flow: Dataflow) -> bool:
    """Whether calls of modules of one class follow from one another, and repeat something.

    Of two that follow, the second is made of the first's output, and of nothing else that comes
    from where the chain begins: a residual unit's parts are gone around, branches are joined.
    Between them nothing has weights, or the shape changes (a patch merger); between two at least
    there is nothing. Where the second is not made of the first, another tower or branch begins.
    """
    adjoining, starts = False, {calls[0].begin.tensor}
    for one, two in pairwise(calls):
        given, taken = one.tensor, two.begin.tensor
        if two.begin.order < one.order:
            return False
        if not flow.found_behind(taken, {given}):
            if not flow.found_behind(taken, starts):
                starts.add(taken)
            continue
        between = any(one.order < c.begin.order and c.order < two.begin.order for c in weighty)
        if between and one.shape == two.begin.shape:
            return False
        if given != taken and flow.found_behind(taken, starts, without=given):
            return False
        adjoining |= not between
    return adjoining and any(call.begin.shape == call.shape for call in calls)


def _repeated(
    units: list[Event], calls: list[Event], flow: Dataflow, modules: Mapping[str, nn.Module]
) -> list[Event]:
    """Return the outermost calls of what a model has twice, or else has in a list of modules.

    Not heads: classes whose calls, of which there are several, are all followed by nothing.
    """
    used = {
        call
        for call in units
        if any(
            flow.found_behind(later.begin.tensor, {call.tensor})
            for later in calls
            if later.begin.order > call.order
        )
    }
    times = Counter(type(module) for module in set(modules.values()))
    listed = {m for in_list in modules.values() if type(in_list) is nn.ModuleList for m in in_list}
    found = _outermost([c for c in units if times[type(c.module)] > 1], [])
    found = found or _outermost([c for c in units if c.module in listed and c in used], [])
    kinds, going_on = Counter(type(c.module) for c in found), {type(c.module) for c in used}
    return [c for c in found if type(c.module) in going_on or kinds[type(c.module)] < 2]


def _head(outside: list[Event], body: list[Event], flow: Dataflow, scores: Event) -> Event | None:
    """Find the input of the head: the first place behind the body that all goes through."""
    inputs = [e for e in outside if isinstance(e.module, nn.Linear) and not e.begin]
    if not body:
        return inputs[-1] if inputs else None
    given = {event.tensor for event in body}
    after = [e for e in inputs if e.order > body[-1].order]
    for event in after:
        if not flow.found_behind(scores.tensor, given, without=event.tensor):
            return event
    whole = flow.found_behind(scores.tensor, given)
    for event in after:  # of several heads; where two towers meet in no layer, there is none
        if whole <= flow.found_behind(event.tensor, given):
            return event
    if after or not isinstance(body[-1].module, CONVOLUTION) or scores.shape != body[-1].shape[:1]:
        return None
    before = given - {body[-1].tensor}
    around = flow.found_behind(scores.tensor, before, without=body[-1].tensor)
    return body[-1].begin if before and not around else None  # the averages of its last map


def _outermost(calls: list[Event], within: list[Event]) -> list[Event]:
    """Drop the calls that lie inside another of them, or of some more."""
    return [c for c in calls if not any(other.holds(c) for other in (*calls, *within))]


def _is_unit(module: nn.Module) -> bool:
    """Whether a module has parts and a forward of its own, and is no normalisation."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return True
    if type(module).__module__.startswith("torch.nn.") or not any(module.children()):
        return False
    own = type(module).forward not in (nn.Module.forward, nn.Sequential.forward)
    return own and not isinstance(module, NORM)
