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
# # Distil from a ranking
#
# A ranking of layers is worth what a student gains from it. Here: choose layers of a teacher in
# four ways, distil the same student from each, compare with other objectives, and keep a run that
# may be interrupted. Digits from scikit-learn, small networks, about a minute.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from geomkd import choose_layers, distill, pair_layers, score_layers
from geomkd.datasets import digits
from geomkd.distillation.objectives import Features, LogitDistillation
from geomkd.plots import plot_accuracy
from geomkd.quickstart import residual_network

torch.set_num_threads(1)  # networks this small gain nothing from more
data = digits(seed=0)
train, val = (data.x_train, data.y_train), (data.x_val, data.y_val)
example = data.x_train[:2]

# %% [markdown]
# ## 1. A teacher and its ranking

# %%
teacher = residual_network(widths=(12, 24, 48), blocks=3, seed=0)
options = {"val": val, "batch_size": 64, "progress": False}
taught = distill(teacher, None, train, objective="ce", epochs=8, **options)
taught

# %%
scores = score_layers(teacher, train, progress=False)
scores.plot(k=3)
plt.show()

# %% [markdown]
# The bands say how much of a curve is due to the images that were drawn. Two layers whose bands
# overlap change places in many half-samples: `scores.rank()` calls them tied.

# %%
scores.rank()[["layer", "rank", "lowest_rank", "highest_rank", "tied_with"]]

# %% [markdown]
# ## 2. Choosing layers, and pairing them
#
# `select` takes any column of the scores; `choose_layers` looks at nothing but the place of a
# layer: what a ranking has to beat. `pair_layers` gives each a block of the student.


# %%
def student_of(seed):
    return residual_network(widths=(4, 8, 16), blocks=1, seed=seed)


choices = {
    "highest Q": scores.select(3),
    "highest S": scores.select(3, by="separation"),
    "evenly spaced": choose_layers(teacher, example, 3),
    "last": choose_layers(teacher, example, 3, how="last"),
}
pairs = {how: pair_layers(layers, student_of(0), example) for how, layers in choices.items()}
pd.DataFrame({how: [t for t, _ in pairs[how]] for how in pairs}, index=["1st", "2nd", "3rd"])

# %% [markdown]
# ## 3. The same student from each choice
#
# Objective `"features"`: the backbone sees the teacher's features alone, the head learns from
# labels on features that are detached from the backbone. Two seeds each, the last epoch.


# %%
def runs(seeds=(0, 1), **more):
    return [
        distill(student_of(k), teacher, train, seed=k, epochs=8, **more, **options) for k in seeds
    ]


curves = {
    how: [run.history["val_accuracy"].to_numpy() for run in runs(pairs=pairs[how])] for how in pairs
}
plot_accuracy(curves, name="validation accuracy")
plt.show()

# %% [markdown]
# ## 4. Other objectives
#
# Rivals go by name, with their published weights. Objects take options, and add up: here features
# whose targets are standardised, and the same with softened logits that reach the whole student.

# %%
objectives = {
    "ce": "ce",
    "kd": "kd",
    "feature_kd": "feature_kd",
    "features, standardised": Features(normalize="channel"),
    "features + logits": Features(normalize="channel", detaches_head=False)
    + LogitDistillation(ce_weight=0.0),
}
evenly = pairs["evenly spaced"]
found = {name: runs(pairs=evenly, objective=objective) for name, objective in objectives.items()}
pd.DataFrame(
    {name: [f"{run.accuracy:.1%}" for run in each] for name, each in found.items()},
    index=["seed 0", "seed 1"],
).T

# %%
found["features + logits"][0].history.round(3)

# %% [markdown]
# ## 5. Teacher features from files
#
# Without augmentation the teacher says the same of an image in every epoch. With `cache_dir=` it is
# asked once; the files are found again by every later run of this teacher, these layers and data.

# %%
folder = Path(tempfile.mkdtemp())
live, *_ = runs(seeds=(0,), pairs=evenly)
cached, *_ = runs(seeds=(0,), pairs=evenly, cache_dir=folder / "features")
difference = abs(live.history["loss"] - cached.history["loss"]).max()
print(f"largest difference of the losses: {difference:.1e}")
print(f"files: {len(list((folder / 'features').rglob('*.npy')))}")

# %% [markdown]
# ## 6. A run that is interrupted
#
# With `checkpoint_dir=` the same call goes on where it stopped. Here an augmentation on the device
# (a shift by a pixel) breaks off in the middle of the third epoch.

# %%
steps = []


def shifted(images, stop=None):
    steps.append(1)
    if stop is not None and len(steps) > stop:
        raise RuntimeError("the power went out")
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(images, (down, right), dims=(2, 3))


task = {"pairs": evenly, "epochs": 5, "checkpoint_steps": 5, **options}
try:
    distill(student_of(0), teacher, train, augment=lambda x: shifted(x, 40),
            checkpoint_dir=folder / "run", **task)  # fmt: skip
except RuntimeError as error:
    print(error, "- kept:", *sorted(path.name[:14] for path in (folder / "run").iterdir()))
resumed = distill(student_of(0), teacher, train, augment=shifted,
                  checkpoint_dir=folder / "run", **task)  # fmt: skip
whole = distill(student_of(0), teacher, train, augment=shifted, **task | {"checkpoint_steps": None})
same = all(
    torch.equal(a, b)
    for a, b in zip(resumed.student.parameters(), whole.student.parameters(), strict=True)
)
print("the same student as without the interruption, bit for bit:", same)

# %%
resumed.plot()
plt.show()

# %% [markdown]
# ## What this shows, and what not
#
# How to do it. Which choice is best it does not show: one teacher, one data set, two seeds, and 297
# validation images, on which two accuracies near 95 % differ by chance by a point or two. Repeat it
# with your teacher and at least three seeds before you believe a ranking;
# `geomkd distill --layers auto` does one such run from the command line.
