"""Models of any kind: strip their wrappers, call them, read their outputs, keep their modes."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def unwrap(model: nn.Module) -> nn.Module:
    """Strip the wrappers of ``torch.compile`` and of the data-parallel classes.

    Parameters
    ----------
    model : torch.nn.Module
        A model, possibly wrapped, also several times over.

    Returns
    -------
    torch.nn.Module
        The module inside; `model` itself if it is not wrapped.

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> from torch import nn
    >>> from geomkd.network.forward import unwrap
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

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    batch : Tensor, tuple, list or mapping
        A tuple or list holds positional arguments, a mapping keyword arguments; anything else is
        the one argument.
    forward : callable, optional
        ``forward(model, batch)`` is called instead, with the batch as it is.

    Returns
    -------
    object
        What the model returns.

    Examples
    --------
    >>> import torch
    >>> from geomkd.network.forward import call
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


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of a module's output, depth first.

    Parameters
    ----------
    output : Tensor, tuple, list or mapping
        What a module returned; nested as it may be.

    Returns
    -------
    Tensor
        The output itself, or the first tensor in it.

    Raises
    ------
    TypeError
        If there is no tensor in `output`.

    Examples
    --------
    >>> import torch
    >>> from geomkd.network.forward import first_tensor
    >>> first_tensor({"loss": None, "states": (torch.ones(2), torch.zeros(3))})
    tensor([1., 1.])
    """
    found = _find(output)
    if found is None:
        raise TypeError(_no_tensor(output))
    return found


def replace_first_tensor(output: Any, tensor: Tensor) -> Any:
    """Return the same structure with its first tensor replaced.

    Parameters
    ----------
    output : Tensor, tuple, list or mapping
        What a module returned; it is not changed.
    tensor : Tensor
        What stands in the place of ``first_tensor(output)``.

    Returns
    -------
    object
        A structure of the types of `output`, named tuples and mapping classes included.

    Raises
    ------
    TypeError
        If there is no tensor in `output`.

    Examples
    --------
    >>> import torch
    >>> from geomkd.network.forward import replace_first_tensor
    >>> replace_first_tensor((torch.ones(2), "weights"), torch.zeros(1))
    (tensor([0.]), 'weights')
    """
    if isinstance(output, Tensor):
        return tensor
    for key, value in _items(output):
        if _find(value) is not None:
            return _with_item(output, key, replace_first_tensor(value, tensor))
    raise TypeError(_no_tensor(output))


def _no_tensor(output: Any) -> str:
    got = type(output).__name__
    return f"expected a tensor, or a tuple, list or mapping that holds one; got {got}"


def _items(output: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return output.items()
    return enumerate(output) if isinstance(output, tuple | list) else ()


def _find(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    found = (_find(value) for _, value in _items(output))
    return next((tensor for tensor in found if tensor is not None), None)


def _with_item(output: Any, key: Any, value: Any) -> Any:
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        changed[key] = value
        return changed
    values = list(output)
    values[key] = value
    # A named tuple takes its fields one by one, every other sequence takes an iterable.
    return output._make(values) if hasattr(output, "_make") else type(output)(values)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and back as it was.

    Parameters
    ----------
    model : torch.nn.Module
        The model. Autocast stays as the caller has it.

    Yields
    ------
    None

    Notes
    -----
    The training flag of every module is set and put back by itself, not through ``eval()`` and
    ``train()``: a model with frozen parts has mixed flags, and some libraries override those two
    to merge weights. The random state (of the host, and of the accelerator that the model is on)
    is put back as well, for models that draw numbers even now.

    Examples
    --------
    >>> from torch import nn
    >>> from geomkd.network.forward import evaluating
    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with evaluating(model):
    ...     model.training
    False
    >>> [module.training for module in model]
    [True, False]
    """
    unwrap(model)  # nothing but a module has modes
    flags = [(module, module.training) for module in model.modules()]
    generators = _generators(model)
    states = [generator.get_rng_state() for generator in generators]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for generator, state in zip(generators, states, strict=True):
            generator.set_rng_state(state)


def _generators(model: nn.Module) -> list[Any]:
    """Return the modules that hold the random states a forward pass could change."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        # Asking an accelerator that the model does not use would start it up for nothing.
        if any(parameter.device.type == kind for parameter in model.parameters()):
            return [torch, torch.get_device_module(kind)]
    return [torch]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module of a model under each of its names, without the names that wrappers add.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it and its submodules may be wrapped, as `unwrap` has it.

    Returns
    -------
    dict of str to torch.nn.Module
        In order of registration, the model itself first, as ``""``. A shared module is there more
        than once.

    Raises
    ------
    TypeError
        If `model` is not a module, or a TorchScript one, which takes no hooks. Submodules of that
        sort are left out.

    Examples
    --------
    >>> from torch import nn
    >>> from geomkd.network.forward import modules_by_name
    >>> list(modules_by_name(nn.Sequential(nn.DataParallel(nn.ReLU()), nn.Tanh())))
    ['', '0', '1']
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


class on_device:
    """A context in which a model is on a device, by default its own; gives the device."""

    def __init__(self, model: nn.Module, device: torch.device | str | None) -> None:
        self.model = model
        first = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))
        self.own, self.device = first.device, first.device if device is None else device

    def __enter__(self) -> torch.device:
        self.device = torch.device(self.device)
        if self.device != self.own:
            self.model.to(self.device)
        return self.device

    def __exit__(self, *_: object) -> None:
        if self.device != self.own:
            self.model.to(self.own)
