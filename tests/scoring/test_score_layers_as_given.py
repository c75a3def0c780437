"""What `score_layers` and `similarity_matrix` go by: the labels that items give, one seed."""

import inspect
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from teachers import least_of, score
from torch import nn
from torch.utils.data import Dataset

from geomkd.scoring.similarity_matrix import similarity_matrix


class Coarse(Dataset):
    """Items with two classes; its ``targets`` are of ten."""

    def __init__(self, n=120):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 4, generator=generator)
        self.targets = torch.arange(n) % 10

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.targets[i] >= 5)


def deep():
    return nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(4, 4), nn.Tanh())])


@pytest.mark.parametrize("options", [{}, {"entropy_per_class": 30}, {"measures": ["knn_accuracy"]}])
def test_labels_that_items_give_are_scored(options):
    data, model = Coarse(), deep()
    expected = score(model, (data.x, (data.targets >= 5).long()), **options)
    with pytest.warns(UserWarning, match="labels are read from the samples") as caught:
        scores = score(model, data, **options)
    assert len(caught) == 1 and caught[0].filename == inspect.getfile(score)
    assert scores.settings["classes"] == 2
    assert scores.to_frame().equals(expected.to_frame())
    with pytest.warns(UserWarning, match="labels are read from the samples") as caught:
        frame = similarity_matrix(model, None, data, progress=False)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert len(frame) == len(scores.to_frame())


# ---- models that draw at random even in evaluation mode ----

N = 120
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
DRAWS = {
    "torch": lambda x: x * (torch.rand_like(x) < 0.7),
    "dropout": lambda x: F.dropout(x, 0.3, training=True),
    "numpy": lambda x: x * torch.from_numpy(np.random.rand(*x.shape) < 0.7),  # noqa: NPY002
    "random": lambda x: x + torch.tensor([[random.random()] for _ in x]),
}


class Masked(nn.Module):
    """Draws before, between and behind its layers."""

    def __init__(self, draw, width=4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, width), nn.Linear(width, 20), nn.Linear(20, 3)
        self.tanh, self.gelu, self.draw = nn.Tanh(), nn.GELU(), draw

    def forward(self, x):
        x = self.draw(self.tanh(self.a(self.draw(x))))
        return self.draw(self.c(self.draw(self.gelu(self.b(x)))))


def states():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in DRAWS), ("torch", {"entropy_per_class": 30, "samples": 60})],
)
def test_one_seed_gives_one_result_in_any_memory(name, options, plans):
    model = Masked(DRAWS[name], width=8000)
    least = least_of(model, (X, Y), **options)
    before, frames = states(), []
    for memory in ("2GB", f"{least + 8}MB", f"{least + 1}MB"):
        frames.append(score(model, (X, Y), memory=memory, **options).to_frame())
        assert states() == before
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        before = states()
    assert {plan.batch_size for plan in plans} == {16}
    assert len({plan.passes for plan in plans}) > 1
    column = frames[0]["quality"]
    assert column.tolist() == pytest.approx(frames[1]["quality"].tolist(), rel=1e-5)
    assert column.tolist() == pytest.approx(frames[2]["quality"].tolist(), rel=1e-5)
    other = score(model, (X, Y), seed=1, **options).to_frame()["quality"]
    assert other.tolist() != pytest.approx(column.tolist(), rel=1e-4)


def test_batches_of_a_model_that_draws_nothing_follow_the_memory(plans):
    score(Masked(lambda x: x), (X, Y))
    assert plans[-1].batch_size == N


def test_every_batch_draws_anew():
    noise = Masked(lambda x: torch.rand_like(x))
    zeros = score(noise, (torch.zeros(N, 4), Y), layers=["a"], measures=["two_nn"])
    assert zeros.settings["samples"] == N  # repeated batches would be warned of as equal rows


@pytest.mark.parametrize("name", DRAWS)
def test_predicted_labels_and_similarities_follow_the_seed(name):
    model = Masked(DRAWS[name])
    found = []
    for _ in range(2):
        before = states()
        frame = score(model, X, labels="predicted").to_frame()
        alike = similarity_matrix(model, Masked(DRAWS[name]), (X, Y), batch_size=40, progress=False)
        assert states() == before
        found.append((frame["quality"].tolist(), alike.to_numpy().tolist()))
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert found[0] == found[1]
