"""Knowledge quality: separation, information and efficiency of one layer's features.

Definition and symbols follow arXiv 2511.14981. The formulas read what `quality_statistics` makes of
a layer's Gram matrix, for R draws from its sample at a time: the sample itself (R = 1), or the
half-samples behind a ranking's spread.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geomkd.common.checks import check_dataset_size, check_definition
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import exact_arithmetic
from geomkd.measures.measure import Measure
from geomkd.measures.null import WithNull, beside_null, check_null, permuted_grams
from geomkd.measures.quality_statistics import (
    Statistics,
    entropy_nats,
    first_terms,
    statistics_of_sample,
    terms_to,
    warn_of_rows_without_direction,
)

TERMS = ("separation", "information", "efficiency", "quality")
Parts = dict[str, Tensor]  # named values, each (R,)
Formula = Callable[[Statistics, float], Parts]


def separation_from(s: Statistics, dataset_size: float) -> Parts:
    """S = mean_a w_a - mean_{a != b} b_ab; w_a, b_ab mean cosines within and between classes."""
    within, between = s.cosines.within.mean(dim=0), s.cosines.between
    parts = {"mean_within_cosine": within, "mean_between_cosine": between}
    return {"separation": within - between} | parts


def information_from(s: Statistics, dataset_size: float) -> Parts:
    """I, the spread of directions within classes times the entropy of their spectra."""
    return (_published_information if s.definition == "published" else _robust_information)(s)


def _published_information(s: Statistics) -> Parts:
    """I = (1 - mean_a min c_ij) * mean_a H_a / log 5, H_a over the first K terms, K = sum_a k_a."""
    least = s.cosines.low.mean(dim=0)
    k = torch.stack([terms_to(a.shares, 0.95) for a in s.spectra])  # at most n_a - 1, the rank
    keep = k.sum(dim=0).unsqueeze(1)  # summed over classes, as published: bites on collapse
    entropy = torch.stack([entropy_nats(first_terms(a.shares, keep)) for a in s.spectra])
    entropy = entropy.mean(dim=0)
    parts = {"min_within_cosine": least, "class_entropy": entropy}
    parts["class_dimension_95"] = k.double().mean(dim=0)
    return {"information": (1 - least) * entropy / math.log(5)} | parts


def _robust_information(s: Statistics) -> Parts:
    """I = mean_a (1 - q_a) / 2 * mean_a H_a / log min(n_a - 1, d), q_a the 5 % quantile of u_ij."""
    low, shares = s.cosines.low.mean(dim=0), []
    for a in s.spectra:
        most = math.log(max(1, min(a.samples - 1, s.dim)))
        shares.append(entropy_nats(a.shares) / most if most else torch.zeros_like(low))
    entropy = torch.stack(shares).mean(dim=0)
    parts = {"low_within_cosine": low, "class_entropy": entropy}
    return {"information": (1 - low) / 2 * entropy} | parts


def efficiency_from(s: Statistics, dataset_size: float) -> Parts:
    """E = 2 mean_a delta_a / size of the features; published: times (N / pi)^(1 / min(n, d))."""
    delta, size = s.margins.mean(dim=0), s.size
    value = torch.where(size > 0, 2 * delta / size, 0.0)
    parts = {"nearest_other_class_distance": delta}
    if s.definition == "robust":
        return {"efficiency": value} | parts | {"rms_norm": size}
    factor = torch.full_like(size, (dataset_size / math.pi) ** (1 / min(s.n, s.dim)))
    return {"efficiency": value * factor} | parts | {"mean_norm": size, "size_factor": factor}


def quality_from(s: Statistics, dataset_size: float) -> Parts:
    """Q = S + sqrt(I E), its terms and every intermediate of each draw."""
    separation, information, efficiency = (
        of(s, dataset_size) for of in (separation_from, information_from, efficiency_from)
    )
    product = information["information"] * efficiency["efficiency"]
    quality = separation["separation"] + product.clamp(min=0).sqrt()
    return {"quality": quality} | separation | information | efficiency


@dataclass(frozen=True)
class KnowledgeQuality:
    """Quality of one layer and what it is made of; see `knowledge_quality`.

    Attributes
    ----------
    quality, separation, information, efficiency : float
        Q = S + sqrt(I E), and its terms.
    details : dict of str to float
        Every intermediate.
    definition : str
        "published" or "robust".
    samples, dim, n_classes : int
        Shape of the sample, and its classes.
    null : dict of str to WithNull
        The four scores beside those of permuted labels, where they were asked for; 0-d tensors.
    """

    quality: float
    separation: float
    information: float
    efficiency: float
    details: dict[str, float] = field(repr=False)
    definition: str
    samples: int
    dim: int
    n_classes: int
    null: dict[str, WithNull] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        """One line."""
        return (
            f"KnowledgeQuality(quality={self.quality:.4f}, separation={self.separation:.4f}, "
            f"information={self.information:.4f}, efficiency={self.efficiency:.4f}, "
            f"definition={self.definition!r}, n={self.samples}, d={self.dim}, "
            f"classes={self.n_classes})"
        )

    def _repr_html_(self) -> str:
        terms = ("quality", "separation", "information", "efficiency")
        rows = [(name, getattr(self, name), "<b>{}</b>") for name in terms]
        rows += [(name, value, "{}") for name, value in self.details.items()]
        cells = "".join(
            f"<tr><td>{style.format(name.replace('_', ' '))}</td>"
            f"<td style='text-align:right'>{style.format(f'{value:.5g}')}</td></tr>"
            for name, value, style in rows
        )
        return (
            f"<table><caption>{self.definition} definition, n = {self.samples}, d = {self.dim}, "
            f"{self.n_classes} classes</caption>{cells}</table>"
        )


def knowledge_quality(
    features: Any,
    labels: Any,
    *,
    dataset_size: float | None = None,
    definition: str = "published",
    null: int = 0,
    seed: int = 0,
) -> KnowledgeQuality:
    r"""Knowledge quality of one layer's features: Q = S + sqrt(I E).

    Parameters
    ----------
    features : Tensor or ndarray, shape (n, ...)
        Activations of n samples, float64, float32, float16 or bfloat16, on any device; flattened
        to (n, d).
    labels : Tensor or ndarray, shape (n,) or (n, C)
        Integers, or exact one-hot rows.
    dataset_size : number, optional
        Size N of the data set that the sample was drawn from; n by default. Only the published
        efficiency depends on it.
    definition : {"published", "robust"}
        "published" is the paper's, with its quirks; "robust" is this library's own, invariant to
        translation and rotation too.
    null, seed : int
        Permutations of the labels to hold the scores against, and their seed; each costs as much
        as the score.

    Returns
    -------
    KnowledgeQuality
        Python floats, ``details`` with every intermediate, and ``null``.

    Raises
    ------
    TypeError
        Features that are no floating-point array, labels of one axis that are no integers.
    ValueError
        NaN or Inf, fewer than two classes or than two samples of one, lengths or devices that
        differ, features of less than two axes, ``dataset_size`` below n, an unknown definition.

    Warns
    -----
    UserWarning
        Zero rows (in "robust": rows at the mean), which have no direction: their cosine with
        everything, themselves included, is taken as 0.

    Notes
    -----
    With c_ij = abs(cos(x_i, x_j)), classes a of n_a samples, natural logarithms:

    * S = mean_a w_a - mean_{a != b} b_ab; w_a, b_ab the means of c_ij within a (i = j included)
      and between a and b;
    * I = (1 - mean_a min c_ij) mean_a H_a / log 5; H_a the entropy of the squared singular values
      p of class a about its mean, of which the first K are kept and renormalised;
      K = sum_a k_a, k_a the terms that hold 95 %;
    * E = 2 mean_a delta_a / mean_a nu_a (N / pi)^(1 / min(n, d)); delta_a the smallest distance
      from class a to any other, nu_a the mean norm.

    "robust" subtracts the mean of all rows first and takes the signed cosine u_ij:
    S = mean_a mean_{i < j} u_ij - mean_{a != b} mean u_ij;
    I = mean_a (1 - q_a) / 2 mean_a H_a / log min(n_a - 1, d), q_a the 5 % quantile of u_ij within
    a; E = 2 mean_a median_i min_j abs(x_i - x_j) / sqrt(mean_i abs(x_i)^2).

    Other than in the published code a zero row gives no NaN, and a class of fewer samples or
    dimensions than the widest spectrum keeps its entropy. Here 0 log 0 = 0, and a class without
    variance has k_a = 1 and H_a = 0.

    What it does not mean: the published figures move with a common offset and have a floor of c_ij
    near 1 / pi through ReLU. Both definitions move with the number of samples; compare at equal n:
    a ResNet-20's Q went +4 to +22 % from 25 to 500 a class (robust -11 to -4, its E -23 to -3).

    Cost: n^2 d flops in the features' precision, O(n^2) in float64, C eigenproblems of size n_a;
    memory n^2 numbers and 1,024 columns of the features.

    References
    ----------
    Cooper, Chen, Dwivedy, Gurari. Logit-Based Losses Limit the Effectiveness of Feature Knowledge
    Distillation. NeurReps 2025, arXiv 2511.14981.

    Examples
    --------
    >>> import torch
    >>> from geomkd import knowledge_quality
    >>> labels = torch.arange(200) % 4
    >>> noise = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    >>> features = torch.eye(4)[labels].repeat(1, 16) + 0.5 * noise
    >>> q = knowledge_quality(features, labels, dataset_size=5000)
    >>> q.quality == q.separation + (q.information * q.efficiency) ** 0.5
    True
    """
    given = (features, labels, definition, dataset_size, null, seed)
    gram, parts, held = _scored(TERMS, quality_from, *given, stacklevel=4)
    values = {name: value.item() for name, value in parts.items()}
    terms = {name: values.pop(name) for name in TERMS}
    shape = {"samples": gram.n, "dim": gram.dim, "n_classes": gram.n_classes}
    return KnowledgeQuality(**terms, **shape, details=values, definition=definition, null=held)


def separation(
    features: Any, labels: Any, *, definition: str = "published", null: int = 0, seed: int = 0
) -> Tensor | WithNull:
    """Separation S of classes by cosine: within minus between.

    Parameters, errors and formulas as in `knowledge_quality`, whose S this is.

    Returns
    -------
    Tensor, shape (), or WithNull
        float64, on the features' device.

    Examples
    --------
    >>> import torch
    >>> from geomkd import separation
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> separation(torch.eye(2)[labels], labels)
    tensor(1., dtype=torch.float64)
    """
    return _term("separation", separation_from, features, labels, definition, None, null, seed)


def information(
    features: Any, labels: Any, *, definition: str = "published", null: int = 0, seed: int = 0
) -> Tensor | WithNull:
    """Information I: the spread of directions within classes times their spectral entropy.

    Parameters, errors and formulas as in `knowledge_quality`, whose I this is.

    Returns
    -------
    Tensor, shape (), or WithNull
        float64, on the features' device.

    Examples
    --------
    >>> import torch
    >>> from geomkd import information
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> information(torch.eye(2)[labels], labels)  # every class collapsed
    tensor(0., dtype=torch.float64)
    """
    return _term("information", information_from, features, labels, definition, None, null, seed)


def efficiency(
    features: Any,
    labels: Any,
    *,
    dataset_size: float | None = None,
    definition: str = "published",
    null: int = 0,
    seed: int = 0,
) -> Tensor | WithNull:
    """Efficiency E: the margin between classes over the size of the features.

    Parameters, errors and formulas as in `knowledge_quality`, whose E this is.

    Returns
    -------
    Tensor, shape (), or WithNull
        float64, on the features' device.

    Examples
    --------
    >>> import torch
    >>> from geomkd import efficiency
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> e = efficiency(torch.eye(2)[labels], labels, definition="robust")
    >>> torch.testing.assert_close(e, torch.tensor(4.0, dtype=e.dtype))
    """
    given = (features, labels, definition, dataset_size, null, seed)
    return _term("efficiency", efficiency_from, *given)


ROWS = (
    Measure("knowledge_quality", "quality", quality_from, supervised=True, columns=TERMS),
    Measure("separation", "quality", separation_from, supervised=True),
    Measure("information", "quality", information_from, supervised=True),
    Measure("efficiency", "quality", efficiency_from, supervised=True),
)


def _scored(
    names: Sequence[str],
    of: Formula,
    features: Any,
    labels: Any,
    definition: str,
    dataset_size: float | None,
    null: int,
    seed: int,
    *,
    stacklevel: int,
) -> tuple[ClassGram, Parts, dict[str, WithNull]]:
    """Gram matrix of a sample, what a formula makes of it, and scores beside permuted labels."""
    check_definition(definition)
    gram = ClassGram.of(features, labels)
    size = check_dataset_size(dataset_size, gram.n)
    statistics = statistics_of_sample(gram, definition)
    warn_of_rows_without_direction(statistics, stacklevel)
    with exact_arithmetic(gram.device):
        parts, held = of(statistics, size), {}
        if check_null(null, stacklevel):
            scores = {name: parts[name] for name in names}
            held = beside_permuted(gram, scores, [of], size, definition, null, seed)
    return gram, parts, held


def _term(name: str, of: Formula, *given: Any) -> Tensor | WithNull:
    """One term of the sample, beside those of permuted labels if asked for."""
    _, parts, held = _scored((name,), of, *given, stacklevel=5)
    return held[name] if held else parts[name].squeeze(0)


def beside_permuted(
    gram: ClassGram,
    scores: Parts,
    of: list[Formula],
    dataset_size: float,
    definition: str,
    null: int,
    seed: int,
) -> dict[str, WithNull]:
    """Set scores of a Gram matrix, first of each, beside those that permuted labels give."""
    drawn: dict[str, list[Tensor]] = {name: [] for name in scores}
    for other in permuted_grams(gram, null, seed):
        statistics, values = statistics_of_sample(other, definition), {}
        for formula in of:
            values |= formula(statistics, dataset_size)
        for name, found in drawn.items():
            found.append(values[name])
    return {name: beside_null(value[0], torch.cat(drawn[name])) for name, value in scores.items()}
