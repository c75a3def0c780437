"""What a layer's tensor is (a map, tokens, a sequence, a vector), and where its positions lie."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from geomkd.network.calls import Event
from geomkd.network.forward import tensors_in

CONVOLUTION = nn.modules.conv._ConvNd
CHANNELS_FIRST = (CONVOLUTION, nn.modules.batchnorm._NormBase, nn.GroupNorm)
# Not by isinstance: LayerNorm2d classes derive from nn.LayerNorm and take channels first.
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.LSTM, nn.GRU, nn.RNN)


def kind_and_place(
    event: Event,
    events: Sequence[Event],
    modules: Mapping[str, nn.Module],
    example_input: Any,
    decoded: bool = False,
) -> tuple[str, str]:
    """Kind and place of a layer, as `Layer` has them."""
    if (axes := len(event.shape)) != 2:
        first = axes == 3 and _is_map(event, modules, _image(example_input))
        three = "map" if first else "map_last"
        return {1: "vector", 3: three}.get(axes, "other"), "grid"
    sequence, given = _is_sequence(event, events), list(tensors_in(example_input))
    kind, length = ("sequence", event.shape[1]) if sequence else ("tokens", event.shape[0])
    if decoded:
        return kind, "decoder"
    if any(x.shape[1:] == (length,) and not x.is_floating_point() for x in given):
        return kind, "input"
    if sequence or all(x.ndim < 4 for x in given):
        return kind, "line"
    height, width = _image(example_input)
    return kind, "grid" if height == width and all(x.ndim < 5 for x in given) else "oblong"


def on_line(layer: Any) -> bool:
    """Whether a layer's positions follow one another, as those of a text or a signal do."""
    tokens = layer.kind == "tokens" and layer.place not in ("grid", "oblong")
    return tokens or layer.kind == "sequence"


def positions_first(x: Tensor, kind: str) -> Tensor:
    """Give tokens or a sequence as (B, T, C); of its own output, the features again."""
    return x.transpose(1, 2) if kind == "sequence" else x


def _is_sequence(event: Event, events: Sequence[Event]) -> bool:
    """Whether channels are first, as in the last module before that tells, or the first after."""
    at = events.index(event) + 1
    for e in (*reversed(events[:at]), *events[at:]):
        first = isinstance(e.module, CHANNELS_FIRST)
        whole = len(getattr(e.module, "normalized_shape", ())) > 1  # its norm tells no channels
        axis = 0 if first else 1 if type(e.module) in CHANNELS_LAST and not whole else None
        if axis is not None and len(e.shape) == 2 and e.shape[axis] == event.shape[axis]:
            return first
    return False


def _image(example_input: Any) -> tuple[int, int]:
    """Height and width of the first image in a batch, as far as they count.

    (1, 1) where there is none, or it is square whichever axis has the channels; (0, 0) where it is
    not and the channels, neither 1 nor 3, do not tell.
    """
    shape = next((x.shape for x in tensors_in(example_input) if x.ndim > 2), (1, 1))
    if len(shape) != 4 or shape[1] in (1, 3):
        return tuple(shape[-2:])
    square = shape[1] == shape[2] or shape[2] == shape[3]
    return tuple(shape[1:3]) if shape[3] in (1, 3) else (square, square)


def _is_map(event: Event, modules: Mapping[str, nn.Module], image: tuple[int, int]) -> bool:
    """Whether a layer of three axes has its channels first."""
    (first, middle, last), (height, width) = event.shape, image
    is_map, is_map_last = middle * width == last * height, first * width == middle * height
    if is_map != is_map_last:  # the grid has the image's proportions
        return is_map
    path = next(name for name, module in modules.items() if module is event.module)
    while True:  # as the module, else the nearest one around it that shows
        around = list(modules[path].modules())
        if any(isinstance(m, CONVOLUTION | nn.BatchNorm2d) for m in around):
            return True
        if any(type(m) in (nn.Linear, nn.LayerNorm) for m in around):
            return False
        if not path:
            return True
        path = path.rpartition(".")[0]
