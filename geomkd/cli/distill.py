"""``geomkd distill``: from options to a folder that holds the student and how it came about."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from geomkd.cli.config import as_toml, check_same, settings_of
from geomkd.cli.inputs import Inputs, load_inputs
from geomkd.cli.layers import Choice, choose
from geomkd.cli.objective import described, objective_of
from geomkd.cli.processes import ERRORS, agreed, own_device
from geomkd.common.distributed import world
from geomkd.common.files import atomic_write
from geomkd.common.results_folder import machine, new_folder, write_frame, write_json, write_picture
from geomkd.distillation import DistillationResult, distill
from geomkd.distillation.running.recipe import Recipe

CONFIG = "config.toml"
RECIPE = (
    *("epochs", "batch_size", "accumulate", "lr", "weight_decay", "clip_norm", "head_clip_norm"),
    *("seed", "precision", "compile", "channels_last", "cache_dtype", "checkpoint_steps"),
    "log_dir",
)


@dataclass(frozen=True)
class Distilled:
    """What a run left behind.

    Attributes
    ----------
    folder : Path
        Holds config.toml, history.csv, training.png, student.pt, summary.json and checkpoints.
    result : DistillationResult
        The student and its history.
    summary : dict
        What summary.json holds.
    """

    folder: Path
    result: DistillationResult
    summary: dict[str, Any]


def distilled(options: argparse.Namespace, say: Callable[[str], Any]) -> Distilled:
    """Distil as the options say, in a folder of its own; called by every process.

    Parameters
    ----------
    options : Namespace
        As the command line is parsed.
    say : callable
        Takes each line of the story, from the first process.

    Raises
    ------
    ValueError, TypeError, OSError, ImportError, RuntimeError
        What is wrong with the options, or what training raises. A folder made for nothing is
        removed again.
    """
    say = say if world().is_first else lambda text: None
    objective = _checked_objective(options)
    device = agreed(own_device) if options.device is None else options.device
    with _results_folder(options) as folder:
        asks_teacher = objective.uses_features or objective.uses_teacher_logits
        inputs = agreed(lambda: load_inputs(options, needs_teacher=asks_teacher))
        _tell(inputs, options, say)
        choice = Choice([], f"objective {objective.name} takes none")
        if objective.uses_features:
            choice = choose(options, inputs, device, folder)
        say(f"layers: {choice.how}")
        cache = options.cache_dir or (folder / "cache" if options.cache else None)
        result = distill(
            inputs.student.model,
            inputs.teacher and inputs.teacher.model,
            inputs.train,
            pairs=choice.pairs or None,
            objective=objective,
            val=inputs.val,
            device=device,
            cache_dir=cache,
            checkpoint_dir=folder / "checkpoints",
            progress=not options.quiet,
            **{name: getattr(options, name) for name in RECIPE},
        )
        if getattr(objective, "uses_teacher_head", False):
            say("student.pt holds the student, a projector and the teacher's head: WithTeacherHead")
        summary = _summary(options, inputs, choice, objective, result)
        agreed(lambda: _write(folder, result, summary), first_only=True)
    return Distilled(folder, result, summary)


def _checked_objective(options: argparse.Namespace) -> Any:
    """Make the objective, and check what can be known to be wrong before anything is loaded."""
    objective = objective_of(options.objective, options.set or ())
    if options.layers is None and options.pairs is None:
        options.layers = ["auto"]
    elif options.layers is not None and options.pairs is not None:
        raise ValueError("--layers and --pairs exclude each other: pairs name the layers")
    names = {field.name for field in fields(Recipe)} & set(RECIPE)
    Recipe(**{name: getattr(options, name) for name in names}).training_order(objective)
    return objective


@contextmanager
def _results_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Folder of the results: made by the first process, or that of the run that goes on."""
    name, is_new = agreed(lambda: _opened(options), first_only=True)
    folder = Path(name)
    try:
        yield folder
    except ERRORS:
        if is_new and world().is_first:
            files = [path for path in folder.rglob("*") if path.is_file()]
            if files == [folder / CONFIG]:
                shutil.rmtree(folder)
        raise


def _opened(options: argparse.Namespace) -> tuple[str, bool]:
    settings, there = settings_of(options), options.out is not None and Path(options.out).exists()
    if options.resume and options.out is None:
        raise ValueError("--resume needs --out, the folder of the run")
    if there and not options.resume:
        raise ValueError(f"{options.out} is there already: give another --out, or --resume")
    if there:
        folder = Path(options.out)
        visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if CONFIG in visible:
            check_same(folder / CONFIG, settings)
        elif visible:  # a run that was killed at once has left nothing
            raise ValueError(f"{folder} is no folder of a run: it has no {CONFIG}")
    else:
        folder = new_folder(options.out, "geomkd-distill")
    with atomic_write(folder / CONFIG) as file:
        file.write(b"# geomkd distill --config THIS_FILE --out FOLDER repeats the run.\n")
        file.write(as_toml(settings).encode())
    return str(folder), not there


def _tell(inputs: Inputs, options: argparse.Namespace, say: Callable[[str], Any]) -> None:
    if inputs.teacher is not None:
        say(f"teacher: {inputs.teacher.story}")
    say(f"student: {inputs.student.story}")
    say(f"data: {options.data}, {len(inputs.train)} images of {inputs.n_classes} classes")
    if inputs.val is not None:
        say(f"validation: {_validation_name(options)}, {len(inputs.val)} images")
    say(f"images: {inputs.images}")


def _validation_name(options: argparse.Namespace) -> str | None:
    if options.val_data is None and options.val_split is None:
        return None
    split = f" ({options.val_split})" if options.val_split is not None else ""
    return f"{options.val_data or options.data}{split}"


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
    return {
        "command": shlex.join(["geomkd", *options.arguments]),
        "teacher": inputs.teacher and inputs.teacher.story,
        "student": inputs.student.story,
        "data": options.data,
        "validation": _validation_name(options),
        "images": inputs.images,
        "objective": described(objective),
        "layers": [teacher for teacher, _ in choice.pairs],
        "layers_are": choice.how,
        "pairs": choice.pairs,
        "last_epoch": last,
        "best_validation_epoch": best,
        "seconds_of_all_epochs": round(float(history["seconds"].sum()), 3),
        "processes": world().size,
        "settings": settings_of(options),
        "scores": choice.scores,
        "machine": machine(),
    }


def _write(folder: Path, result: DistillationResult, summary: dict[str, Any]) -> None:
    write_frame(folder / "history.csv", result.history)
    write_picture(folder / "training.png", result.plot())
    result.save(folder / "student.pt")
    write_json(folder / "summary.json", summary)
