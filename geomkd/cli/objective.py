"""An objective from its name and options in text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from geomkd.distillation.rivals import OBJECTIVES


def objective_of(name: str, settings: Sequence[str] = ()) -> Any:
    """Make the objective of a name, with options such as ``"projector=mlp"``.

    Parameters
    ----------
    name : str
        One of `OBJECTIVES`.
    settings : sequence of str
        ``NAME=VALUE``, the value in the form of the option's type; ``true`` or ``false`` for bool.

    Raises
    ------
    ValueError
        An option that the objective does not have, or a value that it does not take.

    Examples
    --------
    >>> objective_of("kd", ["temperature=2"])
    LogitDistillation(temperature=2.0, ce_weight=0.1, kd_weight=0.9)
    """
    kind = OBJECTIVES[name]
    hints = get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(kind)}
    values: dict[str, Any] = {}
    for text in settings:
        option, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE; got {text!r}")
        if option not in types:
            known = ", ".join(types) or "no options"
            raise ValueError(f"--set: objective {name!r} has {known}; got {option!r}")
        if option in values:
            raise ValueError(f"--set: {option} is there more than once")
        values[option] = _value(option, types[option], value)
    return kind(**values)


def described(objective: Any) -> dict[str, Any]:
    """Name and options of an objective."""
    return {"name": objective.name, **asdict(objective)}


def _value(option: str, kind: type, text: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"--set: {option} must be true or false; got {text!r}")
        return text == "true"
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or (kind is float and not math.isfinite(value)):
        number = {float: "a finite number", int: "a whole number"}[kind]
        raise ValueError(f"--set: {option} must be {number}; got {text!r}")
    return value
