"""The nine teachers: what they are, how they are trained, where their weights are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.material import Material, first_of_each_class
from benchmarks.evidence.networks import build
from benchmarks.paper.augment import augment_crop_flip
from geomkd import candidate_layers, distill
from geomkd.common.files import atomic_write
from geomkd.network.forward import evaluating

Network = tuple[str, dict[str, Any]]
TEACHERS_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """How students are trained, the same for every layer of a teacher.

    Where the mean Kendall's tau between the orders of the layers by two seeds is below
    ``least_ceiling``, a teacher decides nothing.
    """

    per_class: int = 500
    epochs: int = 8
    batch_size: int = 64
    lr: float = 0.0075
    seeds: int = 3
    least_ceiling: float = 0.7


@dataclass(frozen=True)
class Teacher:
    """A teacher, its students, and how both are trained.

    ``published`` names a file of weights; without one the teacher is trained here, from seed 0.
    ``every`` leaves blocks out: of 2, every second one is a candidate.
    """

    name: str
    data: str
    network: Network
    student: Network
    confirmation: bool = False
    published: str | None = None
    epochs: int = 12
    lr: float = 0.0075
    augment: bool = True
    every: int = 1
    recipe: Recipe = field(default=Recipe())

    def build(self, material: Material, *, seed: int = 0) -> nn.Module:
        return self._built(self.network, material, seed)

    def build_student(self, material: Material, *, seed: int) -> nn.Module:
        return self._built(self.student, material, seed)

    @staticmethod
    def _built(network: Network, material: Material, seed: int) -> nn.Module:
        shape = tuple(material.x_train.shape[1:])
        return build(*network, shape=shape, classes=material.classes, seed=seed)

    def layers(self, model: nn.Module, material: Material) -> list[str]:
        """Names of the candidates, in order of depth."""
        found = candidate_layers(model, beside(model, material.x_train[:2]))
        blocks = [layer.name for layer in found if layer.role == "block"]
        left_out = set(blocks) - set(blocks[:: self.every])
        return [layer.name for layer in found if layer.name not in left_out]

    def students_images(self, material: Material) -> tuple[Tensor, Tensor]:
        """Images and labels that every student is trained on."""
        chosen = first_of_each_class(material.y_train, self.recipe.per_class)
        return material.x_train[chosen], material.y_train[chosen]

    @property
    def protocol(self) -> str:
        """Letters that change when anything above does."""
        return _digest(json.dumps(asdict(self), sort_keys=True).encode())


def residual(*widths: int, blocks: int) -> Network:
    return "residual", {"widths": widths, "blocks": blocks}


def vgg(*widths: int) -> Network:
    return "vgg", {"widths": widths, "convolutions": 2}


def vit(width: int, blocks: int, heads: int = 4, patch: int = 4) -> Network:
    return "vit", {"width": width, "blocks": blocks, "heads": heads, "patch": patch}


TEACHERS = [
    Teacher(
        "cifar10-resnet20", "cifar10", ("published", {"blocks": 3}), residual(8, 16, 32, blocks=1),
        published="resnet20_cifar10.pth",
    ),
    Teacher(
        "cifar10-resnet56", "cifar10", ("published", {"blocks": 9}), residual(8, 16, 32, blocks=1),
        published="resnet56_cifar10.pth", every=2,
    ),
    Teacher(
        "cifar10-vgg", "cifar10", vgg(16, 32, 64, 128), residual(8, 16, 32, 64, blocks=1),
        epochs=20,
    ),
    Teacher(  # until it is right on all of its images
        "cifar10-resnet-fitted", "cifar10", residual(16, 32, 64, 128, blocks=2),
        residual(8, 16, 32, 64, blocks=1), augment=False,
    ),
    Teacher(
        "tiny-resnet", "tiny_imagenet", residual(24, 48, 96, blocks=2),
        residual(12, 24, 48, blocks=1), confirmation=True, recipe=Recipe(per_class=250),
    ),
    Teacher(
        "tiny-vgg", "tiny_imagenet", vgg(16, 32, 64, 128), residual(8, 16, 32, 64, blocks=1),
        confirmation=True, recipe=Recipe(per_class=250), epochs=16,
    ),
    Teacher(
        "tiny-vit", "tiny_imagenet", vit(64, 8), vit(32, 4), confirmation=True, lr=0.001, epochs=20,
        recipe=Recipe(per_class=250, lr=0.001),
    ),
    Teacher(
        "fashion-resnet", "fashion", residual(16, 32, 64, blocks=2), residual(8, 16, 32, blocks=1),
        confirmation=True, epochs=10,
    ),
    Teacher(
        "fashion-vit", "fashion", vit(64, 8), vit(32, 4), confirmation=True, lr=0.001, epochs=12,
        recipe=Recipe(lr=0.001),
    ),
]  # fmt: skip
_QUICK = Recipe(per_class=30, epochs=1, batch_size=16, seeds=2, least_ceiling=-1.0)
QUICK = [
    Teacher(
        "quick-resnet", "generated", residual(8, 12, blocks=1), residual(4, 6, blocks=1), epochs=2,
        recipe=_QUICK,
    ),
    Teacher(
        "quick-vit", "generated", vit(8, 2, heads=2), vit(4, 2, heads=2), confirmation=True,
        epochs=2, lr=0.005, recipe=_QUICK,
    ),
]  # fmt: skip


def weights_file(teacher: Teacher, data: Path, results: Path) -> Path:
    """Where the weights are, or will be."""
    if teacher.published:
        return data / teacher.published
    return results / "teachers" / f"{teacher.name}.pt"


def load(teacher: Teacher, material: Material, path: Path) -> nn.Module:
    """Teacher with the weights of a file, in evaluation mode."""
    model = teacher.build(material)
    state = torch.load(path, map_location="cpu", weights_only=True)
    # Older files have no counters of batches, which nothing here reads.
    missing = [n for n in model.state_dict() if n not in state and "num_batches" not in n]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} of the teacher {teacher.name}")
    model.load_state_dict(state, strict=False)
    return model.eval()


def train(teacher: Teacher, material: Material, path: Path, work: Path) -> None:
    """Train a teacher and keep its weights in half precision: measured is what is kept."""
    augment = augment_crop_flip() if teacher.augment else None
    model = teacher.build(material)
    distill(
        model, None, (material.x_train, material.y_train), objective="ce", epochs=teacher.epochs,
        batch_size=TEACHERS_BATCH, lr=teacher.lr, seed=0, augment=augment, progress=False,
        checkpoint_dir=work / "training" / teacher.name,
    )  # fmt: skip
    state = {n: v.half() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(state, file)


def fingerprint(model: nn.Module) -> str:
    """Letters that stand for the weights."""
    parts = []
    for name, value in sorted(model.state_dict().items()):
        if "num_batches" not in name:
            parts += [name.encode(), value.detach().cpu().float().contiguous().numpy().tobytes()]
    return _digest(*parts)


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is the label's, for each image."""
    with evaluating(model):
        found = [model(beside(model, batch)).argmax(1).cpu() for batch in x.split(500)]
    return torch.cat(found) == y


def beside(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs on the device of a model."""
    return x.to(next(model.parameters()).device)


def _digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:12]
