"""One teacher, one student a seed: trained, resumed or found, and written down."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import geomkd
from benchmarks.paper.augment import augment_crop_flip
from benchmarks.paper.data import PaperData
from benchmarks.paper.models import build, head_prefix, load_body
from benchmarks.paper.places import Place, read_json, slug
from benchmarks.paper.recipes import (
    LARGEST_RATE,
    PRETRAINED_RATE,
    Combination,
    layer_indices,
    student_layers,
)
from geomkd.common.distributed import world
from geomkd.common.files import atomic_write
from geomkd.common.results_folder import machine
from geomkd.distillation.running.fingerprints import weights_fingerprint
from geomkd.network.forward import evaluating

DIVERGED = "NaN or infinite"  # what `geomkd.distill` says of a loss


class Teacher(NamedTuple):
    """A trained teacher and the content of its file."""

    model: nn.Module
    about: dict[str, Any]


def run(combination: Combination, seeds: int, data: PaperData, place: Place) -> None:
    """Train what is not there yet of a teacher and of its students, one for each seed."""
    missing = [seed for seed in range(seeds) if not place.student(combination, seed).exists()]
    if not missing:
        return
    teacher = trained_teacher(combination, data, place)
    pairs = paired_layers(combination, teacher.model, data, place)
    for seed in missing:
        train_student(combination, seed, teacher, pairs, data, place)


def trained_teacher(combination: Combination, data: PaperData, place: Place) -> Teacher:
    """Load the teacher of a data set and recipe, or train it (seed 0)."""
    path = place.teacher(combination)
    known, weights = read_json(path), place.weights(path)
    model = build(combination.teacher, data.n_classes, data.image_size, seed=0)
    if known and weights.exists():
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        about = known
    else:
        about = _train_teacher(model, combination, data, place)
    if known and (here := weights_fingerprint(model)) != known["fingerprint"]:
        raise ValueError(
            f"{path} tells of a teacher with fingerprint {known['fingerprint']}, from which "
            f"finished students learned; the one here has {here}. Put that one's weights into "
            f"{weights}, or give another --out"
        )
    if about is not known:
        if world().is_first:
            with atomic_write(weights) as file:
                torch.save(model.state_dict(), file)
        place.finish(path, about)
    return Teacher(model, about)


def _train_teacher(
    model: nn.Module, combination: Combination, data: PaperData, place: Place
) -> dict[str, Any]:
    name, story, rates = combination.teacher, "random weights, seed 0", None
    if name in place.imagenet:
        taken = load_body(model, place.imagenet[name])
        # A stem that is new is trained at the body's rate, as the paper's was.
        story, rates = taken.story, {"": PRETRAINED_RATE, head_prefix(model): 1.0}
    place.say(f"{slug(combination.dataset)}, teacher {name}: {story}")
    options = {"objective": "ce", "lr": LARGEST_RATE[name], "lr_scale": rates, "seed": 0}
    path = place.teacher(combination)
    result = _distill(model, None, combination, data, place, path, options)
    about = {"dataset": slug(combination.dataset), "teacher": name, "start": story}
    about |= {"fingerprint": weights_fingerprint(model)}
    about |= measured(result, combination, data, place)
    place.say(f"  test accuracy {100 * about['test_accuracy']:.2f} %")
    return about


def paired_layers(
    combination: Combination, teacher: nn.Module, data: PaperData, place: Place
) -> list[tuple[str, str]] | None:
    """Names of the paired layers; None where the method uses no features."""
    if combination.layers is None:
        return None
    example = torch.zeros(2, 3, data.image_size, data.image_size)
    student = build(combination.student, data.n_classes, data.image_size)
    of_student = [layer.name for layer in geomkd.candidate_layers(student, example)]
    if combination.layers == "auto":
        scores = geomkd.score_layers(
            teacher,
            data.train,
            protocol="paper",
            subsamples=0,
            device=place.device,
            progress=place.progress,
        )
        if scores.settings["partial"]:  # it takes Ctrl-C for "enough"; here it means "stop"
            raise KeyboardInterrupt
        chosen = [of_student[i] for i in student_layers(combination)]
        return list(zip(scores.select(len(chosen)), chosen, strict=True))
    of_teacher = [layer.name for layer in geomkd.candidate_layers(teacher.cpu(), example)]
    return [(of_teacher[t], of_student[s]) for t, s in layer_indices(combination)]


def train_student(
    combination: Combination,
    seed: int,
    teacher: Teacher,
    pairs: list[tuple[str, str]] | None,
    data: PaperData,
    place: Place,
) -> None:
    """Train a student and write its file; a loss that becomes NaN is a result too."""
    path = place.student(combination, seed)
    about = {key: getattr(combination, key) for key in ("teacher", "student", "method", "layers")}
    about |= {"dataset": slug(combination.dataset), "seed": seed, "pairs": pairs}
    about |= {f"teacher_{key}": teacher.about[key] for key in ("test_accuracy", "fingerprint")}
    model = build(combination.student, data.n_classes, data.image_size, seed=seed)
    options = {"objective": combination.method, "pairs": pairs, "seed": seed}
    options["lr"] = LARGEST_RATE[combination.student]
    try:
        result = _distill(model, teacher.model, combination, data, place, path, options)
    except RuntimeError as error:
        if DIVERGED not in str(error):
            raise
        place.finish(path, about | _circumstances(combination, place) | {"failed": str(error)})
        place.say(f"  {path.stem}: {error}")
        return
    about |= measured(result, combination, data, place)
    place.finish(path, about)
    place.say(f"  {path.stem}: test accuracy {100 * about['test_accuracy']:.2f} %")


def accuracy_on(data: Dataset, model: nn.Module, batch_size: int, device: torch.device) -> float:
    """Share of the images whose largest logit is their label's, in float32."""
    correct = 0
    with evaluating(model.to(device)):
        for images, labels in DataLoader(data, batch_size):
            correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return correct / len(data)


def _distill(
    model: nn.Module,
    teacher: nn.Module | None,
    combination: Combination,
    data: PaperData,
    place: Place,
    path: Any,
    options: dict[str, Any],
) -> geomkd.DistillationResult:
    recipe = combination.recipe
    return geomkd.distill(
        model,
        teacher,
        data.train,
        val=data.val,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        weight_decay=recipe.weight_decay,
        precision=recipe.precision,
        augment=augment_crop_flip() if recipe.augment else None,
        device=place.device,
        checkpoint_dir=place.checkpoints(path),
        progress=place.progress,
        **options,
    )


def measured(
    result: geomkd.DistillationResult, combination: Combination, data: PaperData, place: Place
) -> dict[str, Any]:
    """What a finished run's file says of it."""
    history, batch_size = result.history, combination.recipe.batch_size
    found = {"test_accuracy": accuracy_on(data.test, result.student, batch_size, place.device)}
    if data.val is not None:
        best = history["val_accuracy"].idxmax()
        found["best_validation_epoch"] = int(history["epoch"][best])
        found["best_validation_accuracy"] = float(history["val_accuracy"][best])
    found |= {"images": {"train": len(data.train), "test": len(data.test)}}
    found |= {"seconds": float(history["seconds"].sum()), "history": history.to_dict("list")}
    return found | _circumstances(combination, place)


def _circumstances(combination: Combination, place: Place) -> dict[str, Any]:
    about = {"recipe": asdict(combination.recipe), "date": datetime.date.today().isoformat()}
    about |= {"device": str(place.device), "processes": world().size}
    return about | {"machine": machine()}
