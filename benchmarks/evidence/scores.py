"""Every score of every candidate layer, on each kind of images, as columns."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.material import Material
from benchmarks.evidence.moments import last_block, moments
from benchmarks.evidence.teachers import Teacher
from geomkd import pair_layers, score_layers
from geomkd.measures.table import NAMES

QUALITY = ("separation", "information", "efficiency", "quality")
# held-out: test images that measure no accuracy; training: as many of the teacher's own; paper:
# Q alone, of training images as the paper samples them; untrained: random weights of another seed;
# permuted: labels of held-out images in random order.
IMAGES = ("held-out", "training", "paper", "untrained", "permuted")


def score(
    teacher: Teacher, model: nn.Module, material: Material, images: str, names: Sequence[str]
) -> dict[str, Any]:
    """Columns of scores by name, a number a layer (None where there is none)."""
    started = time.perf_counter()
    x, y = material.x_score, material.y_score
    options = {"subsamples": 0, "dataset_size": len(material.x_train), "progress": False}
    if images == "training":
        options["samples"] = len(x)
    if images in ("training", "paper"):
        x, y = material.x_train, material.y_train
    if images == "untrained":
        model = teacher.build(material, seed=1).eval()
    if images == "permuted":
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    if images == "paper":
        options["protocol"] = "paper"
        columns = _numbers(score_layers(model, (x, y), list(names), **options).to_frame())
        columns = {name: columns[name] for name in ("role", *QUALITY)}
    else:
        columns = _every(teacher, model, material, (x, y), names, options)
    found = {"images": images, "layers": list(names), "columns": columns}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def _every(
    teacher: Teacher, model: nn.Module, material: Material, data: tuple[Tensor, Tensor],
    names: Sequence[str], options: dict[str, Any],
) -> dict[str, list]:  # fmt: skip
    scores = score_layers(model, data, list(names), measures=NAMES, **options)
    columns = _numbers(scores.to_frame())
    robust = score_layers(model, data, list(names), definition="robust", **options).to_frame()
    columns |= {f"robust_{name}": _numbers(robust)[name] for name in QUALITY}
    (first,) = scores.select(1, by="loes")
    columns["loes_first"] = [float(name == first) for name in names]
    student = teacher.build_student(material, seed=0)
    x = data[0][: len(material.x_score)]
    ((_, block),) = pair_layers(list(names)[:1], student, x[:2])
    block = last_block(student, block, x)
    width = block.shape[0] if block.kind == "map" else block.shape[-1]
    held = moments(model, names, block, x)
    columns["reach"] = [held[name].reach(width) for name in names]
    return columns


def _numbers(frame: Any) -> dict[str, list]:
    kept = frame.drop(columns=["layer", "kind", "shape"]).to_dict("list")
    return {
        name: [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]
        for name, values in kept.items()
    }
