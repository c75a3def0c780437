"""Tokens told from sequences, and where their positions lie, by how each network is written."""

import pytest
import torch
from torch import nn

from geomkd.network.kinds import on_line
from geomkd.network.layers import Layer, describe_layers


class Residual(nn.Module):
    """A unit of 1-D convolutions with squeeze and excitation: (B, C, L) in and out."""

    def __init__(self, c):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(c, c, 3, padding=1), nn.BatchNorm1d(c), nn.ReLU()
        self.gate = nn.Linear(c, c)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.act(x * self.gate(x.mean(2)).sigmoid()[:, :, None])


class Conformer(nn.Module):
    """A transformer's unit with a convolution over time inside: (B, T, C) in and out."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.conv, self.last = (
            nn.LayerNorm(c),
            nn.Conv1d(c, c, 3, padding=1),
            nn.Linear(c, c),
        )

    def forward(self, x):
        return self.last(x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2))


class TextCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.time = nn.Embedding(9, 4), nn.LSTM(4, 3, batch_first=True)
        self.conv, self.act, self.pool = nn.Conv1d(4, 5, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2)

    def forward(self, input_ids):
        x = self.words(input_ids)
        self.time(x)
        return self.pool(self.act(self.conv(x.transpose(1, 2))))


def told(model, x, *names):
    return [(layer.kind, layer.place) for layer in describe_layers(model, names, x)]


# As many positions as channels too, where only the modules can tell.
@pytest.mark.parametrize("length", [6, 11])
def test_units_of_signals(length):
    stem = nn.Conv1d(2, 6, 3, padding=1)
    x, names = torch.zeros(3, 2, length), ("0", "0.input", "1", "1.act", "2")
    assert told(nn.Sequential(stem, Residual(6), nn.AvgPool1d(2)), x, *names) == [
        ("sequence", "line")
    ] * len(names)
    x = torch.zeros(3, length, 6)
    assert (
        told(nn.Sequential(Conformer(6), nn.GELU()), x, "0", "1", "0.norm")
        == [("tokens", "line")] * 3
    )
    assert told(Conformer(6), x, "conv") == [("sequence", "line")]


def test_a_norm_over_channels_and_length_tells_nothing():
    model = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.LayerNorm([6, 8]), nn.ReLU())
    assert told(model, torch.zeros(3, 2, 8), "1", "2") == [("sequence", "line")] * 2


def test_where_nothing_tells_it_is_tokens():
    assert told(nn.Sequential(nn.Identity(), nn.ReLU()), torch.zeros(3, 2, 8), "1") == [
        ("tokens", "line")
    ]


def test_positions_of_a_text_are_those_of_its_ids():
    names = ("words", "time", "conv", "act", "pool")
    kinds = ["tokens", "tokens", "sequence", "sequence", "sequence"]
    places = ["input"] * 4 + ["line"]  # half as many are no longer those of the ids
    ids = torch.zeros(3, 8, dtype=torch.long)
    for x in (ids, {"input_ids": ids}):
        assert told(TextCNN(), x, *names) == list(zip(kinds, places, strict=True))


def test_tokens_of_images_lie_on_a_grid():
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(2), nn.Linear(4, 4))
    images, signals = torch.zeros(3, 3, 8, 8), torch.zeros(3, 4, 4)
    assert told(model, images, "2") == [("tokens", "grid")]
    assert told(model[2:], signals, "2") == [("tokens", "line")]
    assert [on_line(Layer("x", "tokens", (4, 4), place=p)) for p in ("grid", "line")] == [0, 1]
    assert on_line(Layer("x", "sequence", (4, 4))) and not on_line(Layer("x", "vector", (4,)))


@pytest.mark.parametrize("images", [(1, 8, 12), (8, 12)])
def test_maps_of_images_that_are_not_square(images):
    """As many channels as rows, or a grid of as many rows as columns, is no square."""

    class Unit(nn.Module):
        def __init__(self, *convolution, **options):
            super().__init__()
            self.conv, self.act = nn.Conv2d(*convolution, **options), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(x if x.ndim == 4 else x[:, None]))

    model = nn.Sequential(Unit(1, 8, 3, padding=1), Unit(8, 2, 4, stride=4))
    x = torch.zeros(3, *images)
    assert told(model, x, "0", "0.act", "1") == [("map", "grid")] * 3
    shapes = [layer.shape for layer in describe_layers(model, ["0", "1"], x)]
    assert shapes == [(8, 8, 12), (2, 2, 3)]


def test_maps_with_channels_last_of_images_that_are_not_square():
    model = nn.Sequential(nn.Linear(3, 12), nn.Conv2d(8, 8, 1))
    assert told(model, torch.zeros(3, 8, 12, 3), "0") == [("map_last", "grid")]
    # Neither 1 nor 3 channels: the modules tell.
    assert told(nn.Sequential(nn.Linear(5, 5)), torch.zeros(3, 8, 12, 5), "0")[0][0] == "map_last"
    assert told(nn.Sequential(nn.Conv2d(5, 5, 1)), torch.zeros(3, 5, 8, 12), "0")[0][0] == "map"


def test_tokens_of_images_that_are_not_square_are_on_no_grid_that_is_known():
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(2), nn.Linear(16, 16))
    (layer,) = describe_layers(model, ["2"], torch.zeros(3, 3, 8, 32))
    assert (layer.kind, layer.place, on_line(layer)) == ("tokens", "oblong", False)
