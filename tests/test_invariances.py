"""What must not change a measure, and what must: knowledge quality, then every public one."""

import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEFINITIONS, TERMS, clusters, values_of

from geomkd import knowledge_quality, measures, separation

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


# ---- every public measure ------------------------------------------------------------------------

ROTATED = {
    rotation,
    scale,
    sample_permutation,
    class_renaming,
}  # all that look at angles and ratios
CENTRED = ROTATED | {translation}
SPLIT = CENTRED - {sample_permutation}  # rows are held out by their place

# Measure -> changes that leave it as it is; all others must move it.
LEAVES = {
    "separation": ROTATED,
    "information": ROTATED,
    "efficiency": ROTATED,
    "separation, robust": CENTRED,
    "information, robust": CENTRED,
    "efficiency, robust": CENTRED,
    "fisher_ratio": CENTRED,
    "silhouette": CENTRED,
    "knn_accuracy": CENTRED,
    "nearest_class_mean": SPLIT,
    "linear_probe": SPLIT,
    "logme": ROTATED,  # an offset is what stands in for an intercept
    "logme, centred": CENTRED,
    "h_score": CENTRED,
    "h_score, unshrunk": CENTRED | {feature_scales},
    "gbc": CENTRED,
    "nc1": CENTRED,
    "nc2_norms": CENTRED,
    "nc2_angles": CENTRED,
    "two_nn": CENTRED,
    "mle_dimension": CENTRED,
    "pca_dimension": CENTRED,
    "pca_dimension, uncentred": ROTATED,
    "participation_ratio": CENTRED,
    "participation_ratio, debiased": CENTRED,
    "spectral_entropy": CENTRED,
    "effective_rank": CENTRED,
    "effective_rank, uncentred": ROTATED,
    "power_law_alpha": CENTRED,
    "isotropy": CENTRED,  # of features far above its 1e-6
    "cka": CENTRED,  # of one of the two layers, but for the order of samples
    "cka, biased": CENTRED,
    "procrustes_distance": CENTRED,
}
OPTIONS = {
    "robust": {"definition": "robust"},
    "centred": {"center": True},
    "uncentred": {"center": False},
    "unshrunk": {"shrinkage": 0.0},
    "debiased": {"debiased": True},
    "biased": {"debiased": False},
}
ALONE = ("two_nn", "mle_dimension", "pca_dimension", "participation_ratio", "spectral_entropy")
ALONE += ("effective_rank", "power_law_alpha", "isotropy")
OF_TWO = ("cka", "procrustes_distance")
MOVES = (
    rotation,
    scale,
    translation,
    feature_scales,
    sample_permutation,
    class_renaming,
    label_permutation,
)


def measured(row, x, y, other):
    """One number of a row of the table."""
    name, _, option = row.partition(", ")
    options = OPTIONS.get(option, {})
    if name in OF_TWO:
        return getattr(measures, name)(x, other, **options).item()
    if name in ALONE:
        return getattr(measures, name)(x, **options).item()
    if name.startswith("nc"):
        return getattr(measures.neural_collapse(x, y), name).item()
    # Of one neighbour, so that no vote is a tie; see below.
    measure = partial(measures.knn_accuracy, k=1) if row == "knn_accuracy" else None
    return (measure or getattr(measures, name))(x, y, **options).item()


def row_names():
    for name in LEAVES:
        name = name.partition(", ")[0]
        yield "neural_collapse" if name.startswith("nc") else name


def test_every_measure_has_a_row():
    results = {"KnowledgeQuality", "NeuralCollapse", "WithNull", "knowledge_quality"}
    assert set(row_names()) == set(measures.__all__) - results


def cells():
    """Rows and changes, but for those of classes that a measure does not know."""
    for row in LEAVES:
        alone = row.partition(", ")[0] in ALONE + OF_TWO
        for change in MOVES[: 5 if alone else 7]:
            yield pytest.param(row, change, id=f"{row}-{change.__name__}")


@pytest.mark.parametrize(("row", "change"), list(cells()))
def test_table(row, change):
    x, y = clusters(200, 18, CLASSES, sep=0.5)
    x = (x * 0.9 ** np.arange(18) + 0.5) * (1000 if row == "isotropy" else 1)
    mix = np.random.default_rng(7).standard_normal((18, 11))
    other = np.maximum(x @ mix, 0)
    changed_x, changed_y = change(x, y, np.random.default_rng(11))
    if change is sample_permutation:  # of both layers
        other = other[np.random.default_rng(11).permutation(len(x))]
    before = measured(row, x, y, np.maximum(x @ mix, 0))
    after = measured(row, changed_x, changed_y, other)
    if change in LEAVES[row]:
        rel = 1e-4 if (row, change) == ("isotropy", scale) else 1e-7
        assert after == pytest.approx(before, rel=rel)
    else:
        assert abs(after / before - 1) > 1e-4


@pytest.mark.parametrize("name", OF_TWO)
def test_both_layers_keep_the_order_of_samples(name):
    x, _ = clusters(60, 12, CLASSES)
    measure = getattr(measures, name)
    assert measure(x, x).item() == pytest.approx(
        {"cka": 1, "procrustes_distance": 0}[name], abs=1e-9
    )
    shuffled = measure(x, x[np.random.default_rng(0).permutation(60)]).item()
    assert shuffled < 0.5 if name == "cka" else shuffled > 0.5
    y = clusters(60, 9, CLASSES, seed=1)[0]
    assert measure(x, y).item() == pytest.approx(measure(y, x).item(), rel=1e-9)


def test_a_tied_vote_goes_to_the_lowest_label():
    """The one measure that the names of classes may move."""
    x, y = np.array([[0.0], [1.0], [1.1], [3.0], [3.1], [9.0]]), np.array([0, 0, 1, 1, 0, 0])
    names = np.array([1, 0])
    here, there = (measures.knn_accuracy(x, labels, k=2).item() for labels in (y, names[y]))
    assert here != there


def test_translation_moves_uncentred_measures_only():
    """A large offset is one direction."""
    x = clusters(80, 12, CLASSES)[0].astype(np.float64)
    assert measures.effective_rank(x + 1e4, center=False, on="eigenvalues") < 1.001
    centred = [measures.effective_rank(features).item() for features in (x, x + 1e4)]
    assert centred[1] == pytest.approx(centred[0], rel=1e-3)


# ---- what the third notebook says of known geometry ----------------------------------------------


def test_noise_and_near_twins_move_the_dimension_that_neighbours_see():
    rng = np.random.default_rng(0)
    plane, turn = rng.random((1000, 2)), rng.standard_normal((2, 100))
    rolled = np.cos(5 * plane @ turn + 2 * np.pi * rng.random(100))
    noise = rng.standard_normal(rolled.shape)
    twins = np.concatenate([rolled, rolled[:100] + 1e-4 * noise[:100]])
    bare, noisy, doubled = (measures.two_nn(x) for x in (rolled, rolled + 0.05 * noise, twins))
    assert doubled < 1 < 1.8 < bare < 2.5 < noisy
    assert measures.pca_dimension(rolled) > 8


def test_cka_hears_the_loudest_directions_alone():
    rng, y = np.random.default_rng(0), np.arange(300) % 10
    loud = 10 * rng.standard_normal((300, 5))
    knowing = np.concatenate([loud, np.eye(10)[y] + 0.1 * rng.standard_normal((300, 10))], axis=1)
    assert measures.cka(knowing, loud) > 0.99
    assert measures.h_score(knowing, y) > 10 * measures.h_score(loud, y)
