"""Images: to train on, to score layers on, and to measure accuracies on; no image is in two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from geomkd.datasets import ImageArrays, load_idx, load_npz

COLOUR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = ((0.286,), (0.353,))
FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_TRAINED = 2000  # images a class that its teachers are trained on
FASHION_SCORED = 300


class Material(NamedTuple):
    """Normalised images (n, C, H, W) with their labels, and the number of classes."""

    x_train: Tensor
    y_train: Tensor
    x_score: Tensor
    y_score: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


def cifar10(folder: Path) -> Material:
    return _archives(folder, "cifar10_subset.npz", "cifar10_more_test.npz")


def tiny_imagenet(folder: Path) -> Material:
    return _archives(folder, "tiny_imagenet_40.npz", "tiny_imagenet_40_more_test.npz")


def fashion(folder: Path) -> Material:
    """Fashion-MNIST: its test images are split into those that score and those that measure."""
    folder = folder / "fashion-mnist" if (folder / "fashion-mnist").is_dir() else FASHION
    x, y = _tensors(load_idx(folder, split="train"), GREY)
    x_held, y_held = _tensors(load_idx(folder, split="test"), GREY)
    kept = first_of_each_class(y, FASHION_TRAINED)
    order = torch.randperm(len(y_held), generator=torch.Generator().manual_seed(0))
    scored = order[first_of_each_class(y_held[order], FASHION_SCORED)]
    rest = torch.ones(len(y_held), dtype=torch.bool)
    rest[scored] = False
    held = x_held[scored], y_held[scored], x_held[rest], y_held[rest]
    return Material(x[kept], y[kept], *held, 10)


def generated(folder: Path | None = None) -> Material:
    """Small images of three classes, each a pattern under noise: for trials of the script."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 3, 8, 8, generator=generator)
    parts = []
    for n in (90, 60, 60):
        y = torch.arange(n) % 3
        parts += [patterns[y] + torch.randn(n, 3, 8, 8, generator=generator), y]
    return Material(*parts, 3)


LOAD: dict[str, Callable[[Path], Material]] = {
    "cifar10": cifar10,
    "tiny_imagenet": tiny_imagenet,
    "fashion": fashion,
    "generated": generated,
}


def first_of_each_class(y: Tensor, per_class: int) -> Tensor:
    """Indices, rising."""
    return torch.cat([(y == a).nonzero().flatten()[:per_class] for a in y.unique()]).sort().values


def _archives(folder: Path, subset: str, more: str) -> Material:
    parts = [load_npz(folder / subset, split=split) for split in ("train", "test")]
    parts.append(load_npz(folder / more))
    tensors = [tensor for part in parts for tensor in _tensors(part, COLOUR)]
    return Material(*tensors, len(tensors[1].unique()))


def _tensors(data: ImageArrays, statistics: tuple) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    images = data.images.movedim(-1, 1).contiguous().float().div_(255)
    return images.sub_(mean).div_(std), data.targets
