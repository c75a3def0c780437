"""Label-permutation nulls: what a supervised score would be if the labels meant nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import check_int
from geomkd.geometry.gram import ClassGram

NULL_COLUMNS = ("null_mean", "null_95", "excess")  # of a score beside its own


class WithNull(NamedTuple):
    """A supervised score beside what permuted labels give.

    Attributes
    ----------
    value : Tensor, shape ()
        The score.
    null_mean, null_95 : Tensor, shape ()
        Mean and 95 % quantile (linear interpolation) of the scores of permuted labels.
    excess : Tensor, shape ()
        ``value - null_mean``.
    """

    value: Tensor
    null_mean: Tensor
    null_95: Tensor
    excess: Tensor


def against_null(
    score: Callable[[Tensor], Tensor], index: Tensor, null: int, seed: int
) -> Tensor | WithNull:
    """Score class indices; with ``null`` > 0 beside as many seeded permutations of them.

    Parameters
    ----------
    score : callable
        From (n,) class indices to a 0-d tensor.
    index : Tensor, shape (n,)
        Class of each sample.
    null : int
        Permutations; 0 returns the bare score.
    seed : int
        Seeds the permutations.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.null import against_null
    >>> index = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> score = lambda index: (index[:3].double().mean() - index[3:].double().mean()).abs()
    >>> against_null(score, index, null=200, seed=0).excess > 0.4
    tensor(True)
    """
    null, seed = check_int(null, "null", least=0), check_int(seed, "seed", least=0)
    value = score(index)
    if not null:
        return value
    drawn = [score(permuted) for permuted in permutations(index, null, seed)]
    return beside_null(value, torch.stack(drawn))


def beside_null(value: Tensor, drawn: Tensor) -> WithNull:
    """Set a score beside those of permuted labels, (R,)."""
    mean = drawn.mean()
    return WithNull(value, mean, drawn.quantile(0.95), value - mean)


def permutations(index: Tensor, count: int, seed: int) -> list[Tensor]:
    """Seeded permutations of class indices, drawn on the CPU whatever their device."""
    generator = torch.Generator().manual_seed(seed)
    own = {"generator": generator, "device": generator.device}
    return [index[torch.randperm(len(index), **own).to(index.device)] for _ in range(count)]


def permuted_grams(gram: ClassGram, count: int, seed: int) -> Iterator[ClassGram]:
    """Gram matrices of the same features under permuted labels, whose class means are others.

    Each reads the columns again.
    """
    classes = gram.classes
    for index in permutations(classes.index, count, check_int(seed, "seed", least=0)):
        other = classes._replace(index=index)
        yield ClassGram.from_columns(gram.columns, other, gram.dtype, gram.scale)
