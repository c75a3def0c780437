"""Means and second moments of a teacher's channels, on the grid that a student sees them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.evidence.teachers import beside
from geomkd import capture
from geomkd.distillation.projectors import Alignment
from geomkd.network.forward import evaluating
from geomkd.network.layers import Layer, describe_layers

BATCH = 250


class Moments(NamedTuple):
    """Of all images and positions of a layer, in float64."""

    mean: Tensor  # (C,)
    second: Tensor  # (C, C), not about the mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel, where it is above half precision's rounding."""
        variance = (self.second.diagonal() - self.mean.square()).clamp(min=0)
        return torch.maximum(variance.sqrt(), 2e-3 * self.mean.abs()).clamp(min=1e-6)

    def reach(self, width: int) -> float:
        """Share of the second moment that a linear projector from ``width`` channels can reach."""
        values = torch.linalg.eigvalsh(self.second).clamp(min=0).flip(0)
        return float(values[:width].sum() / values.sum())


def last_block(student: nn.Module, name: str, x: Tensor) -> Layer:
    """Describe the student's paired layer."""
    return describe_layers(student, [name], beside(student, x[:2]))[0]


def moments(
    teacher: nn.Module, names: Sequence[str], student: Layer, x: Tensor, *, pooled: bool = False
) -> dict[str, Moments]:
    """Moments of each of the teacher's layers where it meets the student's layer, or pooled."""
    layers = describe_layers(teacher, names, beside(teacher, x[:2]))
    align = {layer.name: Alignment(student, layer) for layer in layers}
    sums = dict.fromkeys(names, 0.0)
    squares, counts = dict(sums), dict(sums)
    for batch in x.split(BATCH):
        batch = beside(teacher, batch)
        blank = batch.new_zeros(len(batch), *student.shape)
        with evaluating(teacher), capture(teacher, names) as features:
            teacher(batch)
        for name in names:
            _, target = align[name](blank, features[name])
            if pooled:
                target = target.mean(dim=(2, 3), keepdim=True)
            rows = target.movedim(1, -1).flatten(0, -2).double()
            sums[name] = sums[name] + rows.sum(dim=0)
            squares[name] = squares[name] + rows.T @ rows
            counts[name] += len(rows)
    return {n: Moments(sums[n] / counts[n], squares[n] / counts[n]) for n in names}
