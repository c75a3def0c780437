"""Some of the samples, seeded and by class: half-samples, a split, smaller samples, the subset."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from geomkd.common.randomness import generator_options, nested

MOST = 1000  # samples of the subset whose Gram matrix is kept
_GATHERED = 1_000_000  # numbers gathered at a time: 8 MB in float64


@dataclass(frozen=True, eq=False)
class Draws:
    """R subsets of a class-sorted sample, with the same number of every class in each.

    Of every class F parts are at hand, and a draw takes one of them: what a class gives alone, such
    as its spectrum, is reduced F times, not R times.
    """

    parts: list[Tensor]  # (F, m_a) positions within each class, rising
    taken: Tensor  # (C, R) part of each class that a draw takes
    member: Tensor  # (n, R) whether a sorted row is in a draw
    class_sizes: list[int]  # samples of each class in the sample
    whole: bool  # where the one draw is the sample itself

    @classmethod
    def all_of(cls, sizes: list[int], device: torch.device) -> Self:
        """Take the sample itself as one draw."""
        every = [torch.arange(m, device=device).unsqueeze(0) for m in sizes]
        return cls.one(every, sizes, whole=True)

    @classmethod
    def halves(cls, sizes: list[int], draws: int, seed: int, device: torch.device) -> Self:
        """``draws`` half-samples without replacement: max(2, ceil(n_a / 2)) of every class.

        Of few classes each draw takes halves of its own. Of more, each class is halved at random
        `halvings` times, and a draw takes one half of each class, each as often as any other as far
        as that divides. For whatever adds up over rows both halves of a halving have the sample's
        mean (but for one row that an odd class has in both), and so have the draws.
        """
        uniform = generator_options(seed) | {"dtype": torch.float64}
        count = halvings(len(sizes), draws)
        parts, taken = [], []
        for size in sizes:
            keep = max(2, (size + 1) // 2)
            order = torch.rand(count or draws, size, **uniform).argsort(dim=1)
            if count:
                order = torch.cat([order, order.flip(1)])
            parts.append(order[:, :keep].sort(dim=1).values.to(device))
            turn = torch.arange(draws, device=order.device) % len(order)
            turn = turn[torch.rand(draws, **uniform).argsort()] if count else turn
            taken.append(turn)
        return cls._of(parts, torch.stack(taken).to(device), sizes)

    @classmethod
    def one(cls, rows: list[Tensor], sizes: list[int], *, whole: bool = False) -> Self:
        """One draw of such (1, m_a) rows of classes of such sizes."""
        taken = torch.zeros(len(sizes), 1, dtype=torch.int64, device=rows[0].device)
        return cls._of(rows, taken, sizes, whole)

    @classmethod
    def _of(cls, parts: list[Tensor], taken: Tensor, sizes: list[int], whole: bool = False) -> Self:
        member = []
        for size, part, of_class in zip(sizes, parts, taken, strict=True):
            held = torch.zeros(len(part), size, dtype=torch.bool, device=part.device)
            member.append(held.scatter_(1, part, True)[of_class].T)
        return cls(parts, taken, torch.cat(member), sizes, whole)

    @property
    def sizes(self) -> list[int]:
        """Samples of each class in a draw."""
        return [part.shape[1] for part in self.parts]

    def of_class(self, a: int) -> Tensor:
        """Positions drawn within class ``a``, (R, m_a), rising."""
        return self.parts[a][self.taken[a]]

    def weights(self) -> Tensor:
        """Membership over class size, (n, R) float64: sums become means over classes."""
        of_row = [
            1.0 / m for m, n_a in zip(self.sizes, self.class_sizes, strict=True) for _ in range(n_a)
        ]
        return self.member * self.member.new_tensor(of_row, dtype=torch.float64).unsqueeze(1)

    def pairs(self, rows: Tensor, square: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(which, (r, m, m) of the (n_a, n_a) ``square`` at (F, m) ``rows``), a few at a time."""
        step = max(1, _GATHERED // rows.shape[1] ** 2)
        for start in range(0, len(rows), step):
            i = rows[start : start + step]
            part = square.unsqueeze(0) if self.whole else square[i[:, :, None], i[:, None, :]]
            yield slice(start, start + len(i)), part


def halvings(n_classes: int, draws: int) -> int:
    """Random halvings of each of C classes that ``draws`` half-samples are made of; 0: none.

    So many that a mean over classes varies with as many degrees of freedom as independent draws
    have; at least five (of two, minima within a hundred classes vary too little), and none where
    that would save nothing.
    """
    count = max(5, math.ceil(draws / n_classes))
    return count if 2 * count < draws else 0


def held_out(index: Tensor, n_classes: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and test rows, a mask each, drawn within each class.

    ``share * m`` of a class's m samples are held out: rounded, halves up, but at least one and at
    most m - 1; a single sample is for training only. Renaming classes leaves the split as it is.
    The seeded permutation is drawn on the CPU, and nothing waits for a device.
    """
    shuffled = torch.randperm(len(index), **generator_options(seed)).to(index.device)
    order = shuffled[torch.sort(index[shuffled], stable=True).indices]  # by class, random within
    sizes = (index == torch.arange(n_classes, device=index.device).unsqueeze(1)).sum(dim=1)
    tested = (share * sizes.double() + 0.5).floor().long()
    tested = torch.minimum(tested.clamp(min=1), sizes - 1)
    place = torch.arange(len(index), device=index.device) - (sizes.cumsum(0) - sizes)[index[order]]
    first = place < tested[index[order]]
    test = torch.zeros_like(index, dtype=torch.bool).scatter(0, order, first)
    return ~test, test


def balanced(orders: list[Tensor], samples: int) -> Tensor:
    """Rows of a nested sample of at most ``samples``, equally many a class, rising.

    At least two of every class, even where that is more than ``samples``.
    """
    share = max(2, samples // len(orders))
    return torch.cat([rows[:share] for rows in orders]).sort().values


def parts_of(
    index: Tensor, subsamples: int, sweep: Sequence[int], seed: int
) -> list[Tensor | None]:
    """Places in the subset, rising, of all of it, its half-samples, its smaller samples.

    ``index`` is the class of each sample of the subset. None stands for half-samples that are all
    of it, of two samples a class, and for sizes in ``sweep`` that it has not: they tell nothing.
    """
    device, sizes = index.device, index.bincount().tolist()
    parts = [torch.arange(len(index), device=device)]
    if subsamples:
        order = torch.argsort(index, stable=True)
        drawn = Draws.halves(sizes, subsamples, seed, device)
        halves = (order[member].sort().values for member in drawn.member.T)
        parts += [half if len(half) < len(index) else None for half in halves]
    orders, whole = nested(index, sizes, seed), {len(index): parts[0]}
    smaller = (balanced(orders, size) if size < len(index) else whole.get(size) for size in sweep)
    return [*parts, *smaller]


@dataclass(eq=False)
class SampleDraws:
    """Draws from a sample, in this order: itself, half-samples, smaller samples; Q of them in all.

    Attributes
    ----------
    order : Tensor, shape (n,)
        Sample that each row of a class-sorted Gram matrix is.
    whole, groups : Draws, list of Draws
        The sample itself; it, its half-samples if there are any, and each of ``smaller``.
    member : Tensor, shape (n, Q)
        Whether a sorted row is in a draw.
    rows : Tensor, shape (m,)
        The subset whose Gram matrix is kept, rising, at most 1,000 samples.
    parts : list of Tensor or None
        Places in the subset of every draw, see `parts_of`.
    """

    index: Tensor  # (n,) class of each sample, as they come
    sizes: list[int]  # samples of each class
    subsamples: int = 0  # half-samples
    seed: int = 0
    sweep: list[int] = field(default_factory=list)  # samples of the smaller ones, rising

    def __post_init__(self) -> None:
        self.n, self.n_classes, device = len(self.index), len(self.sizes), self.index.device
        self.order = torch.argsort(self.index, stable=True)
        orders = nested(self.index, self.sizes, self.seed)
        self.rows = balanced(orders, MOST) if self.n > MOST else torch.arange(self.n, device=device)
        self.whole = Draws.all_of(self.sizes, device)
        self.groups = [self.whole]
        if self.subsamples:
            self.groups.append(Draws.halves(self.sizes, self.subsamples, self.seed, device))
        self.smaller = [self._smaller(balanced(orders, samples)) for samples in self.sweep]
        self.groups += self.smaller
        self.member = torch.cat([draws.member for draws in self.groups], dim=1)
        self.parts = parts_of(self.index[self.rows], self.subsamples, self.sweep, self.seed)
        self._elsewhere: dict[torch.device, Self] = {}

    def _smaller(self, rows: Tensor) -> Draws:
        member = torch.zeros_like(self.whole.member)
        member[torch.argsort(self.order)[rows]] = True
        parts = [part.nonzero().T for part in member[:, 0].split(self.sizes)]
        return Draws.one(parts, self.sizes)

    def rows_of(self, member: Tensor) -> Tensor:
        """Find the samples of a draw, (n,) of sorted rows, in the order in which they come."""
        return self.order[member].sort().values

    def to(self, device: torch.device) -> Self:
        """Return the same on the device that a layer's features are on."""
        if device == self.index.device:
            return self
        if device not in self._elsewhere:
            given = (self.sizes, self.subsamples, self.seed, self.sweep)
            self._elsewhere[device] = SampleDraws(self.index.to(device), *given)
        return self._elsewhere[device]
