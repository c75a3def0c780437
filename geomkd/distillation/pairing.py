"""Which teacher layers are learned from without a ranking, and which student layer learns which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from geomkd.common.checks import check_choice, check_names
from geomkd.network.forward import Forward
from geomkd.network.layers import Layer, candidate_layers
from geomkd.scoring.loes import check_k

if TYPE_CHECKING:
    import pandas as pd


def pair_layers(
    teacher_layers: Sequence[str],
    student: nn.Module,
    example_input: Any,
    *,
    similarity: pd.DataFrame | None = None,
    granularity: str = "blocks",
    forward: Forward | None = None,
) -> list[tuple[str, str]]:
    """Pair teacher layers, one to one, with layers of the student: evenly spaced, or most alike.

    Parameters
    ----------
    teacher_layers : sequence of str
        Names of the k teacher layers, in order of depth, such as ``scores.select(4)`` gives.
    student : nn.Module
        The student; it is run once, in evaluation mode, and left as it was.
    example_input : Any
        A batch of inputs for the student, where it is: a tensor, a tuple of arguments, or a mapping
        of keywords.
    similarity : DataFrame, optional
        Rows teacher layers, columns student layers, larger where they are more alike, as
        ``similarity_matrix(teacher, student, data)`` gives.
    granularity : {"blocks", "stages"}
        Of the student's layers, as in `candidate_layers`.
    forward : callable, optional
        ``forward(student, example_input)`` for students that are not simply called.

    Returns
    -------
    list of (str, str)
        Teacher layer and student layer, in the order of ``teacher_layers``.

    Raises
    ------
    TypeError
        ``teacher_layers`` is not a list of names, or ``similarity`` not a DataFrame.
    ValueError
        No names, a name that occurs twice, or more names than the student has layers. Of
        ``similarity``: layers that it lacks or holds twice, values that are not finite, distances.

    Notes
    -----
    The student's layers are its m blocks (without blocks, its activations before the head), in
    order of execution, and of these the ones with index ``round((i + 1) * m / k) - 1`` for
    i = 0 ... k - 1: evenly spaced, and the last of them always among the chosen. With
    ``similarity``, of the same m layers those whose summed similarity is greatest among all choices
    that keep the order of depth; the earlier one where two are as good. Cost: k m steps.

    Examples
    --------
    >>> from torch import nn, zeros
    >>> layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    >>> pair_layers(["layer4"], nn.Sequential(*layers), zeros(2, 4))
    [('layer4', '3')]
    """
    names = check_names(teacher_layers, "teacher_layers")
    layers = candidate_layers(student, example_input, granularity=granularity, forward=forward)
    student_names = _main_layers(layers, "student")
    k, m = len(names), len(student_names)
    if k > m:
        raise ValueError(
            f"every teacher layer needs a student layer of its own; got {k} teacher layers for the "
            f"{m} layers of the student {student_names}"
        )
    if similarity is None:
        chosen = evenly_spaced(student_names, k)
    else:
        values = _checked_similarity(similarity, names, student_names)
        chosen = [student_names[j] for j in _in_order(values)]
    return list(zip(names, chosen, strict=True))


def choose_layers(
    teacher: nn.Module,
    example_input: Any,
    k: int = 4,
    *,
    how: str = "evenly_spaced",
    granularity: str = "blocks",
    forward: Forward | None = None,
) -> list[str]:
    """Choose teacher layers by their place alone: what a ranking has to beat.

    Parameters
    ----------
    teacher : nn.Module
        The teacher; it is run once, in evaluation mode, and left as it was.
    example_input : Any
        A batch of inputs, on the teacher's device, as `pair_layers` takes it.
    k : int
        How many.
    how : {"evenly_spaced", "anchored", "last"}
        Of the teacher's m blocks (without blocks, its activations before the head), in order of
        execution: those with index ``round((i + 1) * m / k) - 1`` for i = 0 ... k - 1; so of the
        blocks and behind them the head's input, which is then in; or the last k blocks.
    granularity : {"blocks", "stages"}
        Of the teacher's layers, as in `candidate_layers`.
    forward : callable, optional
        ``forward(teacher, example_input)`` for teachers that are not simply called.

    Returns
    -------
    list of str
        Names in order of depth, as :func:`pair_layers` takes them.

    Raises
    ------
    ValueError
        An unknown ``how``, ``k`` not between 1 and the number of layers to choose from, or
        ``"anchored"`` without a head.

    Examples
    --------
    >>> from torch import nn, zeros
    >>> layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    >>> choose_layers(nn.Sequential(*layers), zeros(2, 4), 1, how="last")
    ['3']
    """
    check_choice(how, "how", ("evenly_spaced", "anchored", "last"))
    layers = candidate_layers(teacher, example_input, granularity=granularity, forward=forward)
    names = _main_layers(layers, "teacher")
    if how == "anchored":
        names += (heads := [layer.name for layer in layers if layer.role == "head_input"])
        if not heads:
            raise ValueError("the teacher has no linear head whose input could be chosen")
    check_k(k, len(names))
    return names[-k:] if how == "last" else evenly_spaced(names, k)


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


def _checked_similarity(frame: Any, rows: list[str], columns: list[str]) -> list[list[float]]:
    """Similarity of teacher and student layers, in the order of the names."""
    if not all(hasattr(frame, name) for name in ("index", "columns", "loc", "attrs")):
        raise TypeError(f"similarity must be a pandas DataFrame; got {type(frame).__name__}")
    if frame.attrs.get("measure") == "procrustes":
        raise ValueError("similarity must be larger where layers are more alike; got distances")
    for of, names, held in (
        ("row of teacher", rows, list(frame.index)),
        ("column of student", columns, list(frame.columns)),
    ):
        wrong = [name for name in names if held.count(name) != 1]
        if wrong:
            raise ValueError(
                f"similarity must have one {of} layer each; got none or several of {wrong} "
                f"among {held}"
            )
    values = frame.loc[rows, columns].to_numpy(dtype=float)
    if not math.isfinite(values.sum()):
        raise ValueError("similarity must be finite; got NaN or Inf")
    return values.tolist()


def _in_order(values: list[list[float]]) -> list[int]:
    """Rising columns, one a row, of the greatest sum."""
    m = len(values[0])
    best, taken = [0.0] * (m + 1), []  # best: sum of the rows so far within the first j columns
    for row in values:
        sums, take = [-math.inf], [False]
        for j in range(m):
            with_j = best[j] + row[j]
            take.append(with_j > sums[j])
            sums.append(max(with_j, sums[j]))
        best, taken = sums, [*taken, take]
    columns, j = [], m
    for take in reversed(taken):
        while not take[j]:
            j -= 1
        j -= 1
        columns.append(j)
    return columns[::-1]


def _main_layers(layers: Sequence[Layer], who: str) -> list[str]:
    """Blocks of a model's candidates, or without blocks the activations before the head."""
    for role in ("block", "activation"):
        names = [layer.name for layer in layers if layer.role == role]
        if names:
            return names
    raise ValueError(f"the {who} has neither blocks nor activations before its head to choose from")
