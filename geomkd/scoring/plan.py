"""How the layers of a model are read within a bound of memory."""

import math
import numbers
from collections.abc import Collection, Sequence
from typing import NamedTuple, Self

import torch

from geomkd.common.checks import about, sums_device
from geomkd.data.sample import Sample
from geomkd.geometry.precision import BLOCK, COLUMNS
from geomkd.network.layers import Layer
from geomkd.network.masks import Mask, laid_on, mask_of
from geomkd.network.pooling import pooled

KERNELS = 64_000_000  # bytes that the numeric libraries keep for themselves
BATCH = 256  # samples of a forward pass, where memory allows
DRAWN = 16  # samples of a forward pass that draws at random: the same in any memory
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}


class Stored(NamedTuple):
    """A layer with the width, type and device in which its features are held."""

    layer: Layer
    dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, layer: Layer, pool: str, mask: Mask = None) -> Self:
        """Tell how a layer's features are held once they are pooled, by a few samples' mask."""
        own = laid_on(layer, mask)
        n, device = (2, "meta") if own is None else (len(own), own.device)
        form = torch.empty((), dtype=layer.dtype, device=device).expand(n, *layer.shape)
        with about(f"layer {layer.name!r}"):
            form = pooled(form, layer.kind, pool, mask_of(layer, mask, form))
        return cls(layer, form.shape[1], form.dtype, sums_device(layer.device))

    @property
    def gram_dtype(self) -> torch.dtype:
        """Type of the layer's Gram matrix."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32


class Plan(NamedTuple):
    """Groups of layers that are read in one pass; a group of one may be read in slices."""

    groups: list[list[Stored]]
    width: int  # features of a slice, for a layer that does not fit
    batch_size: int
    passes: int


def parse_bytes(memory: str | int) -> int:
    """Read "2GB", "512 MiB" or a number as bytes."""
    if isinstance(memory, str):
        text = memory.strip().lower()
        unit = next((unit for unit in UNITS if text.endswith(unit)), "")
        try:
            value = float(text.removesuffix(unit)) * UNITS.get(unit, 1)
        except ValueError:
            value = -1
    else:
        value = memory if isinstance(memory, numbers.Real) else -1
    if not 1 <= value < float("inf"):
        raise ValueError(f"memory must be bytes or a text such as '2GB'; got {memory!r}")
    return int(value)


def plan_of(
    stored: Sequence[Stored],
    sample: Sample,
    budget: int,
    per_sample: int,
    *,
    halves: bool,
    draws: bool = False,
    more: int = 0,
) -> Plan:
    """Greedy groups of layers in order of execution, in ``budget`` bytes for everything together.

    ``per_sample`` is the bytes of one sample's forward pass; ``halves`` whether half-samples are
    scored too; ``draws`` whether the model draws at random, so that a batch must not depend on the
    budget; ``more`` the bytes of measures beside knowledge quality. A budget too small for one
    sample at a time and ``COLUMNS`` features of a layer is a ``ValueError`` with the least.
    """
    n, sizes, entropy = len(sample), sample.classes.sizes, sample.entropy_sizes
    most = max(entropy)
    item = max(s.gram_dtype.itemsize for s in stored)
    fixed = sample.kept_bytes + more + KERNELS + item * n * n
    fixed += COLUMNS * max(2 * item * n, (8 + 2 * item) * most)  # a slice, and its centred copy
    square = max(*sizes, most) ** 2 if len(sizes) > 1 else 0  # unlabelled: no class spectra
    fixed += 12 * 8 * BLOCK**2 + 6 * 8 * square + 4 * 8 * n * (len(sizes) + 2)
    fixed += halves * (64 * 16 * n + 6 * 8_000_000)
    squares = 8 * sum(m * m for m in entropy)  # of every layer in a group
    column = max(n, most) * max(s.dtype.itemsize for s in stored)
    smallest = min(DRAWN, n) if draws else 1
    least = fixed + squares + smallest * per_sample
    least += column * min(COLUMNS, max(s.dim for s in stored))
    if budget < least:
        raise ValueError(
            f"memory must be at least {math.ceil(least / 1e6)} MB for {n} samples of this model "
            f"(fewer samples need less, more memory is faster); got {budget / 1e6:.4g} MB"
        )
    share = min((budget - fixed) // 4, budget - least + smallest * per_sample)
    largest = smallest if draws else min(BATCH, n)
    batch_size = int(max(smallest, min(largest, share // per_sample)))
    room = budget - fixed - batch_size * per_sample
    width = (room - squares) // column
    groups = grouped(stored, max(n, most), squares, room)
    passes = sum(-(-group[0].dim // width) if len(group) == 1 else 1 for group in groups)
    return Plan(groups, width, batch_size, passes)


def grouped(
    layers: Sequence[Stored], rows: int, squares: int, room: int, alone: Collection[str] = ()
) -> list[list[Stored]]:
    """Layers in turn as far as features of ``rows`` samples have room, some ``alone`` by name."""
    groups: list[list[Stored]] = []
    free = 0
    for s in layers:
        need, sliced = rows * s.dim * s.dtype.itemsize + squares, s.layer.name in alone
        if sliced or not groups or need > free:
            groups.append([])
            free = room
        groups[-1].append(s)
        free = 0 if sliced else free - need
    return groups
