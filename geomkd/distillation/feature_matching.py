"""Which student layer learns from which teacher layer: pairs, all of them, or learned attention."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from geomkd.distillation.losses import at_least_float32
from geomkd.distillation.projectors import Meeting, make_projector, reset

PAIRINGS = ("one_to_one", "all", "attention")


class Matching(nn.Module):
    """Projectors of a set of layers, and the error of what they project.

    ``pairing`` and ``projector`` are as in `geomkd.distillation.objectives.Features`.
    """

    def __init__(self, meeting: Meeting, *, pairing: str, projector: str) -> None:
        super().__init__()
        teachers, students = (_first_places(side) for side in zip(*meeting.pairs, strict=True))
        # Places of a teacher layer and a student layer among the pairs.
        if pairing == "one_to_one":
            self.combinations = [(i, i) for i in range(len(meeting.pairs))]
        else:
            self.combinations = [(t, s) for s in students for t in teachers]
        self.projectors = nn.ModuleList(
            make_projector(projector, meeting, *places) for places in self.combinations
        )
        self.teachers, self.students, self.attention = teachers, students, None
        if pairing == "attention":
            self.attention = LayerAttention(
                len(students), len(teachers), meeting.batch_size, generator=meeting.generator
            )

    def forward(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], **how: Any
    ) -> Tensor:
        """Mean error of the combinations; with attention, the weighted sum over teacher layers."""
        errors = [
            projector.error(student_features[s], teacher_features[t], **how)
            for projector, (t, s) in zip(self.projectors, self.combinations, strict=True)
        ]
        if self.attention is None:
            return torch.stack([error.mean() for error in errors]).mean()
        weights = self.attention(
            [student_features[s] for s in self.students],
            [teacher_features[t] for t in self.teachers],
        )
        each = torch.stack(errors, dim=1).unflatten(1, weights.shape[1:])
        return (weights * each).sum(dim=2).mean()


class LayerAttention(nn.Module):
    """How much each student layer attends to each teacher layer, sample by sample.

    A layer's query (student) or key (teacher) of a sample is made by a small network from the
    sample's row of the batch's Gram matrix F F^T; the weights are the softmax over teacher layers
    of their products.

    Parameters
    ----------
    n_students, n_teachers : int
        Numbers of layers.
    batch_size : int
        B; fixed, since the networks' inputs are rows of B x B matrices.
    generator : torch.Generator, optional
        Source of the initial weights.

    References
    ----------
    Chen et al.: Cross-layer distillation with semantic calibration. arXiv:2012.03236.

    Examples
    --------
    >>> attention = LayerAttention(2, 3, batch_size=8)
    >>> weights = attention([torch.randn(8, 4)] * 2, [torch.randn(8, 5)] * 3)
    >>> weights.shape, bool(weights.sum(dim=2).allclose(torch.ones(8, 2)))
    (torch.Size([8, 2, 3]), True)
    """

    def __init__(
        self,
        n_students: int,
        n_teachers: int,
        batch_size: int,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, width = batch_size, max(1, batch_size // 4)

        def network() -> nn.Module:
            first = skip_init(nn.Linear, batch_size, 2 * width)
            return nn.Sequential(first, nn.ReLU(), skip_init(nn.Linear, 2 * width, width))

        self.queries = nn.ModuleList(network() for _ in range(n_students))
        self.keys = nn.ModuleList(network() for _ in range(n_teachers))
        reset(self, generator)

    def forward(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]
    ) -> Tensor:
        """Weights of shape (B, n_students, n_teachers), summing to 1 over the last axis."""
        if len(student_features[0]) != self.batch_size:
            raise ValueError(
                f"attention was made for batches of {self.batch_size} samples; "
                f"got {len(student_features[0])}"
            )
        queries = _embedded(self.queries, student_features)
        keys = _embedded(self.keys, teacher_features)
        return torch.softmax(queries @ keys.transpose(1, 2), dim=2)


def _embedded(networks: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
    """Return the unit vectors of each layer, (B, n_layers, width)."""
    rows = [at_least_float32(x).flatten(1) for x in features]
    vectors = [network(x @ x.T) for network, x in zip(networks, rows, strict=True)]
    return F.normalize(torch.stack(vectors, dim=1), dim=2)


def _first_places(layers: Sequence) -> list[int]:
    """Places where each layer occurs first."""
    names = [layer.name for layer in layers]
    return [names.index(name) for name in dict.fromkeys(names)]
