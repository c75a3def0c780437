"""What must not change knowledge quality, and what must, of both definitions."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEFINITIONS, TERMS, clusters, values_of

from geomkd import knowledge_quality, separation

CLASSES = 4


def rotation(x, y, rng):
    q, _ = np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])))
    return x @ q, y


def reflection(x, y, rng):
    return x * np.where(np.arange(x.shape[1]) == 0, -1, 1), y


def feature_permutation(x, y, rng):
    return x[:, rng.permutation(x.shape[1])], y


def scale(x, y, rng):
    return x * 10 ** rng.uniform(-3, 3), y


def negation(x, y, rng):
    return -x, y


def zero_features(x, y, rng):
    return np.concatenate([x, np.zeros_like(x)], axis=1), y


def sample_permutation(x, y, rng):
    order = rng.permutation(len(x))
    return x[order], y[order]


def class_renaming(x, y, rng):
    return x, rng.permutation(50)[:CLASSES][y] - 25


def translation(x, y, rng):
    return x + rng.standard_normal(x.shape[1]), y


def feature_scales(x, y, rng):
    return x * rng.uniform(0.2, 5, x.shape[1]), y


def sample_scales(x, y, rng):
    return x * rng.uniform(0.2, 5, (len(x), 1)), y


def label_permutation(x, y, rng):
    return x, rng.permutation(y)


NEITHER = [
    rotation,
    reflection,
    feature_permutation,
    scale,
    negation,
    sample_permutation,
    class_renaming,
]
# Change -> terms that it moves, of the published and of the robust definition.
CHANGES = {
    translation: (TERMS, ()),
    feature_scales: (TERMS, TERMS),
    sample_scales: (("quality", "information", "efficiency"), TERMS),
    label_permutation: (TERMS, TERMS),
    # Only through min(n, d) and log min(n_a - 1, d), if d is the smaller.
    zero_features: (("quality", "efficiency"), ("quality", "information")),
}


def sample(seed=0):
    x, y = clusters(80, 12, CLASSES, seed=seed)
    return x.astype(np.float64) + 0.5, y


def quality(x, y, definition):
    q = knowledge_quality(x, y, dataset_size=1000, definition=definition)
    values = values_of(q)
    return {name: values[name] for name in TERMS}


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("change", NEITHER, ids=lambda change: change.__name__)
@settings(deadline=None, derandomize=True, max_examples=8)
@given(seed=st.integers(0, 2**16))
def test_must_not_matter(change, definition, seed):
    x, y = sample(seed)
    changed = quality(*change(x, y, np.random.default_rng(seed)), definition)
    assert changed == pytest.approx(quality(x, y, definition), rel=1e-9)


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@settings(deadline=None, derandomize=True, max_examples=8)
@given(seed=st.integers(0, 2**16))
def test_what_moves_and_what_stays(change, definition, seed):
    x, y = sample(seed)
    before = quality(x, y, definition)
    after = quality(*change(x, y, np.random.default_rng(seed)), definition)
    moves = CHANGES[change][DEFINITIONS.index(definition)]
    for name in TERMS:
        if name in moves:
            assert abs(after[name] / before[name] - 1) > 1e-4, name
        else:
            assert after[name] == pytest.approx(before[name], rel=1e-9), name


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=5),
    d=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    whole_numbers=st.booleans(),
)
def test_bounds_hold_for_any_sample(sizes, d, seed, whole_numbers):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.standard_normal((len(y), d)) + 1e-3
    x = np.round(x) + 3 if whole_numbers else x  # repeated samples, across classes too
    for definition in DEFINITIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows at the mean
            q = knowledge_quality(x, y, definition=definition)
        assert q.details["class_entropy"] >= -1e-9
        assert q.information >= -1e-9
        assert 0 <= q.efficiency < np.inf
        most = 1 if definition == "published" else 2
        assert -most - 1e-9 <= q.separation <= most + 1e-9
        assert q.quality >= q.separation


def test_shuffled_labels_have_no_separation():
    """Mean 0 in the robust definition; the published one counts i = j and is biased upwards."""
    x, y = clusters(120, 10, CLASSES)
    rng = np.random.default_rng(0)
    drawn = {
        definition: np.array(
            [separation(x, rng.permutation(y), definition=definition).item() for _ in range(150)]
        )
        for definition in DEFINITIONS
    }
    error = {name: values.std() / np.sqrt(len(values)) for name, values in drawn.items()}
    assert abs(drawn["robust"].mean()) < 4 * error["robust"]
    assert error["robust"] < 0.005
    assert drawn["published"].mean() > 20 * error["published"]


def test_sample_size_moves_the_published_definition_more():
    """The same distribution with 20 and with 160 samples a class."""
    few, many = (clusters(n, 128, CLASSES, relu=True) for n in (80, 640))
    moved = {
        definition: abs(
            knowledge_quality(*many, definition=definition).information
            / knowledge_quality(*few, definition=definition).information
            - 1
        )
        for definition in DEFINITIONS
    }
    assert moved["published"] > 0.3
    assert moved["robust"] < 0.1
