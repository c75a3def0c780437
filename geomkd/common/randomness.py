"""Seeded draws, and the global random states as they were afterwards."""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, another for every other choice of as many."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def generator_options(seed: int) -> dict[str, Any]:
    """Options for ``torch.rand`` and its like: draws of the seed, whatever the default device."""
    generator = torch.Generator().manual_seed(seed)
    return {"generator": generator, "device": generator.device}


def nested(index: Tensor, sizes: list[int], seed: int) -> list[Tensor]:
    """Rows of every class, in a seeded order: the first of each are a smaller sample."""
    keys = torch.rand(len(index), **generator_options(seed), dtype=torch.float64).argsort()
    keys = keys.to(index.device)
    order = keys[index[keys].argsort(stable=True)]
    return list(order.split(sizes))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within, torch draws from the seed, on an accelerator too if it is given; then as before."""
    on_accelerator = device is not None and device.index is not None
    kind = {"device_type": device.type} if on_accelerator else {}
    devices = range(torch.get_device_module(device).device_count()) if on_accelerator else ()
    with torch.random.fork_rng(devices, **kind):
        # torch.manual_seed seeds accelerators as well: not when none takes part.
        (torch.manual_seed if on_accelerator else torch.default_generator.manual_seed)(seed)
        yield


@contextmanager
def all_seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within, NumPy and ``random`` draw from the seed as well as torch does; then as before."""
    with HostDraws(seed), seeded(seed, device):
        yield


class HostDraws:
    """A context in which torch (on the host), NumPy and ``random`` draw from a seed.

    Afterwards their states are as before; entered again, the draws go on where they were left.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.own, self.callers = seed, None, None

    def __enter__(self) -> None:
        self.callers = _host_states()
        if self.own is None:
            torch.default_generator.manual_seed(self.seed)
            np.random.seed(self.seed % 2**32)  # noqa: NPY002 - what data sets draw from
            random.seed(self.seed)
        else:
            _set_host_states(*self.own)

    def __exit__(self, *_: object) -> None:
        self.own = _host_states()
        _set_host_states(*self.callers)


def _host_states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_host_states(of_torch: Any, of_numpy: Any, of_random: Any) -> None:
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)  # noqa: NPY002
    random.setstate(of_random)


def random_modules(*devices: torch.device) -> list[Any]:
    """Modules whose random states draws on some devices change: torch's own, an accelerator's."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        # Asking an accelerator that is not used would start it up for nothing.
        if any(device.type == kind for device in devices):
            return [torch, torch.get_device_module(kind)]
    return [torch]


def random_fingerprint(*devices: torch.device) -> bytes:
    """Random states of the host and of an accelerator among the devices: whether something drew."""
    of_torch = [module.get_rng_state().tolist() for module in random_modules(*devices)]
    return pickle.dumps((of_torch, *_host_states()[1:]))


@contextmanager
def random_states_kept(*devices: torch.device) -> Iterator[None]:
    """Put the random states of the host and of an accelerator among the devices back at the end."""
    host = _host_states()
    states = [(module, module.get_rng_state()) for module in random_modules(*devices)]
    try:
        yield
    finally:
        for module, state in states:
            module.set_rng_state(state)
        _set_host_states(*host)
