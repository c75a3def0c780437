"""CIFAR-10, CIFAR-100 and Tiny ImageNet from their published files, or an npz archive instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from benchmarks.paper.models import IMAGE_SIZES
from geomkd.data.sample import Sample
from geomkd.datasets import ImageArrays, load_npz

MOST_VALIDATION = 5000
STATISTICS_BATCH = 1000  # images of a step, so that the counts need little memory
Splits = tuple[ImageArrays, ImageArrays]  # training and test


class Sizes(NamedTuple):
    """What is known of a data set before it is read."""

    n_classes: int
    image_size: int
    n_train: int
    folder: str


PUBLISHED = {
    "cifar10": Sizes(10, 32, 50_000, "cifar-10-batches-py"),
    "cifar100": Sizes(100, 32, 50_000, "cifar-100-python"),
    "tiny_imagenet": Sizes(200, 64, 100_000, "tiny-imagenet-200"),
}


@dataclass(frozen=True)
class PaperData:
    """Images of the parts of a data set, all normalised alike; ``val`` only where asked for."""

    train: ImageArrays
    val: ImageArrays | None
    test: ImageArrays
    n_classes: int
    image_size: int


def load(
    name: str,
    root: str | Path = ".",
    *,
    download: bool = False,
    subset: int | None = None,
    validation: bool = False,
    seed: int = 0,
) -> PaperData:
    """Read a data set; the channels are normalised by its training images' mean and deviation.

    Parameters
    ----------
    name : str
        A key of `PUBLISHED`, or ``npz:FILE`` with uint8 arrays as `geomkd.datasets.load_npz` reads.
    root : path
        Folder that holds the published folders.
    download : bool
        Let torchvision fetch CIFAR where it is not there.
    subset : int, optional
        At most so many training images, and test images, equally many of every class.
    validation : bool
        A fifth of the training images, at most 5,000, becomes ``val``, equally many of a class.
    seed : int
        Seeds the choice of subset and validation images.

    Raises
    ------
    ValueError
        Files that are missing or not what they should be.
    """
    train, test = _read(name, Path(root), download)
    for part, images in (("train", train), ("test", test)):
        _check_images(f"{name}, {part}", images)
    n_classes, statistics = int(train.targets.max()) + 1, channel_statistics(train.images)
    rows = {"train": torch.arange(len(train)), "test": torch.arange(len(test))}
    if validation:
        rows["val"] = Sample(train, min(len(train) // 5, MOST_VALIDATION), seed=seed).indices
        rows["train"] = rows["train"][~torch.isin(rows["train"], rows["val"])]
    parts = {
        name: _rows(test if name == "test" else train, chosen, statistics)
        for name, chosen in rows.items()
    }
    if subset is not None:
        for name in ("train", "test"):
            if len(parts[name]) > subset:
                chosen = Sample(parts[name], subset, seed=seed).indices
                parts[name] = _rows(parts[name], chosen, statistics)
    image_size = train.images.shape[1]
    return PaperData(parts["train"], parts.get("val"), parts["test"], n_classes, image_size)


def sizes_of(names: list[str], root: str | Path, *, download: bool = False) -> dict[str, Sizes]:
    """Sizes of data sets that are there to be read; ``ValueError`` where one is not."""
    found = {}
    for name in names:
        if name.startswith("npz:"):
            train = _read(name, Path(root), False)[0]
            found[name] = Sizes(int(train.targets.max()) + 1, train.images.shape[1], len(train), "")
            continue
        found[name] = PUBLISHED[name]
        if not (Path(root) / found[name].folder).is_dir() and not (download and "cifar" in name):
            raise ValueError(f"{Path(root) / found[name].folder} is not there")
    return found


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], from counts of its 256 values.

    Parameters
    ----------
    images : Tensor, shape (n, H, W, C), uint8

    Returns
    -------
    mean, std : list of C floats
    """
    counts = torch.zeros(images.shape[-1], 256, dtype=torch.float64)
    for batch in images.split(STATISTICS_BATCH):
        for channel, count in enumerate(counts):
            count += torch.bincount(batch[..., channel].flatten(), minlength=256)
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = share @ value
    variance = (share * (value - mean[:, None]).square()).sum(1)
    return mean.tolist(), variance.sqrt().tolist()


def read_cifar(source: Callable[..., Any], root: Path, download: bool = False) -> Splits:
    """Training and test images of `torchvision.datasets.CIFAR10`, CIFAR100 or a subclass."""
    parts = []
    for train in (True, False):
        try:
            part = source(str(root), train=train, download=download)
        except RuntimeError as error:  # missing, or not the published bytes
            raise ValueError(f"{root / source.base_folder}: {error} (--download does)") from None
        images, targets = torch.from_numpy(part.data).contiguous(), torch.tensor(part.targets)
        parts.append(ImageArrays(images, targets, classes=part.classes))
    return parts[0], parts[1]


def read_tiny_imagenet(root: Path) -> Splits:
    """Training and validation images of Tiny ImageNet's folder; the latter serve as the test.

    The published test images have no labels.
    """
    folder = root / PUBLISHED["tiny_imagenet"].folder
    if not (folder / "wnids.txt").is_file():
        raise ValueError(
            f"{folder}: expected the unpacked tiny-imagenet-200.zip with wnids.txt, train and val"
        )
    classes = (folder / "wnids.txt").read_text().split()
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    train = [
        (file, label)
        for wnid, label in label_of.items()
        for file in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
    ]
    annotations = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    rows = [line.split("\t")[:2] for line in annotations]
    if unknown := sorted({wnid for _, wnid in rows} - set(classes)):
        raise ValueError(f"{folder}/val/val_annotations.txt: not in wnids.txt: {unknown[:3]}")
    test = [(folder / "val" / "images" / file, label_of[wnid]) for file, wnid in rows]
    return tuple(_decoded(folder, files, classes) for files in (train, test))


def _decoded(folder: Path, files: list[tuple[Path, int]], classes: list[str]) -> ImageArrays:
    targets = torch.tensor([label for _, label in files])
    if missing := set(range(len(classes))) - set(targets.tolist()):
        raise ValueError(f"{folder}: no image of class {classes[min(missing)]}")
    images = np.empty((len(files), 64, 64, 3), np.uint8)
    for row, (file, _) in zip(images, files, strict=True):
        with Image.open(file) as image:
            if image.size != (64, 64):
                raise ValueError(f"{file}: expected 64 x 64 pixels; got {image.size}")
            row[:] = image.convert("RGB")  # some are grey
    return ImageArrays(torch.from_numpy(images), targets, classes=classes)


def _read(name: str, root: Path, download: bool) -> Splits:
    if name.startswith("npz:"):
        return tuple(load_npz(name.removeprefix("npz:"), split=part) for part in ("train", "test"))
    if name == "tiny_imagenet":
        return read_tiny_imagenet(root)
    if name not in PUBLISHED:
        raise ValueError(f"dataset must be {', '.join(PUBLISHED)} or npz:FILE; got {name!r}")
    return read_cifar(getattr(datasets, name.upper()), root, download)


def _check_images(where: str, images: ImageArrays) -> None:
    shape, dtype = tuple(images.images.shape), images.images.dtype
    if dtype != torch.uint8 or shape[1:] not in [(size, size, 3) for size in IMAGE_SIZES]:
        raise ValueError(
            f"{where}: images must be uint8 (n, 32, 32, 3) or (n, 64, 64, 3); got {dtype} {shape}"
        )


def _rows(images: ImageArrays, rows: Tensor, statistics: tuple) -> ImageArrays:
    mean, std = statistics
    whole = len(rows) == len(images)  # no second copy of a large data set
    pixels = images.images if whole else images.images[rows]
    return ImageArrays(pixels, images.targets[rows], classes=images.classes, mean=mean, std=std)
