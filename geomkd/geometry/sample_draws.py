"""The draws that all layers of a run share: the sample, its half-samples, smaller samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from geomkd.geometry.draws import Draws
from geomkd.geometry.subset_gram import MOST, balanced, nested, parts_of


@dataclass(eq=False)
class SampleDraws:
    """Draws from a sample, in this order: itself, half-samples, smaller samples; Q of them in all.

    Parameters
    ----------
    index : Tensor, shape (n,)
        Class of each sample, as they come.
    sizes : list of int
        Samples of each class.
    subsamples, seed : int
        Half-samples and their seed.
    sweep : list of int
        Smaller samples, rising.

    Attributes
    ----------
    order : Tensor, shape (n,)
        Sample that each row of a class-sorted Gram matrix is.
    whole : Draws
        The sample itself.
    groups : list of Draws
        The sample, its half-samples if there are any, each smaller sample.
    member : Tensor, shape (n, Q)
        Whether a sorted row is in a draw.
    rows : Tensor, shape (m,)
        The subset whose Gram matrix is kept, rising, at most 1,000 samples.
    parts : list of Tensor
        Places in the subset of every draw.
    """

    index: Tensor
    sizes: list[int]
    subsamples: int = 0
    seed: int = 0
    sweep: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n, self.n_classes, device = len(self.index), len(self.sizes), self.index.device
        self.order = torch.argsort(self.index, stable=True)
        orders = nested(self.index, self.sizes, self.seed)
        self.rows = balanced(orders, MOST) if self.n > MOST else torch.arange(self.n, device=device)
        self.whole = Draws.all_of(self.sizes, device)
        halves = (self.sizes, self.subsamples, self.seed, device)
        self.groups = [self.whole, *([Draws.halves(*halves)] if self.subsamples else [])]
        self.smaller = [self._smaller(balanced(orders, samples)) for samples in self.sweep]
        self.groups += self.smaller
        self.member = torch.cat([draws.member for draws in self.groups], dim=1)
        self.parts = parts_of(self.index[self.rows], self.subsamples, self.sweep, self.seed)
        self._elsewhere: dict[torch.device, SampleDraws] = {}

    def _smaller(self, rows: Tensor) -> Draws:
        member = torch.zeros_like(self.whole.member)
        member[torch.argsort(self.order)[rows]] = True
        of_class = [part.nonzero().T for part in member[:, 0].split(self.sizes)]
        return Draws(of_class, member, self.sizes, False)

    def rows_of(self, member: Tensor) -> Tensor:
        """Find the samples of a draw, (n,) of sorted rows, in the order in which they come."""
        return self.order[member].sort().values

    def to(self, device: torch.device) -> SampleDraws:
        """Return the same on the device that a layer's features are on."""
        if device == self.index.device:
            return self
        if device not in self._elsewhere:
            given = (self.sizes, self.subsamples, self.seed, self.sweep)
            self._elsewhere[device] = SampleDraws(self.index.to(device), *given)
        return self._elsewhere[device]
