"""Hooks: copy what the modules of a model compute while it runs.

A model may be wrapped by ``torch.compile`` or a data-parallel class. The module inside is watched,
and runs in plain Python meanwhile, since compiled graphs and fused kernels would pass the hooks by.
"""

import difflib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geomkd.common.checks import check_names
from geomkd.network.forward import Forward, call, first_tensor, modules_by_name, unwrap


class Target(NamedTuple):
    """What a layer's name stands for: a call of a module, its input or its output."""

    module: nn.Module
    is_input: bool
    number: int | None  # None: the name does not say which call


def target_of(name: str, modules: Mapping[str, nn.Module]) -> Target:
    """Find what ``"fc"``, ``"fc.input"``, ``"fc#2"`` or ``"fc.input#2"`` is among all modules.

    Raises
    ------
    ValueError
        If there is no such module; with the names that come closest.
    """
    base, number = name, None
    if name not in modules and "#" in name:
        stem, _, digits = name.rpartition("#")
        if digits.isdecimal() and int(digits) > 0:
            base, number = stem, int(digits)
    path = base if base in modules else base.removesuffix(".input")
    if path not in modules:
        close = difflib.get_close_matches(path, [key for key in modules if key], n=3)
        hint = f"; close matches: {', '.join(map(repr, close))}" if close else ""
        raise ValueError(f"layer {name!r}: the model has no module {path!r}{hint}")
    return Target(modules[path], path != base, number)


def has_layer(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer's name stands for one of the modules."""
    try:
        return target_of(name, modules) is not None
    except ValueError:
        return False


@contextmanager
def watching(
    model: nn.Module,
    modules: Iterable[nn.Module],
    see: Callable[[nn.Module, bool, int, Any], None],
    restart: Callable[[], None],
) -> Iterator[None]:
    """Report every call of some modules while the context lasts.

    Parameters
    ----------
    model : torch.nn.Module
        The model, unwrapped. Each call of it sets the counts of calls back.
    modules : iterable of torch.nn.Module
        Modules of `model` to report on.
    see : callable
        ``see(module, is_input, number, value)``, before the call with the arguments as value,
        after it with the output.
    restart : callable
        Called without arguments when a call of `model` begins.
    """
    counts: Counter[tuple[nn.Module, bool]] = Counter()

    def begin(module: nn.Module, args: Any) -> None:
        counts.clear()
        restart()

    def report(module: nn.Module, is_input: bool, value: Any) -> None:
        counts[module, is_input] += 1
        see(module, is_input, counts[module, is_input], value)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        report(module, True, (args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        report(module, False, output)

    with ExitStack() as stack:
        stack.enter_context(as_written())
        stack.callback(model.register_forward_pre_hook(begin).remove)
        for module in dict.fromkeys(modules):
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


@contextmanager
def as_written() -> Iterator[None]:
    """Make compiled modules run their Python code, and transformers their modules one by one."""
    # A compiled graph that exists does not see new hooks; without dynamo loaded there is none.
    loaded = "torch._dynamo" in sys.modules
    # The fused path of nn.TransformerEncoder hands nested tensors to its layers, hooks or not.
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.compiler.set_stance("force_eager") if loaded else nullcontext():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def capture(
    model: nn.Module, names: Iterable[str], *, detach: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Copy what named layers compute in the forward passes run inside the context.

    Parameters
    ----------
    model : torch.nn.Module
        The model; compiled and data-parallel ones too, which run uncompiled meanwhile.
    names : iterable of str
        Names of modules. ``"fc.input"`` is the first tensor among the arguments of module ``fc``;
        ``"relu#2"`` is the second call of ``relu`` alone, where ``"relu"`` gives every call, as
        ``"relu"``, ``"relu#2"`` and so on.
    detach : bool, default True
        Cut the copies from the graph; with False, gradients flow through them.

    Yields
    ------
    dict of str to Tensor
        Filled as the model runs, in order of execution. Each new call of `model` empties it first.

    Raises
    ------
    TypeError
        If `model` is not a module or `names` not a list of strings.
    ValueError
        If there is no module of a name; in the forward pass, if a layer returns no tensor.

    Notes
    -----
    The copies are taken at once, so an in-place operation that follows does not change them. Of a
    tuple, list or mapping the first tensor counts. The mode of the model is the caller's;
    `evaluating` sets it. The hooks are removed whatever happens.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd.network.hooks import capture
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with capture(model, ["1", "2.input"]) as features:
    ...     _ = model(torch.ones(5, 3))
    >>> {name: tuple(tensor.shape) for name, tensor in features.items()}
    {'1': (5, 4), '2.input': (5, 4)}
    """
    root = unwrap(model)
    targets = _targets(root, check_names(names, "names", distinct=False))
    features: dict[str, Tensor] = {}

    def see(module: nn.Module, is_input: bool, number: int, value: Any) -> None:
        for name, wanted in targets.get((module, is_input), ()):
            if wanted in (None, number):
                key = name if wanted or number == 1 else f"{name}#{number}"
                tensor = _tensor_of(key, value)
                features[key] = tensor.detach().clone() if detach else tensor.clone()

    with watching(root, [module for module, _ in targets], see, features.clear):
        yield features


def features_of(
    model: nn.Module,
    batch: Any,
    names: Iterable[str],
    *,
    forward: Forward | None = None,
    take: Callable[[str, Tensor], Any] | None = None,
) -> dict[str, Any]:
    """Compute named layers' features of one batch, no further than the last of them.

    Parameters
    ----------
    model : torch.nn.Module
        The model; of a wrapped one the module inside is run, in the mode that it is in.
    batch : Tensor, tuple, list or mapping
        A batch, as `call` takes it.
    names : iterable of str
        Names as in `capture`, each for one call: ``"relu"`` is the first call alone.
    forward : callable, optional
        ``forward(model, batch)`` runs the model instead.
    take : callable, optional
        ``take(name, tensor)`` makes what is returned of a layer's tensor, at once, before an
        in-place operation can change it. By default a detached copy.

    Returns
    -------
    dict of str to Tensor
        By name, in the order of `names`: the features, or what `take` made of them.

    Raises
    ------
    ValueError
        If there is no module of a name, a layer returns no tensor, or is never run.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> features_of(model, torch.ones(5, 3), ["1"])["1"].shape
    torch.Size([5, 4])
    """
    root, names = unwrap(model), check_names(names, "names", distinct=False)
    targets = _targets(root, names)
    taken: dict[str, Any] = {}

    def see(module: nn.Module, is_input: bool, number: int, value: Any) -> None:
        for name, wanted in targets.get((module, is_input), ()):
            if number == (wanted or 1):
                tensor = _tensor_of(name, value)
                taken[name] = take(name, tensor) if take else tensor.detach().clone()
        if len(taken) == len(set(names)):
            raise _Enough

    with watching(root, [module for module, _ in targets], see, taken.clear), suppress(_Enough):
        call(root, batch, forward)
    missing = [name for name in names if name not in taken]
    if missing:
        raise ValueError(f"layers never run in this forward pass: {', '.join(map(repr, missing))}")
    return {name: taken[name] for name in names}


class _Enough(Exception):
    """Ends a forward pass whose remainder is not needed."""


def _targets(
    root: nn.Module, names: list[str]
) -> dict[tuple[nn.Module, bool], list[tuple[str, int | None]]]:
    """Return what to look for at each module's input and output: names and numbers of calls."""
    modules = modules_by_name(root)
    targets = defaultdict(list)
    for name in names:
        module, is_input, number = target_of(name, modules)
        targets[module, is_input].append((name, number))
    return targets


def _tensor_of(name: str, value: Any) -> Tensor:
    try:
        return first_tensor(value)
    except TypeError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
