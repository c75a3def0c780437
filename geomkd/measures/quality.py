"""Knowledge quality: separation, information and efficiency of one layer's features.

Definition and symbols follow arXiv 2511.14981. Every function here reads a `ClassGram`, for R draws
from its sample at a time: the sample itself (R = 1), or the half-samples behind a ranking's spread.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geomkd.common.checks import check_dataset_size, check_definition, check_int
from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import exact_arithmetic
from geomkd.measures.null import WithNull, beside_null, permutations
from geomkd.measures.quality_statistics import (
    Spectrum,
    about_the_mean,
    abs_cosines,
    class_spectra,
    entropy_nats,
    first_terms,
    nearest_in_draws,
    quantile,
    signed_cosines,
    terms_to,
    trace,
)

TERMS = ("separation", "information", "efficiency", "quality")
Parts = dict[str, Tensor]  # named intermediates, each (R,)


# ---- the published definition --------------------------------------------------------------------


def _published_separation(gram: ClassGram, draws: Draws) -> tuple[Tensor, Parts]:
    """S = mean_a w_a - mean_{a != b} b_ab, of c_ij = |cos(x_i, x_j)|, i = j included."""
    c = gram.n_classes
    within = torch.stack([mean for mean, _ in abs_cosines(gram, draws)])
    every = gram.abs_cosine_form(draws.weights())  # sum over all ordered pairs of classes
    between = (every - within.sum(dim=0)) / (c * (c - 1))
    within = within.mean(dim=0)
    return within - between, {"mean_within_cosine": within, "mean_between_cosine": between}


def _published_information(
    gram: ClassGram, draws: Draws, spectra: list[Spectrum]
) -> tuple[Tensor, Parts]:
    """I = (1 - mean_a min c_ij) * mean_a H_a / log 5, H_a over the first K terms, K = sum_a k_a."""
    least = torch.stack([low for _, low in abs_cosines(gram, draws)]).mean(dim=0)
    k = torch.stack([terms_to(s.shares, 0.95) for s in spectra])  # at most n_a - 1, the rank
    keep = k.sum(dim=0).unsqueeze(1)  # summed over classes, as published: bites on collapse
    entropy = torch.stack([entropy_nats(first_terms(s.shares, keep)) for s in spectra]).mean(dim=0)
    parts = {
        "min_within_cosine": least,
        "class_entropy": entropy,
        "class_dimension_95": k.double().mean(dim=0),
    }
    return (1 - least) * entropy / math.log(5), parts


def _published_efficiency(
    gram: ClassGram, draws: Draws, nearest: Tensor, dataset_size: float
) -> tuple[Tensor, Parts]:
    """E = 2 mean_a delta_a / mean_a nu_a * (N / pi)^(1 / min(n, d))."""
    distance = nearest.sqrt() / gram.scale
    delta = torch.stack([distance[s:e].amin(dim=0) for s, e in gram.spans]).mean(dim=0)
    nu = (draws.weights().T @ gram.raw_sq.sqrt()) / gram.n_classes / gram.scale
    rank = min(sum(draws.sizes), gram.dim)
    factor = torch.full_like(nu, (dataset_size / math.pi) ** (1 / rank))
    parts = {"nearest_other_class_distance": delta, "mean_norm": nu, "size_factor": factor}
    return torch.where(nu > 0, 2 * delta / nu, 0.0) * factor, parts


# ---- the robust definition -----------------------------------------------------------------------


def _robust_separation(gram: ClassGram, draws: Draws) -> tuple[Tensor, Parts]:
    """S = mean_a w_a - mean_{a != b} b_ab of signed cosines u_ij about the mean, w_a over i < j."""
    c = gram.n_classes
    about = about_the_mean(gram, draws)
    p = draws.weights() * about.inverse_norm
    mass = p.sum(dim=0)
    every = (
        (p * gram.dot_times(p)).sum(dim=0)
        - 2 * mass * (p * about.shift).sum(dim=0)
        + about.offset * mass**2
    )
    diagonal, within = torch.zeros_like(every), torch.zeros_like(every)
    for a, m in enumerate(draws.sizes):
        cosines = signed_cosines(gram, draws, about, a)
        sums = torch.cat([torch.stack([u.sum((1, 2)), trace(u)], dim=1) for u in cosines])
        diagonal += sums[:, 0] / m**2
        within += (sums[:, 0] - sums[:, 1]) / (m * (m - 1))
    between, within = (every - diagonal) / (c * (c - 1)), within / c
    return within - between, {"mean_within_cosine": within, "mean_between_cosine": between}


def _robust_information(
    gram: ClassGram, draws: Draws, spectra: list[Spectrum]
) -> tuple[Tensor, Parts]:
    """I = mean_a (1 - q_a) / 2 * mean_a H_a / log min(n_a - 1, d), q_a the 5 % quantile of u_ij."""
    about = about_the_mean(gram, draws)
    low = []
    for a, m in enumerate(draws.sizes):
        i, j = torch.triu_indices(m, m, 1, device=gram.device)
        cosines = signed_cosines(gram, draws, about, a)
        low.append(torch.cat([quantile(u[:, i, j], 0.05) for u in cosines]))
    low = torch.stack(low).mean(dim=0)
    shares = []
    for spectrum in spectra:
        most = math.log(max(1, min(spectrum.samples - 1, gram.dim)))
        shares.append(entropy_nats(spectrum.shares) / most if most else torch.zeros_like(low))
    entropy = torch.stack(shares).mean(dim=0)
    return (1 - low) / 2 * entropy, {"low_within_cosine": low, "class_entropy": entropy}


def _robust_efficiency(
    gram: ClassGram, draws: Draws, nearest: Tensor, dataset_size: float
) -> tuple[Tensor, Parts]:
    """E = 2 mean_a median_i min_j |x_i - x_j| / sqrt(mean_i |x_i|^2); no term in N."""
    distance = nearest.sqrt() / gram.scale
    delta = [
        quantile(distance[s:e].T.gather(1, chosen), 0.5)
        for (s, e), chosen in zip(gram.spans, draws.of_class, strict=True)
    ]
    delta = torch.stack(delta).mean(dim=0)
    about = about_the_mean(gram, draws)
    rms = ((about.sq * draws.member).sum(dim=0) / sum(draws.sizes)).sqrt() / gram.scale
    parts = {"nearest_other_class_distance": delta, "rms_norm": rms}
    return torch.where(rms > 0, 2 * delta / rms, 0.0), parts


# ---- both ----------------------------------------------------------------------------------------

_SEPARATION = {"published": _published_separation, "robust": _robust_separation}
_INFORMATION = {"published": _published_information, "robust": _robust_information}
_EFFICIENCY = {"published": _published_efficiency, "robust": _robust_efficiency}


def quality_from(
    gram: ClassGram,
    draws: Draws,
    dataset_size: float,
    definition: str,
    *,
    nearest: Tensor | None = None,
    spectra: list[Spectrum] | None = None,
) -> Parts:
    """Quality, its three terms and every intermediate of each draw: (R,) tensors by name."""
    with exact_arithmetic(gram.device):
        spectra = class_spectra(gram, draws) if spectra is None else spectra
        nearest = nearest_in_draws(gram, draws, definition) if nearest is None else nearest
        s, s_parts = _SEPARATION[definition](gram, draws)
        i, i_parts = _INFORMATION[definition](gram, draws, spectra)
        e, e_parts = _EFFICIENCY[definition](gram, draws, nearest, dataset_size)
        q = s + (i * e).clamp(min=0).sqrt()
    parts = {"quality": q, "separation": s, "information": i, "efficiency": e}
    return parts | s_parts | i_parts | e_parts


# ---- public --------------------------------------------------------------------------------------


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
        Integers, or one-hot or score rows, of which the largest counts.
    dataset_size : number, optional
        Size N of the data set that the sample was drawn from; n by default. Only the published
        efficiency depends on it.
    definition : {"published", "robust"}
        "published" is the paper's, with its quirks; "robust" is this library's own, invariant to
        translation and nearly free of sample size.
    null : int
        Permutations of the labels to hold the scores against; each costs as much as the score.
    seed : int
        Seeds them.

    Returns
    -------
    KnowledgeQuality
        Python floats, ``details`` with every intermediate, and ``null``.

    Raises
    ------
    TypeError
        Features that are no floating-point array, labels that are neither integers nor score rows.
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

    The published code runs on one CUDA device only, draws its sample without a seed, gives an
    entropy of 0 to a class with fewer samples or dimensions than the widest spectrum, fails where
    one statistic is a Python float, and gives NaN for a zero row. Here 0 log 0 = 0 everywhere, and
    a class without variance has k_a = 1 and H_a = 0.

    What it does not mean: the published figures move with a common offset of the features, with the
    number of samples a class and, through ReLU, have a floor of c_ij near 1 / pi whatever the
    class; compare layers at equal n.

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
    check_definition(definition)
    gram = ClassGram.of(features, labels)
    size = check_dataset_size(dataset_size, gram.n)
    _warn_of_rows_without_direction(gram, definition, stacklevel=3)
    parts = quality_from(gram, Draws.all_of(gram.classes.sizes, gram.device), size, definition)
    held = {}
    if check_int(null, "null", least=0):
        held = quality_null(gram, parts, size, definition, null, seed)
    values = {name: value.item() for name, value in parts.items()}
    terms = {name: values.pop(name) for name in TERMS}
    return KnowledgeQuality(
        **terms,
        details=values,
        definition=definition,
        samples=gram.n,
        dim=gram.dim,
        n_classes=gram.n_classes,
        null=held,
    )


def quality_null(
    gram: ClassGram, parts: Parts, dataset_size: float, definition: str, null: int, seed: int
) -> dict[str, WithNull]:
    """Set the four scores of a Gram matrix, first of ``parts``, beside permuted labels' ones."""
    draws = Draws.all_of(gram.classes.sizes, gram.device)
    drawn = [
        quality_from(other, draws, dataset_size, definition)
        for other in permuted_grams(gram, null, seed)
    ]
    return {
        name: beside_null(parts[name][0], torch.cat([other[name] for other in drawn]))
        for name in TERMS
    }


def permuted_grams(gram: ClassGram, count: int, seed: int) -> Iterator[ClassGram]:
    """Gram matrices of the same features under permuted labels: their class means are others.

    Each reads the columns again.
    """
    classes = gram.classes
    for index in permutations(classes.index, count, check_int(seed, "seed", least=0)):
        other = classes._replace(index=index)
        yield ClassGram.from_columns(gram.columns, other, gram.dtype, gram.scale)


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
    gram = _gram(features, labels, definition)
    return _term(_SEPARATION[definition], gram, null, seed)


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

    def term(gram: ClassGram, draws: Draws) -> tuple[Tensor, Parts]:
        return _INFORMATION[definition](gram, draws, class_spectra(gram, draws))

    return _term(term, _gram(features, labels, definition), null, seed)


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
    gram = _gram(features, labels, definition)
    size = check_dataset_size(dataset_size, gram.n)

    def term(gram: ClassGram, draws: Draws) -> tuple[Tensor, Parts]:
        nearest = nearest_in_draws(gram, draws, definition)
        return _EFFICIENCY[definition](gram, draws, nearest, size)

    return _term(term, gram, null, seed)


def _gram(features: Any, labels: Any, definition: str) -> ClassGram:
    check_definition(definition)
    gram = ClassGram.of(features, labels)
    _warn_of_rows_without_direction(gram, definition, stacklevel=4)
    return gram


def _term(term: Callable, gram: ClassGram, null: int, seed: int) -> Tensor | WithNull:
    """One term of a Gram matrix, beside those of permuted labels if asked for."""
    draws = Draws.all_of(gram.classes.sizes, gram.device)
    with exact_arithmetic(gram.device):
        value = term(gram, draws)[0].squeeze(0)
        if not check_int(null, "null", least=0):
            return value
        drawn = [term(other, draws)[0] for other in permuted_grams(gram, null, seed)]
        return beside_null(value, torch.cat(drawn))


def _warn_of_rows_without_direction(gram: ClassGram, definition: str, stacklevel: int) -> None:
    if definition == "published":
        count, what = int(gram.zero_rows.sum()), "are zero"
    else:
        about = about_the_mean(gram, Draws.all_of(gram.classes.sizes, gram.device))
        count, what = int((about.inverse_norm == 0).sum()), "equal the mean of all rows"
    if count:
        warnings.warn(
            f"{count} of {gram.n} feature rows {what}: their cosines are taken as 0",
            stacklevel=stacklevel,
        )
