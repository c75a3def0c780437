"""What options name: data, and the networks that it fits."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from geomkd.cli.models import Loaded, brings_weights, load_model
from geomkd.datasets import load_folder, loader_of, open_dataset
from geomkd.network.forward import call, evaluating


@dataclass(frozen=True)
class Inputs:
    """What a distillation starts from."""

    student: Loaded
    teacher: Loaded | None  # None where the objective asks for none
    train: Dataset
    val: Dataset | None
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

    def network(role: str, n_classes: int | None = None) -> Loaded:
        known = {"weights": getattr(options, f"{role}_weights"), "seed": options.seed}
        return load_model(getattr(options, role), option=role, n_classes=n_classes, **known)

    def data(path: str, split: str | None, option: str) -> tuple[Dataset, str]:
        return load_data(path, source, split=split, option=option, **images_of(options))

    given = {role: getattr(options, f"{role}_weights") for role in roles}
    weighted = [role for role in roles if given[role] or brings_weights(getattr(options, role))]
    models = {role: network(role) for role in weighted}
    source = next((m for m in models.values() if m.transform), Loaded(nn.Identity(), None, ""))
    train, images = data(options.data, options.split, "split")
    val, n_classes = None, n_classes_of(train)
    if options.val_data is not None or options.val_split is not None:
        val, _ = data(options.val_data or options.data, options.val_split, "val-split")
        ours, theirs = _class_names(train), _class_names(val)
        if ours and theirs and ours != theirs:
            raise ValueError(
                f"training and validation data must have the same classes; got {ours} and {theirs}"
            )
    models |= {role: network(role, n_classes) for role in roles if role not in models}
    for role, loaded in models.items():
        check_takes_images(f"--{role} {getattr(options, role)}", loaded, train)
    return Inputs(models["student"], models.get("teacher"), train, val, n_classes, images)


def n_classes_of(data: Any) -> int:
    """Count the classes of a data set: its names, or as many as its largest label tells."""
    return len(_class_names(data) or ()) or int(torch.as_tensor(data.targets).max()) + 1


def _class_names(data: Any) -> list[str] | None:
    return getattr(getattr(data, "data", data), "classes", None)


# ---- data ----------------------------------------------------------------------------------------


def images_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options of the images, as `load_data` takes them."""
    return {name: getattr(options, name) for name in ("image_size", "mean", "std")}


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
    words = f"the weights' own: {' '.join(str(loaded.transform).split())}"
    if has_folders:
        return load_folder(path, transform=loaded.transform), words
    return Transformed(open_dataset(path, **options), loaded.transform), words


def check_takes_images(name: str, loaded: Loaded, data: Dataset) -> None:
    """Run a network on one image: what it raises of its own is of many kinds, and unclear."""
    image = data[0][0]
    try:
        with evaluating(loaded.model):
            call(loaded.model, image[None])
    except Exception as error:
        raise ValueError(
            f"{name} does not take these images, of shape {tuple(image.shape)}: "
            f"{str(error) or type(error).__name__}"
        ) from error


class Transformed(Dataset):
    """A data set of (image, label) with a transform of the images.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.ones(2, 3), torch.tensor([0, 1]))
    >>> Transformed(data, lambda image: image * 2)[0][0]
    tensor([2., 2., 2.])
    """

    def __init__(self, data: Any, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.transform = data, transform
        if hasattr(data, "targets"):
            self.targets = data.targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.data[index]
        return self.transform(image), label
