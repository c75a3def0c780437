"""One run on several processes, as torchrun starts them; without it, one process and no cost."""

import atexit
import gc
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Whose text says what is wrong.
ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


class World(NamedTuple):
    """Place of this process among those of the run."""

    rank: int  # its number, from 0; the first one writes, prints and shows bars
    size: int  # how many there are

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Any) -> Any:
        """Every ``size``-th item of a sequence, this process's first."""
        return items[self.rank :: self.size]


def world() -> World:
    """Join the processes that torchrun started, or tell that there is only this one.

    A process group that the caller has made is used as it is. Otherwise torchrun's is made here,
    with torch's default backends, and left when the process ends.
    """
    if not dist.is_available():
        return World(0, 1)
    if not dist.is_initialized():
        started = dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not started:
            return World(0, 1)
        _join()
    return World(dist.get_rank(), dist.get_world_size())


def gathered(value: Any) -> list[Any]:
    """Gather what every process passes, in the order of their ranks; called by all of them."""
    size = world().size
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value)
    return values


def agreed(act: Callable[[], T], *, first_only: bool = False) -> T:
    """Act in every process, or in the first for all; what one of them raises, all raise.

    ``act`` is without collective operations.
    """
    value, error = None, None
    if world().is_first or not first_only:
        try:
            value = act()
        except Exception as raised:  # of a caller's function, anything
            error = raised
    told = gathered((value if first_only else None, error and str(error)))
    if error is not None:
        raise error
    for _, message in told:
        if message is not None:
            raise ValueError(message)
    return told[0][0] if first_only else value


def own_device() -> torch.device | None:
    """Accelerator of this process, made the current one; None where there is none."""
    if not torch.accelerator.is_available():
        return None
    number, n_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if number >= n_devices:
        raise ValueError(
            f"each process takes an accelerator of its own; process {number} (from 0) of this host "
            f"finds {n_devices}: start fewer processes, or give --device"
        )
    torch.accelerator.set_device_index(number)
    return torch.device(torch.accelerator.current_accelerator().type, number)


def summed(tensor: Tensor) -> Tensor:
    """Sum of every process's tensor; called by all of them."""
    if world().size == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the first process; called by all of them."""
    if world().size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def _join() -> None:
    # Imported later, as by DistributedDataParallel, its functions would have this group as default
    # argument, and so keep it and its threads for good.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group()
    atexit.register(_leave)


def _leave() -> None:
    # Gloo's threads are joined when nothing holds the group any more. One that frees the tensors of
    # the last collective takes Python's lock, and aborts the process that is ending meanwhile.
    gc.collect()  # wrappers of a model hold the group too
    if dist.is_initialized():
        dist.destroy_process_group()
