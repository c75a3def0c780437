"""score_layers on several processes against one: the same to the last bit, errors included.

Run by itself, as torchrun does it, this file is what a process does.
"""

import contextlib
import copy
import functools
import io
import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import ended, start
from small import seeded_model
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from geomkd import LayerScores, score_layers
from geomkd.common.distributed import world

N, CLASSES, EXAMPLES = 48, 4, 2
SIZES = (1, 2)
Y = torch.arange(N) % CLASSES

pytestmark = pytest.mark.slow


# ---- what a process does -------------------------------------------------------------------------


def images():
    return torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@functools.cache
def network():
    return seeded_model(lambda: ResNet(BasicBlock, [2, 1, 1, 1], num_classes=CLASSES))


def spoiled(path):
    """A network that gives NaN from this parameter on."""
    model = copy.deepcopy(network())
    with torch.no_grad():
        model.get_parameter(path)[0] = float("nan")
    return model


def with_zero_rows():
    """Layers "0" and "1" of which the first has rows of zeros, and such inputs."""
    torch.manual_seed(0)
    x = images().flatten(1)
    x[[40, 7, 12]] = 0
    return nn.Sequential(nn.Identity(), nn.Linear(x.shape[1], 6)), x


class Odd(Exception):
    """An error that cannot be read in another process: its arguments are not its text."""

    def __init__(self, what, where):
        super().__init__(f"{what} in {where}")


def failing(error, *, rank, after=0):
    """Forward function that fails in one process, once more than so many samples were read."""
    read = 0

    def forward(model, batch):
        nonlocal read
        read += len(batch) * (len(batch) != EXAMPLES)
        if world().rank == rank % world().size and read > after:
            raise error
        return model(batch)

    return forward


def tight(more, **options):
    """Budget this many bytes above the least."""
    try:
        score_layers(network(), (images(), Y), memory=1, **options)
    except ValueError as error:
        return int(re.search(r"at least (\d+) MB", str(error)).group(1)) * 10**6 + more
    raise AssertionError("a byte was enough")


def case(model=None, x=None, **options):
    model = network() if model is None else model
    data = (images() if x is None else x, Y)
    return lambda: score_layers(model, data, **({"subsamples": 5, "progress": False} | options))


def mean_of_first(features, labels):
    """A measure of the caller's own."""
    return features[labels == 0].mean()


def cases():
    """Calls of score_layers by name, the same in every process unless the name says otherwise."""
    small = {"subsamples": 5, "definition": "robust", "entropy_per_class": 10, "samples": 24}
    few = ["layer4.0", "fc.input", "fc"]
    zero, x = with_zero_rows()
    several = ("two_nn", "knn_accuracy", "h_score", "effective_rank", "cka_to_last", "fisher_ratio")
    several += ("knowledge_quality", mean_of_first)
    yield "measures", case(measures=several, layers=few, sweep=[16, 32])
    yield "nulls", case(measures=("separation", "knn_accuracy"), layers=few[1:], null=19)
    yield "plain", case()
    yield "slices", case(**small, memory=tight(400_000, **small))
    yield "groups", case(memory=tight(0))
    ends = ["relu", "fc.input"]  # the last by itself would be read in larger batches
    yield "batches", case(layers=ends, memory=tight(100_000, layers=ends))
    yield "one layer", case(layers=["fc.input"])
    yield "bar", case(layers=few, progress=True)
    yield "zero rows", case(zero, x, layers=["0", "1"])
    yield "memory", case(memory=1)
    yield "NaN from layer2.0 on", case(spoiled("layer2.0.bn2.bias"))
    yield "NaN in fc alone", case(spoiled("fc.bias"), layers=few)
    yield "odd error", case(forward=failing(Odd("no luck", "forward"), rank=-1))
    stop = KeyboardInterrupt()
    yield "Ctrl-C", case(forward=failing(stop, rank=-1, after=N), memory=tight(0))
    yield "Ctrl-C at first", case(forward=failing(stop, rank=-1, after=-1))
    yield "Ctrl-C without rows", case(layers=few[:1], forward=failing(stop, rank=0))
    yield "other samples", case(layers=few, samples=N - 4 * world().rank)


def told(call):
    """What a call gives, as JSON holds it."""
    bar = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(bar):
        warnings.simplefilter("always")
        try:
            result = call()
        except (Exception, KeyboardInterrupt) as error:
            result = [type(error).__name__, str(error)]
    texts = [str(w.message) for w in caught if str(w.message).startswith("layer ")]
    return result, {"warnings": texts, "bar": "100%" in bar.getvalue()}


def process(folder):
    found = {}
    for name, call in cases():
        result, found[name] = told(call)
        if isinstance(result, LayerScores):
            result.save(folder / f"{name}.{world().rank}.scores")
        else:
            found[name]["error"] = result
    (folder / f"{world().rank}.json").write_text(json.dumps(found))


# ---- what the processes gave ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of every number of processes."""
    return {size: run(tmp_path_factory.mktemp(f"{size}"), size) for size in SIZES}


def run(folder, size):
    running = start(__file__, [folder], size=size, output=folder / "said")
    assert ended(running, timeout=300) == [0] * size, (folder / "said").read_text()
    return folder


def told_in(runs, size, name):
    return [json.loads((runs[size] / f"{rank}.json").read_text())[name] for rank in range(size)]


def scores_in(runs, size, name):
    return [LayerScores.load(runs[size] / f"{name}.{rank}.scores") for rank in range(size)]


def assert_identical(scores, other):
    pd.testing.assert_frame_equal(scores.to_frame(), other.to_frame(), check_exact=True)
    assert scores.draws.keys() == other.draws.keys()
    for term, drawn in scores.draws.items():
        np.testing.assert_array_equal(drawn, other.draws[term])
    assert scores.sweep.keys() == other.sweep.keys()
    for term, values in scores.sweep.items():
        np.testing.assert_array_equal(values, other.sweep[term])
    np.testing.assert_array_equal(scores.kept, other.kept)
    assert scores.settings == other.settings


several = pytest.mark.parametrize("size", SIZES[1:])


@several
@pytest.mark.parametrize(
    "name", ["plain", "nulls", "slices", "groups", "batches", "one layer", "bar", "zero rows"]
)
def test_every_process_gives_what_one_gives(runs, size, name):
    (alone,) = scores_in(runs, 1, name)
    assert alone.settings["partial"] is False
    for scores in scores_in(runs, size, name):
        assert_identical(scores, alone)
        assert ("knn_accuracy_excess" in scores.frame) == (name == "nulls")


@several
def test_every_process_gives_all_measures(runs, size):
    (alone,) = scores_in(runs, 1, "measures")
    assert {"quality", "mean_of_first", "cka_to_last", "h_score"} < set(alone.draws)
    assert alone.sweep["two_nn"].shape == (3, 2) and alone.draws["h_score"].shape == (3, 5)
    assert alone.grams.shape == (3, N, N)
    for scores in scores_in(runs, size, "measures"):
        assert_identical(scores, alone)


@several
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("memory", "ValueError", "memory must be at least"),
        ("NaN from layer2.0 on", "ValueError", "layer 'layer2.0': features must be finite"),
        ("NaN in fc alone", "ValueError", "layer 'fc': features must be finite"),
    ],
)
def test_an_error_is_everywhere_that_of_one_process(runs, size, name, kind, text):
    (alone,) = told_in(runs, 1, name)
    assert alone["error"][0] == kind and alone["error"][1].startswith(text)
    assert [found["error"] for found in told_in(runs, size, name)] == size * [alone["error"]]


@several
def test_an_error_that_cannot_travel_is_told_in_its_words(runs, size):
    errors = [found["error"] for found in told_in(runs, size, "odd error")]
    expected = ["RuntimeError", "Odd: no luck in forward"]
    assert errors == (size - 1) * [expected] + [["Odd", "no luck in forward"]]


@several
@pytest.mark.parametrize("name", ["Ctrl-C", "Ctrl-C at first"])
def test_ctrl_c_in_one_process_leaves_the_rest(runs, size, name):
    (whole,) = scores_in(runs, 1, "groups" if name == "Ctrl-C" else "plain")
    parts = scores_in(runs, size, name)
    rows = whole.to_frame()["layer"].isin(parts[0].to_frame()["layer"])
    assert 0 < rows.sum() < len(rows)
    expected = LayerScores(
        whole.to_frame()[rows].assign(depth=range(rows.sum())).reset_index(drop=True),
        {term: drawn[rows] for term, drawn in whole.draws.items()},
        replace(whole.how, partial=True),
        {term: values[rows] for term, values in whole.sweep.items()},
        whole.kept[rows],
    )
    for part in parts:
        assert_identical(part, expected)


@several
def test_ctrl_c_without_rows_is_raised_everywhere(runs, size):
    found = told_in(runs, size, "Ctrl-C without rows")
    assert [one["error"] for one in found] == size * [["KeyboardInterrupt", ""]]


@several
def test_other_arguments_are_told(runs, size):
    text = (
        "every process must call score_layers with the same arguments; samples, samples_per_class, "
        "subset, subset_classes of process 1 differ from those of process 0"
    )
    found = told_in(runs, size, "other samples")
    assert [one["error"] for one in found] == size * [["ValueError", text]]


@pytest.mark.parametrize("size", SIZES)
def test_bar_and_warning_come_once(runs, size):
    bars = [found["bar"] for found in told_in(runs, size, "bar")]
    assert bars == [True] + (size - 1) * [False]
    text = "layer '0': 3 of 48 feature rows are zero: their cosines are taken as 0"
    caught = [found["warnings"] for found in told_in(runs, size, "zero rows")]
    assert sorted(caught, key=len) == (size - 1) * [[]] + [[text]]


if __name__ == "__main__":
    process(Path(sys.argv[1]))
