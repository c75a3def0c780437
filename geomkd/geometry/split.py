"""Seeded, class-stratified split of a sample into rows to fit on and rows held out."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor


def check_share(value: Any, name: str = "test_share") -> float:
    """Check that a share lies strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be between 0 and 1; got {value}")
    return float(value)


def held_out(index: Tensor, n_classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and test rows, drawn within each class.

    Parameters
    ----------
    index : Tensor, shape (n,)
        Class of each sample, 0 ... n_classes - 1.
    n_classes : int
        Classes, C.
    share : float
        Of a class's m samples, ``share * m`` are held out: rounded, halves up, but at least one and
        at most m - 1. A class of a single sample is for training only.
    seed : int
        Seeds one permutation of the rows, drawn on the CPU whatever the device.

    Returns
    -------
    train, test : Tensor, shape (n,)
        Boolean, on the device of ``index``; every row is in one of them.

    Notes
    -----
    Class numbers do not enter: renaming classes leaves the split as it is. Masks, not row numbers,
    as their shape does not depend on the class sizes: nothing here waits for a device.

    Examples
    --------
    >>> import torch
    >>> from geomkd.geometry.split import held_out
    >>> index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    >>> train, test = held_out(index, 2, 0.3, seed=0)
    >>> index[test].bincount(), index[train].bincount()
    (tensor([1, 2]), tensor([3, 4]))
    """
    generator = torch.Generator().manual_seed(seed)
    own = {"generator": generator, "device": generator.device}
    shuffled = torch.randperm(len(index), **own).to(index.device)
    order = shuffled[torch.sort(index[shuffled], stable=True).indices]  # by class, random within
    sizes = (index == torch.arange(n_classes, device=index.device).unsqueeze(1)).sum(dim=1)
    tested = (share * sizes.double() + 0.5).floor().long()
    tested = torch.minimum(tested.clamp(min=1), sizes - 1)
    place = torch.arange(len(index), device=index.device) - (sizes.cumsum(0) - sizes)[index[order]]
    first = place < tested[index[order]]
    test = torch.zeros_like(index, dtype=torch.bool).scatter(0, order, first)
    return ~test, test
