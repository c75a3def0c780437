"""Label-permutation nulls: what a supervised score would be if the labels meant nothing."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import as_classes, as_features, check_int
from geomkd.common.randomness import generator_options
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import exact_arithmetic
from geomkd.geometry.principal import Principal, principal

NULL_COLUMNS = ("null_mean", "null_95", "excess", "p_value")  # of a score beside its own
FEWEST = 19  # permutations of which one in twenty can be told


class WithNull(NamedTuple):
    """A supervised score beside what permuted labels give: 0-d tensors.

    Attributes
    ----------
    value, excess
        The score, and ``value - null_mean``.
    null_mean, null_95
        Mean of the R scores of permuted labels, and the ceil(0.95 (R + 1))-th smallest of them,
        beyond which a score without meaning lies in at most 5 % of cases; NaN for R below 19.
    p_value
        ``(1 + the number of them that are at least value) / (R + 1)``; of what meaning lowers, such
        as nc1, near 1 where there is some.
    """

    value: Tensor
    null_mean: Tensor
    null_95: Tensor
    excess: Tensor
    p_value: Tensor


def against_null(
    score: Callable[[Tensor], Tensor], index: Tensor, null: int, seed: int, *, stacklevel: int = 4
) -> Tensor | WithNull:
    """Score (n,) class indices, as a 0-d tensor; with a ``null`` beside permutations of them."""
    seed = check_int(seed, "seed", least=0)
    return null_of(score, index, null, seed) if check_null(null, stacklevel) else score(index)


def principal_against_null(
    score: Callable[[Principal, Tensor, int], Tensor],
    features: Any,
    labels: Any,
    null: int,
    seed: int,
    *,
    center: bool = True,
) -> Tensor | WithNull:
    """`against_null` of a score of principal coordinates, class indices and number of classes."""
    x = as_features(features)
    classes = as_classes(labels, len(x), x.device)
    with exact_arithmetic(x.device):
        found, n_classes = principal(x, center=center), len(classes.sizes)
        own = (classes.index, null, seed)
        return against_null(lambda index: score(found, index, n_classes), *own, stacklevel=5)


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
    p_value = (1 + (~(drawn < value)).sum().to(mean.dtype)) / (count + 1)
    return WithNull(value, mean, quantile, value - mean, p_value)


def permutations(index: Tensor, count: int, seed: int) -> list[Tensor]:
    """Seeded permutations of class indices, drawn on the CPU whatever their device."""
    own = generator_options(seed)
    return [index[torch.randperm(len(index), **own).to(index.device)] for _ in range(count)]


def permuted_grams(gram: ClassGram, count: int, seed: int) -> Iterator[ClassGram]:
    """Gram matrices of the same features under permuted labels; each reads the columns again."""
    classes = gram.classes
    for index in permutations(classes.index, count, check_int(seed, "seed", least=0)):
        other = classes._replace(index=index)
        yield ClassGram.from_columns(gram.columns, other, gram.dtype, gram.scale)
