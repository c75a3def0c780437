"""Teacher, student and data of a distillation, as its options name them."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from geomkd.cli.loading import Loaded, load_data, load_model
from geomkd.common.randomness import seeded


@dataclass(frozen=True)
class Inputs:
    """What a distillation starts from.

    Attributes
    ----------
    student, teacher : Loaded
        ``teacher`` is None where the objective asks for none.
    train, val : Dataset
        ``val`` is None where there is no validation.
    n_classes : int
        Of the training data.
    images : str
        What is done to an image, in words.
    """

    student: Loaded
    teacher: Loaded | None
    train: Dataset
    val: Dataset | None
    n_classes: int
    images: str


def load_inputs(options: argparse.Namespace, *, needs_teacher: bool) -> Inputs:
    """Load what the options name.

    Weights come first, for their own transform of the images; networks without weights last, for
    they have as many logits as the data has classes.

    Raises
    ------
    ValueError, TypeError, OSError
        An option that is missing, or what it names cannot be had.
    """
    roles = ("teacher", "student") if needs_teacher else ("student",)
    for name in (*roles, "data"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is needed, on the command line or in a --config file")
    with_weights = {
        role: _named(role, options)
        for role in roles
        if getattr(options, f"{role}_weights") is not None
    }
    source = next((m for m in with_weights.values() if m.transform is not None), None)
    source = source or Loaded(nn.Identity(), None, "")
    train, images = _data(options.data, options.split, "--split", source, options)
    n_classes = n_classes_of(train)
    val = _validation(options, source, train)
    models = {role: with_weights.get(role) or _named(role, options, n_classes) for role in roles}
    return Inputs(models["student"], models.get("teacher"), train, val, n_classes, images)


def n_classes_of(data: Any) -> int:
    """Count the classes of a data set: its names, or as many as its largest label tells."""
    return len(_class_names(data) or ()) or int(torch.as_tensor(data.targets).max()) + 1


def fresh(name: str, n_classes: int, seed: int) -> Loaded:
    """Build a model of random weights; a classifier of torchvision's with ``n_classes`` logits."""
    source, _, rest = name.partition(":")
    if source == "torchvision":
        try:
            from torchvision import models
        except ModuleNotFoundError:
            return load_model(name, seed=seed)  # which says what to install
        if rest in models.list_models(module=models):
            with seeded(seed):
                model = models.get_model(rest, weights=None, num_classes=n_classes)
            return Loaded(model, None, f"{name}, {n_classes} classes, weights random, seed {seed}")
    return load_model(name, seed=seed)


def _named(role: str, options: argparse.Namespace, n_classes: int | None = None) -> Loaded:
    name, weights = getattr(options, role), getattr(options, f"{role}_weights")
    try:
        if n_classes is not None:
            return fresh(name, n_classes, options.seed)
        return load_model(name, weights=weights, seed=options.seed)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("--model", f"--{role}", 1)) from None


def _data(
    path: str, split: str | None, option: str, source: Loaded, options: argparse.Namespace
) -> tuple[Dataset, str]:
    if split is not None and Path(path).is_dir() and any(e.is_dir() for e in os.scandir(path)):
        raise ValueError(f"{option} is for arrays; {path} is a folder of class folders")
    given = {"image_size": options.image_size, "mean": options.mean, "std": options.std}
    if options.image_size is not None and not Path(path).is_dir():
        raise ValueError(f"--image-size is for folders of images; got {path}")
    return load_data(path, source, split=split, **given)


def _validation(options: argparse.Namespace, source: Loaded, train: Dataset) -> Dataset | None:
    path, split = options.val_data, options.val_split
    if path is None and split is None:
        return None
    val, _ = _data(path or options.data, split, "--val-split", source, options)
    ours, theirs = _class_names(train), _class_names(val)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"training and validation data must have the same classes; got {ours} and {theirs}"
        )
    return val


def _class_names(data: Any) -> list[str] | None:
    return getattr(getattr(data, "data", data), "classes", None)
