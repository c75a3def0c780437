"""``geomkd distill``: from options to a folder that holds the student and how it came about."""

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from geomkd.cli.config import run_folder, settings_of
from geomkd.cli.inputs import Inputs, load_inputs
from geomkd.cli.parser import options_of
from geomkd.cli.score import check_by
from geomkd.common.checks import about
from geomkd.common.distributed import agreed, own_device, world
from geomkd.common.results_folder import machine, write_frame, write_json, write_picture
from geomkd.distillation import DistillationResult, distill
from geomkd.distillation.pairing import choose_layers, pair_layers
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.distillation.running.recipe import Recipe
from geomkd.measures.table import columns_of, named
from geomkd.network.layers import describe_layers
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.ranking import RULES
from geomkd.scoring.score_layers import score_layers

BY_PLACE = {"auto": "anchored", "even": "evenly_spaced", "last": "last"}
SCORING = ("samples", "protocol", "pool", "measures", "definition")  # how layers are scored
Choice = tuple[list[tuple[str, str]], str, dict[str, Any] | None]  # pairs, why, scores' settings


def distilled(options: argparse.Namespace, say: Callable[[str], Any]) -> None:
    """Distil in a folder of its own; ``say`` takes each line of text. Called by every process."""
    say = say if world().is_first else lambda text: None
    objective = _checked_objective(options)
    device = agreed(own_device) if options.device is None else options.device
    with run_folder(options) as folder:
        asks_teacher = objective.uses_features or objective.uses_teacher_logits
        inputs = agreed(lambda: load_inputs(options, needs_teacher=asks_teacher))
        say(_beginning(inputs, options))
        choice: Choice = [], f"objective {objective.name} takes none", None
        if objective.uses_features:
            choice = _choose(options, inputs, device, folder)
        say(f"layers: {choice[1]}")
        teacher = inputs.teacher and inputs.teacher.model
        given = {"pairs": choice[0] or None, "objective": objective, "device": device}
        given |= {"train": inputs.train, "val": inputs.val, "progress": not options.quiet}
        given["cache_dir"] = options.cache_dir or (folder / "cache" if options.cache else None)
        given |= {"checkpoint_dir": folder / "checkpoints", "teacher": teacher}
        given["student"] = inputs.student.model
        result = distill(**options_of(distill, options) | given)
        summary = _summary(options, inputs, choice, objective, result)
        agreed(lambda: _write(folder, result, summary), first_only=True)
    if getattr(objective, "uses_teacher_head", False):
        say("student.pt holds the student, a projector and the teacher's head: WithTeacherHead")
    say(_end(summary, folder))


def _checked_objective(options: argparse.Namespace) -> Any:
    """Make the objective, and check what can be known to be wrong before anything is loaded."""
    objective = objective_of(options.objective, options.set or ())
    if options.layers is None and options.pairs is None:
        options.layers = ["auto"]
    elif options.layers is not None and options.pairs is not None:
        raise ValueError("--layers and --pairs exclude each other: pairs name the layers")
    if options.pairs is not None and options.granularity != "blocks":
        raise ValueError("--granularity is of layers not named, and pairs name them")
    given = _of_scoring(options)
    if options.scores is not None and given[0] in SCORING:
        raise ValueError(f"--scores are there already: --{given[0]} would say how they are made")
    if given and options.layers != ["auto"]:
        raise ValueError(f"--{given[0]} is about scoring, which --layers auto alone does")
    if options.scores is None:
        check_by(options.by, columns_of(named(options.measures)))
    numbers = {field.name: getattr(options, field.name, None) for field in fields(Recipe)}
    Recipe(**numbers).training_order(objective)
    return objective


def _of_scoring(options: argparse.Namespace) -> list[str]:
    """Names of the options that ask for layers by their scores."""
    known = {name: signature(score_layers).parameters[name].default for name in SCORING}
    listed = {name: list(value) for name, value in known.items() if isinstance(value, tuple)}
    given = [n for n in SCORING if getattr(options, n) not in (None, known[n], listed.get(n))]
    return given + [name for name in ("by", "scores") if getattr(options, name) is not None]


# ---- objective -----------------------------------------------------------------------------------


def objective_of(name: str, settings: Sequence[str] = ()) -> Any:
    """Make the objective of a name, with options in text, in the form of their type."""
    kind = OBJECTIVES[name]
    types = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
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


def _value(option: str, kind: type, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool and text in ("true", "false"):
        return text == "true"
    with suppress(ValueError):
        if kind is float and math.isfinite(float(text)):
            return float(text)
    wanted = "true or false" if kind is bool else "a finite number"
    raise ValueError(f"--set: {option} must be {wanted}; got {text!r}")


# ---- layers --------------------------------------------------------------------------------------


def _choose(options: argparse.Namespace, inputs: Inputs, device: Any, folder: Path) -> Choice:
    """Pair layers as the options ask for it; called by every process."""
    if options.pairs is not None:
        pairs = [tuple(text.split(":")) for text in options.pairs]
        if wrong := [":".join(pair) for pair in pairs if len(pair) != 2 or not all(pair)]:
            raise ValueError(f"--pairs takes TEACHER_LAYER:STUDENT_LAYER; got {wrong[0]!r}")
        return pairs, "pairs by hand", None
    teacher, student = inputs.teacher.model, inputs.student.model
    example = torch.stack([inputs.train[i][0] for i in range(min(2, len(inputs.train)))])
    settings, grain = None, {"granularity": options.granularity}
    if options.layers == ["auto"] and _of_scoring(options):
        # Too many? Now, not late.
        pair_layers([str(i) for i in range(options.k)], student, example, **grain)
        scores = _kept_scores(options, inputs, device, folder, example)
        by = options.by or scores.by
        layers, settings = scores.select(options.k, by=RULES.get(by, by)), scores.settings
        how = f"the {len(layers)} of highest {by}"
    elif len(options.layers) == 1 and options.layers[0] in BY_PLACE:
        place = BY_PLACE[options.layers[0]]
        layers = choose_layers(teacher, example, options.k, how=place, **grain)
        told = "evenly spaced up to the head's input" if place == "anchored" else place
        how = f"{len(layers)}, {told.replace('_', ' ')}"
    else:
        layers, how = options.layers, "layers by name"
    return pair_layers(layers, student, example, **grain), how, settings


def _kept_scores(
    options: argparse.Namespace, inputs: Inputs, device: Any, folder: Path, example: Any
) -> LayerScores:
    """Scores of the teacher, from the folder or the file of --scores, or made on the data."""
    path = folder / "scores.npz"
    if agreed(path.exists, first_only=True):
        return agreed(lambda: LayerScores.load(path))
    if options.scores is not None:
        scores = agreed(lambda: _scores_in(options.scores, inputs.teacher.model, example))
        check_by(options.by, list(scores.draws))
    else:
        given = {"model": inputs.teacher.model, "data": inputs.train, "layers": None}
        given |= {"device": device, "progress": not options.quiet}
        scores = score_layers(**options_of(score_layers, options) | given)
        if scores.settings["partial"]:
            raise KeyboardInterrupt

    def write() -> None:
        by = RULES.get(options.by, options.by)
        write_frame(folder / "layers.csv", scores.to_frame())
        write_picture(folder / "layers.png", scores.plot(k=options.k, by=by))
        scores.save(path)  # last: where it is, the others are

    agreed(write, first_only=True)
    return scores


def _scores_in(path: str, teacher: nn.Module, example: Any) -> LayerScores:
    """Scores of a file; ``ValueError`` where they are not of the teacher's layers."""
    scores = LayerScores.load(path)
    if scores.settings["partial"]:
        raise ValueError(f"{path} is of a scoring that was interrupted: layers are missing")
    frame = scores.to_frame()
    with about(f"{path} has scores of another network"):
        for i, layer in enumerate(describe_layers(teacher, frame["layer"], example)):
            if layer.shape != (there := frame["shape"][i]):
                here = f"is {layer.shape} in the teacher"
                raise ValueError(f"layer {layer.name!r} {here}, {there} there")
    return scores


# ---- what is told and written --------------------------------------------------------------------


def _beginning(inputs: Inputs, options: argparse.Namespace) -> str:
    networks = {"teacher": inputs.teacher, "student": inputs.student}
    lines = [f"{role}: {loaded.story}" for role, loaded in networks.items() if loaded is not None]
    lines += [f"data: {options.data}, {len(inputs.train)} images of {inputs.n_classes} classes"]
    if inputs.val is not None:
        lines += [f"validation: {inputs.validation}, {len(inputs.val)} images"]
    return "\n".join([*lines, f"images: {inputs.images}"])


def _summary(
    options: argparse.Namespace,
    inputs: Inputs,
    choice: Choice,
    objective: Any,
    result: DistillationResult,
) -> dict[str, Any]:
    history = result.history
    last = {"epoch": int(history["epoch"].iloc[-1])}
    last |= {name: float(history[name].iloc[-1]) for name in history if name.endswith("_accuracy")}
    best = None
    if result.best_val_accuracy is not None:
        epoch = int(history.loc[history["val_accuracy"].idxmax(), "epoch"])
        best = {"epoch": epoch, "val_accuracy": result.best_val_accuracy}
    pairs, why, scores = choice
    told = {"command": shlex.join(["geomkd", *options.arguments])}
    told |= {"teacher": inputs.teacher and inputs.teacher.story, "student": inputs.student.story}
    told |= {"data": options.data, "validation": inputs.validation, "images": inputs.images}
    told |= {"objective": {"name": objective.name, **asdict(objective)}}
    told |= {"layers": [teacher for teacher, _ in pairs], "layers_are": why, "pairs": pairs}
    told |= {"last_epoch": last, "best_validation_epoch": best}
    told |= {"seconds_of_all_epochs": round(float(history["seconds"].sum()), 3)}
    told |= {"processes": world().size, "settings": settings_of(options)}
    return told | {"scores": scores, "machine": machine()}


def _write(folder: Path, result: DistillationResult, summary: dict[str, Any]) -> None:
    write_frame(folder / "history.csv", result.history)
    write_picture(folder / "training.png", result.plot())
    result.save(folder / "student.pt")
    write_json(folder / "summary.json", summary)


def _end(summary: dict[str, Any], folder: Path) -> str:
    rows = [("teacher layer", "student layer"), *summary["pairs"]]
    width = max(len(teacher) for teacher, _ in rows) + 2
    text = "".join(f"\n{teacher:<{width}}{student}" for teacher, student in rows)
    text = f"{text}\n" if summary["pairs"] else ""
    settings = ", ".join(f"{k} {v}" for k, v in summary["objective"].items() if k != "name")
    text += f"\nobjective: {summary['objective']['name']}{' with ' if settings else ''}{settings}\n"
    last, best = summary["last_epoch"], summary["best_validation_epoch"]
    text += f"last epoch, {last['epoch']}: training accuracy {last['train_accuracy']:.1%}"
    if best is not None:
        text += f", validation accuracy {last['val_accuracy']:.1%}\n"
        text += f"best validation epoch, {best['epoch']}: {best['val_accuracy']:.1%}"
    text += f"\n{summary['seconds_of_all_epochs']:.0f} s of training\nwrote student.pt, "
    return f"{text}history.csv, training.png, summary.json and config.toml to {folder}"
