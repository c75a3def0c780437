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
# may be interrupted. Digits from scikit-learn, small networks, short runs.

# %% tags=["parameters"]
n_images, epochs, failing_step = 1000, 6, 42

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
train, val = (data.x_train[:n_images], data.y_train[:n_images]), (data.x_val, data.y_val)
example = data.x_train[:2]

# %% [markdown]
# ## 1. A teacher and its ranking

# %%
teacher = residual_network(widths=(12, 24, 48), blocks=3, seed=0)
options = {"val": val, "epochs": epochs, "batch_size": 64, "progress": False}
taught = distill(teacher, None, train, objective="ce", **options)
taught

# %%
scores = score_layers(teacher, train, progress=False)
scores.plot(k=3)
plt.show()

# %% [markdown]
# The bands say how much of a curve is due to the images that were drawn. Layers can rise and fall
# together from one half-sample to the next, so bands that overlap do not make a tie: `tied_with`
# gives the ranks of the layers that change places too often to be called apart.

# %%
scores.rank()[["layer", "rank", "best", "worst", "tied_with"]]

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
pd.DataFrame({how: [" → ".join(pair) for pair in pairs[how]] for how in pairs})

# %% [markdown]
# ## 3. The same student from each choice
#
# Objective `"features"`: the backbone sees the teacher's features alone, the head learns from
# labels on features that are detached from the backbone. Two seeds each; the legend has the last
# epoch, not the best. Both seeds read the teacher's answers from the same files, see 5.


# %%
scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)


def runs(seeds=(0, 1), cache_dir=folder / "features", **more):
    more |= {"cache_dir": cache_dir, **options}
    return [distill(student_of(k), teacher, train, seed=k, **more) for k in seeds]


chosen = {how: runs(pairs=pairs[how]) for how in pairs}
curves = {
    how: [run.history["val_accuracy"].to_numpy() for run in each] for how, each in chosen.items()
}
plot_accuracy(curves, name="validation accuracy")
plt.show()

# %% [markdown]
# ## 4. Other objectives
#
# Rivals go by name (`"kd"`, `"feature_kd"`, ...), with their published weights; `"ce"`, labels
# alone, is the one to beat. Objects take options, and add up: here features whose targets are
# standardised, and a sum of these with the teacher's softened logits. In the sum
# `detaches_head=False` lets cross entropy and logits reach the backbone too. Where features are
# used, the pairs are the evenly spaced ones.

# %%
objectives = {
    "features, standardised": Features(normalize="channel"),
    "features + logits": Features(normalize="channel", detaches_head=False)
    + LogitDistillation(ce_weight=0.0),
}
evenly = pairs["evenly spaced"]
found = {"ce": runs(objective="ce", cache_dir=None), "features": chosen["evenly spaced"]}
found |= {name: runs(pairs=evenly, objective=objectives[name]) for name in objectives}
pd.DataFrame(
    {name: [f"{run.accuracy:.1%}" for run in each] for name, each in found.items()},
    index=["seed 0", "seed 1"],
).T

# %% [markdown]
# The history has the parts of a loss before they are weighted; of a sum they bear the number of
# their term. Here the second cross entropy has weight 0.

# %%
found["features + logits"][0].history.drop(columns=["lr", "seconds"]).round(3)

# %% [markdown]
# ## 5. Teacher features from files
#
# Without augmentation the teacher says the same of an image in every epoch. With `cache_dir=` it is
# asked once; the files are found again by every later run of this teacher, these layers and data.
# The same run, with the teacher asked at every step (the seconds leave out the pass that makes the
# files):

# %%
cached = chosen["evenly spaced"][0]
live, *_ = runs(seeds=(0,), pairs=evenly, cache_dir=None)
n_bytes = sum(path.stat().st_size for path in (folder / "features").rglob("*.npy"))
print(f"largest difference of the losses: {abs(live.history.loss - cached.history.loss).max():.1e}")
print(f"files of all runs: {n_bytes / 1e6:.1f} MB")
for name, run in {"live": live, "cached": cached}.items():
    print(f"{name:<6} {run.history.seconds.sum():.2f} s in the epochs")

# %% [markdown]
# ## 6. A run that is interrupted
#
# With `checkpoint_dir=` the same call goes on where it stopped. Here the augmentation, noise drawn
# on the device, breaks off in the middle of an epoch; the count of its calls shows that the second
# call does not start over.

# %%
steps = 0


def noisy(images):
    global steps
    steps += 1
    return images + 0.1 * torch.randn_like(images)


def failing(images):
    if steps == failing_step:
        raise RuntimeError("the power went out")
    return noisy(images)


task = {"pairs": evenly, **options}
kept = {"checkpoint_dir": folder / "run", "checkpoint_steps": 5}
try:
    distill(student_of(0), teacher, train, augment=failing, **kept, **task)
except RuntimeError as error:
    print(f"{error} after {steps} steps")
print("kept:", *sorted(path.name[:14] for path in (folder / "run").iterdir()))

steps = 0
resumed = distill(student_of(0), teacher, train, augment=noisy, **kept, **task)
print(f"resumed for {steps} steps")

steps = 0
whole = distill(student_of(0), teacher, train, augment=noisy, **task)
print(f"without interruption {steps} steps")

expected = whole.student.state_dict()
same = all(torch.equal(x, expected[name]) for name, x in resumed.student.state_dict().items())
print("the same student, bit for bit:", same)
scratch.cleanup()

# %%
resumed.plot()
plt.show()

# %% [markdown]
# ## What this shows, and what not
#
# How to do it. Which choice or objective is best it does not show: one teacher, one data set, two
# seeds, short runs, and few validation images. Chance alone moves an accuracy p on n images by
# about √(p(1 − p)/n):

# %%
p, n = found["ce"][0].accuracy, len(data.y_val)
print(f"p = {p:.1%}, n = {n}: {(p * (1 - p) / n) ** 0.5:.1%}")

# %% [markdown]
# Repeat it with your teacher and at least three seeds before you believe a ranking, and decide on
# images that chose nothing: the test part was not touched here. `geomkd distill --by quality` does
# one such run from the command line.
