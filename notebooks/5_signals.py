# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Signals: a network of one-dimensional convolutions
#
# Nine men say the same two Japanese vowels; who speaks? 640 utterances of 12 cepstral coefficients
# and 7 to 29 frames each (Kudo, Toyama, Shimbo 1999), which the package `sktime` carries
# (`pip install sktime`). A teacher learns the speakers from 270 of them, its layers are ranked, and
# a small student gets five utterances a speaker.

# %% tags=["parameters"]
teacher_epochs, epochs, seeds, utterances = 30, 60, 3, 5

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sktime.datasets import load_japanese_vowels
from torch import nn

from geomkd import choose_layers, distill, pair_layers, score_layers
from geomkd.distillation.objectives import CrossEntropy, Features

torch.set_num_threads(1)  # networks this small gain nothing from more


def utterances_of(split, frames=24):
    """Signals (n, 12, frames), each stretched to as many frames, and their speakers."""
    table, speakers = load_japanese_vowels(split=split, return_X_y=True)
    at = np.linspace(0, 1, frames)
    x = [[np.interp(at, np.linspace(0, 1, len(c)), c) for c in row] for row in table.to_numpy()]
    return torch.tensor(np.array(x), dtype=torch.float32), torch.tensor(speakers.astype(int)) - 1


train, test = utterances_of("train"), utterances_of("test")
mean, std = train[0].mean((0, 2), keepdim=True), train[0].std((0, 2), keepdim=True)
train, test = [((x - mean) / std, y) for x, y in (train, test)]
print(
    "train",
    tuple(train[0].shape),
    "test",
    tuple(test[0].shape),
    "speakers",
    len(set(train[1].tolist())),
)


# %% [markdown]
# ## 1. A teacher, and what its layers know
#
# Layers of one-dimensional convolutions are (B, channels, time), `kind="sequence"`. `pool="mean"`
# averages over time, to one value a channel.


# %%
class Residual(nn.Module):
    """Two convolutions over time, and the way around them."""

    def __init__(self, given, channels, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(given, channels, 5, stride, 2),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 5, 1, 2),
            nn.BatchNorm1d(channels),
        )
        same = given == channels
        self.skip = nn.Identity() if same else nn.Conv1d(given, channels, 1, stride)

    def forward(self, x):
        return torch.relu(self.skip(x) + self.body(x))


def network(*widths, seed):
    torch.manual_seed(seed)
    blocks, given = [], 12
    for width in widths:
        blocks.append(Residual(given, width, 2 if blocks and width > given else 1))
        given = width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(given, 9))


options = {"batch_size": 16, "lr": 0.003, "val": test, "progress": False}
teacher = network(32, 32, 64, 64, 128, 128, seed=0)
taught = distill(teacher, None, train, objective="ce", epochs=teacher_epochs, **options)
print(f"teacher: {100 * taught.accuracy:.1f} % of the test speakers right, chance is 11.1 %")

# %%
scores = score_layers(
    teacher, train, pool="mean", measures=["knowledge_quality", "silhouette"], progress=False
)
scores.plot(measures=["quality", "silhouette"], k=2)
plt.show()

# %%
scores.rank()

# %% [markdown]
# Q is highest at the first block, the silhouette at the head: they do not agree about what is worth
# teaching. The students tell.
#
# ## 2. A student with few utterances
#
# A student's channels meet the teacher's by a projection of channels; where it has fewer frames
# than the teacher, the longer of the two is averaged down.

# %%
few = torch.cat([torch.nonzero(train[1] == speaker)[:utterances, 0] for speaker in range(9)])
lesson = train[0][few], train[1][few]
by_silhouette = scores.select(2, by="silhouette")
layers = {
    "by quality": scores.select(2),
    "by silhouette": by_silhouette,
    "evenly spaced": choose_layers(teacher, lesson[0], 2),
}
methods = {"cross entropy": (CrossEntropy(), None), "kd": ("kd", None)}
for name, chosen in layers.items():
    methods[f"features, {name}"] = Features(), chosen
    methods[f"cross entropy and features, {name}"] = Features(detaches_head=False), chosen

rows = []
for method, (objective, chosen) in methods.items():
    for seed in range(seeds):
        student = network(8, 16, seed=seed)
        pairs = chosen and pair_layers(chosen, student, lesson[0])
        run = {"objective": objective, "pairs": pairs, "epochs": epochs, "seed": seed} | options
        result = distill(student, None if method == "cross entropy" else teacher, lesson, **run)
        rows.append(
            {"method": method, "layers": ", ".join(chosen or ()), "%": 100 * result.accuracy}
        )
frame = pd.DataFrame(rows).groupby(["method", "layers"], sort=False)["%"]
table = frame.agg(["mean", "std", "min", "max"]).round(1)
table

# %% [markdown]
# Test accuracy after the last epoch, every seed counted; chance is 11.1 %. When this was run, the
# layers of highest Q, those nearest to the input, gave the worst students, and no set of layers was
# clearly better than the logits. Three seeds and one teacher: `benchmarks/RESULTS.md` has more.
