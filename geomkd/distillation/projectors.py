"""How student features meet teacher features of another shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from geomkd.layers import Layer

PREFIX_TOKENS = (0, 1, 2, 5)  # none, a class token, with a distillation token, with four registers
CHANNEL_AXIS = {"map": 0, "map_last": -1, "tokens": -1, "vector": -1}  # of one sample's shape


class Projector(nn.Module):
    """Takes the features of a student layer to the shape of a teacher layer's.

    A bias-free 1x1 convolution for maps, a bias-free linear layer over the features of vectors
    and of tokens that are the same number on both sides. Everything else meets on a grid: the
    larger one is average-pooled to the smaller before the projection.

    Parameters
    ----------
    student, teacher : Layer
        The two layers, for their kinds and shapes.
    generator : torch.Generator, optional
        Source of the initial weights; the global one by default.

    Raises
    ------
    ValueError
        A layer that is neither map, tokens nor vector, or tokens that form no square grid where
        one is needed.

    Examples
    --------
    >>> import torch
    >>> from geomkd.layers import Layer
    >>> student = Layer("layer4", "map", (8, 4, 4))
    >>> projector = Projector(student, Layer("encoder", "tokens", (1 + 4, 16)))
    >>> projected, target = projector(torch.randn(2, 8, 4, 4), torch.randn(2, 5, 16))
    >>> projected.shape == target.shape == (2, 16, 2, 2)
    True
    """

    def __init__(
        self, student: Layer, teacher: Layer, *, generator: Generator | None = None
    ) -> None:
        super().__init__()
        channels = [_channels(layer) for layer in (student, teacher)]
        self.student_kind, self.teacher_kind = student.kind, teacher.kind
        self.on_grid = not _same_positions(student, teacher)
        if self.on_grid:
            for layer in (student, teacher):
                _check_grid(layer)
            self.project = skip_init(nn.Conv2d, *channels, kernel_size=1, bias=False)
        else:
            self.project = skip_init(nn.Linear, *channels, bias=False)
        # What a fresh nn.Conv2d or nn.Linear draws, from a generator of our own.
        nn.init.kaiming_uniform_(self.project.weight, a=math.sqrt(5), generator=generator)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Projected student features and their target.

        Parameters
        ----------
        student, teacher : Tensor
            Features of the two layers, the batch axis first.

        Returns
        -------
        projected, target : Tensor, shape (B, C) or (B, C, T) or (B, C, H, W)
            Both of the same shape, with the teacher's channels on the second axis.
        """
        if not self.on_grid:
            return self.project(student).movedim(-1, 1), teacher.movedim(-1, 1)
        student = to_grid(student, self.student_kind)
        teacher = to_grid(teacher, self.teacher_kind)
        grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        return self.project(_pooled(student, grid)), _pooled(teacher, grid)


def make_projectors(pairs: Sequence[tuple[Layer, Layer]], *, seed: int = 0) -> nn.ModuleList:
    """One seeded projector per (teacher layer, student layer); errors name the pair.

    Parameters
    ----------
    pairs : sequence of (Layer, Layer)
        Teacher layer and student layer.
    seed : int
        Seed of the initial weights.
    """
    generator = Generator().manual_seed(seed)
    projectors = nn.ModuleList()
    for teacher, student in pairs:
        try:
            projectors.append(Projector(student, teacher, generator=generator))
        except ValueError as error:
            raise ValueError(f"pair {(teacher.name, student.name)}: {error}") from None
    return projectors


def to_grid(features: Tensor, kind: str) -> Tensor:
    """Features as maps of shape (B, C, H, W).

    Parameters
    ----------
    features : Tensor, the batch axis first
        Maps, tokens or vectors; leading tokens outside the square grid are dropped.
    kind : {"map", "map_last", "tokens", "vector"}
        What the axes mean.
    """
    if kind == "map_last":
        return features.movedim(-1, 1)
    if kind == "vector":
        return features[:, :, None, None]
    if kind == "tokens":
        prefix, side = _square(features.shape[1])
        return features[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return features


def _square(n_tokens: int) -> tuple[int, int]:
    """Return the number of prefix tokens and the side of the square grid that the others form."""
    for prefix in PREFIX_TOKENS:
        side = math.isqrt(max(n_tokens - prefix, 0))
        if side > 0 and side * side == n_tokens - prefix:
            return prefix, side
    raise ValueError(
        f"tokens must form a square grid after dropping 0, 1, 2 or 5 of them; got {n_tokens} tokens"
    )


def _pooled(features: Tensor, grid: tuple[int, int]) -> Tensor:
    return features if features.shape[2:] == grid else F.adaptive_avg_pool2d(features, grid)


def _channels(layer: Layer) -> int:
    if layer.kind not in CHANNEL_AXIS:
        raise ValueError(
            f"layer {layer.name!r} must give maps, tokens or vectors; got {layer.kind!r} features "
            f"of shape {tuple(layer.shape)} a sample"
        )
    return layer.shape[CHANNEL_AXIS[layer.kind]]


def _same_positions(student: Layer, teacher: Layer) -> bool:
    if student.kind != teacher.kind or student.kind not in ("tokens", "vector"):
        return False
    return student.shape[:-1] == teacher.shape[:-1]


def _check_grid(layer: Layer) -> None:
    if layer.kind == "tokens":
        try:
            _square(layer.shape[0])
        except ValueError as error:
            raise ValueError(f"layer {layer.name!r}: {error}") from None
