"""Every measure asked for, of a layer in hand: one pass over rows, one set of spectra.

What needs neighbours or distances reads the rows of the layer's one Gram matrix together; what
needs a spectrum reads one eigenproblem a draw of the kept subset.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geomkd.common.checks import check_int
from geomkd.geometry.draws import SampleDraws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import COLUMNS, exact_arithmetic, one_thread
from geomkd.geometry.principal import SubsetGram
from geomkd.geometry.row_blocks import NUMBERS, NearestRows, walk
from geomkd.measures.dimension import K, distinct, warn_of_equal_rows
from geomkd.measures.measure import Measure
from geomkd.measures.null import NULL_COLUMNS, null_of
from geomkd.measures.quality import beside_permuted, warn_of_rows_without_direction
from geomkd.measures.quality_statistics import STATISTICS, spectra_of_larger
from geomkd.measures.table import TABLE, columns_of

# Neighbours of the sample of which a half-sample's are found: fewer than 20 of them in a half have
# a probability of 1e-9 a row; then the farthest kept stands for those that are missing.
_KEPT = 96
SMALL = 2048  # samples up to which what is read off a Gram matrix is too little to be shared

Values = dict[str, Tensor]  # columns of the frame, (Q,) each
Drawn = dict[str, list[float]]


@dataclass(frozen=True, eq=False)
class LayerMeasures:
    """The measures of a run, of any of its layers."""

    measures: dict[str, Callable | None]  # as `geomkd.measures.table.named` gives them
    draws: SampleDraws  # what all layers are scored in
    labels: Tensor  # (n,) as a measure of the caller's own is given them
    definition: str  # of knowledge quality
    dataset_size: float  # likewise
    null: int = 0  # permutations of the labels
    center: bool = True  # about the mean or not, of the spectra that may be either

    def of(
        self, gram: ClassGram, subset: SubsetGram, features: Tensor | None, squares: list[Tensor]
    ) -> tuple[dict[str, float], Drawn, Drawn]:
        """Score a layer: its row of the frame, its half-samples, its smaller samples, by column.

        From Gram matrices of the sample and of the kept subset, the layer's (n, d) features where
        they are at hand, and the Gram matrix of each class's larger sample, if the entropy has one.
        """
        draws = self.draws.to(gram.device)
        with exact_arithmetic(gram.device), one_thread(gram.n <= SMALL):
            quality, whole = self._of_quality(gram, draws, squares)
            found = quality | self._of_grams(gram, draws) | self._of_rows(gram, draws)
            found |= self._of_spectra(subset, draws)
        for name, own in self.measures.items():
            if own is not None:
                found[name] = self._of_features(name, own, draws, features)
        row, halves, smaller = dict(whole), {}, {}
        split = [1, draws.subsamples, len(draws.sweep)]
        for name in columns_of(self.measures):
            if name in found:  # not of two layers
                own, half, small = found[name].split(split)
                row[name], halves[name], smaller[name] = own.item(), half.tolist(), small.tolist()
        if self.null:
            row |= self._nulls(gram, subset, draws, quality)
        return row, halves, smaller

    def _rows(self, *needs: str) -> dict[str, Measure]:
        """Rows of the table that are asked for and have such needs."""
        rows = {name: TABLE[name] for name, own in self.measures.items() if own is None}
        return {name: row for name, row in rows.items() if row.needs in needs}

    # ---- of the layer's Gram matrix --------------------------------------------------------------

    def _of_quality(
        self, gram: ClassGram, draws: SampleDraws, squares: list[Tensor]
    ) -> tuple[Values, dict[str, float]]:
        """Columns of all draws, and every intermediate of the sample itself."""
        rows, parts = self._rows("quality"), []
        for drawn in draws.groups if rows else []:
            spectra = spectra_of_larger(gram, squares, drawn, draws.seed) if squares else None
            statistics = STATISTICS[self.definition](gram, drawn, spectra=spectra)
            if drawn.whole:
                warn_of_rows_without_direction(statistics, stacklevel=1)
            parts.append({})
            for row in rows.values():
                parts[-1] |= row.of(statistics, self.dataset_size)
        columns = columns_of(rows)
        whole = {name: value.item() for name, value in parts[0].items()} if rows else {}
        return {name: torch.cat([part[name] for part in parts]) for name in columns}, whole

    def _of_grams(self, gram: ClassGram, draws: SampleDraws) -> Values:
        return {
            name: torch.cat([row.of(gram, drawn) for drawn in draws.groups])
            for name, row in self._rows("gram").items()
        }

    def _of_rows(self, gram: ClassGram, draws: SampleDraws) -> Values:
        """Everything that reads distances, in one pass over the rows of the Gram matrix."""
        readers = {name: row.of(gram, draws) for name, row in self._rows("rows").items()}
        near = []
        if self._rows("neighbours", "distinct"):
            near.append(NearestRows(gram, _KEPT if draws.subsamples else K))
            near += [NearestRows(gram, K, drawn.member[:, 0]) for drawn in draws.smaller]
        if readers or near:
            numbers = gram.n_classes * draws.member.shape[1]
            walk(gram, [*readers.values(), *near], sums=numbers)
        found = {name: reader.found() for name, reader in readers.items()}
        return found | self._of_neighbours(gram, near, draws)

    def _of_neighbours(
        self, gram: ClassGram, readers: list[NearestRows], draws: SampleDraws
    ) -> Values:
        of_all, of_distinct = self._rows("neighbours"), self._rows("distinct")
        parts: dict[str, list[Tensor]] = {name: [] for name in (*of_all, *of_distinct)}
        first = [draws.member[:, : 1 + draws.subsamples]]  # the first reader serves the halves too
        members = first + [drawn.member for drawn in draws.smaller]
        for reader, member in zip(readers, members, strict=False):
            near = reader.found()
            for name, row in of_all.items():
                parts[name].append(row.of(gram, near, member))
            if of_distinct:
                near, held, equal = distinct(gram, near, member)
                if reader is readers[0]:
                    warn_of_equal_rows(equal, gram.n)
            for name, row in of_distinct.items():
                parts[name].append(row.of(gram, near, held))
        return {name: torch.cat(columns) for name, columns in parts.items()}

    # ---- of the kept subset, and of the features -------------------------------------------------

    def _of_spectra(self, subset: SubsetGram, draws: SampleDraws) -> Values:
        rows, index = self._rows("spectrum"), draws.index[draws.rows]
        tables: dict[str, list[Tensor]] = {name: [] for name in rows}
        for part in draws.parts if rows else []:
            if part is None:  # not the first
                for table in tables.values():
                    table.append(torch.full_like(table[0], torch.nan))
                continue
            with one_thread():
                centred = {self._centred(row) for row in rows.values()}
                found = {center: subset.principal(part, center=center) for center in centred}
            for name, row in rows.items():
                of = self._seeded(row.of, row)
                values = of(found[self._centred(row)], index[part], draws.n_classes)
                values = values if row.columns else [values]
                tables[name].append(torch.stack([*values]).double())
        columns: Values = {}
        for name, row in rows.items():
            columns |= dict(zip(row.columns_given, torch.stack(tables[name]).T, strict=True))
        return columns

    def _centred(self, row: Measure) -> bool:
        return self.center if row.center is None else row.center

    def _seeded(self, of: Callable, row: Measure) -> Callable:
        return partial(of, seed=self.draws.seed) if row.seeded else of

    def _of_features(
        self, name: str, own: Callable, draws: SampleDraws, features: Tensor | None
    ) -> Tensor:
        if features is None:
            raise ValueError(
                f"measure {name!r} needs all features of a layer at once; more memory= holds them"
            )
        labels, values = self.labels.to(features.device), []
        for member in draws.member.T:
            rows = draws.rows_of(member)
            values.append(_number(own(features[rows], labels[rows]), name))  # copies
        return torch.tensor(values, dtype=torch.float64, device=features.device)

    # ---- nulls -----------------------------------------------------------------------------------

    def _nulls(
        self, gram: ClassGram, subset: SubsetGram, draws: SampleDraws, quality: Values
    ) -> dict[str, float]:
        """Columns that set supervised measures beside permuted labels."""
        given = (self.null, draws.seed)
        with exact_arithmetic(gram.device):
            of = [row.of for row in self._rows("quality").values()]
            how = (self.dataset_size, self.definition, *given)
            held = beside_permuted(gram, quality, of, *how) if quality else {}
            for name, row in self._rows("gram", "rows", "neighbours", "distinct").items():
                if row.supervised:
                    score = self._seeded(row.score, row)(gram)
                    held[name] = null_of(score, gram.class_of, *given)
            for row in self._rows("spectrum").values():
                if row.supervised:
                    index = draws.index[draws.rows]
                    found = subset.principal(draws.parts[0], center=self._centred(row))
                    for place, column in enumerate(row.columns_given):
                        score = partial(self._at, row, found, draws.n_classes, place)
                        held[column] = null_of(score, index, *given)
        return {
            f"{name}_{key}": getattr(held[name], key).item()
            for name in columns_of(self.measures)
            if name in held
            for key in NULL_COLUMNS
        }

    def _at(self, row: Measure, found: Any, n_classes: int, place: int, index: Tensor) -> Tensor:
        """One column of a measure of a spectrum, of other class indices."""
        value = self._seeded(row.of, row)(found, index, n_classes)
        return value[place] if row.columns else value

    # ---- cost ------------------------------------------------------------------------------------

    def work(self, dim: int, *, more: bool = True) -> int:
        """Multiplications, roughly, of a layer's ``dim`` features; ``more``: of all else too."""
        beside = 2000 * (1 + self.null) + 20_000 * bool(self._rows("spectrum"))
        return (self.draws.n**2 // 2 + 2 * len(self.draws.rows) ** 2) * (dim + more * beside)

    def bytes(self, dim: int, layers: int) -> int:
        """Estimate what the measures of ``layers`` layers, at most ``dim`` wide, need besides."""
        draws = self.draws
        m, n, q = len(draws.rows), draws.n, draws.member.shape[1]
        need = 8 * m * (2 * m + COLUMNS)  # the Gram matrix of the subset, a narrow layer
        need += 4 * m * m * layers  # what is kept of it, and its copy in the result
        if self._rows("kept"):
            need += 4 * m * m * layers + 16 * m * m
        if self._rows("spectrum"):
            need += 6 * 8 * m * m
        if self._rows("rows", "neighbours", "distinct"):
            need += 6 * 8 * NUMBERS + n * (6 * 8 * _KEPT + 10 * 8 * q)
        if any(own is not None for own in self.measures.values()):
            need += 8 * n * dim
        if self.null and self._rows("quality"):
            need += 8 * n * n  # a permutation's Gram matrix beside the layer's
        return need


def check_sweep(sweep: Sequence[int], n: int, n_classes: int) -> list[int]:
    """Sizes of smaller samples: rising, at least two of every class, less than all."""
    if isinstance(sweep, str) or not isinstance(sweep, Sequence):
        raise TypeError(f"sweep must be a sequence of sample sizes; got {sweep!r}")
    sizes = [check_int(size, "a size in sweep", least=2 * n_classes) for size in sweep]
    if sizes != sorted(set(sizes)) or (sizes and sizes[-1] >= n):
        raise ValueError(f"sweep must rise and stay below the {n} samples; got {list(sweep)}")
    return sizes


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"measure {name!r} must return a number; got {value!r}") from error
