"""How student features meet teacher features of another shape."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from geomkd.common.checks import check_choice
from geomkd.distillation.losses import feature_error
from geomkd.network.kinds import on_line, positions_first
from geomkd.network.layers import Layer
from geomkd.network.masks import Masks, mask_of, of_both, prefix_of
from geomkd.network.pooling import pooled

PROJECTORS = ("linear", "mlp", "pca", "none")
Pair = tuple[Tensor, Tensor]
CHANNEL_AXIS = {"map": 0, "sequence": 0, "map_last": -1, "tokens": -1, "vector": -1}


@dataclass(frozen=True)
class Meeting:
    """What an objective is told before training, to make the modules that it trains.

    Attributes
    ----------
    pairs : list of (Layer, Layer)
        Teacher layer and student layer.
    batch_size : int
        Samples that the loss sees at a time: of one process and one accumulated part of a batch.
    generator : torch.Generator
        Source of initial weights.
    teacher_features : callable
        Returns the teacher's features of each pair, of some hundred training samples.
    """

    pairs: Sequence[tuple[Layer, Layer]]
    batch_size: int
    generator: Generator
    teacher_features: Callable[[], Sequence[Tensor]]


class Alignment(nn.Module):
    """Two layers' features as maps on one grid.

    Tokens that are the same number on both sides become a map (B, C, T, 1), as sequences do, a
    vector one of a single position. Where the positions differ, or with ``spatial``, tokens of
    square images lie on a square grid, without leading tokens that do not fit; those of other
    images are refused, but to meet a vector as their mean. The larger grid, or longer
    sequence, is average-pooled to the smaller.

    Tokens of texts and signals meet by position. Where a mask tells which are real, on either side,
    these alone do, each a sample of its own: of a text with as many on both sides, however each is
    padded, token j meets token j; where the numbers differ (one network strides, or has another
    tokenizer), the more are averaged to the fewer, by relative position.
    """

    def __init__(self, student: Layer, teacher: Layer, *, spatial: bool = False) -> None:
        super().__init__()
        self.layers = sides = (student, teacher)
        sizes = {math.prod(side.shape) // channels(side) for side in sides}
        lines, kinds = [side for side in sides if on_line(side)], {side.kind for side in sides}
        same = len(sizes) == len(kinds) == 1 and kinds <= {"tokens", "vector"}
        oblong = any(side.place == "oblong" and side.kind == "tokens" for side in sides)
        self.to_vector = bool(lines or oblong) and "vector" in kinds
        self.on_grid = not lines and not self.to_vector and (spatial or not same)
        by_token = any(side.place in ("input", "stretch", "decoder") for side in lines)
        apart = [f"positions of {side.name!r} apart" for side in lines if side.place == "apart"]
        if len(lines) == 1 and not self.to_vector:
            raise ValueError(f"{lines[0].kind} of {lines[0].name!r} have no grid to meet maps on")
        if by_token and not self.to_vector and (spatial or apart):
            got = "a projector that mixes neighbours" if spatial else f"{apart[0]} from the mask's"
            raise ValueError(f"a text's tokens meet others of it, each by itself; got {got}")
        for layer in sides if self.on_grid else ():
            check_grid(layer)

    def forward(self, student: Tensor, teacher: Tensor, mask: Masks = None) -> Pair:
        """Both sides as maps (B, C, H, W) of the same H and W."""
        (reals, counts), maps = self.real(student, teacher, mask), []
        for x, layer, real in zip((student, teacher), self.layers, reals, strict=True):
            if counts is not None:
                x = averaged(positions_first(x, layer.kind), real, counts.tolist())
            elif self.to_vector and layer.kind != "vector":
                x = to_map(pooled(x, layer.kind, "mean", real), "vector")
            else:
                x = to_grid(x, layer.kind) if self.on_grid else to_map(x, layer.kind)
            maps.append(x)
        grid = tuple(map(min, *(x.shape[2:] for x in maps)))
        return pooled_to(maps[0], grid), pooled_to(maps[1], grid)

    def real(self, student: Tensor, teacher: Tensor, mask: Masks) -> tuple[list, Tensor | None]:
        """Which positions are real on each side, (B, T), and how many of each sample meet, (B,)."""
        sides = list(zip(self.layers, of_both(mask), (student, teacher), strict=True))
        reals = [mask_of(*side) for side in sides]
        if self.to_vector or all(real is None for real in reals):
            return reals, None
        for i in (i for i, real in enumerate(reals) if real is None):
            x = positions_first(sides[i][2], self.layers[i].kind)
            reals[i] = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return reals, torch.minimum(*(real.sum(dim=1) for real in reals))


class Projector(nn.Module):
    """Takes the features of a student layer to the shape of a teacher layer's.

    Both sides become maps on one grid first, see `Alignment`.

    Parameters
    ----------
    student, teacher : Layer
        The two layers, for their kinds and shapes.
    kind : str
        ``"linear"``: a 1x1 convolution. ``"mlp"``: 1x1, 3x3 and 1x1 convolutions, twice the
        teacher's channels between them. ``"bottleneck"``: the same with half the teacher's
        channels, batch normalisation and ReLU after the last one too. ``"hint"``: a 1x1
        convolution, batch normalisation, ReLU. ``"none"``: nothing; the channels must be as many.
        No convolution has a bias. Inner convolutions are followed by batch normalisation and ReLU.
    generator : torch.Generator, optional
        Source of the initial weights; the global one by default.

    Raises
    ------
    ValueError
        A kind that does not exist; a layer that is neither map, tokens nor vector, tokens that form
        no square grid where one is needed, or channels that differ without a projector.

    Examples
    --------
    >>> import torch
    >>> from geomkd.network.layers import Layer
    >>> student = Layer("layer4", "map", (8, 4, 4))
    >>> projector = Projector(student, Layer("encoder", "tokens", (1 + 4, 16)))
    >>> projected, target = projector(torch.randn(2, 8, 4, 4), torch.randn(2, 5, 16))
    >>> projected.shape == target.shape == (2, 16, 2, 2)
    True
    """

    def __init__(
        self,
        student: Layer,
        teacher: Layer,
        *,
        kind: str = "linear",
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        before, after = (channels(layer) for layer in (student, teacher))
        # A 3x3 convolution looks at neighbours.
        self.align = Alignment(student, teacher, spatial=kind in ("mlp", "bottleneck"))
        if kind == "none" and before != after:
            raise ValueError(
                f"without a projector both layers need as many channels; got {before} of the "
                f"student's {student.name!r} and {after} of the teacher's {teacher.name!r}"
            )
        self.project = _network(kind, before, after)
        reset(self.project, generator)

    def forward(self, student: Tensor, teacher: Tensor, mask: Masks = None) -> Pair:
        """Projected student features and their target, (B, C, H, W), C the teacher's channels."""
        student, target = self.align(student, teacher, mask)
        return self.project(student), target

    def error(self, student: Tensor, teacher: Tensor, mask: Masks = None, **how: str) -> Tensor:
        """Error of each sample, (B,), as `feature_error`; of tokens, of those that meet."""
        error = feature_error(*self(student, teacher, mask), **how)
        _, counts = self.align.real(student, teacher, mask)
        if counts is None:
            return error
        places = torch.arange(int(counts.max()), device=error.device) < counts[:, None]
        sums = error.new_zeros(places.shape).masked_scatter(places, error).sum(dim=1)
        return sums / counts.clamp(min=1)


class PrincipalComponents(Projector):
    """Takes the teacher's features to the student's channels; the student's stay as they are.

    The target is the teacher's features in the basis of their first principal components over
    channels, as many as the student has channels, fitted before training on some hundred samples.
    A student with more channels than the teacher is refused.
    """

    def __init__(self, student: Layer, teacher: Layer, *, features: Tensor) -> None:
        before, after = (channels(layer) for layer in (student, teacher))
        if before > after:
            raise ValueError(
                f"principal components need at most as many student channels as teacher channels; "
                f"got {before} of the student's {student.name!r} and {after} of the teacher's "
                f"{teacher.name!r}"
            )
        nn.Module.__init__(self)
        self.align, self.project = Alignment(student, teacher), nn.Identity()
        # Of the positions that a target has: on a grid there is no class token.
        as_maps = to_grid if self.align.on_grid else to_map
        x = as_maps(features, teacher.kind).movedim(1, -1).flatten(0, -2).double()
        mean = x.mean(dim=0)
        components = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.flip(1)[:, :before]
        # An eigenvector's sign is the library's whim: the largest entry is made positive.
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        self.register_buffer("mean", mean)
        self.register_buffer("components", components * largest.sign())

    def forward(self, student: Tensor, teacher: Tensor, mask: Masks = None) -> Pair:
        """Student features, and the target in the basis of the principal components."""
        student, teacher = self.align(student, teacher, mask)
        centred = teacher.movedim(1, -1) - self.mean.to(teacher.dtype)
        return student, (centred @ self.components.to(teacher.dtype)).movedim(-1, 1)


def make_projector(
    kind: str, meeting: Meeting, teacher_index: int, student_index: int
) -> Projector:
    """Projector between the teacher layer of one pair and the student layer of another.

    Raises
    ------
    ValueError
        Layers that cannot meet; the message names the pair.
    """
    teacher, student = meeting.pairs[teacher_index][0], meeting.pairs[student_index][1]
    try:
        if kind == "pca":
            features = meeting.teacher_features()[teacher_index]
            return PrincipalComponents(student, teacher, features=features)
        return Projector(student, teacher, kind=kind, generator=meeting.generator)
    except ValueError as error:
        raise ValueError(f"pair {(teacher.name, student.name)}: {error}") from None


def linear_projectors(meeting: Meeting) -> nn.ModuleList:
    """One linear projector a pair."""
    return nn.ModuleList(make_projector("linear", meeting, i, i) for i in range(len(meeting.pairs)))


def to_grid(features: Tensor, kind: str) -> Tensor:
    """Features as maps (B, C, H, W); leading tokens outside the square grid are dropped."""
    if kind == "tokens":
        features = features[:, prefix_of(features.shape[1]) :].transpose(1, 2)
        return features.unflatten(2, (math.isqrt(features.shape[2]), -1))
    return to_map(features, kind)


def to_map(features: Tensor, kind: str) -> Tensor:
    """Features as maps, every position kept: tokens (B, T, C) become (B, C, T, 1)."""
    if kind == "map_last":
        return features.movedim(-1, 1)
    if kind == "vector":
        return features[:, :, None, None]
    if kind in ("tokens", "sequence"):
        return (features.transpose(1, 2) if kind == "tokens" else features).unsqueeze(-1)
    return features


def averaged(x: Tensor, real: Tensor, counts: list[int]) -> Tensor:
    """Real tokens of (B, T, C), each sample's averaged to its count of them: (sum, C, 1, 1)."""
    tokens, sizes = x[real], real.sum(dim=1).tolist()
    if sizes != counts:
        parts = zip(tokens.T.split(sizes, dim=1), counts, strict=True)
        fewer = [x if x.shape[1] == n else F.adaptive_avg_pool1d(x, n) for x, n in parts]
        tokens = torch.cat(fewer, dim=1).T
    return tokens[:, :, None, None]


def pooled_to(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool maps to a grid."""
    return features if features.shape[2:] == grid else F.adaptive_avg_pool2d(features, grid)


def channels(layer: Layer) -> int:
    """Channels of a layer; ``ValueError`` for one that has no axis of them."""
    if layer.kind not in CHANNEL_AXIS:
        raise ValueError(
            f"layer {layer.name!r} must give maps, tokens, sequences or vectors; got "
            f"{layer.kind!r} features of shape {tuple(layer.shape)} a sample"
        )
    return layer.shape[CHANNEL_AXIS[layer.kind]]


def check_grid(layer: Layer) -> None:
    """Refuse tokens that form no square grid."""
    if layer.kind == "tokens" and layer.place == "oblong":
        raise ValueError(
            f"layer {layer.name!r}: only tokens of square images have a grid that is known; got "
            f"{layer.shape[0]} tokens of others"
        )
    if layer.kind == "tokens" and prefix_of(layer.shape[0]) is None:
        raise ValueError(
            f"layer {layer.name!r}: tokens must form a square grid after dropping 0, 1, 2 or 5 of "
            f"them; got {layer.shape[0]} tokens"
        )


def check_map(layer: Layer, why: str) -> None:
    """Refuse a layer that gives no maps; the message begins with why."""
    if layer.kind not in ("map", "map_last"):
        raise ValueError(
            f"{why}; layer {layer.name!r} gives {layer.kind} features of shape "
            f"{tuple(layer.shape)} a sample"
        )


def _network(kind: str, before: int, after: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return _convolution(before, after, 1)
    if kind == "hint":
        return nn.Sequential(*_unit(before, after, 1))
    check_choice(kind, "a projector's kind", ("linear", "mlp", "bottleneck", "hint", "none"))
    middle = 2 * after if kind == "mlp" else max(1, after // 2)
    units = [*_unit(before, middle, 1), *_unit(middle, middle, 3)]
    last = _unit(middle, after, 1)
    return nn.Sequential(*units, *(last if kind == "bottleneck" else last[:1]))


def _unit(before: int, after: int, size: int) -> list[nn.Module]:
    return [_convolution(before, after, size), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


def _convolution(before: int, after: int, size: int) -> nn.Module:
    # Without its own initial weights, whose draws would come from the global random state.
    return skip_init(nn.Conv2d, before, after, size, padding=size // 2, bias=False)


def reset(network: nn.Module, generator: Generator | None) -> None:
    """Draw the weights that fresh layers would have, from a generator of our own."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
