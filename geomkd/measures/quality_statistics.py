"""What the formulas of knowledge quality are made of: cosines, spectra and nearest distances.

Everything reads a `ClassGram`, for R draws from its sample at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import ZERO_VARIANCE, inverse, one_thread

NEIGHBOURS = 32  # nearest rows kept for half-samples: all are missed with probability 2^-32
_ZERO_SHARE = 2.0**-18  # of the second moment about the class mean: float32 products give no less


# ---- cosines -------------------------------------------------------------------------------------


def abs_cosines(gram: ClassGram, draws: Draws) -> list[tuple[Tensor, Tensor]]:
    """Mean and minimum of |cos| within every class: a pair of (R,) a class."""
    inverse_norm = inverse(gram.raw_sq.sqrt())
    stats = []
    for a, (s, e) in enumerate(gram.spans):
        scale = inverse_norm[s:e]
        cosine = gram.class_dots(a, raw=True).mul_(scale).mul_(scale.unsqueeze(1)).abs_()
        parts = [(p.mean(dim=(1, 2)), p.amin(dim=(1, 2))) for _, p in draws.pairs(a, cosine)]
        means, minima = zip(*parts, strict=True)
        stats.append((torch.cat(means), torch.cat(minima)))
    return stats


class About(NamedTuple):
    """What moves dot products to the mean of a draw: x_i.x_j - shift_i - shift_j + offset."""

    shift: Tensor
    offset: Tensor
    sq: Tensor
    inverse_norm: Tensor


def about_the_mean(gram: ClassGram, draws: Draws) -> About:
    """Find what moves each draw's dot products to its own mean."""
    if draws.whole:  # already centred
        shift = torch.zeros_like(gram.centred_sq).unsqueeze(1)
        offset = shift[0]
    else:
        mean = draws.member.double() / sum(draws.sizes)
        shift = gram.dot_times(mean)
        offset = (mean * shift).sum(dim=0)
    sq = (gram.centred_sq.unsqueeze(1) - 2 * shift + offset).clamp(min=0)
    # No direction at the mean, or where all rows are equal but for the mean's rounding: cosine 0.
    at_mean = sq <= torch.maximum(1e-12 * sq.mean(dim=0), ZERO_VARIANCE * gram.raw_sq.mean())
    return About(shift, offset, sq, inverse(sq.masked_fill(at_mean, 0.0).sqrt()))


def signed_cosines(gram: ClassGram, draws: Draws, about: About, a: int) -> Iterator[Tensor]:
    """Cosines about the draw's mean within class ``a``, (r, m, m), a few draws at a time."""
    s, e = gram.spans[a]
    chosen = draws.of_class[a]
    shift = about.shift[s:e].T.gather(1, chosen)
    scale = about.inverse_norm[s:e].T.gather(1, chosen)
    for r, dots in draws.pairs(a, gram.class_dots(a)):
        moved = dots - shift[r].unsqueeze(2) - shift[r].unsqueeze(1) + about.offset[r, None, None]
        yield moved * scale[r].unsqueeze(2) * scale[r].unsqueeze(1)


# ---- spectra and distances -----------------------------------------------------------------------


class Spectrum(NamedTuple):
    """One class's spectrum in R draws.

    Attributes
    ----------
    shares : Tensor, shape (R, min(m, d))
        Squared singular values about the class mean over their sum, falling; 0 without variance.
    samples : int
        Samples of the class in a draw, m.
    """

    shares: Tensor
    samples: int


def spectrum_of(
    square: Tensor,
    draws: Draws,
    a: int,
    dim: int,
    floor: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Spectrum:
    """Spectrum of class ``a`` from its (n_a, n_a) Gram matrix, whose products were in ``dtype``.

    A sum of squares below ``floor`` is no variance.
    """
    shares = [_shares(part, dim, floor, dtype) for _, part in draws.pairs(a, square)]
    return Spectrum(torch.cat(shares), draws.sizes[a])


def variance_floor(gram: ClassGram, a: int) -> Tensor:
    """Sum of squares that rounding alone leaves about the mean of class ``a``."""
    s, e = gram.spans[a]
    return ZERO_VARIANCE * gram.raw_sq[s:e].sum()


def class_spectra(gram: ClassGram, draws: Draws) -> list[Spectrum]:
    """Spectrum of every class about its own mean, from the diagonal blocks."""
    spectra = []
    for a in range(gram.n_classes):
        square, floor = gram.class_residual_gram(a), variance_floor(gram, a)
        spectra.append(spectrum_of(square, draws, a, gram.dim, floor, gram.dtype))
    return spectra


def nearest_in_draws(gram: ClassGram, draws: Draws, definition: str) -> Tensor:
    """Squared distance of every row to its nearest of another class, (n, R); inf outside a draw."""
    if draws.whole:
        value, at = gram.nearest_other()
        value, at = value[:, 0], at[:, 0]
        rows = gram.unresolved(value, at, per_class=definition == "published")
        if len(rows):
            value[rows] = gram.refine(rows)
        return value.unsqueeze(1)
    one = draws.member.shape[1] == 1  # a smaller sample, of which no neighbour may be missed
    k = min(8 if one else NEIGHBOURS, gram.n - min(gram.classes.sizes))
    value, at = gram.nearest_other(k, draws.member[:, 0] if one else None)
    rows = gram.unresolved(value[:, 0], at[:, 0], per_class=False)
    if len(rows):
        value[rows] = gram.measure(rows, at[rows]).masked_fill(value[rows].isinf(), torch.inf)
    farthest = value.amax(dim=1)  # a bound, where a draw has missed every neighbour kept
    columns = []
    for member in draws.member.T:
        least = value.masked_fill(~member[at], torch.inf).amin(dim=1)
        columns.append(torch.minimum(least, farthest).masked_fill_(~member, torch.inf))
    return torch.stack(columns, dim=1)


def _shares(block: Tensor, dim: int, floor: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues over their sum of (r, m, m) Gram matrices, centred here, falling."""
    floor = torch.maximum(floor, _ZERO_SHARE * trace(block).unsqueeze(1))
    row = block.mean(dim=2, keepdim=True)
    block = block - row - row.transpose(1, 2) + row.mean(dim=1, keepdim=True)
    with one_thread():
        values = torch.linalg.eigvalsh(block)
    values = values.flip(1)[:, : min(block.shape[1], dim)].clamp(min=0)
    # Rounding spreads about this share over terms that are 0, and Q takes the root of its entropy.
    noise = torch.finfo(dtype).eps / 2 * math.sqrt(block.shape[1])
    rest = values.flip(1).cumsum(dim=1).flip(1)
    values = values.masked_fill(rest <= noise * rest[:, :1], 0.0)
    total = values.sum(dim=1, keepdim=True)
    return torch.where(total > floor, values / total, 0.0)


def terms_to(shares: Tensor, share: float) -> Tensor:
    """Smallest number of leading terms that hold ``share`` of the whole; 1 without variance."""
    terms = (shares.cumsum(dim=1) < share).sum(dim=1) + 1
    return torch.where(shares.sum(dim=1) > 0, terms, 1)


def first_terms(shares: Tensor, keep: Tensor) -> Tensor:
    """Keep the first shares of each row, renormalised; 0 behind them."""
    kept = shares * (torch.arange(shares.shape[1], device=shares.device) < keep)
    total = kept.sum(dim=1, keepdim=True)
    return torch.where(total > 0, kept / total, 0.0)


def entropy_nats(p: Tensor) -> Tensor:
    """Entropy of each row in nats; 0 log 0 = 0."""
    return -torch.xlogy(p, p).sum(dim=1)


def quantile(x: Tensor, q: float) -> Tensor:
    """Quantile of each row with linear interpolation, by selection (no size limit, no sort)."""
    place = q * (x.shape[1] - 1)
    low = math.floor(place)
    high = min(low + 1, x.shape[1] - 1)
    below, above = x.kthvalue(low + 1, dim=1).values, x.kthvalue(high + 1, dim=1).values
    return below + (place - low) * (above - below)


def trace(u: Tensor) -> Tensor:
    """Trace of each of (r, m, m) matrices."""
    return u.diagonal(dim1=1, dim2=2).sum(dim=1)
