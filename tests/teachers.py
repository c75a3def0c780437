"""Small teachers and data, their features captured by hand, and what scores must agree with."""

import re
from copy import deepcopy

import numpy as np
import pytest
import torch
import torchvision
from oracle import TERMS, values_of
from small import Narrow
from torch import nn
from torchvision.models.resnet import BasicBlock

from geomkd import knowledge_quality, score_layers

N, CLASSES = 60, 4


Y = torch.arange(N) % CLASSES


def images(n=N, size=32, channels=3):
    """Images of classes that differ, from an own generator."""
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(CLASSES, channels, size, size, generator=generator)
    noise = torch.randn(n, channels, size, size, generator=generator)
    return 0.5 * means[torch.arange(n) % CLASSES] + noise


def vectors(n=N, d=8):
    return images(n, 1, d).flatten(1)


def sequential(width=16, depth=3, *, seed=0, d=8):
    """Linear layers with ReLU; `candidate_layers` lists every ReLU, the last one feeds the head."""
    torch.manual_seed(seed)
    layers = [nn.Linear(d, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def resnet18(seed=0):
    torch.manual_seed(seed)
    return Narrow(BasicBlock, [2, 2, 2, 2], CLASSES)


def vision_transformer():
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=CLASSES,
    )


class Widen(nn.Module):
    """More features, cheaply: each is one of the input's, scaled and shifted."""

    def __init__(self, d, width):
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        self.register_buffer("index", torch.randint(d, (width,), generator=generator))
        self.weight = nn.Parameter(torch.randn(width, generator=generator))
        self.bias = nn.Parameter(torch.randn(width, generator=generator))

    def forward(self, x):
        return x[:, self.index] * self.weight + self.bias


def wide(*widths):
    """ReLU layers "1", "3", ... of these widths, of inputs of 8 features; then a head."""
    layers = []
    for d, width in zip((8, *widths), widths, strict=False):
        layers += [Widen(d, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def by_hand(model, inputs, names):
    """Features of layers from hooks written here, whole, in one forward pass."""
    model = deepcopy(model).eval()
    modules, found, handles = dict(model.named_modules()), {}, []
    for name in names:
        path, _, number = name.removesuffix(".input").partition("#")
        seen = []

        def keep(module, args, output=None, *, name=name, number=int(number or 1), seen=seen):
            value = args[0] if output is None else output
            seen.append(value[0] if isinstance(value, tuple) else value)
            if len(seen) == number:
                found[name] = seen[-1].clone()

        module = modules[path]
        is_input = name.endswith(".input")
        register = module.register_forward_pre_hook if is_input else module.register_forward_hook
        handles.append(register(keep))
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found


def rows_of(scores):
    return scores.to_frame().set_index("layer")


def assert_as_measured(scores, features, labels, rel=1e-6, **options):
    rows = rows_of(scores)
    for name, x in features.items():
        expected = values_of(knowledge_quality(x, labels, **options))
        got = {key: rows.loc[name, key] for key in expected}
        assert {t: got[t] for t in TERMS} == pytest.approx({t: expected[t] for t in TERMS}, rel=rel)
        assert got == pytest.approx(expected, rel=rel, abs=1e-6), name  # a cosine may be near 0


def assert_same(scores, others, rel=1e-6):
    a, b = rows_of(scores), rows_of(others)
    assert list(a.index) == list(b.index)
    for term in TERMS:
        np.testing.assert_allclose(a[term], b[term], rtol=rel, atol=rel)
        np.testing.assert_allclose(scores.draws[term], others.draws[term], rtol=rel, atol=rel)


def score(model, data, **options):
    return score_layers(model, data, **({"subsamples": 0, "progress": False} | options))


WIDTHS = (1024, 1024, 20_000, 1024)  # the last is the head's input too


def least_of(model, data, **options):
    """Megabytes that the error for too small a budget asks for."""
    with pytest.raises(ValueError, match="memory must be at least") as caught:
        score(model, data, memory=1, **options)
    return int(re.search(r"at least (\d+) MB", str(caught.value)).group(1))
