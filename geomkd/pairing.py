"""Which teacher layers are learned from without a ranking, and which student layer learns which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from geomkd.checks import check_int
from geomkd.layers import candidate_layers
from geomkd.models import Forward


def pair_layers(
    teacher_layers: Sequence[str],
    student: nn.Module,
    example_input: Any,
    *,
    forward: Forward | None = None,
) -> list[tuple[str, str]]:
    """Pair teacher layers, one to one, with evenly spaced layers of the student.

    Parameters
    ----------
    teacher_layers : sequence of str
        Names of the k teacher layers, in order of depth, such as ``scores.select(4)`` gives.
    student : nn.Module
        The student; it is run once, in evaluation mode, and left as it was.
    example_input : Any
        A batch of inputs for the student: a tensor, a tuple of arguments, or a mapping of keywords.
    forward : callable, optional
        ``forward(student, example_input)`` for students that are not simply called.

    Returns
    -------
    list of (str, str)
        Teacher layer and student layer, in the order of ``teacher_layers``.

    Raises
    ------
    TypeError
        ``teacher_layers`` is not a list of names.
    ValueError
        No names, a name that occurs twice, or more names than the student has layers.

    Notes
    -----
    The student's layers are its m blocks (without blocks, its activations before the head), in
    order of execution, and of these the ones with index ``round((i + 1) * m / k) - 1`` for
    i = 0 ... k - 1: evenly spaced, and the last of them always among the chosen.

    Examples
    --------
    >>> from torch import nn, zeros
    >>> layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    >>> pair_layers(["layer4"], nn.Sequential(*layers), zeros(2, 4))
    [('layer4', '3')]
    """
    names = _checked_names(teacher_layers)
    student_names = _main_layers(student, "student", example_input, forward)
    k, m = len(names), len(student_names)
    if k > m:
        raise ValueError(
            f"every teacher layer needs a student layer of its own; got {k} teacher layers for the "
            f"{m} layers of the student {student_names}"
        )
    return list(zip(names, evenly_spaced(student_names, k), strict=True))


def choose_layers(
    teacher: nn.Module,
    example_input: Any,
    k: int = 4,
    *,
    how: str = "evenly_spaced",
    forward: Forward | None = None,
) -> list[str]:
    """Choose teacher layers by their place alone: what a ranking has to beat.

    Parameters
    ----------
    teacher : nn.Module
        The teacher; it is run once, in evaluation mode, and left as it was.
    example_input : Any
        A batch of inputs: a tensor, a tuple of arguments, or a mapping of keywords.
    k : int
        How many.
    how : {"evenly_spaced", "last"}
        Of the teacher's m blocks (without blocks, its activations before the head), in order of
        execution: those with index ``round((i + 1) * m / k) - 1`` for i = 0 ... k - 1, or the last
        k.
    forward : callable, optional
        ``forward(teacher, example_input)`` for teachers that are not simply called.

    Returns
    -------
    list of str
        Names in order of depth, as :func:`pair_layers` takes them.

    Raises
    ------
    ValueError
        An unknown ``how``, or ``k`` not between 1 and m.

    Examples
    --------
    >>> from torch import nn, zeros
    >>> layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    >>> choose_layers(nn.Sequential(*layers), zeros(2, 4), 1, how="last")
    ['3']
    """
    if how not in ("evenly_spaced", "last"):
        raise ValueError(f"how must be 'evenly_spaced' or 'last'; got {how!r}")
    names = _main_layers(teacher, "teacher", example_input, forward)
    k = check_int(k, "k", least=1)
    if k > len(names):
        raise ValueError(f"k must be at most the {len(names)} layers of the teacher; got {k}")
    return evenly_spaced(names, k) if how == "evenly_spaced" else names[-k:]


def evenly_spaced(names: Sequence[str], k: int) -> list[str]:
    """K of m names, those at ``round((i + 1) * m / k) - 1``, i = 0 ... k - 1; the last is in.

    Raises
    ------
    ValueError
        ``k`` is not between 1 and m.

    Examples
    --------
    >>> evenly_spaced(["a", "b", "c", "d", "e", "f"], 2)
    ['c', 'f']
    """
    m = len(names)
    if not 1 <= k <= m:
        raise ValueError(f"k must be between 1 and the {m} names; got {k}")
    return [names[round((i + 1) * m / k) - 1] for i in range(k)]


def _checked_names(names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"teacher_layers must be a list of layer names; got {type(names).__name__} {names!r}"
        )
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"teacher_layers must hold layer names (str); got {type(name).__name__} {name!r}"
            )
    if not names:
        raise ValueError("teacher_layers must hold at least one layer name; got none")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"teacher_layers must differ from each other; got {twice} more than once")
    return list(names)


def _main_layers(model: nn.Module, who: str, example_input: Any, forward: Any) -> list[str]:
    """Blocks of a model, or without blocks its activations before the head."""
    layers = candidate_layers(model, example_input, forward=forward)
    for role in ("block", "activation"):
        names = [layer.name for layer in layers if layer.role == role]
        if names:
            return names
    raise ValueError(f"the {who} has neither blocks nor activations before its head to choose from")
