"""Teachers and students: the published ResNets, residual networks, VGG, small transformers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomkd.quickstart import residual_network


class Basic(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.padding = stride, (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """ResNet of He 2016, section 4.2, named as in akamaster/pytorch_resnet_cifar10."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        for stage, (before, width) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            first = Basic(before, width, 1 if stage == 1 else 2)
            rest = (Basic(width, width, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


class SmallViT(nn.Module):
    """Transformer of square patches, classified from the mean token."""

    def __init__(
        self, *, width: int, blocks: int, heads: int, patch: int, side: int, channels: int,
        classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 2 * width, **options) for _ in range(blocks))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def vgg(widths: tuple[int, ...], convolutions: int, channels: int, classes: int) -> nn.Sequential:
    """Convolutions with batch norm and ReLU, a pooling between widths, a linear head."""
    layers: dict[str, nn.Module] = {}
    for stage, width in enumerate(widths, 1):
        if stage > 1:
            layers[f"pool{stage - 1}"] = nn.MaxPool2d(2)
        for i in range(1, convolutions + 1):
            layers[f"conv{stage}_{i}"] = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            layers[f"norm{stage}_{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{stage}_{i}"] = nn.ReLU()
            channels = width
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers, head=nn.Linear(channels, classes)))


def build(
    kind: str, options: dict[str, Any], *, shape: tuple[int, ...], classes: int, seed: int
) -> nn.Module:
    """Network with random weights of a seed, for images of shape (C, H, W)."""
    channels, side, _ = shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "published":
            return CifarResNet(**options, classes=classes)
        if kind == "residual":
            return residual_network(**options, seed=seed, channels=channels, classes=classes)
        if kind == "vgg":
            return vgg(**options, channels=channels, classes=classes)
        if kind == "vit":
            return SmallViT(**options, side=side, channels=channels, classes=classes)
    raise ValueError(f"kind must be published, residual, vgg or vit; got {kind!r}")
