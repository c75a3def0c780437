"""What the tests of ``geomkd distill`` run, tiny; by itself, several commands in one start."""

import json
import sys

import numpy as np
import torch

NETWORKS = """
import os
from geomkd.quickstart import residual_network

def teacher():
    return residual_network(widths=(8, 16, 16), blocks=2, seed=0, channels=3, classes=4)

def student():
    return residual_network(widths=(4, 8), blocks=1, seed=1, channels=3, classes=4)

def not_made_in_the_second():
    if os.environ.get("RANK") == "1":
        raise ValueError("no network here")
    return student()

def fails_in_the_second():
    def fail(module, inputs):
        if module.training and os.environ.get("RANK") == "1":
            raise OSError("the disk is gone")
    network = student()
    network.register_forward_pre_hook(fail)
    return network
"""
COMMAND = ["distill", "--teacher", "tiny_nets:teacher", "--student", "tiny_nets:student"]
COMMAND += ["--data", "images.npz", "--epochs", "2", "--batch-size", "16", "--quiet"]
WRITTEN = ["checkpoints", "config.toml", "history.csv", "student.pt", "summary.json"]
WRITTEN += ["training.png"]


def make_files(folder):
    """The networks and the images that `COMMAND` names."""
    (folder / "tiny_nets.py").write_text(NETWORKS)
    rng, y = np.random.default_rng(0), np.arange(80) % 4
    x = rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])


def student_of(folder):
    return torch.load(folder / "student.pt", weights_only=True)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


if __name__ == "__main__":
    from geomkd.cli.main import main

    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)  # a process that is ended keeps what it said
    for arguments in json.loads(sys.argv[1]):
        if code := main(arguments):
            sys.exit(code)
