"""Folders of image files, one sub-folder for each class; imported where torchvision is needed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision import datasets, transforms

from geomkd.common.checks import check_int
from geomkd.data.images import channel_statistics, hidden

DEEPEST = 65535  # largest value of 16 bits


class ImageFolder(datasets.ImageFolder):
    """Torchvision's, but that hidden files and folders are left out, and errors name the file.

    A ``transform`` gets images in RGB, 8 bits a channel; without one, items are tensors in [0, 1].
    """

    def __init__(self, path: str, transform: Callable | None, **options: Any) -> None:
        item = to_tensor(**options) if transform is None else transform
        loader = read_image if transform is None else read_rgb
        super().__init__(path, item, loader=loader, is_valid_file=self._is_image)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the class folders, and their numbers."""
        classes = [name for name in super().find_classes(directory)[0] if not hidden(name)]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def _is_image(self, file: str) -> bool:
        parts = Path(os.path.relpath(file, os.path.expanduser(self.root))).parts
        return datasets.folder.is_image_file(file) and not any(map(hidden, parts))


def to_tensor(image_size: int | None, mean: Any, std: Any) -> Callable:
    """Transform from what `read_image` gives to float32 (3, H, W)."""
    steps = [transforms.ToTensor(), _three_channels]
    if image_size is not None:
        check_int(image_size, "image_size", least=1)
        steps = [transforms.Resize(image_size), transforms.CenterCrop(image_size), *steps]
    if mean is not None or std is not None:
        mean, std = channel_statistics(mean, std, 3)
        steps.append(transforms.Normalize(mean.flatten().tolist(), std.flatten().tolist()))
    return transforms.Compose(steps)


def read_image(file: str | os.PathLike) -> Image.Image:
    """Image of a file: RGB, or if it has more than 8 bits one channel of floats in [0, 1]."""
    with opened(file) as image:
        if image.mode != "F" and not image.mode.startswith("I"):
            return image.convert("RGB")
        values = np.asarray(image, dtype=np.float64) / (1 if image.mode == "F" else DEEPEST)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is refused too
            most = 1 if image.mode == "F" else DEEPEST
            low, high = values.min() * most, values.max() * most
            raise ValueError(f"its values must lie in [0, {most}]; they are {low:g} to {high:g}")
        return Image.fromarray(values.astype(np.float32))


def read_rgb(file: str | os.PathLike) -> Image.Image:
    """Image of a file in RGB, 8 bits a channel: grey levels beyond are rounded, not cut off."""
    image = read_image(file)
    if image.mode == "F":
        image = Image.fromarray(np.uint8(np.asarray(image) * 255 + 0.5)).convert("RGB")
    return image


@contextmanager
def opened(file: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image file; whatever is wrong with it is a ``ValueError`` that names it."""
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:  # each format's decoder has errors of its own
        raise ValueError(f"{file} cannot be read as an image: {error}") from error


def check_one_size(files: list[str]) -> None:
    """Refuse images of several sizes, by their headers."""
    first = None
    for file in files:
        with opened(file) as image:
            size = image.size
        first = first or size
        if size != first:
            raise ValueError(
                f"images must have one size when neither image_size nor transform is given; "
                f"{files[0]} is {first[0]}x{first[1]}, {file} is {size[0]}x{size[1]} "
                "(width x height): pass image_size="
            )


def _three_channels(image: Tensor) -> Tensor:
    return image if len(image) == 3 else image.repeat(3, 1, 1)
