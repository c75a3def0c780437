"""Models of any kind: strip their wrappers, call them, read their outputs, keep their modes."""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.common.randomness import random_states_kept

Forward = Callable[[nn.Module, Any], Any]


def unwrap(model: nn.Module) -> nn.Module:
    """Strip the wrappers of ``torch.compile`` and of the data-parallel classes, however many.

    Examples
    --------
    >>> unwrap(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    # Importing dynamo takes a second or more; no model is compiled before someone else has.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    compiled = getattr(dynamo, "OptimizedModule", ())
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, compiled):
            model = model._orig_mod
        else:
            return model


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run `model` on a batch of whatever form.

    A tuple or list holds positional arguments, a mapping keyword arguments; anything else is the
    one argument. ``forward(model, batch)`` is called instead where it is given.

    Examples
    --------
    >>> call(torch.nn.ReLU(), {"input": torch.tensor([-1.0, 1.0])})
    tensor([0., 1.])
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def tried(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """`call` for the first time; says so where images are uint8, which few models mean."""
    raw = [x for x in tensors_in(batch) if x.dtype == torch.uint8 and forward is None]
    how = "make images float (n, C, H, W) and normalise them as the model was trained"
    how += ": x.float() / 255, less mean, by deviation"
    try:
        output = call(model, batch, forward)
    except RuntimeError as error:
        if not raw:
            raise
        what = f"the model does not take uint8, {tuple(raw[0].shape)} ({error})"
        raise ValueError(f"{what}: {how}") from error
    if any(x.ndim > 3 for x in raw):
        warnings.warn(
            f"images are uint8, and the model takes 0 ... 255 as they are: {how}; if it normalises "
            "them itself, call it by forward=lambda model, x: model(x)",
            stacklevel=2,
        )
    return output


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """Within, multiplications by the weights of convolutions and linear maps are noted."""
    counts: list[int] = []

    def count(module: nn.Module, given: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(output, Tensor) and isinstance(weight, Tensor) and weight.ndim > 1:
            counts.append(output.numel() * weight[0].numel())

    hooks = [module.register_forward_hook(count) for module in unwrap(model).modules()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def multiplications(model: nn.Module, inputs: Any, forward: Forward | None = None) -> float:
    """Multiplications of a sample, as `counting` notes them, in evaluation mode.

    Infinitely many where the model cannot be called: who calls it next says why.
    """
    with counting(model) as counts, evaluating(model):
        try:
            call(unwrap(model), inputs, forward)
        except Exception:
            return math.inf
    return sum(counts) / len(next(tensors_in(inputs)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings, depth first."""
    if isinstance(value, Tensor):
        yield value
        return
    for _, part in _items(value):
        yield from tensors_in(part)


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a module's output; ``TypeError`` where there is none."""
    for tensor in tensors_in(output):
        return tensor
    raise TypeError(
        "expected a tensor, or a tuple, list or mapping that holds one; "
        f"got {type(output).__name__}"
    )


def replace_first_tensor(output: Any, tensor: Tensor) -> Any:
    """Return the same structure, named tuples and mapping classes included, with another tensor."""
    first_tensor(output)  # there is one
    if isinstance(output, Tensor):
        return tensor
    key, value = next(item for item in _items(output) if any(True for _ in tensors_in(item[1])))
    value = replace_first_tensor(value, tensor)
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        changed[key] = value
        return changed
    values = [*output[:key], value, *output[key + 1 :]]
    # A named tuple takes its fields one by one, every other sequence takes an iterable.
    return output._make(values) if hasattr(output, "_make") else type(output)(values)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, tuple | list) else ()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and back as it was.

    The random states (of torch, NumPy and ``random``, and of the accelerator that the model is on)
    are put back as well, for models that draw even now. Autocast stays as the caller has it.

    Examples
    --------
    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with evaluating(model):
    ...     model.training
    False
    >>> [module.training for module in model]
    [True, False]
    """
    unwrap(model)  # nothing but a module has modes
    # Not through eval() and train(): a model with frozen parts has mixed flags, and some libraries
    # override those two to merge weights.
    flags = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters()}
    try:
        with random_states_kept(*devices), torch.no_grad():
            for module, _ in flags:
                module.training = False
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that are in evaluation mode and whose state, if they have any, is not trained.

    State is parameters and, where the model itself is in training mode, buffers: of a model that is
    in evaluation mode as a whole, nobody has frozen the batch normalisations without parameters.
    """
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        parameters = list(module.parameters())
        state = parameters or (model.training and list(module.buffers()))
        if state and not module.training and not any(p.requires_grad for p in parameters):
            found |= dict.fromkeys(part for part in module.modules() if not part.training)
    return list(found)


def check_loaded(model: nn.Module, name: str) -> None:
    """Refuse a model some of whose parameters have no values where it is."""
    for key, parameter in unwrap(model).named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"the {name}'s parameter {key!r} has no values (offloaded, or never loaded: it is "
                "on the meta device); load all weights first"
            )


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model under each of its names, without the names that wrappers add.

    In order of registration, the model itself first, as ``""``; a shared module more than once,
    TorchScript ones, which take no hooks, not at all.

    Raises
    ------
    TypeError
        If `model` is not a module, or a TorchScript one.
    """
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        found[name] = module = unwrap(module)
        for child_name, child in module._modules.items():
            if child is not None and not isinstance(child, torch.jit.ScriptModule):
                visit(f"{name}.{child_name}" if name else child_name, child)

    if isinstance(unwrap(model), torch.jit.ScriptModule):
        raise TypeError(f"model must run in Python; got a {type(unwrap(model)).__name__}")
    visit("", model)
    return found


@contextmanager
def on_device(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Have a model on a device, by default its own; gives the device."""
    check_loaded(model, "model")
    own = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0)).device
    device = own if device is None else torch.empty(0, device=device).device  # with its index
    if device == own:
        yield device
        return
    try:
        model.to(device)
        yield device
    finally:
        model.to(own)
