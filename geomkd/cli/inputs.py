"""What options name: data, and the networks that it fits."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from geomkd.cli.models import Loaded, load_model
from geomkd.cli.parser import options_of
from geomkd.datasets import load_folder, loader_of, open_dataset
from geomkd.network.forward import call, evaluating

OTHERS = ("input_ids", "input_values", "input_features")  # as transformers name texts and sounds


class Inputs(NamedTuple):
    """What a distillation starts from."""

    student: Loaded
    teacher: Loaded | None  # None where the objective asks for none
    train: Dataset
    val: Dataset | None
    validation: str | None  # what names the validation data
    n_classes: int  # of the training data
    images: str  # what is done to an image, in words


def load_inputs(options: argparse.Namespace, *, needs_teacher: bool) -> Inputs:
    """Load what the options of a distillation name.

    Weights come first, for their own transform of the images; networks without weights last, for
    they have as many logits as the data has classes.
    """
    roles = ("teacher", "student") if needs_teacher else ("student",)
    for name in (*roles, "data"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is needed, on the command line or in a --config file")
    names = {role: getattr(options, role) for role in roles}
    weights = {role: getattr(options, f"{role}_weights") for role in roles}

    def network(role: str, n_classes: int | None = None) -> Loaded:
        known = {"weights": weights[role], "seed": options.seed, "n_classes": n_classes}
        return of_images(role, names[role], load_model(names[role], option=role, **known))

    # Of Hugging Face's the configuration tells the number of classes.
    first = [r for r in roles if weights[r] is not None or names[r].startswith("hf:")]
    models = {role: network(role) for role in first}
    source = next((m for m in models.values() if m.transform), Loaded(nn.Identity(), None, ""))
    how = options_of(load_data, options)
    train, images = load_data(options.data, source, **how)
    val, validation, ours = None, None, _class_names(train)
    if options.val_data is not None or options.val_split is not None:
        validation = options.val_data or options.data
        if (validation, options.val_split or "train") == (options.data, options.split or "train"):
            raise ValueError("--val-data are the training data; --val-split names other arrays")
        how |= {"split": options.val_split, "option": "val-split"}
        val, _ = load_data(validation, source, **how)
        validation += f" ({options.val_split})" if options.val_split is not None else ""
        theirs = _class_names(val)
        if ours and theirs and ours != theirs:
            both = f"{ours} and {theirs}"
            raise ValueError(f"training and validation data must have the same classes; got {both}")
    n_classes = len(ours or ()) or int(torch.as_tensor(train.targets).max()) + 1
    models |= {role: network(role, n_classes) for role in roles if role not in models}
    for role, loaded in models.items():
        check_takes_images(f"--{role} {names[role]}", loaded, train)
    teacher = models.get("teacher")
    return Inputs(models["student"], teacher, train, val, validation, n_classes, images)


def _class_names(data: Any) -> list[str] | None:
    return getattr(getattr(data, "data", data), "classes", None)


# ---- data ----------------------------------------------------------------------------------------


def load_data(
    path: str | os.PathLike,
    loaded: Loaded,
    *,
    split: str | None = None,
    option: str = "split",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Dataset, str]:
    """Open a data set as a model expects it; the data, and what is done to an image, in words.

    Without ``mean``, ``std`` and ``image_size`` the weights' own transform is used where there is
    one; else images are scaled to [0, 1] alone. ``option`` is that of the split, for errors.
    """
    loader = loader_of(path)
    has_folders = loader is load_folder
    if split is not None and has_folders:
        raise ValueError(f"--{option} is for arrays; {path} is a folder of class folders")
    if image_size is not None and loader not in (None, load_folder):
        raise ValueError(f"--image-size is for folders of images; {path} holds arrays")
    given = {"image_size": image_size, "mean": mean, "std": std}
    given = {key: value for key, value in given.items() if value is not None}
    options = {} if split is None else {"split": split}
    if given or loaded.transform is None:
        words = ", ".join(f"{key} {value}" for key, value in given.items())
        data = open_dataset(path, **options, **given)
        return data, f"scaled to [0, 1]{'; ' if words else ''}{words}"
    name = getattr(loaded.transform, "__name__", str(loaded.transform))
    words = f"the weights' own: {' '.join(name.split())}"
    if has_folders:
        return load_folder(path, transform=loaded.transform), words
    return Transformed(open_dataset(path, **options), loaded.transform), words


def of_images(option: str, name: str, loaded: Loaded) -> Loaded:
    """Return a network, but for one of texts or sounds, of which there are no data to load here."""
    if (takes := getattr(loaded.model, "main_input_name", "")) in OTHERS:
        what = f"--{option} {name} takes {takes}, and the command line has images alone to give"
        raise ValueError(f"{what}: in Python score_layers and distill take it, masks and all")
    return loaded


def check_takes_images(name: str, loaded: Loaded, data: Dataset) -> None:
    """Run a network on one image: what it raises of its own is of many kinds, and unclear."""
    image = data[0][0]
    try:
        with evaluating(loaded.model):
            call(loaded.model, image[None])
    except Exception as error:
        what = f"{name} does not take these images, of shape {tuple(image.shape)}"
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error


class Transformed(Dataset):
    """A data set of (image, label) with a transform of the images."""

    def __init__(self, data: Any, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.transform = data, transform
        if hasattr(data, "targets"):
            self.targets = data.targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.data[index]
        return self.transform(image), label
