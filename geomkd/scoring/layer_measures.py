"""Every measure by its name, for a layer in hand: one pass over rows, one set of spectra.

What needs neighbours or distances reads the rows of the layer's one Gram matrix together; what
needs a spectrum reads one eigenproblem a draw of the kept subset. "Draws" are the sample itself,
its half-samples and its smaller samples, in this order: Q columns of everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geomkd import measures as public
from geomkd.common.checks import check_int
from geomkd.geometry.draws import MOST, Draws, balanced, held_out, nested, parts_of
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import Neighbours
from geomkd.geometry.precision import COLUMNS, exact_arithmetic, one_thread
from geomkd.geometry.principal import Principal, SubsetGram
from geomkd.geometry.row_blocks import NUMBERS, NearestRows, nearest_rows, sums_over_classes, walk
from geomkd.measures import collapse, dimension, probe, separability, spectrum, transfer
from geomkd.measures.null import WithNull, against_null
from geomkd.measures.quality import TERMS

QUALITY = "knowledge_quality"
KNN, MLE = 15, 20  # neighbours of knn_accuracy and mle_dimension
TEST_SHARE = 0.3  # held out by nearest_class_mean
# Neighbours of the sample of which a half-sample's are found: fewer than 20 of them in a half have
# a probability of 1e-9 a row; then the farthest kept stands for those that are missing.
_KEPT = 96

Values = dict[str, Tensor]  # columns of the frame, (Q,) each


class OfSpectrum(NamedTuple):
    """A measure of the kept subset's principal coordinates.

    Attributes
    ----------
    of : callable
        From (principal, class indices, classes) to a 0-d tensor, or to one a column.
    center : bool or None
        About the mean, or not; None as ``score_layers(center=)`` says.
    supervised : bool
        Whether labels enter.
    columns : tuple of str
        Names of its columns, where they are not its own.
    seeded : bool
        Whether it takes ``seed=``.
    """

    of: Callable[[Principal, Tensor, int], Any]
    center: bool | None = True
    supervised: bool = False
    columns: tuple[str, ...] = ()
    seeded: bool = False


OF_SPECTRUM = {
    "pca_dimension": OfSpectrum(
        lambda p, *_: spectrum.pca_dimension_from(p.sq_singular, p.n, p.dim, 0.9), center=None
    ),
    "participation_ratio": OfSpectrum(
        lambda p, *_: spectrum.participation_ratio_from(p.sq_singular)
    ),
    "spectral_entropy": OfSpectrum(
        lambda p, *_: spectrum.spectral_entropy_from(p.sq_singular, "singular"), center=None
    ),
    "effective_rank": OfSpectrum(
        lambda p, *_: spectrum.effective_rank_from(p.sq_singular, "singular"), center=None
    ),
    "power_law_alpha": OfSpectrum(
        lambda p, *_: spectrum.power_law_alpha_from(p.sq_singular, spectrum.FIT), center=None
    ),
    "isotropy": OfSpectrum(lambda p, *_: spectrum.isotropy_from(p.sq_singular, p.n, p.dim)),
    "linear_probe": OfSpectrum(probe.linear_probe_from, supervised=True, seeded=True),
    "neural_collapse": OfSpectrum(
        lambda *given: collapse.neural_collapse_from(*given)[:3],
        supervised=True,
        columns=("nc1", "nc2_norms", "nc2_angles"),
    ),
    "logme": OfSpectrum(transfer.logme_from, center=False, supervised=True),
    "h_score": OfSpectrum(transfer.h_score_from, supervised=True),
    "gbc": OfSpectrum(transfer.gbc_from, supervised=True),
}
OF_NEIGHBOURS = ("two_nn", "mle_dimension", "knn_accuracy")
OF_ROWS = (*OF_NEIGHBOURS, "silhouette", "nearest_class_mean")
OF_SCATTER = ("fisher_ratio",)
OF_GRAMS = ("cka_to_last",)  # of two layers: from the kept Gram matrices, once all are there
NAMES = (QUALITY, *OF_ROWS, *OF_SCATTER, *OF_SPECTRUM, *OF_GRAMS)
_FRAME = ("layer", "depth", "kind", "role", "shape", "n", "dim")
_COLUMNS = (column for measure in OF_SPECTRUM.values() for column in measure.columns)
_TAKEN = {*NAMES, *_COLUMNS, *TERMS, *_FRAME}  # columns that are no caller's own
LABEL_FREE = (
    "two_nn",
    "mle_dimension",
    *(name for name, measure in OF_SPECTRUM.items() if not measure.supervised),
    *OF_GRAMS,
)


def named(measures: Sequence[Any]) -> dict[str, Callable | None]:
    """Names of measures, with the function of those that are the caller's own.

    Raises
    ------
    TypeError, ValueError
        No sequence of names and functions, an unknown name, one that occurs twice.
    """
    if isinstance(measures, str) or not isinstance(measures, Sequence) or not measures:
        raise TypeError(f"measures must be a sequence of names and functions; got {measures!r}")
    found: dict[str, Callable | None] = {}
    for measure in measures:
        name = measure if isinstance(measure, str) else getattr(measure, "__name__", None)
        own = (
            None
            if isinstance(measure, str) or getattr(public, name or "", 0) is measure
            else measure
        )
        if not isinstance(measure, str) and not callable(measure):
            raise TypeError(f"a measure must be a name or a function; got {measure!r}")
        if name is None:
            raise TypeError(f"a function that is a measure needs a __name__; got {measure!r}")
        if own is None and name not in NAMES:
            raise ValueError(f"measures must be among {NAMES} or functions; got {name!r}")
        if own is not None and (name in _TAKEN or not name.isidentifier()):
            raise ValueError(f"a measure of one's own needs a name of its own; got {name!r}")
        if name in found:
            raise ValueError(f"every measure must be there once; got {name!r} twice")
        found[name] = own
    return found


def check_sweep(sweep: Sequence[int], n: int, n_classes: int) -> list[int]:
    """Sizes of smaller samples: rising, at least two of every class, less than all."""
    if isinstance(sweep, str) or not isinstance(sweep, Sequence):
        raise TypeError(f"sweep must be a sequence of sample sizes; got {sweep!r}")
    sizes = [check_int(size, "a size in sweep", least=2 * n_classes) for size in sweep]
    if sizes != sorted(set(sizes)) or (sizes and sizes[-1] >= n):
        raise ValueError(f"sweep must rise and stay below the {n} samples; got {list(sweep)}")
    return sizes


def columns_of(names: Sequence[str]) -> list[str]:
    """Columns of the frame that measures of these names give, knowledge quality's apart."""
    columns = []
    for name in names:
        if name != QUALITY:
            own = OF_SPECTRUM[name].columns if name in OF_SPECTRUM else ()
            columns += own or (name,)
    return columns


@dataclass(eq=False)
class Toolbox:
    """The measures of a run, and the draws that all its layers share.

    Parameters
    ----------
    measures : dict
        As `named` gives them.
    index : Tensor, shape (n,)
        Class of each sample, as they come.
    sizes : list of int
        Samples of each class.
    labels : Tensor, shape (n,)
        Labels as a measure of the caller's own is given them.
    subsamples, seed, null : int
        Half-samples, seed, permutations.
    sweep : list of int
        Smaller samples, rising.
    center : bool
        About the mean or not, of the spectra that may be either.
    """

    measures: dict[str, Callable | None]
    index: Tensor
    sizes: list[int]
    labels: Tensor
    subsamples: int = 0
    seed: int = 0
    null: int = 0
    sweep: list[int] = field(default_factory=list)
    center: bool = True

    def __post_init__(self) -> None:
        self.n, self.n_classes, device = len(self.index), len(self.sizes), self.index.device
        self.order = torch.argsort(self.index, stable=True)
        orders = nested(self.index, self.sizes, self.seed)
        self.rows = balanced(orders, MOST) if self.n > MOST else torch.arange(self.n, device=device)
        self.whole = Draws.all_of(self.sizes, device)
        halves = (self.sizes, self.subsamples, self.seed, device)
        self.halves = [Draws.halves(*halves)] if self.subsamples else []
        self.smaller = [self._smaller(balanced(orders, samples)) for samples in self.sweep]
        self.draws = [self.whole, *self.halves, *self.smaller]
        self.member = torch.cat([draws.member for draws in self.draws], dim=1)
        self.parts = parts_of(self.index[self.rows], self.subsamples, self.sweep, self.seed)
        self._elsewhere: dict[torch.device, Toolbox] = {}

    def _smaller(self, rows: Tensor) -> Draws:
        member, of_class, start = torch.zeros_like(self.whole.member), [], 0
        member[torch.argsort(self.order)[rows]] = True
        for size in self.sizes:
            of_class.append(member[start : start + size, 0].nonzero().T)
            start += size
        return Draws(of_class, member, self.sizes, False)

    def to(self, device: torch.device) -> Toolbox:
        """Return the same on the device that a layer's features are on."""
        if device == self.index.device:
            return self
        if device not in self._elsewhere:
            moved = {"index": self.index.to(device), "labels": self.labels.to(device)}
            self._elsewhere[device] = replace(self, **moved)
        return self._elsewhere[device]

    def bytes(self, dim: int, layers: int) -> int:
        """Estimate what the measures of ``layers`` layers, at most ``dim`` wide, need besides."""
        m, n, q = len(self.rows), self.n, self.member.shape[1]
        need = 8 * m * (m + COLUMNS)  # the Gram matrix of the subset
        need += 4 * m * m * layers  # what is kept of it, and its copy in the result
        wanted = set(self.measures)
        if wanted & set(OF_GRAMS):
            need += 4 * m * m * layers + 16 * m * m
        if wanted & set(OF_SPECTRUM):
            need += 6 * 8 * m * m
        if wanted & set(OF_ROWS):
            need += 6 * 8 * NUMBERS + n * (6 * 8 * _KEPT + 10 * 8 * q)
        if any(own is not None for own in self.measures.values()):
            need += 8 * n * dim
        if self.null and QUALITY in wanted:
            need += 8 * n * n  # a permutation's Gram matrix beside the layer's
        return need

    # ---- a layer ---------------------------------------------------------------------------------

    def values(self, gram: ClassGram, subset: SubsetGram, features: Tensor | None) -> Values:
        """Every measure but knowledge quality and those of two layers: (Q,) by column."""
        found: Values = {}
        with exact_arithmetic(gram.device):
            found |= self._of_rows(gram)
            if "fisher_ratio" in self.measures:
                ratios = [separability.fisher_ratio_from(gram, draws) for draws in self.draws]
                found["fisher_ratio"] = torch.cat(ratios)
            found |= self._of_spectra(subset)
        for name, own in self.measures.items():
            if own is not None:
                found[name] = self._of_features(name, own, features)
        return {name: found[name] for name in columns_of(self.measures) if name in found}

    def _of_rows(self, gram: ClassGram) -> Values:
        wanted, readers = set(self.measures) & set(OF_ROWS), {}
        if wanted & set(OF_NEIGHBOURS):
            readers["near"] = NearestRows(gram, _KEPT if self.halves else MLE)
            for i, draws in enumerate(self.smaller):
                readers[f"near {i}"] = NearestRows(gram, MLE, draws.member[:, 0])
        member = self.member.double()
        if "silhouette" in wanted:
            sums = sums_over_classes(gram, member)
            own = gram.class_of.unsqueeze(1)
            readers["silhouette"] = separability.Silhouettes(own, member, gram.n_classes, sums)
        if "nearest_class_mean" in wanted:
            readers["means"] = separability.NearestMeans(gram, *self._splits())
        if readers:
            walk(gram, list(readers.values()), sums=gram.n_classes * member.shape[1])
        found: Values = {}
        if "near" in readers:
            near = [reader for name, reader in readers.items() if name.startswith("near")]
            found |= self._of_neighbours(gram, near, wanted)
        if "silhouette" in wanted:
            found["silhouette"] = readers["silhouette"].means()
        if "nearest_class_mean" in wanted:
            found["nearest_class_mean"] = readers["means"].accuracies()
        return found

    def _splits(self) -> tuple[Tensor, Tensor]:
        """Rows to take means of and to judge, in every draw, by class: (n, Q) each."""
        train, test = torch.zeros_like(self.member), torch.zeros_like(self.member)
        for q, member in enumerate(self.member.T):
            rows = self.order[member].sort().values  # as they came
            masks = held_out(self.index[rows], self.n_classes, TEST_SHARE, self.seed)
            for table, mask in zip((train, test), masks, strict=True):
                whole = torch.zeros(self.n, dtype=torch.bool, device=member.device)
                whole[rows[mask]] = True
                table[:, q] = whole[self.order]
        return train, test

    def _of_neighbours(self, gram: ClassGram, near: list[NearestRows], wanted: set) -> Values:
        served = 1 + self.subsamples  # columns that the first reader serves
        groups = [(near[0], self.member[:, :served])]
        groups += [(r, d.member) for r, d in zip(near[1:], self.smaller, strict=True)]
        parts: dict[str, list[Tensor]] = {name: [] for name in OF_NEIGHBOURS if name in wanted}
        for reader, member in groups:
            sq, at = reader.found()
            valid = sq.isfinite()
            if "knn_accuracy" in wanted:
                parts["knn_accuracy"].append(_knn(gram, at, valid, member))
            if wanted & {"two_nn", "mle_dimension"}:
                (sq, at), first = _distinct(gram, Neighbours(sq, at), member.any(dim=1))
                equal = int((first != torch.arange(self.n, device=first.device)).sum())
                if equal and reader is near[0]:
                    self._tell_equals(equal)
                valid = sq.isfinite() & (sq > 0)
                logs = torch.where(valid, sq, 1.0).log() / 2
                # The first of equal rows stands for whichever of them a draw holds.
                held = member.long()
                held = torch.zeros_like(held).index_add_(0, first, held) > 0
                for name, of in (("two_nn", _two_nn), ("mle_dimension", _mle)):
                    if name in wanted:
                        parts[name].append(of(logs, at, valid, held))
        return {name: torch.cat(columns) for name, columns in parts.items()}

    def _tell_equals(self, count: int) -> None:
        warnings.warn(
            f"{count} of {self.n} feature rows equal another and were dropped from the distances "
            "behind two_nn and mle_dimension",
            stacklevel=2,
        )

    def _of_spectra(self, subset: SubsetGram) -> Values:
        wanted = {name: OF_SPECTRUM[name] for name in self.measures if name in OF_SPECTRUM}
        centred = {
            name: self.center if m.center is None else m.center for name, m in wanted.items()
        }
        index = self.index[self.rows]
        rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for part in self.parts if wanted else []:
            with one_thread():
                coordinates = {c: subset.principal(part, center=c) for c in set(centred.values())}
            for name, measure in wanted.items():
                given = coordinates[centred[name]], index[part], self.n_classes
                values = self._of_principal(name)(*given)
                rows[name].append(torch.stack(values) if measure.columns else values)
        found: Values = {}
        for name, measure in wanted.items():
            table = torch.stack(rows[name]).double()
            if measure.columns:
                found |= dict(zip(measure.columns, table.T, strict=True))
            else:
                found[name] = table
        return found

    def _of_principal(self, name: str) -> Callable:
        measure = OF_SPECTRUM[name]
        return partial(measure.of, seed=self.seed) if measure.seeded else measure.of

    def _of_features(self, name: str, own: Callable, features: Tensor | None) -> Tensor:
        if features is None:
            raise ValueError(
                f"measure {name!r} needs all features of a layer at once; more memory= holds them"
            )
        values = []
        for member in self.member.T:
            rows = self.order[member].sort().values
            values.append(_number(own(features[rows], self.labels[rows]), name))  # copies
        return torch.tensor(values, dtype=torch.float64, device=self.index.device)

    # ---- nulls -----------------------------------------------------------------------------------

    def nulls(self, gram: ClassGram, subset: SubsetGram) -> dict[str, WithNull]:
        """Supervised measures beside those of permuted labels, knowledge quality apart."""
        found: dict[str, WithNull] = {}
        for name in self.measures:
            for column, score, index in self._scores_of(name, gram, subset):
                with exact_arithmetic(gram.device):
                    found[column] = against_null(score, index, self.null, self.seed)
        return found

    def _scores_of(self, name: str, gram: ClassGram, subset: SubsetGram) -> list[tuple]:
        """Columns of a measure, each with a function of class indices, and the true ones."""
        if name in OF_SPECTRUM and OF_SPECTRUM[name].supervised:
            measure, index = OF_SPECTRUM[name], self.index[self.rows]
            coordinates = subset.principal(self.parts[0], center=measure.center)

            def score(index: Tensor, column: int | None) -> Tensor:
                value = self._of_principal(name)(coordinates, index, self.n_classes)
                return value if column is None else value[column]

            if not measure.columns:
                return [(name, partial(score, column=None), index)]
            return [(c, partial(score, column=i), index) for i, c in enumerate(measure.columns)]
        of_gram = {
            "knn_accuracy": partial(separability.knn_score, k=KNN),
            "silhouette": separability.silhouette_score,
            "nearest_class_mean": partial(
                separability.nearest_mean_score, share=TEST_SHARE, seed=self.seed
            ),
            "fisher_ratio": separability.fisher_score,
        }
        return [(name, of_gram[name](gram), gram.class_of)] if name in of_gram else []


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"measure {name!r} must return a number; got {value!r}") from error


def _distinct(gram: ClassGram, near: Neighbours, among: Tensor) -> tuple[Neighbours, Tensor]:
    """Neighbours that some rows have among the distinct of them, and the first equal to each."""
    own = torch.arange(gram.n, device=gram.device)
    first = own
    while bool((near.sq_distance[among] == 0).any()):
        first = _first_equal(near, among)[first]
        among = among & (first == own)
        near = nearest_rows(gram, near.index.shape[1], among)
    return near, first


def _first_equal(near: Neighbours, among: Tensor) -> Tensor:
    """First of the rows that are linked to each by distances of 0: (n,)."""
    own = torch.arange(len(among), device=among.device)
    # Of many equal rows each has only some of the others among its neighbours.
    linked = (near.sq_distance == 0) & among.unsqueeze(1)
    to = torch.where(linked, near.index, own.unsqueeze(1))
    first, before = torch.minimum(own, to.amin(dim=1)), own
    while not torch.equal(first, before):
        before = first
        low = first.unsqueeze(1).expand_as(to).flatten()
        first = first.scatter_reduce(0, to.flatten(), low, "amin")
        first = first[to].amin(dim=1)
    return first


def _knn(gram: ClassGram, at: Tensor, valid: Tensor, member: Tensor) -> Tensor:
    near, own = gram.class_of[at], gram.class_of
    columns = []
    for drawn in member.T:
        hits = separability.knn_hits(near, valid & drawn[at], own, gram.n_classes, KNN)
        columns.append((hits & drawn).sum() / drawn.sum().double())
    return torch.stack(columns)


def _two_nn(logs: Tensor, at: Tensor, valid: Tensor, member: Tensor) -> Tensor:
    columns = []
    for drawn in member.T:
        first, second = (_at_rank(logs, valid & drawn[at], rank)[drawn] for rank in (1, 2))
        enough = len(first) >= 3
        columns.append(
            dimension.two_nn_from(second - first) if enough else logs.new_tensor(torch.nan)
        )
    return torch.stack(columns)


def _mle(logs: Tensor, at: Tensor, valid: Tensor, member: Tensor) -> Tensor:
    columns = []
    for drawn in member.T:
        inside = valid & drawn[at]
        farthest = _at_rank(logs, inside, MLE).unsqueeze(1)
        near = inside & (inside.cumsum(dim=1) <= MLE)
        excess = torch.where(near, farthest - logs, 0.0).sum(dim=1)[drawn]
        enough = len(excess) > MLE
        columns.append(
            dimension.mle_dimension_from(excess, MLE) if enough else logs.new_tensor(torch.nan)
        )
    return torch.stack(columns)


def _at_rank(logs: Tensor, valid: Tensor, rank: int) -> Tensor:
    """Log distance to the valid neighbour of that rank, of the last where there are fewer: (n,)."""
    counts = valid.cumsum(dim=1)
    wanted = counts[:, -1:].clamp(max=rank)
    return torch.where(valid & (counts == wanted), logs, 0.0).sum(dim=1)
