"""What knowledge quality is made of, reduced once for R draws from a layer's sample.

`Published` and `Robust` hold, for the definition of that name, what the formulas of
`geomkd.measures.quality` read: cosines, spectra, margins between classes, the features' size.
Each is computed when it is first asked for.
"""

import math
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from geomkd.geometry.draws import Draws
from geomkd.geometry.eigenvalues import eigenvalues
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import unsure
from geomkd.geometry.precision import ZERO_VARIANCE, exact_arithmetic, inverse

NEIGHBOURS = 32  # nearest rows kept for half-samples: all are missed with probability 2^-32
_FIRST_ROWS, _OF_FIRST = 24, 16  # rows of a class that are read first, their neighbours kept
_ZERO_SHARE = 2.0**-18  # of the second moment about the class mean: float32 products give no less


class Cosines(NamedTuple):
    """Cosines of the samples of R draws."""

    within: Tensor  # (C, R) mean within each class
    low: Tensor  # (C, R) the least in each (published), or the 5 % quantile (robust)
    between: Tensor  # (R,) mean over ordered pairs of classes of the mean between them


class Spectrum(NamedTuple):
    """One class's spectrum in R draws."""

    # (R, min(m, d)) squared singular values about the class mean over their sum, falling; or 0.
    shares: Tensor
    samples: int  # of the class in a draw, m


class _Statistics:
    """What both definitions read; ``spectra`` in place of those of the sample."""

    definition: ClassVar[str]

    def __init__(
        self, gram: ClassGram, draws: Draws, *, spectra: list[Spectrum] | None = None
    ) -> None:
        self.gram, self.draws = gram, draws
        self.dim, self.n = gram.dim, sum(draws.sizes)
        self.pairs = gram.n_classes * (gram.n_classes - 1)
        if spectra is not None:
            self.spectra = spectra

    @cached_property
    def spectra(self) -> list[Spectrum]:
        """Spectrum of every class about its own mean, from the diagonal blocks."""
        squares = map(self.gram.class_residual_gram, range(self.gram.n_classes))
        return spectra_of(self.gram, squares, self.draws)

    @cached_property
    def nearest(self) -> Tensor:
        """Distance of every row to its nearest of another class, (n, R); inf outside a draw."""
        sq_distance = nearest_in_draws(self.gram, self.draws, self.definition)
        return sq_distance.sqrt() / self.gram.scale


class Published(_Statistics):
    """Of the features as they come, with c_ij = |cos(x_i, x_j)|."""

    definition = "published"

    @cached_property
    def cosines(self) -> Cosines:
        """Of c_ij, i = j included; ``low`` is the minimum."""
        gram, means, minima = self.gram, [], []
        inverse_norm = inverse(gram.raw_sq.sqrt())
        for a, (s, e) in enumerate(gram.spans):
            scale = inverse_norm[s:e]
            cosine = gram.class_dots(a, raw=True).mul_(scale).mul_(scale.unsqueeze(1)).abs_()
            of_parts = self.draws.pairs(self.draws.parts[a], cosine)
            mean, least = zip(*((p.mean((1, 2)), p.amin((1, 2))) for _, p in of_parts), strict=True)
            means.append(torch.cat(mean)[self.draws.taken[a]])
            minima.append(torch.cat(least)[self.draws.taken[a]])
        within = torch.stack(means)
        every = gram.abs_cosine_form(self.draws.weights())  # sum over all ordered pairs of classes
        return Cosines(within, torch.stack(minima), (every - within.sum(dim=0)) / self.pairs)

    @cached_property
    def margins(self) -> Tensor:
        """Least distance from each class to any other, (C, R)."""
        if len(self.draws.taken[0]) == 1:
            return torch.stack([self.nearest[s:e].amin(dim=0) for s, e in self.gram.spans])
        return least_in_draws(self.gram, self.draws).sqrt() / self.gram.scale

    @cached_property
    def size(self) -> Tensor:
        """Mean over classes of the mean norm, (R,)."""
        gram = self.gram
        return (self.draws.weights().T @ gram.raw_sq.sqrt()) / gram.n_classes / gram.scale

    def without_direction(self) -> tuple[int, str]:
        """Count the rows whose cosines are taken as 0, and say what they are."""
        return int(self.gram.zero_rows.sum()), "are zero"


class About(NamedTuple):
    """What moves dot products to the mean of a draw: x_i.x_j - shift_i - shift_j + offset."""

    shift: Tensor
    offset: Tensor
    sq: Tensor
    inverse_norm: Tensor


class Robust(_Statistics):
    """Of the features about the draw's mean, with u_ij = cos(x_i, x_j)."""

    definition = "robust"

    @cached_property
    def about(self) -> About:
        """What moves each draw's dot products to its own mean."""
        gram, draws = self.gram, self.draws
        if draws.whole:  # already centred
            shift = torch.zeros_like(gram.centred_sq).unsqueeze(1)
            offset = shift[0]
        else:
            mean = draws.member.double() / self.n
            shift = gram.dot_times(mean)
            offset = (mean * shift).sum(dim=0)
        sq = (gram.centred_sq.unsqueeze(1) - 2 * shift + offset).clamp(min=0)
        # No direction at the mean, or where all rows are equal but for the mean's rounding: 0.
        at_mean = sq <= torch.maximum(1e-12 * sq.mean(dim=0), ZERO_VARIANCE * gram.raw_sq.mean())
        return About(shift, offset, sq, inverse(sq.masked_fill(at_mean, 0.0).sqrt()))

    @cached_property
    def cosines(self) -> Cosines:
        """Of u_ij, i < j within classes; ``low`` is the 5 % quantile."""
        gram, about = self.gram, self.about
        p = self.draws.weights() * about.inverse_norm
        mass = p.sum(dim=0)
        every = (
            (p * gram.dot_times(p)).sum(dim=0)
            - 2 * mass * (p * about.shift).sum(dim=0)
            + about.offset * mass**2
        )
        diagonal, within, low = torch.zeros_like(every), [], []
        for a, m in enumerate(self.draws.sizes):
            i, j = torch.triu_indices(m, m, 1, device=gram.device)
            parts = [
                (u.sum((1, 2)), _trace(u), quantile(u[:, i, j], 0.05)) for u in self._within(a)
            ]
            total, trace, lowest = map(torch.cat, zip(*parts, strict=True))
            diagonal += total / m**2
            within.append((total - trace) / (m * (m - 1)))
            low.append(lowest)
        return Cosines(torch.stack(within), torch.stack(low), (every - diagonal) / self.pairs)

    def _within(self, a: int) -> Iterator[Tensor]:
        """Cosines within class ``a``, (r, m, m), a few draws at a time."""
        s, e = self.gram.spans[a]
        chosen, about = self.draws.of_class(a), self.about
        shift = about.shift[s:e].T.gather(1, chosen)
        scale = about.inverse_norm[s:e].T.gather(1, chosen)
        for r, dots in self.draws.pairs(chosen, self.gram.class_dots(a)):
            moved = dots - shift[r].unsqueeze(2) - shift[r].unsqueeze(1)
            moved = moved + about.offset[r, None, None]
            yield moved * scale[r].unsqueeze(2) * scale[r].unsqueeze(1)

    @cached_property
    def margins(self) -> Tensor:
        """Median over each class of the distance to the nearest of another, (C, R)."""
        spans, of_class = enumerate(self.gram.spans), self.draws.of_class
        parts = (self.nearest[s:e].T.gather(1, of_class(a)) for a, (s, e) in spans)
        return torch.stack([quantile(part, 0.5) for part in parts])

    @cached_property
    def size(self) -> Tensor:
        """Root of the mean squared norm, (R,)."""
        total = (self.about.sq * self.draws.member).sum(dim=0)
        return (total / self.n).sqrt() / self.gram.scale

    def without_direction(self) -> tuple[int, str]:
        """Count the rows whose cosines are taken as 0, and say what they are."""
        return int((self.about.inverse_norm == 0).sum()), "equal the mean of all rows"


Statistics = Published | Robust
STATISTICS = {kind.definition: kind for kind in (Published, Robust)}


def statistics_of_sample(gram: ClassGram, definition: str) -> Statistics:
    """Reduce the sample itself."""
    return STATISTICS[definition](gram, Draws.all_of(gram.classes.sizes, gram.device))


def warn_of_rows_without_direction(statistics: Statistics, stacklevel: int) -> None:
    """Warn of rows whose cosines are taken as 0, with their number."""
    with exact_arithmetic(statistics.gram.device):
        count, what = statistics.without_direction()
    if count:
        warnings.warn(
            f"{count} of {statistics.gram.n} feature rows {what}: their cosines are taken as 0",
            stacklevel=stacklevel,
        )


# ---- spectra and distances -----------------------------------------------------------------------


def spectra_of_larger(
    gram: ClassGram, squares: list[Tensor], draws: Draws, seed: int
) -> list[Spectrum]:
    """Spectra of larger samples of the classes, from their own (m, m) Gram matrices.

    Whole where ``draws`` are; else as many half-samples of the larger samples.
    """
    sizes = [len(square) for square in squares]
    if draws.whole:
        of_larger = Draws.all_of(sizes, gram.device)
    else:
        of_larger = Draws.halves(sizes, draws.member.shape[1], seed, gram.device)
    scaled = (square * gram.scale * gram.scale for square in squares)
    return spectra_of(gram, scaled, of_larger)


def spectra_of(gram: ClassGram, squares: Iterable[Tensor], draws: Draws) -> list[Spectrum]:
    """Spectra of the classes from (m, m) Gram matrices of samples of them, scaled as ``gram``."""
    # Of many draws only the spread counts, and the precision of the features gives it.
    found_in = [gram.dtype if len(part) > 1 else torch.float64 for part in draws.parts]
    floors: list[Tensor] = []
    shares: list[list[Tensor]] = [[] for _ in found_in]

    def centred() -> Iterator[Tensor]:
        for a, square in enumerate(squares):
            s, e = gram.spans[a]
            floor = ZERO_VARIANCE * gram.raw_sq[s:e].sum()  # what rounding leaves about the mean
            for _, block in draws.pairs(draws.parts[a], square):
                traces = _ZERO_SHARE * _trace(block).unsqueeze(1)
                floors.append(torch.maximum(floor, traces))
                of_class.append(a)
                row = block.mean(dim=2, keepdim=True)
                block = block - row - row.transpose(1, 2) + row.mean(dim=1, keepdim=True)
                yield block.to(found_in[a])

    of_class: list[int] = []
    for i, values in enumerate(eigenvalues(centred())):
        shares[of_class[i]].append(_shares(values.double(), gram.dim, floors[i], gram.dtype))
    chosen = zip(shares, draws.taken, draws.sizes, strict=True)
    return [Spectrum(torch.cat(parts)[taken], m) for parts, taken, m in chosen]


def _shares(values: Tensor, dim: int, floor: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues of (r, m) matrices, rising, as shares of their sum, falling."""
    m = values.shape[1]
    values = values.flip(1)[:, : min(m, dim)].clamp(min=0)
    # Rounding spreads about this share over terms that are 0, and Q takes the root of its entropy.
    noise = torch.finfo(dtype).eps / 2 * math.sqrt(m)
    rest = values.flip(1).cumsum(dim=1).flip(1)
    values = values.masked_fill(rest <= noise * rest[:, :1], 0.0)
    total = values.sum(dim=1, keepdim=True)
    return torch.where(total > floor, values / total, 0.0)


def nearest_in_draws(gram: ClassGram, draws: Draws, definition: str) -> Tensor:
    """Squared distance of every row to its nearest of another class, (n, R); inf outside a draw."""
    if draws.whole:
        value, at = gram.nearest_of_others
        value, at = value[:, 0].clone(), at[:, 0]
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
    return _of_drawn(value, at, draws.member, draws.member)


def _of_drawn(value: Tensor, at: Tensor, own: Tensor, member: Tensor) -> Tensor:
    """Least of (m, k) values at rows that are in each draw, (m, R); inf where ``own`` is not."""
    farthest = value.amax(dim=1)  # a bound, where a draw has missed every neighbour kept
    columns = []
    for held, drawn in zip(own.T, member.T, strict=True):
        least = value.masked_fill(~drawn[at], torch.inf).amin(dim=1)
        columns.append(torch.minimum(least, farthest).masked_fill_(~held, torch.inf))
    return torch.stack(columns, dim=1)


def least_in_draws(gram: ClassGram, draws: Draws) -> Tensor:
    """Least squared distance from each class to any other in each draw, (C, R).

    Read off the rows of a class that are nearest to others in the whole sample: what is as near as
    the next of them, no draw can bring nearer. Where a draw holds none of these, more are read.
    """
    near = gram.nearest_of_others
    lower = (near.sq_distance - unsure(gram, near)[1]).squeeze(1)
    k = min(_OF_FIRST, gram.n - max(gram.classes.sizes))
    least = torch.empty(draws.taken.shape, dtype=torch.float64, device=gram.device)
    beyond = torch.full_like(lower[:1], torch.inf)
    open_, count = list(range(gram.n_classes)), _FIRST_ROWS
    while open_:
        first, next_ = [], []
        for s, e in (gram.spans[a] for a in open_):
            rising = lower[s:e].sort()
            first.append(rising.indices[:count].sort().values + s)
            next_.append(torch.cat([rising.values, beyond])[min(count, e - s)])
        rows = torch.cat(first)
        found = _of_drawn(*gram.nearest_others_of(rows, k), draws.member[rows], draws.member)
        of_class = torch.stack([part.amin(dim=0) for part in found.split([len(r) for r in first])])
        least[open_] = of_class
        unsettled = (of_class > torch.stack(next_).unsqueeze(1)).any(dim=1).tolist()
        open_, count = [a for a, more in zip(open_, unsettled, strict=True) if more], 4 * count
    return least


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


def _trace(u: Tensor) -> Tensor:
    """Trace of each of (r, m, m) matrices."""
    return u.diagonal(dim1=1, dim2=2).sum(dim=1)
