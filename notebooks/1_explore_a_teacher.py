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
# # Explore a teacher
#
# Which layers of a network hold knowledge worth teaching, and how sure are we? Half an hour with
# `geomkd`: from the score of two tensors, over the curves of a teacher's layers, to a student that
# learned from the layers you chose. Everything here runs on a laptop, on data that is installed
# with scikit-learn.

# %% tags=["parameters"]
n_images, teacher_epochs, student_epochs = 1000, 8, 10

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

from geomkd import candidate_layers, capture, distill, knowledge_quality, pair_layers, score_layers
from geomkd.datasets import digits
from geomkd.quickstart import residual_network
from geomkd.scoring.ranking import sqrt_si

torch.set_num_threads(1)  # networks this small gain nothing from more

# %% [markdown]
# ## 1. One layer's features
#
# `knowledge_quality` takes features (n, ...) and labels (n,). Here four classes lie around four
# random centres; the noise decides how much of a class is its centre.

# %%
generator = torch.Generator().manual_seed(0)
labels = torch.arange(400) % 4
centres = torch.randn(4, 64, generator=generator)
noise = torch.randn(400, 64, generator=generator)

knowledge_quality(centres[labels] + 0.5 * noise, labels)

# %% [markdown]
# Q = S + √(I·E). **S**, separation: how much more alike two samples of a class are than two of
# different classes, by |cosine|. **I**, information: how far a class spreads, times the entropy of
# its spectrum. **E**, efficiency: the margin between classes over the size of the features.
#
# The three pull apart. As noise grows, S falls and I rises:

# %%
levels = [0.05, 0.2, 0.5, 1.0, 2.0, 4.0]
rows = [knowledge_quality(centres[labels] + level * noise, labels) for level in levels]
terms = ["separation", "information", "efficiency", "quality"]
pd.DataFrame([[getattr(q, term) for term in terms] for q in rows], index=levels, columns=terms)

# %% [markdown]
# The published definition has quirks that a reader of its figures should know. A constant added to
# every feature changes all of it, although it moves no sample with respect to another;
# `definition="robust"` does not see it.

# %%
features = centres[labels] + noise
for definition in ("published", "robust"):
    plain, moved = (
        knowledge_quality(x, labels, definition=definition) for x in (features, features + 2)
    )
    print(f"{definition:<10} Q = {plain.quality:.3f}, with 2 added {moved.quality:.3f}")

# %% [markdown]
# ## 2. A teacher and its layers
#
# A small residual network on 1,000 handwritten digits. `distill` with `objective="ce"` is plain
# training.

# %%
data = digits(seed=0)
train, test = (data.x_train[:n_images], data.y_train[:n_images]), (data.x_test, data.y_test)
teacher = residual_network(widths=(16, 32, 64), blocks=3, seed=0)
options = {"val": test, "batch_size": 64, "progress": False}
taught = distill(teacher, None, train, objective="ce", epochs=teacher_epochs, **options)
taught

# %% [markdown]
# Which places of it can be read? `candidate_layers` runs the network once and lists the blocks, the
# activations outside them and the input of the head, in order of execution.

# %%
for layer in candidate_layers(teacher, data.x_train[:2]):
    print(f"{layer.name:<10} {layer.role:<11} {layer.kind:<7} {layer.shape}")

# %% [markdown]
# `capture` copies what any of them computes. It works on every PyTorch model, and removes its hooks
# whatever happens.

# %%
with capture(teacher, ["block3", "block9"]) as features, torch.no_grad():
    teacher(train[0])
for name, x in features.items():
    print(name, knowledge_quality(x, train[1]))

# %% [markdown]
# ## 3. All layers at once, and how sure
#
# `score_layers` draws one class-balanced sample, runs the teacher over it and scores every layer.
# The bands come from 50 half-samples: they say how much of a figure hangs on which images were
# drawn.

# %%
scores = score_layers(teacher, train, progress=False)
scores.plot()
plt.show()

# %%
scores.rank()

# %% [markdown]
# `best` and `worst` bound the ranks that a layer takes in 95 % of the half-samples; layers of the
# ranks in `tied_with` change places with it too often to be called apart.
#
# `select` takes any column, or a function of the frame. Q is often largest early, where I and E
# are; the geometric mean of S and I asks for classes that are apart *and* not collapsed.

# %%
print("by Q:       ", scores.select(3))
print("by S:       ", scores.select(3, by="separation"))
print("by sqrt(SI):", scores.select(3, by=sqrt_si))

# %% [markdown]
# ## 4. A student
#
# Pair the chosen layers with a student's blocks, evenly spaced, and distil: the student's backbone
# learns by mean squared error on the features alone, its head by cross entropy on features detached
# from the backbone.

# %%
student = residual_network(widths=(4, 8, 16), blocks=1, seed=1)
pairs = pair_layers(scores.select(3, by="separation"), student, data.x_train[:2])
print(pairs)
result = distill(student, teacher, train, pairs=pairs, epochs=student_epochs, **options)
result

# %%
result.plot()
plt.show()

# %% [markdown]
# Against the same student trained with labels alone:

# %%
alone = residual_network(widths=(4, 8, 16), blocks=1, seed=1)
baseline = distill(alone, None, train, objective="ce", epochs=student_epochs, **options)
print("last epoch, one seed:")
print(f"features only {result.accuracy:.3f}, cross entropy {baseline.accuracy:.3f}")

# %% [markdown]
# One seed and 500 test images tell little: the standard error of an accuracy near 95 % is one
# point. `python -m geomkd quickstart` repeats the comparison with several seeds and ways of
# choosing layers.
#
# Next: your own model. `score_layers(model, dataset)` takes any PyTorch model and a pair of
# tensors, a Dataset, a DataLoader or an iterable of batches; `memory="2GB"` bounds what it needs.
