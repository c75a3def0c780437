"""What several processes do in a test: ``two_processes.py OUT CASE ...``."""

import sys
from pathlib import Path

import torch
from small import blobs, images, mlp, resnet, resnet2
from torch.utils.data import DataLoader, TensorDataset

from geomkd.common.distributed import gathered, world
from geomkd.distillation import distill
from geomkd.distillation.objectives import Features


class WithIdleLayer(torch.nn.Module):
    """A student with a layer that nothing reaches."""

    def __init__(self, body):
        super().__init__()
        self.body, self.idle = body, torch.nn.Linear(3, 3)
        torch.nn.init.ones_(self.idle.weight)
        torch.nn.init.ones_(self.idle.bias)

    def forward(self, x):
        return self.body(x)


def networks(dtype):
    return mlp().to(dtype), mlp((6, 32, 32, 3), seed=1).to(dtype)


def ends_after_two_epochs(row):
    assert world().is_first
    return row["epoch"] == 2


def run(case, folder):
    """One run of a case; the same call in one process and in several."""
    kind, _, detail = case.partition(":")
    options = {"epochs": 2, "batch_size": 16, "progress": False, "pairs": [("1", "1"), ("4", "4")]}
    dtype = torch.float64 if kind in ("float64", "objective") else torch.float32
    x, y = blobs(52)  # the last batch has four samples: two a process
    data = x.to(dtype), y
    student, teacher = networks(dtype)
    if kind == "objective":
        options |= {"objective": detail}
    elif kind == "everything":
        data = DataLoader(TensorDataset(*data), num_workers=1)
        options |= {"objective": "feature_kd", "accumulate": 2, "clip_norm": 0.5, "val": blobs(21)}
    elif kind == "cached":
        options |= {"cache_dir": folder / "cache", "val": blobs(21)}
    elif kind in ("checkpoints", "resumed"):
        states = folder.with_name("checkpoints") if kind == "resumed" else folder
        if kind == "resumed" and world().is_first:
            max((states / "states").iterdir()).unlink()  # its epoch is done again from the middle
        gathered(None)
        options |= {"checkpoint_dir": states / "states", "checkpoint_steps": 2}
    elif kind == "stopped":
        options |= {"epochs": 4, "callbacks": [ends_after_two_epochs]}
    elif kind == "idle":
        student = WithIdleLayer(student)
        options |= {"pairs": [("1", "body.1"), ("4", "body.4")]}
    elif kind == "normalised":
        student, teacher, data = resnet(), resnet2(), images(24)
        options |= {"pairs": [("layer4.0", "layer4.0")], "lr": 1e-3}
    elif kind == "different":
        student = mlp(seed=world().rank)
    elif kind == "pca":
        options |= {"objective": Features(projector="pca"), "pairs": [("4", "4")]}
    return distill(student, teacher, data, **options)


def main(folder, cases):
    for case in cases:
        own = folder / case
        own.mkdir(exist_ok=True)
        result = run(case, own)
        state = dict(result.student.state_dict())
        history = result.history.drop(columns="seconds").to_dict("list")
        everyone = gathered((state, history))
        for states, rows in everyone[1:]:
            assert rows == everyone[0][1], case
            assert all(torch.equal(states[n], everyone[0][0][n]) for n in state), case
        if world().is_first:
            assert world().size > 1
            torch.save({"student": everyone[0][0], "history": everyone[0][1]}, own / "result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
