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
# # Read the geometry
#
# `geomkd.measures` asks of a layer: do its classes stand apart, would a simple reader do well, how
# many dimensions do neighbours see, how many directions hold the variance, which other layer says
# the same? `select` then chooses a few. Every answer is a number, and every number can mislead:
# here each family is read on a trained teacher and on data of known geometry. What the text says of
# the teacher is what came out here; on another processor training may end a little differently.

# %% tags=["parameters"]
n_images, epochs, half_samples, null = 1000, 6, 20, 20

# %%
import math
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from geomkd import capture, choose_layers, distill, score_layers, separation, similarity_matrix
from geomkd import measures as m
from geomkd.datasets import digits
from geomkd.plots import compare, plot_classes, plot_similarity
from geomkd.quickstart import residual_network

torch.set_num_threads(1)  # networks this small gain nothing from more
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator)


# %% [markdown]
# ## 1. One teacher, a measure of every family
#
# A small residual network, trained on 1,000 digits and read on 500 others. One call takes all
# measures; `null=20` also scores twenty permutations of the labels, `sweep` smaller samples.

# %%
data = digits(seed=0)
teacher = residual_network(widths=(12, 24, 48), blocks=2, seed=0)
train, test = (data.x_train[:n_images], data.y_train[:n_images]), (data.x_test, data.y_test)
folder = Path(tempfile.mkdtemp())


def keep(row):
    torch.save(teacher.state_dict(), folder / f"{row['epoch']}.pt")


options = {"epochs": epochs, "batch_size": 64, "callbacks": [keep], "progress": False}
distill(teacher, None, train, objective="ce", **options)

shown = ["knn_accuracy", "logme", "two_nn", "participation_ratio", "cka_to_last"]
more = ["knowledge_quality", "h_score", "effective_rank"]
options = {"subsamples": half_samples, "null": null, "progress": False}
sizes = [50, 100, 200, 350]
scores = score_layers(teacher, test, measures=shown + more, sweep=sizes, **options)
frame = scores.to_frame().set_index("layer")
scores.plot(measures=shown, k=3)
plt.show()

# %% [markdown]
# From the first layer to the last the classes part (separability: `knn_accuracy`; transfer:
# `logme`), neighbours see fewer dimensions (`two_nn`), the variance lies in fewer directions
# (`participation_ratio`), and layers grow like the last (`cka_to_last`). The legend has the ranges.
#
# ## 2. Separability and transfer scores have a floor
#
# Noise of 512 features, with labels that mean nothing. What fits something to the rows that it then
# judges finds classes all the same. `null=` tells: what permuted labels score too is nothing.

# %%
noise, labels = normal(500, 512), torch.arange(500) % 10
means = torch.stack([noise[labels == c].mean(dim=0) for c in range(10)])
on_own_rows = (torch.cdist(noise, means).argmin(dim=1) == labels).double().mean()
print(f"nearest class mean, judged on the rows that the means are of: {on_own_rows:.2f}")
floors = {
    "nearest_class_mean (held out)": m.nearest_class_mean(noise, labels, null=20),
    "fisher_ratio": m.fisher_ratio(noise, labels, null=20),
    "h_score": m.h_score(noise, labels, null=20),
    "h_score, not shrunk": m.h_score(noise, labels, shrinkage=0.0, null=20),
    "logme, 10 classes": m.logme(noise, labels, null=20),
    "logme, 100 classes": m.logme(noise, torch.arange(500) % 100, null=20),
}
floors = pd.DataFrame({k: map(float, v) for k, v in floors.items()}, m.WithNull._fields).T
floors.round(3)

# %% [markdown]
# Without shrinkage noise has the highest H-score there is. And LogME is for one set of labels: with
# 100 classes noise scores above most of the teacher's layers on ten digits. Shrinkage mends the
# H-score of white noise, but a layer is not white noise:

# %%
frame.filter(regex="^(dim|(h_score|separation|quality)(_null_mean|_excess)?)$").round(2)

# %% [markdown]
# Where a layer has more features than samples, more than half of its H-score is there for permuted
# labels. By score `block2` is first and the head's input among the last two; by excess they are
# last and first. Separation's floor is near 0; knowledge quality's, above 0.3, is its other terms'.
#
# ## 3. Dimensions: what neighbours see, and how many directions
#
# A plane rolled into 100 features, the same with noise, and a Gaussian of 50 directions; at the
# right, white noise of 100 features.

# %%
plane = torch.rand(2000, 2, generator=generator)
rolled = torch.cos(5 * plane @ normal(2, 100) + 2 * math.pi * torch.rand(100, generator=generator))
known = {
    "rolled plane": rolled,
    "rolled plane + noise": rolled + 0.05 * normal(2000, 100),
    "Gaussian": normal(2000, 50) @ normal(50, 100),
}
white, sizes = normal(2000, 100), [50, 100, 200, 500, 1000, 2000]
seen = {name: [m.two_nn(x[:n]).item() for n in sizes] for name, x in known.items()}
ratios = {"plain": [m.participation_ratio(white[:n]).item() for n in sizes]}
ratios["debiased"] = [m.participation_ratio(white[:n], debiased=True).item() for n in sizes]
ratios["100 n / (100 + n)"] = [100 * n / (100 + n) for n in sizes]

_, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
places = [{"loc": "upper left", "bbox_to_anchor": (0, 0.88)}, {"loc": "lower right"}]
for ax, curves, truths, place in zip(axes, (seen, ratios), ((2, 50), (100,)), places, strict=True):
    for (name, values), style in zip(curves.items(), ("o-", "s--", "k.:"), strict=True):
        ax.semilogx(sizes, values, style, label=name)
    for truth in truths:
        ax.axhline(truth, color="0.5", lw=0.8, zorder=0)
        ax.annotate(f" true: {truth}", (1, truth), xycoords=("axes fraction", "data"), va="center")
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.minorticks_off()
    ax.set(xlabel="samples n", ylim=(0, 1.1 * truths[-1]))
    ax.legend(frameon=False, **place)
axes[0].set_ylabel("two_nn")
axes[1].set_ylabel("participation ratio of white noise")
plt.show()
directions = m.pca_dimension(rolled).item()
print(f"rolled plane: two_nn {seen['rolled plane'][-1]:.2f}, pca_dimension {directions:.0f}")

# %% [markdown]
# Neighbours see the plane as a plane at every n, its variance takes many directions: two questions,
# two answers. But the nearer neighbours come, the more of the noise they see, and 50 dimensions are
# too many for 2,000 samples: `two_nn` stays below 35. The participation ratio of a sample follows
# n, not the 100 directions that are there; `debiased=True` finds these.
#
# **Duplicates.** Equal rows are dropped, and a warning counts them; *nearly* equal ones (augmented
# copies, neighbouring frames) are not, and nothing warns. A vote of neighbours gains by copies.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    equal = m.two_nn(torch.cat([rolled, rolled[:200]]))
nearly = m.two_nn(torch.cat([rolled, rolled[:200] + 1e-4 * normal(200, 100)]))
twice = m.knn_accuracy(noise.repeat(2, 1), labels.repeat(2), k=1)
print(f"two_nn with 200 equal rows: {equal:.2f}, and: {caught[0].message}")
print(f"with 200 nearly equal rows: {nearly:.2f}")
print(f"knn_accuracy (k = 1) of noise with every row twice: {twice:.2f}")

# %% [markdown]
# ## 4. Has the order of the layers settled?
#
# The published efficiency takes the *smallest* distance between classes: it falls as samples come
# in, and not alike in all layers.

# %%
scores.plot_sweep(by="efficiency")
plt.show()
by = ["efficiency", "separation", "quality", "two_nn", "participation_ratio", "effective_rank"]
settled = pd.DataFrame({name: scores.settling(by=name)["tau"] for name in by})
settled.index = ["50 to 100", "100 to 200", "200 to 350", "350 to 500"]
swept = {name: scores.swept(by=name) for name in by}
settled.loc["score at 500 / at 50"] = {k: (x[:, -1] / x[:, 0]).mean() for k, x in swept.items()}
settled.round(2)

# %% [markdown]
# From 100 to 200 samples the order by efficiency turns over. Separation keeps its order while its
# values fall; quality and the effective rank rise. Compare layers at one n, and look at tau first.
#
# ## 5. A common offset
#
# Add 5 to every feature of a layer: no sample moves with respect to another.

# %%
with capture(teacher, frame.index) as features, torch.no_grad():
    teacher(data.x_test)
layer, y = features["block4"].flatten(1), data.y_test
reads = {
    "separation, published": lambda x: separation(x, y),
    "separation, robust": lambda x: separation(x, y, definition="robust"),
    "effective_rank, center=False": lambda x: m.effective_rank(x, center=False),
    "effective_rank": m.effective_rank,
    "logme": lambda x: m.logme(x, y),
    "logme, center=True": lambda x: m.logme(x, y, center=True),
    "two_nn": m.two_nn,
}
table = pd.DataFrame({c: [f(layer + c).item() for f in reads.values()] for c in (0, 5)}, reads)
change = (table[5] / table[0] - 1).abs()
table.assign(change=change).rename(columns={0: "as it is", 5: "5 added"}).round(3)

# %% [markdown]
# ## 6. Similarity
#
# In independent layers the biased CKA sees the more in common the wider they are; `cka` is
# debiased, `procrustes_distance` cannot be. And CKA hears the loudest directions alone: of two
# layers that it calls equal, one may know the classes and the other not.

# %%
for d in (10, 1000):
    a, b = normal(100, d), normal(100, d)
    biased, distance = m.cka(a, b, debiased=False), m.procrustes_distance(a, b)
    print(f"{d:>4} features: cka {m.cka(a, b):.2f}, biased {biased:.2f}, procrustes {distance:.2f}")
loud = 10 * normal(500, 5)
knowing = torch.cat([loud, torch.eye(10)[labels] + 0.1 * normal(500, 10)], dim=1)
excess = [m.h_score(x, labels, null=20).excess for x in (knowing, loud)]
print(f"cka {m.cka(knowing, loud):.3f}, excess of h_score {excess[0]:.2f} and {excess[1]:.2f}")

alike = similarity_matrix(features)
alike.index.name = alike.columns.name = "the teacher"
plot_similarity(alike)
plt.show()

# %% [markdown]
# ## 7. Selection: layers that say the same thing
#
# The three layers of highest separation are the last three, and near copies. `redundancy=` takes a
# penalty from layers like those chosen before; `"loes"` weighs loss, isotropy, redundancy and the
# triangles of classes (`eta`). Do they choose layers that differ?

# %%
ways = {
    "separation": scores.select(3, by="separation"),
    "separation, redundancy=0.5": scores.select(3, by="separation", redundancy=0.5),
    "loes": scores.select(3, by="loes"),
    "loes, eta=0": scores.select(3, by="loes", eta=0.0),
    "evenly spaced": choose_layers(teacher, data.x_test[:2], 3),
}
most = {way: max(alike.loc[a, b] for a in x for b in x if a < b) for way, x in ways.items()}
chosen = pd.DataFrame({"layers": {way: ", ".join(x) for way, x in ways.items()}})
chosen["most alike two (cka)"] = most
chosen["lowest separation"] = {way: frame.separation[x].min() for way, x in ways.items()}
chosen.round(2)

# %% [markdown]
# Here they do not: each of the first four ways takes two layers of CKA above 0.95. `redundancy` is
# not CKA: a layer of participation ratio 8 is only 1 / √8 = 0.35 redundant to its own copy. The
# triangles grow with a layer's scale: without `eta` LOES takes others, again alike. Even spacing
# looks at depth alone, and takes less alike ones here. Which choice teaches a student better no
# number here says: look at the matrix, choose, and distil (`distil_from_a_ranking`).
#
# ## 8. Over training, and by class
#
# `distill` called `keep` after every epoch: a folder of checkpoints. Of each the layers are scored;
# the last one is the teacher of above.

# %%
over = {}
for path in sorted(folder.glob("*.pt"), key=lambda path: int(path.stem)):
    teacher.load_state_dict(torch.load(path, weights_only=True))
    over[int(path.stem)] = score_layers(teacher, test, subsamples=half_samples, progress=False)

_, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
compare({f"epoch {n}": over[n] for n in (1, epochs)}, by="separation", ax=axes[0])
compare(over, by="separation", heat=True, ax=axes[1])
plt.show()

# %%
plot_classes(scores.per_class())
plt.show()

# %% [markdown]
# After one epoch separation falls with depth, after six it has risen from 0.01 to 0.6 at the head's
# input, and the first layer is where it was: what training adds, it adds at the end, and most of it
# in the second epoch. By class (cosines about the mean, as `definition="robust"`, so on another
# scale than the curves) zeros stand apart from the first layer on; eights are the last to, and even
# at the head's input they are among those least apart. `scores.per_class()` has the numbers.
