"""Draws from a sample: the whole of it, or seeded class-stratified half-samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_GATHERED = 1_000_000  # numbers gathered at a time: 8 MB in float64


@dataclass(frozen=True, eq=False)
class Draws:
    """R subsets of a class-sorted sample, with the same number of every class in each.

    Parameters
    ----------
    of_class : list of Tensor, shape (R, m_a)
        Positions drawn within each class, rising.
    member : Tensor, shape (n, R)
        Whether a sorted row is in a draw.
    class_sizes : list of int
        Samples of each class in the sample.
    whole : bool
        True where the one draw is the sample itself.
    """

    of_class: list[Tensor]
    member: Tensor
    class_sizes: list[int]
    whole: bool

    @classmethod
    def all_of(cls, sizes: list[int], device: torch.device) -> Draws:
        """Take the sample itself as one draw."""
        of_class = [torch.arange(m, device=device).unsqueeze(0) for m in sizes]
        member = torch.ones(sum(sizes), 1, dtype=torch.bool, device=device)
        return cls(of_class, member, sizes, True)

    @classmethod
    def halves(cls, sizes: list[int], draws: int, seed: int, device: torch.device) -> Draws:
        """``draws`` half-samples without replacement: max(2, ceil(n_a / 2)) of every class.

        Examples
        --------
        >>> import torch
        >>> from geomkd.geometry.draws import Draws
        >>> Draws.halves([4, 6], 3, seed=0, device=torch.empty(0).device).member.sum(0)
        tensor([5, 5, 5])
        """
        generator = torch.Generator().manual_seed(seed)
        # Neither the default device nor the default type may change a draw.
        uniform = {"generator": generator, "device": generator.device, "dtype": torch.float64}
        of_class, members = [], []
        for size in sizes:
            keep = max(2, (size + 1) // 2)
            order = torch.rand(draws, size, **uniform).argsort(dim=1)
            chosen = order[:, :keep].sort(dim=1).values
            of_class.append(chosen.to(device))
            members.append(torch.zeros_like(order, dtype=torch.bool).scatter_(1, chosen, True))
        member = torch.cat(members, dim=1).T.contiguous().to(device)
        return cls(of_class, member, sizes, False)

    @property
    def sizes(self) -> list[int]:
        """Samples of each class in a draw."""
        return [chosen.shape[1] for chosen in self.of_class]

    def weights(self) -> Tensor:
        """Membership over class size, (n, R) float64: sums become means over classes."""
        of_row = [
            1.0 / m for m, n_a in zip(self.sizes, self.class_sizes, strict=True) for _ in range(n_a)
        ]
        return self.member * self.member.new_tensor(of_row, dtype=torch.float64).unsqueeze(1)

    def pairs(self, a: int, square: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(draws, (r, m, m) part of the (n_a, n_a) ``square`` of class ``a``), a few at a time."""
        chosen = self.of_class[a]
        step = max(1, _GATHERED // chosen.shape[1] ** 2)
        for start in range(0, len(chosen), step):
            i = chosen[start : start + step]
            part = square.unsqueeze(0) if self.whole else square[i[:, :, None], i[:, None, :]]
            yield slice(start, start + len(i)), part
