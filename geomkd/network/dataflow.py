"""Which tensor of a forward pass was made from which: what a chain of blocks is told by."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from geomkd.network.forward import tensors_in


class Dataflow(TorchFunctionMode):
    """Records, while it is entered, what every operation takes and gives.

    Every tensor has a number, greater than those of the tensors that it was made from; an operation
    in place makes it another tensor, with another number. Parameters and constants have none.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(2)
    >>> with Dataflow() as flow:
    ...     first = flow.number(x)
    ...     y = x + 1
    ...     z = x * y
    >>> y, z = flow.number(y), flow.number(z)
    >>> flow.found_behind(z, {first}), flow.found_behind(z, {first}, without=y)
    ({0}, {0})
    >>> flow.found_behind(y, {first}, without=y)
    set()
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[tuple[int, ...]] = []
        self._seen: dict[int, tuple[weakref.ref, int, int]] = {}
        self._paused = False

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note what was made from what."""
        if self._paused:
            return func(*args, **(kwargs or {}))
        taken = list(tensors_in((args, kwargs or {})))
        numbers, before = self.known(taken), [_version(tensor) for tensor in taken]
        output = func(*args, **(kwargs or {}))
        made = list(output if hasattr(output, "__next__") else tensors_in(output))
        name = getattr(func, "__name__", "")
        if numbers and not (name.endswith("_like") or name.startswith("new_")):  # shapes alone
            kept = {
                id(t) for t, version in zip(taken, before, strict=True) if version == _version(t)
            }
            for tensor in (*made, *taken):
                if id(tensor) not in kept and self._number(tensor) is None:
                    self._add(tensor, numbers)
        return iter(made) if hasattr(output, "__next__") else output  # of an unpacked tensor

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing of what is done to tensors meanwhile."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def number(self, tensor: Tensor | None, made_from: Iterable[int] = ()) -> int:
        """Give a tensor's number; where it has none, a new one, made from those numbers."""
        own = None if tensor is None else self._number(tensor)
        return self._add(tensor, tuple(made_from)) if own is None else own

    def known(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """Return the numbers of those tensors that have one."""
        found = (self._number(tensor) for tensor in tensors)
        return tuple(dict.fromkeys(number for number in found if number is not None))

    def found_behind(self, end: int, wanted: set[int], *, without: int | None = None) -> set[int]:
        """Those of some tensors that one was made from by a way that avoids another; or is."""
        least, found, seen, front = min(wanted, default=0), set(), {without}, [end]
        while front:
            number = front.pop()
            if number not in seen and number >= least:
                seen.add(number)
                found |= wanted & {number}
                front += self.sources[number]
        return found

    def _number(self, tensor: Tensor) -> int | None:
        known, version, number = self._seen.get(id(tensor), (lambda: None, 0, 0))
        return number if known() is tensor and version == _version(tensor) else None

    def _add(self, tensor: Tensor | None, sources: tuple[int, ...]) -> int:
        self.sources.append(sources)
        number = len(self.sources) - 1
        if tensor is not None:
            self._seen[id(tensor)] = weakref.ref(tensor), _version(tensor), number
        return number


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which counts operations in place
