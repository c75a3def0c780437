"""What a command minds when torchrun starts several processes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from geomkd.common.distributed import gathered, world

T = TypeVar("T")
ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)  # told in one line
WAIT = 5.0  # seconds


def agreed(act: Callable[[], T], *, first_only: bool = False) -> T:
    """Act in every process, or in the first alone; what one of them raises, all raise.

    Parameters
    ----------
    act : callable
        Without arguments, and without collective operations.
    first_only : bool
        Act in the first process, and return its value in all.

    Examples
    --------
    >>> agreed(lambda: 3)
    3
    """
    value, error = None, None
    if world().is_first or not first_only:
        try:
            value = act()
        except ERRORS as raised:
            error = raised
    told = gathered((value if first_only else None, error and str(error)))
    if error is not None:
        raise error
    for _, message in told:
        if message is not None:
            raise ValueError(message)
    return told[0][0] if first_only else value


def is_first_to_fail() -> bool:
    """Whether no process of this run failed before, so that the others may fail because of it.

    Waits some seconds for the others to fail too: what ends first has all of them ended.
    """
    here = world()
    if here.size == 1:
        return True
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=WAIT),
        )
        key = f"geomkd/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        number, started = store.add(key, 1), time.monotonic()
        while store.add(key, 0) < here.size and time.monotonic() < started + WAIT:
            time.sleep(0.05)
        return number == 1
    except (KeyError, RuntimeError):  # a group of the caller's, or the store has gone
        return here.is_first


def own_device() -> torch.device | None:
    """Accelerator of this process, made the current one; None where there is none.

    Raises
    ------
    ValueError
        More processes on this host than accelerators.
    """
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
