"""One row of the table of measures: what `score_layers` knows of a measure beside its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """A measure by name; every family holds its own rows, `geomkd.measures.table` all of them.

    Attributes
    ----------
    name : str
        As in ``score_layers(measures=)``, and its column.
    needs : str
        What ``of`` reads, which tells its arguments and what it returns for R draws:

        * "quality": statistics of the draws, size of the data set -> columns by name, (R,) each;
        * "gram": the layer's `ClassGram`, draws -> (R,);
        * "rows": `ClassGram`, all draws (`SampleDraws`) -> a reader of rows (see
          `geomkd.geometry.row_blocks`) whose ``found()`` gives (Q,);
        * "neighbours", or "distinct" where equal rows are dropped: `ClassGram`, nearest rows of
          every row (`Neighbours`), (n, R) membership -> (R,);
        * "spectrum": principal coordinates of a draw of the kept subset, (m,) class indices, number
          of classes -> a 0-d tensor, or one a column;
        * "kept": kept Gram matrices of a draw, of a layer and of the last -> a 0-d tensor.
    of : callable
        What computes it.
    supervised : bool
        Whether labels enter.
    columns : tuple of str
        Names of its columns, where they are not its own.
    center : bool or None
        Of a "spectrum": about the mean, or not; None as ``score_layers(center=)`` says.
    seeded : bool
        Whether ``of`` (of a "spectrum") and ``score`` take ``seed=``.
    score : callable, optional
        For nulls, where ``of`` has no class indices to permute: from a `ClassGram` to a function of
        the class indices of its rows.
    """

    name: str
    needs: str
    of: Callable[..., Any]
    supervised: bool = False
    columns: tuple[str, ...] = ()
    center: bool | None = True
    seeded: bool = False
    score: Callable[..., Callable] | None = None

    @property
    def columns_given(self) -> tuple[str, ...]:
        """Names of its columns of the frame."""
        return self.columns or (self.name,)
