"""The paper's networks, shallow and narrow; run by itself, its command line on them."""

import runpy
import time

from small import Narrow
from torchvision.models import MobileNetV2

from benchmarks.paper import models


class OneBlock(Narrow):
    def __init__(self, block, layers, num_classes, **options):
        super().__init__(block, [1] * 4, num_classes, **options)


class NarrowMobile(MobileNetV2):
    pause = 0.0  # seconds a step

    def __init__(self, num_classes):
        super().__init__(num_classes, width_mult=0.25)

    def forward(self, x):
        time.sleep(self.pause * self.training)
        return super().forward(x)


CLASSES = {"ResNet": OneBlock, "MobileNetV2": NarrowMobile}

if __name__ == "__main__":
    NarrowMobile.pause = 0.5  # time enough to be killed
    for name, kind in CLASSES.items():
        setattr(models, name, kind)
    runpy.run_module("benchmarks.paper", run_name="__main__", alter_sys=True)
