"""Which layers of the teacher a run learns from, and the scores that tell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from geomkd.cli.inputs import Inputs
from geomkd.cli.processes import agreed
from geomkd.common.distributed import gathered, world
from geomkd.common.results_folder import write_frame, write_picture
from geomkd.distillation.pairing import choose_layers, pair_layers
from geomkd.quickstart import sqrt_si
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.score_layers import score_layers

EVENLY = {"even": "evenly_spaced", "last": "last"}


class Choice(NamedTuple):
    """Pairs of layers, and how they came about.

    Attributes
    ----------
    pairs : list of (str, str)
        Teacher layer and student layer.
    how : str
        In words.
    scores : dict or None
        Settings of the scores, where there are any.
    """

    pairs: list[tuple[str, str]]
    how: str
    scores: dict[str, Any] | None = None


def choose(options: argparse.Namespace, inputs: Inputs, device: Any, folder: Path) -> Choice:
    """Pair layers as the options ask for it; called by every process.

    Scores are kept in the folder, and found there by a run that goes on.

    Raises
    ------
    ValueError
        Layers that are not there, or more of them than the student has.
    """
    if options.pairs is not None:
        return Choice(named_pairs(options.pairs), "pairs by hand")
    teacher, student = inputs.teacher.model, inputs.student.model
    example = torch.stack([inputs.train[i][0] for i in range(min(2, len(inputs.train)))])
    settings = None
    if options.layers == ["auto"]:
        pair_layers([str(i) for i in range(options.k)], student, example)  # too many? now, not late
        scores = kept_scores(options, inputs, device, folder)
        by = sqrt_si if options.by == "sqrt_si" else options.by
        layers, settings = scores.select(options.k, by=by), scores.settings
        how = f"the {len(layers)} of highest {options.by}"
    elif len(options.layers) == 1 and options.layers[0] in EVENLY:
        layers = choose_layers(teacher, example, options.k, how=EVENLY[options.layers[0]])
        how = f"{len(layers)}, {EVENLY[options.layers[0]].replace('_', ' ')}"
    else:
        layers, how = options.layers, "layers by name"
    return Choice(pair_layers(layers, student, example), how, settings)


def named_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of names from ``"teacher layer:student layer"``.

    Examples
    --------
    >>> named_pairs(["layer1.0:layer1.1"])
    [('layer1.0', 'layer1.1')]
    """
    pairs = [tuple(text.split(":")) for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"--pairs takes TEACHER_LAYER:STUDENT_LAYER; got {text!r}")
    return pairs


def kept_scores(
    options: argparse.Namespace, inputs: Inputs, device: Any, folder: Path
) -> LayerScores:
    """Scores of the teacher on the training data, from the folder if they are there."""
    path = folder / "scores.npz"
    if agreed(path.exists, first_only=True):
        return agreed(lambda: LayerScores.load(path))
    scores = score_layers(
        inputs.teacher.model,
        inputs.train,
        samples=options.samples,
        seed=options.seed,
        device=device,
        memory=options.memory,
        progress=not options.quiet,
    )
    if scores.settings["partial"]:
        raise KeyboardInterrupt
    by = sqrt_si if options.by == "sqrt_si" else options.by
    if world().is_first:
        write_frame(folder / "layers.csv", scores.to_frame())
        write_picture(folder / "layers.png", scores.plot(k=options.k, by=by))
        scores.save(path)  # last: where it is, the others are
    gathered(None)
    return scores
