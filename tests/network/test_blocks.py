"""How blocks are told: what a chain is, stages, patterns of names, what was made from what."""

import re

import pytest
import torch
from torch import nn
from torchvision.models import resnet34, vgg11

from geomkd import choose_layers, pair_layers, score_layers
from geomkd.network.dataflow import Dataflow
from geomkd.network.layers import candidate_layers, describe_layers, survey


class Unit(nn.Module):
    """A convolution with its activation; alone, it is the block of a plain network."""

    def __init__(self, channels, given=None):
        super().__init__()
        self.conv, self.act = nn.Conv2d(given or channels, channels, 1), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Around(nn.Module):
    """Two units, and the way around both."""

    def __init__(self, channels):
        super().__init__()
        self.one, self.two = Unit(channels), Unit(channels)

    def forward(self, x):
        return x + self.two(self.one(x))


class Branches(nn.Module):
    """Two units side by side."""

    def __init__(self, channels):
        super().__init__()
        self.left, self.right = Unit(channels), Unit(channels)

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], 1)[:, ::2]


class Alternating(nn.Module):
    """Two parts, each with a way around itself, as in a transformer whose norms come last."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = Around(channels), Unit(channels)

    def forward(self, x):
        x = self.first(x)
        return x * self.second(x)


X = torch.zeros(2, 4, 6, 6)


def blocks_of(*body, x=X):
    with_head = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))
    with_head(x)
    return [layer.name for layer in candidate_layers(with_head, x) if layer.role == "block"]


@pytest.mark.parametrize("kind", [Unit, Around, Branches, Alternating])
def test_the_innermost_unbroken_chain(kind):
    assert blocks_of(*(kind(4) for _ in range(3))) == ["0", "1", "2"]


def test_chains_in_a_container_that_is_a_chain_itself():
    class Stage(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.blocks, self.down = nn.Sequential(Around(4), Around(4)), nn.Conv2d(4, 4, 2, 2)

        def forward(self, x):
            return self.down(self.blocks(x))

    expected = [f"{i}.blocks.{j}" for i in range(2) for j in range(2)]
    assert blocks_of(Stage(4), Stage(4)) == expected
    # With a convolution of the same shape between any two, the stages alone are a chain.
    assert blocks_of(
        *(nn.Sequential(Around(4), nn.Conv2d(4, 4, 1)) for _ in range(2)), Unit(4)
    ) == [
        "0.0",
        "1.0",
        "2",
    ]


def test_none_keeps_the_shape():
    """A stem's convolutions: no chain, and without any chain what occurs twice."""
    stem = nn.Sequential(Unit(8, 4), Unit(16, 8))
    assert blocks_of(stem, Around(16), Around(16)) == ["1", "2"]
    assert blocks_of(Unit(8, 4), Unit(16, 8)) == ["0", "1"]


def test_others_in_a_row_with_blocks():
    """Before the last of them, or of a class that is; a head at the end of the row is none."""
    assert blocks_of(Branches(4), Unit(4), Unit(4), Branches(4), Around(4)) == ["0", "1", "2", "3"]


def test_the_only_module_of_a_list_is_a_block():
    """A network of one layer: its list says that there might be more."""

    class Listed(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.layers, self.heads = nn.ModuleList([Unit(4)]), nn.ModuleList([head])

        def forward(self, x):
            return self.heads[0](self.layers[0](x))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    layers = [layer.name for layer in candidate_layers(Listed(Head()), X)]
    assert layers == ["layers.0", "heads.0.fc.input"]


def test_convolutional_head_is_not_offered():
    body = [Unit(4), Unit(4), nn.Dropout(), nn.Conv2d(4, 3, 1), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = candidate_layers(model, X)
    assert [(layer.name, layer.feeds_head) for layer in layers] == [("0", False), ("1", True)]
    # A map that is not averaged is no class scores.
    assert [layer.name for layer in candidate_layers(model[:5], X)] == ["0", "1", "4"]


class Towers(nn.Module):
    """Two towers of one class; their ends meet in a linear layer, or in a product."""

    def __init__(self, meet):
        super().__init__()
        self.left, self.right = (nn.Sequential(Around(4), Around(4)) for _ in range(2))
        self.to_left, self.to_right = nn.Linear(4, 5), nn.Linear(4, 5)
        self.head, self.meet = nn.Linear(10, 3), meet

    def forward(self, x):
        one = self.to_left(self.left(x).mean((2, 3)))
        two = self.to_right(self.right(x).mean((2, 3)))
        return self.head(torch.cat([one, two], 1)) if self.meet else one @ two.T


@pytest.mark.parametrize(("meet", "head"), [(True, ["head.input"]), (False, [])])
def test_towers_and_where_they_meet(meet, head):
    layers = [layer.name for layer in candidate_layers(Towers(meet), X)]
    assert layers == ["left.0", "left.1", "right.0", "right.1", *head]


def test_stages():
    resnet, vgg, x = resnet34(), vgg11(), torch.zeros(2, 3, 64, 64)
    with torch.device("meta"):
        resnet, vgg, x = resnet.to("meta"), vgg.to("meta"), x.to("meta")
    stages = ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]
    assert [e.name for e in candidate_layers(resnet, x, granularity="stages")] == [
        "relu",
        *stages,
        "fc.input",
    ]
    found = [layer.name for layer in candidate_layers(vgg, x, granularity="stages")]
    assert found[:5] == [f"features.{i}" for i in (1, 4, 9, 14, 19)]
    assert choose_layers(resnet, x, 4, granularity="stages") == stages
    assert pair_layers(["a", "b"], resnet, x, granularity="stages") == [
        ("a", "layer2.3"),
        ("b", "layer4.2"),
    ]
    # Towers are not one stage, though all has one shape.
    towers = [layer.name for layer in candidate_layers(Towers(True), X, granularity="stages")]
    assert towers == ["left.1", "right.1", "head.input"]


def test_patterns_of_names():
    data = torch.randn(60, 4, 6, 6), torch.arange(60) % 3
    model = Towers(True)
    chosen = {
        ("left.*", "head.input"): ["left.0", "left.1", "head.input"],
        ("*.[1]",): ["left.1", "right.1"],
        ("to_*.input",): ["to_left.input", "to_right.input"],
        ("right.0.?wo.act", "right.*"): ["right.0.two.act", "right.0", "right.1"],
    }
    for names, expected in chosen.items():
        layers = survey(model, X, list(names)).layers
        assert [layer.name for layer in layers] == expected
    scores = score_layers(model, data, ["left.*"], subsamples=0, progress=False)
    assert scores.frame["layer"].tolist() == ["left.0", "left.1"]
    with pytest.raises(ValueError, match=re.escape("layer 'lef.*': no layer that is run has such")):
        survey(model, X, ["lef.*"])
    with pytest.raises(ValueError, match=re.escape("the model has no module 'left.*'")):
        describe_layers(model, ["left.*"], X)


def test_errors_of_granularity():
    with pytest.raises(ValueError, match=r"granularity must be one of .*; got 'layers'"):
        candidate_layers(Towers(True), X, granularity="layers")
    data = torch.randn(60, 4, 6, 6), torch.arange(60) % 3
    with pytest.raises(ValueError, match="layers= names the layers: granularity='stages' has none"):
        score_layers(Towers(True), data, ["left.0"], granularity="stages", progress=False)


def test_dataflow():
    """Through views, unpacking, operations in place; not through shapes or constants."""
    x = torch.randn(2, 3)
    with Dataflow() as flow:
        start = flow.number(x)
        one, two = (x.view(3, 2) + 1).unbind(1)
        aside = torch.zeros_like(x).sum() + torch.ones(1)
        joined = torch.stack([one, two])
        before = flow.number(joined)
        joined[0] = aside
        part = torch.empty(2, 3)
        part[0] = one
    assert flow.known([aside]) == () and flow.number(joined) > before
    for made in (one, two, joined, part):
        assert flow.found_behind(flow.number(made), {start}) == {start}
    assert flow.found_behind(flow.number(part), {start}, without=flow.number(one)) == set()
    assert flow.found_behind(flow.number(joined), {start}, without=flow.number(one)) == {start}
    assert flow.number(x) == start  # unchanged
