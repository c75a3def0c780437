"""Rules as functions of the scores' frame: one number a layer, to rank and select by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def sqrt_si(frame: DataFrame) -> Any:
    """Geometric mean of separation and information; 0 where their product is negative.

    Examples
    --------
    >>> import pandas
    >>> sqrt_si(pandas.DataFrame({"separation": [0.5, -0.1], "information": [2.0, 1.0]})).tolist()
    [1.0, 0.0]
    """
    return (frame["separation"] * frame["information"]).clip(lower=0) ** 0.5


RULES = {"sqrt_si": sqrt_si}
