"""Small networks and data that the tests of distillation share."""

import copy
import itertools

import torch
from torch import nn
from torchvision.models import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from geomkd.distillation import distill
from geomkd.distillation.pairing import pair_layers

CPU = torch.device("cpu")


def seeded_model(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


class Narrow(ResNet):
    """Basic blocks an eighth as wide, behind a stem of the published width."""

    def __init__(self, block, layers, num_classes, **options):
        super().__init__(block, layers, num_classes, **options)
        self.fc = nn.Linear(64, num_classes)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, planes // 8, *args, **options)


def resnet(n=3):
    return seeded_model(lambda: Narrow(BasicBlock, [1, 1, 1, 1], n))


def resnet2(n=3):
    return seeded_model(lambda: Narrow(BasicBlock, [2, 1, 1, 1], n), seed=1)


def mobilenet(n=3):
    return seeded_model(lambda: MobileNetV2(num_classes=n, width_mult=0.25))


def vit(n=3, width=16, layers=4, seed=0):
    return seeded_model(
        lambda: VisionTransformer(32, 8, layers, 2, width, 2 * width, num_classes=n), seed
    )


def wide_vit(n=3):
    return vit(n, width=24, layers=6, seed=1)


def mlp(widths=(6, 16, 16, 3), seed=0, dropout=0.0):
    def make():
        layers = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout)]
        return nn.Sequential(*layers[:-2])

    return seeded_model(make, seed)


def images(n=8, classes=3, size=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, size, size, generator=generator)
    return x, torch.arange(n) % classes


def blobs(n=50):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    centres = 2 * torch.randn(3, 6, generator=generator)
    return centres[y] + torch.randn(n, 6, generator=generator), y


PAIRS = [("1", "1"), ("4", "4")]


def run_mlp(train=None, *, student=None, teacher=None, **options):
    options = {"pairs": PAIRS, "epochs": 2, "batch_size": 16, "progress": False} | options
    student = student or mlp()
    teacher = teacher or mlp((6, 32, 32, 3), seed=1)
    return distill(student, teacher, train or blobs(), **options)


def state(model):
    return copy.deepcopy(model.state_dict())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def pairs_of(teacher, student, k=4):
    ours = [s for _, s in pair_layers([str(i) for i in range(k)], teacher, images(2)[0])]
    return pair_layers(ours, student, images(2)[0])
