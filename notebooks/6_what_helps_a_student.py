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
# # What helps a student?
#
# A score of a layer is a promise: a student that learns from it will gain. Here the promise is kept
# or broken in the open. For every candidate layer of a teacher the same student was trained from
# that layer alone, three times; the scores were computed on images that served nothing else. All
# that is drawn is read from `benchmarks/results/ranking_power` of a checkout; nothing is trained.
# `benchmarks/ranking_power.py` wrote it, at the top of which the protocol stands.

# %% tags=["parameters"]
teachers = 9

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import geomkd

root = Path(geomkd.__file__).parents[1]
sys.path.insert(0, str(root))
from benchmarks.evidence.command import chosen_rule
from benchmarks.evidence.found import Found
from benchmarks.evidence.report import regret_map
from benchmarks.evidence.teachers import TEACHERS

results = root / "benchmarks" / "results" / "ranking_power"
founds = [Found.of(teacher, results) for teacher in TEACHERS[:teachers]]
founds = [found for found in founds if found.complete]
pd.DataFrame(
    {
        "teacher": found.teacher.name,
        "part": "confirmation" if found.teacher.confirmation else "discovery",
        "its accuracy, %": round(100 * found.about["accuracy"], 1),
        "layers": len(found.layers()),
        "students": len(found.runs),
        "failed": sum("failed" in run for run in found.runs.values()),
        "tau between seeds": round(found.ceiling(), 2),
    }
    for found in founds
)

# %% [markdown]
# Only teachers whose students are all finished are shown. On those of *discovery* one rule was
# chosen; those of *confirmation* had no part in it. The last column is the ceiling: how well one
# seed's order of the layers agrees with another's. Little more can be asked of a score.
#
# ## 1. One layer, one student
#
# Each point is a student (test accuracy after the last epoch), each line the mean of three, the
# dashed line the same student by cross entropy alone. What is under the dashed line taught worse
# than the labels do.

# %%
columns = min(3, len(founds))
rows = -(-len(founds) // columns)
fig, axes = plt.subplots(
    rows, columns, figsize=(3.7 * columns, 3 * rows), squeeze=False, layout="constrained"
)
for ax, found in zip(axes.flat, founds, strict=False):
    accuracies = found.accuracies()
    places = np.arange(len(accuracies))
    ax.plot(places, accuracies, "o", color="#56B4E9", ms=4)
    ax.plot(places, accuracies.mean(axis=1), color="#0072B2")
    ax.axhline(found.zero_line().mean(), color="#D55E00", ls="--", lw=1.2)
    ax.set_xticks(places, found.layers(), rotation=60, ha="right", fontsize=7)
    ax.set_title(found.teacher.name, fontsize=9)
for ax in axes[:, 0]:
    ax.set_ylabel("student's accuracy, %")
for ax in axes.flat[len(founds) :]:
    ax.set_axis_off()
plt.show()

# %% [markdown]
# Late layers help, early ones do harm; on Fashion-MNIST, where the labels alone do well, hardly any
# helps. Whether the very last one, the head's input, is the best of all or worse than the block
# before it differs between teachers, and that is what a score would have to tell.
#
# ## 2. What each rule costs
#
# A rule picks one layer. Its regret is how many points the student of that layer is below the
# student of the best one, which two seeds name and the third measures, in turn. Rules stand in the
# order of their mean regret on the teachers of discovery; those of confirmation are right of the
# line, where there are any. *Deepest block*, *head's input*, *depth* and *random* need no score.

# %%
regret_map(founds)
plt.show()
print("the rule that went to confirmation:", chosen_rule(results))

# %% [markdown]
# ## 3. The order of all layers
#
# Kendall's tau between a score and the students' mean accuracies: 1 for the same order, 0 for none,
# −1 for its reverse. Depth alone is a hard rival: later layers separate the classes better, and
# they help more, so any score that grows with depth has a high tau and has told nothing new.

# %%
shown = ["depth", "linear probe", "LogME", "silhouette", "NC2 angles", "S", "I", "E", "Q"]
shown += ["power law", "two-NN", "effective rank"]
names = [found.teacher.name for found in founds]
taus = [[found.tau(rule) for found in founds] for rule in shown]
fig, ax = plt.subplots(figsize=(3 + 0.8 * len(names), 4), layout="constrained")
picture = ax.imshow(taus, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
for (row, column), value in np.ndenumerate(taus):
    colour = "white" if abs(value) > 0.6 else "black"
    ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
ax.set_yticks(range(len(shown)), shown)
fig.colorbar(picture, label="Kendall's tau with the students")
plt.show()

# %% [markdown]
# ## 4. Controls
#
# The same scores of the teacher's training images, by the paper's sampling, of an untrained network
# of the same shape, and with permuted labels. A score whose tau survives permuted labels has not
# read the classes; one that an untrained network has as well reads the architecture. (Mean tau over
# the teachers above; by the paper's sampling only Q and its parts are computed.)

# %%
kinds = ["held-out", "training", "paper", "untrained", "permuted"]
kept = ["Q", "S", "silhouette", "linear probe", "LogME", "power law"]
taus = [[[found.tau(rule, kind) for found in founds] for kind in kinds] for rule in kept]
pd.DataFrame(np.mean(taus, axis=2), kept, kinds).round(2)

# %% [markdown]
# ## 5. Four layers
#
# Nobody distils from one layer. The same students on sets of four, of four teachers: accuracy less
# that of four evenly spaced blocks, a point a seed. *Anchored* is evenly spaced up to the head's
# input, `choose_layers(how="anchored")`.

# %%
from benchmarks.evidence.choices import EVENLY
from benchmarks.evidence.sets import TEACHERS as OF_SETS
from benchmarks.evidence.sets_found import SetsFound
from benchmarks.evidence.sets_report import choices_of, drawn

sets = [SetsFound.of(teacher, results.parent / "sets") for teacher in OF_SETS[:teachers]]
drawn(sets, choices_of, EVENLY)
plt.show()

# %% [markdown]
# ## What came of it
#
# - The rule that was best on discovery, the power law's exponent, failed on confirmation: it names
#   the first layer on Fashion-MNIST. **No score is recommended.** Of the two places that need none,
#   the head's input was nearer to the best layer on confirmation, the deepest block on discovery.
# - Of sets, evenly spaced up to the head's input matched or beat evenly spaced blocks on three of
#   four teachers; it is what `geomkd distill --layers auto` takes. No set by Q was clearly
#   better on any.
# - Silhouette, LogME, nearest class mean and probe order the layers nearly as well as depth does,
#   and by what they read: with permuted labels their order is gone. Q's order is weak in any case.
#
# All tables, the objectives and the weights: `benchmarks/RESULTS.md`. Nine small networks, three
# kinds of images, students trained for minutes: what larger ones do is open.
