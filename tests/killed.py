"""A run that its test kills: ``killed.py FOLDER``; every step leaves a byte."""

import functools
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from geomkd.datasets import digits
from geomkd.distillation import distill
from geomkd.distillation.objectives import Features
from geomkd.geometry.precision import one_thread

read = functools.cache(digits)


class Shifted(Dataset):
    """Digits, each moved by a random number of pixels."""

    def __init__(self):
        split = read(seed=0)
        self.x, self.targets = split.x_train[:200], split.y_train[:200]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        shift = torch.randint(-1, 2, (2,)).tolist()
        return torch.roll(self.x[i], shift, dims=(1, 2)), self.targets[i]


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def run(folder, *, epochs=2, checkpoint_steps=3, after_step=lambda: None, **options):
    """Distil with every kind of state: workers, draws, dropout, normalisation, attention."""

    def jittered(x):
        after_step()
        return x + 0.05 * torch.randn(x.shape)

    loader = DataLoader(Shifted(), num_workers=options.pop("workers", 1))
    settings = {
        "pairs": [("2", "2"), ("5", "5")],
        "objective": Features(pairing="attention", projector="mlp"),
        "batch_size": 20,
        "seed": 0,
        "clip_norm": 1.0,
        "augment": jittered,
        "progress": False,
    } | options
    student = options.pop("student", None) or network(4, 1)
    settings.pop("student", None)
    with one_thread():  # bits depend on the number of threads
        return distill(
            student,
            settings.pop("teacher", None) or network(8, 0),
            loader,
            epochs=epochs,
            checkpoint_dir=folder,
            checkpoint_steps=checkpoint_steps,
            **settings,
        )


if __name__ == "__main__":
    at = Path(sys.argv[1])

    def note():
        with (at / "steps").open("ab") as file:
            file.write(b".")
        time.sleep(0.02)

    result = run(at / "checkpoints", after_step=note)
    result.save(at / "student.pt")
    history = result.history.drop(columns="seconds")
    history.to_json(at / "history.json", double_precision=15)
