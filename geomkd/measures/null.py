"""Label-permutation nulls: what a supervised score would be if the labels meant nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import check_int
from geomkd.geometry.gram import ClassGram

NULL_COLUMNS = ("null_mean", "null_95", "excess", "p_value")  # of a score beside its own
FEWEST = 19  # permutations of which one in twenty can be told


class WithNull(NamedTuple):
    """A supervised score beside what permuted labels give.

    Attributes
    ----------
    value : Tensor, shape ()
        The score.
    null_mean, null_95 : Tensor, shape ()
        Mean of the R scores of permuted labels, and the ceil(0.95 (R + 1))-th smallest of them,
        beyond which a score without meaning lies in at most 5 % of cases; NaN for R below 19.
    excess : Tensor, shape ()
        ``value - null_mean``.
    p_value : Tensor, shape ()
        ``(1 + the number of them that are at least value) / (R + 1)``.
    """

    value: Tensor
    null_mean: Tensor
    null_95: Tensor
    excess: Tensor
    p_value: Tensor


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
    seed = check_int(seed, "seed", least=0)
    return null_of(score, index, null, seed) if check_null(null, stacklevel=4) else score(index)


def null_of(score: Callable[[Tensor], Tensor], index: Tensor, null: int, seed: int) -> WithNull:
    """Score class indices beside ``null`` permutations of them; nothing is checked."""
    drawn = [score(permuted) for permuted in permutations(index, null, seed)]
    return beside_null(score(index), torch.stack(drawn))


def check_null(null: int, stacklevel: int) -> int:
    """Check a number of permutations; warn of so few that there is no 95 % quantile."""
    if 0 < check_int(null, "null", least=0) < FEWEST:
        warnings.warn(
            f"null_95 is NaN: it needs null={FEWEST} permutations or more; got {null}",
            stacklevel=stacklevel,
        )
    return null


def beside_null(value: Tensor, drawn: Tensor) -> WithNull:
    """Set a score beside those of permuted labels, (R,)."""
    mean, count = drawn.mean(), len(drawn)
    quantile = torch.full_like(mean, torch.nan)
    if count >= FEWEST:
        quantile = drawn.sort().values[-(-95 * (count + 1) // 100) - 1]
    p_value = (1 + (drawn >= value).sum().to(mean.dtype)) / (count + 1)
    return WithNull(value, mean, quantile, value - mean, p_value)


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
