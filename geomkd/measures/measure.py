"""One row of the table of measures: what `score_layers` knows of a measure beside its name."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """A measure by name; every family holds its own rows, `geomkd.measures.table` all of them.

    ``needs`` is what ``of`` reads, which tells its arguments and what it returns for R draws:

    * "quality": statistics of the draws, size of the data set -> columns by name, (R,) each;
    * "gram": the layer's `ClassGram`, draws -> (R,);
    * "rows": `ClassGram`, all draws (`SampleDraws`) -> a reader of rows (see
      `geomkd.geometry.row_blocks`) whose ``found()`` gives (Q,);
    * "neighbours", or "distinct" where equal rows are dropped: `ClassGram`, nearest rows of
      every row (`Neighbours`), (n, R) membership -> (R,);
    * "spectrum": principal coordinates of a draw of the kept subset, (m,) class indices, number
      of classes -> a 0-d tensor, or one a column;
    * "kept": kept Gram matrices of a draw, of a layer and of the last -> a 0-d tensor.
    """

    name: str  # as in score_layers(measures=), and its column
    needs: str
    of: Callable[..., Any]
    supervised: bool = False  # whether labels enter
    columns: tuple[str, ...] = ()  # names of its columns, where they are not its own
    center: bool | None = True  # of a "spectrum": about the mean; None: as score_layers(center=)
    seeded: bool = False  # whether `of` (of a "spectrum") and `score` take seed=
    # For nulls, where `of` has no class indices to permute: from a `ClassGram` to a function of
    # the class indices of its rows.
    score: Callable[..., Callable] | None = None

    @property
    def columns_given(self) -> tuple[str, ...]:
        """Names of its columns of the frame."""
        return self.columns or (self.name,)
