"""LOES: choosing several layers at once, good ones that do not say the same thing.

Everything is a function of the layers' centred Gram matrices over the same m samples, so that the
layers may be of any widths.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomkd.common.checks import as_labels, as_tensor, check_int, check_number
from geomkd.geometry.precision import exact_arithmetic, inverse
from geomkd.geometry.principal import of_gram
from geomkd.measures.spectrum import isotropy_from

_SPANNED = 1e-6  # ridge that takes chosen features out of a candidate's, in LOES's code
_NUMBERS = 2**16  # of every Gram matrix, taken to float64 at a time


class Step(NamedTuple):
    """One layer of a joint selection, and the terms that chose it."""

    layer: int  # its index
    objective: float  # loss + alpha (1 - isotropy) + gamma redundancy - eta triangle_area
    isotropy: float
    redundancy: float  # to the layers chosen before; 0 in the first step
    loss: float | None  # of predicting what the layers before leave of the labels; None without
    triangle_area: float | None  # of the class centroids; 0 in the first step, None without labels


def redundancy(grams: Any) -> Tensor:
    """Redundancy ||X_a' X_b|| / (||X_a|| ||X_b||), Frobenius norms, of every two of L layers.

    From the centred Gram matrices G_a = X_a X_a' of the same m samples, (L, m, m), as
    ``sqrt(tr G_a G_b / (tr G_a tr G_b))``: (L, L), float64, between 0 and 1; 0 for a layer that
    does not vary. To a copy of itself a layer's redundancy is not 1 but ``1 / sqrt(participation
    ratio of its spectrum)``: copies of a layer that varies in many directions count as less
    redundant than two unlike layers of few. Divided by the root of both copies' own,
    ``r / sqrt(outer(diag r, diag r))``, it is the square root of linear CKA. LOES's code (see
    `loes`) does not centre the features first.
    """
    x = _as_grams(grams)
    with exact_arithmetic(x.device):
        dots = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
        for piece in x.flatten(1).split(_NUMBERS, dim=1):
            exact = piece.double()
            dots.addmm_(exact, exact.T)
        per_norm = inverse(x.diagonal(dim1=1, dim2=2).double().sum(dim=1).clamp(min=0).sqrt())
        return dots.clamp_(min=0).sqrt_().mul_(per_norm).mul_(per_norm.unsqueeze(1)).clamp_(max=1)


def loes(
    grams: Any,
    index: Any | None,
    n_classes: int | None,
    k: int,
    *,
    dims: Sequence[int],
    alpha: float = 1.0,
    gamma: float = 0.5,
    eta: float = 0.1,
    ridge: float = 1e-3,
) -> list[Step]:
    """Choose k layers jointly by LOES, Layer-wise Optimal Embedding Selection, for any widths.

    Greedy. The first layer minimises the loss of predicting the one-hot labels, plus ``alpha (1 -
    isotropy)``. Each next one minimises the loss of predicting what is left of the labels from the
    part of its features that is orthogonal to all chosen before, plus ``alpha (1 - isotropy)``,
    plus ``gamma`` times its largest redundancy to a chosen layer, minus ``eta`` times the mean area
    of the triangles of class centroids of that part.

    Parameters
    ----------
    grams : Tensor or ndarray, shape (L, m, m)
        Centred Gram matrix of the same m samples for every layer.
    index, n_classes : Tensor or ndarray, shape (m,), and int; or None
        Class of each sample, 0 ... n_classes - 1; None for the label-free form, which knows no loss
        and no triangles.
    k : int
        How many layers, from 1 to L.
    dims : sequence of int, length L
        Features of every layer.
    alpha, gamma, eta, ridge : float
        Weights of the terms, and the ridge of the regressions, as published.

    Returns
    -------
    list of Step
        In the order of choice; ties go to the earlier layer.

    Notes
    -----
    Every layer is read through its principal coordinates (m, r), a rotation of its features that
    its Gram matrix determines. Normalisations are those of the authors' code: features are centred
    and not scaled; the loss is the mean squared error over all m n_classes numbers, on the samples
    that were fitted; ``ridge`` is added to X'X, not to its mean; isotropy is ``mean(l) / (std(l) +
    1e-6)`` over eigenvalues l of X'X / m, of the whole layer, also in later steps. So loss,
    isotropy and redundancy hardly depend on a layer's scale, but triangle areas grow with its
    square: where layers of unlike scales meet, give ``eta=0``. A layer of one feature has no spread
    of eigenvalues: isotropy takes it for perfect.

    Other than in the code, redundancy is that of centred features, the area is the mean over all
    triangles of three classes (there, 200 random triples with repetitions), and isotropy takes
    min(m, d) eigenvalues, without 1e-6 added to each (there, all d up to d = 512).

    The orthogonal part is the remainder of a ridge, ``X - K (K + l I)^-1 X`` with K the sum of the
    chosen Gram matrices. l is 1e-6 as in the code while the chosen layers together have fewer than
    m - 1 features. From there on they span all centred samples and that remainder would vanish: l
    is then tr K / m, which takes out the directions in which they vary more than on average. Layers
    of m - 1 and more features fit any labels: their loss is near 0, and the other terms choose.

    Cost: an eigenproblem of size m for every layer and every step, about 4 m^2 r multiplications
    for every candidate in every step, and m r float64 numbers a layer.

    References
    ----------
    Batra et al. Uncovering the Latent Potential of Deep Intermediate Representations. ICML 2026,
    arXiv:2605.23033; https://github.com/arnesh2212/loes.
    """
    x = _as_grams(grams)
    dims = [check_int(dim, "dims", 1) for dim in dims]
    if len(dims) != len(x):
        raise ValueError(f"dims must be one for each of {len(x)} grams; got {len(dims)}")
    check_k(k, len(x))
    check_number(alpha, "alpha", least=0), check_number(gamma, "gamma", least=0)
    check_number(eta, "eta", least=0), check_number(ridge, "ridge", above=0)
    with exact_arithmetic(x.device):
        labels = None if index is None else _as_index(index, n_classes, x)
        left = None
        if labels is not None:
            hot = torch.nn.functional.one_hot(labels, n_classes).double()
            left = hot - hot.mean(dim=0)
        parts, isotropies = _read(x, dims, keep=labels is not None)
        alike = redundancy(x).tolist()
        steps: list[Step] = []
        while len(steps) < k:
            chosen = [step.layer for step in steps]
            beyond = _beyond(parts, chosen, dims)
            candidates = []
            for layer in sorted(set(range(len(x))) - set(chosen)):
                likeness = max((alike[layer][other] for other in chosen), default=0.0)
                objective = alpha * (1 - isotropies[layer]) + gamma * likeness
                loss = area = None
                if labels is not None:
                    apart = beyond(layer)
                    loss = float((left - _ridge_fit(apart, left, ridge)).square().mean())
                    area = _triangle_area(_centroids(apart, labels)) if chosen else 0.0
                    objective += loss - eta * area
                candidates.append(Step(layer, objective, isotropies[layer], likeness, loss, area))
            steps.append(min(candidates, key=lambda step: step.objective))  # the first of equals
            if labels is not None:
                left = left - _ridge_fit(beyond(steps[-1].layer), left, ridge)
        return steps


def _read(grams: Tensor, dims: list[int], keep: bool) -> tuple[list[Tensor], list[float]]:
    """Principal coordinates (m, r) of every layer, if they are to be kept, and its isotropy."""
    m, parts, isotropies = grams.shape[1], [], []
    # Of a float32 Gram matrix the eigenvalues that are 0 come as rounding, which a ridge of 1e-3
    # would take for features where the others are large: labels could be fitted with them.
    floor = math.sqrt(m) * torch.finfo(grams.dtype).eps
    for gram, dim in zip(grams, dims, strict=True):
        coordinates, sq_singular, *_ = of_gram(gram.double(), dim)
        rank = min(dim, m - 1, int((sq_singular > floor * sq_singular[:1]).sum()))
        if keep:
            parts.append(coordinates[:, :rank])
        isotropies.append(float(isotropy_from(sq_singular[:rank], m, dim)))
    return parts, isotropies


def _beyond(parts: list[Tensor], chosen: list[int], dims: list[int]) -> Callable[[int], Tensor]:
    """Return what takes from a layer's coordinates what the chosen layers' coordinates hold."""
    if not chosen or not parts:
        return lambda layer: parts[layer]
    m, width = len(parts[0]), sum(dims[a] for a in chosen)
    span = of_gram(sum(parts[a] @ parts[a].T for a in chosen), width)
    shrinkage = float(span.sq_singular.sum()) / m if width >= m - 1 else _SPANNED
    weights = span.coordinates / (span.sq_singular + shrinkage)
    return lambda layer: parts[layer] - weights @ (span.coordinates.T @ parts[layer])


def _ridge_fit(x: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Prediction of a centred target from centred features by ridge regression."""
    square = x.T @ x
    square.diagonal().add_(ridge)
    return x @ torch.linalg.solve(square, x.T @ target)


def _centroids(x: Tensor, labels: Tensor) -> Tensor:
    """Means of the classes that are there, (C, r)."""
    _, present, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), x.shape[1], dtype=x.dtype, device=x.device)
    return sums.index_add_(0, present, x) / sizes.unsqueeze(1)


def _triangle_area(points: Tensor) -> float:
    """Mean area of the triangles of every three of C points, from their dot products."""
    total = torch.zeros((), dtype=points.dtype, device=points.device)
    for first in range(len(points) - 2):
        edges = points[first + 1 :] - points[first]
        dots = edges @ edges.T
        sq = dots.diagonal()
        total += (torch.outer(sq, sq) - dots.square()).clamp(min=0).sqrt().triu(1).sum() / 2
    return float(total) / max(math.comb(len(points), 3), 1)


def _as_grams(grams: Any) -> Tensor:
    x = as_tensor(grams, "grams")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"grams must be float32 or float64; got {x.dtype}")
    if x.ndim != 3 or x.shape[1] != x.shape[2] or x.shape[1] < 2 or len(x) == 0:
        raise ValueError(f"grams must be (L, m, m) with m >= 2; got {tuple(x.shape)}")
    bad = [a for a, gram in enumerate(x) if not bool(torch.isfinite(gram).all())]
    if bad:
        raise ValueError(f"grams must be finite; got NaN or Inf in those of layers {bad}")
    return x


def _as_index(index: Any, n_classes: int | None, grams: Tensor) -> Tensor:
    labels = as_labels(index, grams.shape[1], grams.device)
    n_classes = check_int(n_classes, "n_classes", 2)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"index must be 0 ... n_classes - 1 = {n_classes - 1}; got {low} ... {high}"
        )
    return labels


def check_k(k: int, layers: int) -> None:
    """Check that k of so many layers can be chosen."""
    if not 1 <= check_int(k, "k", least=k) <= layers:  # any whole number at first
        raise ValueError(f"k must be between 1 and the {layers} layers to choose from; got {k}")
