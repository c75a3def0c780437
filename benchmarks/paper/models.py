"""The seven networks, from torchvision's classes, for small images, after the paper's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import VGG, MobileNetV2, ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import cfgs, make_layers

from geomkd.cli.weights import read_state_dict

IMAGE_SIZES = (32, 64)
HEADS = {ResNet: "fc.", VGG: "classifier.", MobileNetV2: "classifier.", VisionTransformer: "heads."}


def build(name: str, n_classes: int, image_size: int = 32, seed: int = 0) -> nn.Module:
    """Network of a name, with random weights that follow the seed alone.

    Parameters
    ----------
    name : str
        A key of `NETWORKS`.
    n_classes : int
        Number of logits.
    image_size : {32, 64}
        Side of the images: CIFAR's or Tiny ImageNet's.
    seed : int
        Seeds the weights; the global random state stays as it is.

    Raises
    ------
    ValueError
        An unknown network or size.

    Examples
    --------
    >>> build("resnet9", 10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}; got {name!r}")
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be 32 or 64; got {image_size}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return NETWORKS[name](n_classes, image_size)


def head_prefix(model: nn.Module) -> str:
    """Beginning of the names of the head's parameters."""
    return next(prefix for kind, prefix in HEADS.items() if isinstance(model, kind))


class Taken(NamedTuple):
    """What a file of weights gave to a model.

    Attributes
    ----------
    story : str
        How many tensors were taken, and which of the body were not.
    fresh : list of str
        Parameters that kept their random values, the head's among them.
    """

    story: str
    fresh: list[str]


def load_body(model: nn.Module, path: str | os.PathLike) -> Taken:
    """Fill a model's body with weights of the same names and shapes, such as ImageNet's.

    Parameters
    ----------
    model : nn.Module
        One of `build`; changed in place. Its head keeps its random weights.
    path : path
        A file of a state dict, such as torchvision publishes.

    Raises
    ------
    ValueError
        A file that holds no state dict, or none of whose tensors fits.
    """
    own, given = model.state_dict(), read_state_dict(path)
    # Files from before PyTorch 0.4.1 have no counters of batches, which nothing here reads.
    left_out = (head_prefix(model), "num_batches_tracked")
    body = [n for n in own if not n.startswith(left_out) and not n.endswith(left_out)]
    fits = [name for name in body if name in given and given[name].shape == own[name].shape]
    if not fits:
        raise ValueError(f"{path} holds no tensor that fits the body of {type(model).__name__}")
    model.load_state_dict({name: given[name] for name in fits}, strict=False)
    left = [name for name in body if name not in fits]
    story = f"{len(fits)} of the body's {len(body)} tensors taken from {os.path.basename(path)}"
    story += f"; not taken: {', '.join(left)}" if left else ""
    fresh = [name for name, _ in model.named_parameters() if name not in fits]
    return Taken(story, fresh)


def _resnet(blocks: Sequence[int]) -> Callable[[int, int], ResNet]:
    def make(n_classes: int, image_size: int) -> ResNet:
        # Every block begins as its shortcut: the scale of its last batch norm is zero.
        model = ResNet(BasicBlock, list(blocks), num_classes=n_classes, zero_init_residual=True)
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)  # stride 1, not 2
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        if image_size == 32:
            model.maxpool = nn.Identity()
        return model

    return make


def _vgg(letter: str) -> Callable[[int, int], VGG]:
    def make(n_classes: int, image_size: int) -> VGG:
        body = make_layers(cfgs[letter], batch_norm=True)
        model = VGG(body, num_classes=n_classes, init_weights=True)
        model.avgpool = nn.AdaptiveAvgPool2d(1)  # of what five poolings leave, 1x1 or 2x2
        model.classifier[0] = nn.Linear(512, 4096)
        nn.init.normal_(model.classifier[0].weight, 0, 0.01)  # as torchvision does
        nn.init.zeros_(model.classifier[0].bias)
        return model

    return make


def _mobilenet(n_classes: int, image_size: int) -> MobileNetV2:
    model = MobileNetV2(num_classes=n_classes)
    if image_size == 32:  # ends as 2x2, as 64 pixels do with the stride of 2
        model.features[0][0].stride = (1, 1)
    return model


class MeanToken(VisionTransformer):
    """A transformer that is classified from the mean of its tokens, the class token among them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._process_input(x)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.heads(self.encoder(tokens).mean(dim=1))


def _vit(layers: int, heads: int, width: int, mlp: int) -> Callable[[int, int], MeanToken]:
    def make(n_classes: int, image_size: int) -> MeanToken:
        return MeanToken(
            image_size=image_size,
            patch_size=image_size // 8,  # 8x8 tokens: patches of 4 at 32 pixels, of 8 at 64
            num_layers=layers,
            num_heads=heads,
            hidden_dim=width,
            mlp_dim=mlp,
            num_classes=n_classes,
        )

    return make


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg19_bn": _vgg("E"),
    "vgg11_bn": _vgg("A"),
    "resnet34": _resnet([3, 4, 6, 3]),
    "resnet9": _resnet([1, 1, 1, 1]),
    "mobilenet_v2": _mobilenet,
    "vit_b": _vit(12, 12, 768, 3072),
    "vit_et": _vit(8, 6, 192, 576),
}
