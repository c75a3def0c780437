"""Every measure by its name: the rows of all families, and what a caller may ask for."""

from collections.abc import Callable, Sequence
from typing import Any

from geomkd.measures import (
    collapse,
    dimension,
    probe,
    quality,
    separability,
    similarity,
    spectrum,
    transfer,
)

FAMILIES = (quality, dimension, separability, spectrum, probe, collapse, transfer, similarity)
TABLE = {row.name: row for family in FAMILIES for row in family.ROWS}
NAMES = tuple(TABLE)
LABEL_FREE = tuple(name for name, row in TABLE.items() if not row.supervised)
_FRAME = ("layer", "depth", "kind", "role", "shape", "n", "dim")
_TAKEN = {*NAMES, *_FRAME, *(column for row in TABLE.values() for column in row.columns)}


def named(measures: Sequence[Any]) -> dict[str, Callable | None]:
    """Names of measures, all different, with the function of those that are the caller's own."""
    if isinstance(measures, str) or not isinstance(measures, Sequence) or not measures:
        raise TypeError(f"measures must be a sequence of names and functions; got {measures!r}")
    found: dict[str, Callable | None] = {}
    for measure in measures:
        name, own = _named(measure)
        if name in found:
            raise ValueError(f"every measure must be there once; got {name!r} twice")
        found[name] = own
    return found


def columns_of(names: Sequence[str]) -> list[str]:
    """Columns of the frame that measures of these names give, of half-samples too."""
    given = (TABLE[name].columns_given if name in TABLE else (name,) for name in names)
    return list(dict.fromkeys(column for columns in given for column in columns))


def _named(measure: Any) -> tuple[str, Callable | None]:
    """Name of a measure, and its function if it is none of the table's."""
    if isinstance(measure, str):
        if measure not in TABLE:
            raise ValueError(f"measures must be among {NAMES} or functions; got {measure!r}")
        return measure, None
    if not callable(measure):
        raise TypeError(f"a measure must be a name or a function; got {measure!r}")
    name = getattr(measure, "__name__", None)
    if name is None:
        raise TypeError(f"a function that is a measure needs a __name__; got {measure!r}")
    if any(getattr(family, name, None) is measure for family in FAMILIES):
        if name not in TABLE:
            raise ValueError(
                f"{name} compares two layers: 'cka_to_last' compares each with the last, "
                "geomkd.similarity_matrix every two"
            )
        return name, None
    if name in _TAKEN or not name.isidentifier():
        raise ValueError(f"a measure of one's own needs a name of its own; got {name!r}")
    return name, measure
