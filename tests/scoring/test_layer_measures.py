"""Every measure through score_layers, against the public functions on features captured by hand."""

import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from small import seeded_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from geomkd import measures as public
from geomkd import score_layers
from geomkd.geometry.draws import Draws, balanced, nested, parts_of
from geomkd.measures.table import LABEL_FREE, NAMES, columns_of

TERMS = ("separation", "information", "efficiency", "quality")
KEYS = ("null_mean", "null_95", "excess", "p_value")
COLLAPSE = ("nc1", "nc2_norms", "nc2_angles")
SIZES, SEED, HALVES, SWEEP, NULL = [48, 42, 30], 3, 2, [36, 70], 19
N = sum(SIZES)
NAMED = torch.tensor([7, 2, 9])  # classes are found by their order, 2, 7, 9
LAYERS = ["1", "3"]


def shuffled_labels(sizes=SIZES):
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(5))
    return NAMED.sort().values[y[order]]


def vectors(y, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(10, d, generator=generator)
    return (means[y] + torch.randn(len(y), d, generator=generator) + 0.5).to(dtype)


def network(widths=(6, 150, 10, 3), dtype=torch.float64):
    def make():
        layers = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(dtype)

    return seeded_model(make, 7)


def captured(model, x, names=LAYERS):
    """Features of layers of a Sequential, by running it by hand."""
    found = {}
    with torch.no_grad():
        for i, module in enumerate(model):
            found[f"{i}.input"] = x
            x = module(x)
            found[str(i)] = x
    return {name: found[name].flatten(1) for name in names}


def score(model, data, **options):
    return score_layers(model, data, **({"subsamples": 0, "progress": False} | options))


def values_of(name, x, y, *, last=None, dataset_size=N, center=True, null=0):
    """Columns of a measure by the public function; with ``null`` those beside."""
    function = getattr(public, name, None)
    held = {"null": null, "seed": SEED}
    if name == "knowledge_quality":
        found = function(x, y, dataset_size=dataset_size, **held)
        return {t: found.null[t] if null else getattr(found, t) for t in TERMS}
    if name == "efficiency":
        return {name: function(x, y, dataset_size=dataset_size, **held)}
    if name == "neural_collapse":
        return dict(zip(COLLAPSE, function(x, y)[:3], strict=True))
    if name == "cka_to_last":
        return {name: public.cka(x, last)}
    if name in ("pca_dimension", "spectral_entropy", "effective_rank", "power_law_alpha"):
        return {name: function(x, center=center)}
    return {name: function(x) if name in LABEL_FREE else function(x, y, **held)}


def assert_column(table, i, features, y, rows, names=NAMES, rel=1e-9, **options):
    """Column ``i`` of every measure in a table of draws, against these rows of the features."""
    last = features[list(features)[-1]][rows]
    for layer, x in enumerate(features.values()):
        for name in names:
            public_values = values_of(name, x[rows], y[rows], last=last, **options)
            for column, value in public_values.items():
                got = table[column][layer][i]
                close = max(rel, 1e-6 * (name == "cka_to_last"))  # of float32 Gram matrices
                expected = pytest.approx(float(value), rel=close, abs=close, nan_ok=True)
                assert got == expected, (layer, column)


def half_rows(y, draws=HALVES, seed=SEED):
    """Rows of the half-samples, as they come."""
    sizes = y.unique(return_counts=True)[1].tolist()
    order = torch.argsort(y, stable=True)
    member = Draws.halves(sizes, draws, seed, y.device).member
    return [order[drawn].sort().values for drawn in member.T]


def smaller_rows(y, sweep, seed=SEED):
    names, sizes = y.unique(return_counts=True)
    orders = nested(torch.searchsorted(names, y), sizes.tolist(), seed)
    return [balanced(orders, samples) for samples in sweep]


def whole(scores):
    return {name: scores.frame[[name]].to_numpy() for name in scores.draws}


Y = shuffled_labels()
X = vectors(Y)


@pytest.fixture(scope="module")
def scores():
    options = {"subsamples": HALVES, "sweep": SWEEP, "null": NULL, "seed": SEED}
    return score(network(), (X, Y), measures=NAMES, **options)


@pytest.fixture(scope="module")
def features():
    return captured(network(), X)


# ---- the public functions ------------------------------------------------------------------------


def test_every_measure_of_the_sample(scores, features):
    assert [x.shape[1] for x in features.values()] == [150, 10]  # above n and below
    assert list(scores.frame["layer"]) == LAYERS and list(scores.draws) == columns_of(NAMES)
    assert_column(whole(scores), 0, features, Y, slice(None))


@pytest.mark.parametrize("draw", [0, HALVES - 1])
def test_every_measure_of_a_half_sample(scores, features, draw):
    rows = half_rows(Y)[draw]
    assert Y[rows].unique(return_counts=True)[1].tolist() == [24, 21, 15]
    assert_column(scores.draws, draw, features, Y, rows)


@pytest.mark.parametrize("place", range(len(SWEEP)))
def test_every_measure_of_a_smaller_sample(scores, features, place):
    assert_column(scores.sweep, place, features, Y, smaller_rows(Y, SWEEP)[place])


def test_a_smaller_sample_is_balanced_and_within_the_next():
    small, large = (set(rows.tolist()) for rows in smaller_rows(Y, SWEEP))
    assert small < large
    for rows, each in ((small, 12), (large, 23)):
        assert Y[sorted(rows)].unique(return_counts=True)[1].tolist() == [each] * 3


SUPERVISED = [n for n in NAMES if n not in LABEL_FREE and n != "neural_collapse"]


def test_null_columns_are_those_of_the_public_functions(scores, features):
    for layer, x in enumerate(features.values()):
        row = scores.frame.iloc[layer]
        for name in SUPERVISED:
            for column, found in values_of(name, x, Y, null=NULL).items():
                got = [row[f"{column}_{key}"] for key in KEYS]
                expected = [float(value) for value in found[1:]]
                assert got == pytest.approx(expected, rel=1e-8, abs=1e-9), column


def test_null_of_neural_collapse_by_hand(scores, features):
    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(N, generator=generator) for _ in range(NULL)]
    index = torch.searchsorted(Y.unique(), Y)
    for layer, x in enumerate(features.values()):
        drawn = [[float(v) for v in public.neural_collapse(x, index[o])[:3]] for o in orders]
        for column, values in zip(COLLAPSE, np.transpose(drawn), strict=True):
            row = scores.frame.iloc[layer]
            assert row[f"{column}_null_mean"] == pytest.approx(values.mean())
            assert row[f"{column}_null_95"] == pytest.approx(max(values))
            assert row[f"{column}_excess"] == pytest.approx(row[column] - values.mean())


def test_null_adds_columns_and_changes_none(scores):
    added = {c for c in scores.frame if c.endswith(tuple(f"_{key}" for key in KEYS))}
    own = columns_of([n for n in NAMES if n not in LABEL_FREE])
    assert added == {f"{c}_{key}" for c in own for key in KEYS}
    without = score(network(), (X, Y), measures=NAMES, seed=SEED)
    assert not added & set(without.frame)
    kept = list(without.draws)
    np.testing.assert_allclose(without.frame[kept], scores.frame[kept], rtol=1e-12)


def test_each_measure_alone_is_as_among_all(scores):
    for name in NAMES:
        alone = score(network(), (X, Y), measures=[name], seed=SEED, sweep=SWEEP[:1])
        columns = columns_of([name])
        assert list(alone.draws) == columns
        for c in columns:
            np.testing.assert_allclose(alone.frame[c], scores.frame[c], rtol=1e-12, err_msg=c)
            np.testing.assert_allclose(alone.sweep[c][:, 0], scores.sweep[c][:, 0], rtol=1e-12)


def test_without_centring():
    names = [name for name in NAMES if name not in ("knowledge_quality", *TERMS)]
    scores = score(network(), (X, Y), measures=names, center=False, sweep=SWEEP[:1], seed=SEED)
    features = captured(network(), X)
    assert_column(whole(scores), 0, features, Y, slice(None), names, center=False)
    assert_column(scores.sweep, 0, features, Y, smaller_rows(Y, SWEEP)[0], names, center=False)
    assert scores.settings["center"] is False


def test_pool(features):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(60, 1, 6, 6)
    y = torch.arange(60) % 3
    names = ("two_nn", "participation_ratio", "knn_accuracy", "own_mean")

    def own_mean(x, y):
        return x.abs().mean()

    options = {"measures": (*names[:3], own_mean), "layers": ["1"]}
    with torch.no_grad():
        pooled = model[:2](x).mean(dim=(2, 3))
    frame = score(model, (x, y), pool="mean", **options).frame
    expected = [
        public.two_nn(pooled),
        public.participation_ratio(pooled),
        public.knn_accuracy(pooled, y),
        pooled.abs().mean(),
    ]
    got = frame[list(names)].iloc[0].tolist()
    assert got == pytest.approx([float(v) for v in expected], rel=1e-5)
    assert score(model, (x, y), pool="max", **options).settings["pool"] == "max"


# ---- the kept subset -----------------------------------------------------------------------------

MANY = [500, 400, 300]
OF_ALL = ("knowledge_quality", *TERMS[:3], "two_nn", "mle_dimension", "knn_accuracy", "silhouette")
OF_ALL += ("nearest_class_mean", "fisher_ratio")
OF_SUBSET = tuple(name for name in NAMES if name not in OF_ALL)


@pytest.fixture(scope="module")
def large():
    """A sample of 1,200, of which 1,000 are kept, in float32."""
    y = shuffled_labels(MANY)
    x = vectors(y, 3, torch.float32)
    model = network((3, 14, 3), torch.float32)
    options = {"subsamples": 1, "sweep": [300], "seed": SEED, "layers": ["1", "2"]}
    return model, x, y, score(model, (x, y), measures=NAMES, **options)


def test_subset_is_balanced_and_the_rest_is_of_all(large):
    model, x, y, scores = large
    (rows,) = smaller_rows(y, [1000])
    assert len(rows) == 966  # 333, 333 and the 300 that there are
    assert scores.settings["subset"] == 966
    index = torch.searchsorted(y.unique(), y)
    assert scores.settings["subset_classes"] == index[rows].tolist()
    features = captured(model, x, ["1", "2"])
    options = {"rel": 1e-4, "dataset_size": 1200}
    assert_column(whole(scores), 0, features, y, slice(None), OF_ALL, **options)
    assert_column(whole(scores), 0, features, y, rows, OF_SUBSET, **options)
    assert_column(scores.draws, 0, features, y, half_rows(y, 1)[0], OF_ALL, **options)
    assert_column(scores.sweep, 0, features, y, smaller_rows(y, [300])[0], OF_ALL, **options)


def test_draws_within_the_subset(large):
    model, x, y, scores = large
    (rows,) = smaller_rows(y, [1000])
    features = captured(model, x, ["1", "2"])
    kept = {name: f[rows] for name, f in features.items()}
    index = torch.searchsorted(y.unique(), y)[rows]
    _, half, small, most = parts_of(index, 1, [300, 1100], SEED)
    assert torch.equal(half, half_rows(y[rows], 1)[0])
    assert torch.equal(small, smaller_rows(y[rows], [300])[0])
    assert most is None
    for table, place, part in ((scores.draws, 0, half), (scores.sweep, 0, small)):
        assert_column(table, place, kept, y[rows], part, OF_SUBSET, rel=1e-4)


def test_nulls_within_the_subset(large):
    model, x, y, _ = large
    (rows,) = smaller_rows(y, [1000])
    kept = captured(model, x, ["1"])["1"][rows]
    names, options = ("h_score",), {"layers": ["1"], "null": 19, "seed": SEED}
    frame = score(model, (x, y), measures=names, **options).frame
    for name in names:
        found = values_of(name, kept, y[rows], null=19)[name]
        assert frame[f"{name}_excess"][0] == pytest.approx(float(found.excess), rel=1e-4)


def test_kept_grams_are_of_the_centred_subset(large):
    model, x, y, scores = large
    (rows,) = smaller_rows(y, [1000])
    for gram, f in zip(scores.grams, captured(model, x, ["1", "2"]).values(), strict=False):
        exact = f[rows].double() - f[rows].double().mean(dim=0)
        np.testing.assert_allclose(gram, exact @ exact.T, rtol=1e-5, atol=1e-6)


# ---- measures of one's own -----------------------------------------------------------------------


def share_of_seven(features, labels):
    return (labels == 7).double().mean()


def norm_of_nine(features, labels):
    return features[labels == 9].norm()  # a tensor


def no_of_rows(features, labels):
    return len(features)


def text(features, labels):
    return "high"


def several(features, labels):
    return features.mean(dim=0)


def failing(features, labels):
    raise ValueError("no such thing")


def test_functions_are_given_the_draws_and_the_labels_as_they_are(features):
    own = (share_of_seven, norm_of_nine, no_of_rows)
    options = {"subsamples": HALVES, "sweep": SWEEP, "seed": SEED}
    scores = score(network(), (X, Y), measures=own, **options)
    assert list(scores.draws) == [f.__name__ for f in own] == scores.settings["measures"]
    rows = [slice(None), *half_rows(Y), *smaller_rows(Y, SWEEP)]
    for layer, x in enumerate(features.values()):
        for f in own:
            name = f.__name__
            got = [
                scores.frame[name][layer],
                *scores.draws[name][layer],
                *scores.sweep[name][layer],
            ]
            assert got == pytest.approx([float(f(x[r], Y[r])) for r in rows])
    assert scores.by == "share_of_seven"


@pytest.mark.parametrize("name", ["two_nn", "separation", "efficiency", "neural_collapse"])
def test_a_public_function_is_its_name(name):
    by_name, by_function = (
        score(network(), (X, Y), measures=[m]) for m in (name, getattr(public, name))
    )
    assert by_function.frame.equals(by_name.frame)
    assert by_function.settings == by_name.settings


def named_as(name):
    def function(features, labels):
        return 0.0

    function.__name__ = name
    return function


@pytest.mark.parametrize("name", ["two_nn", "quality", "nc1", "layer", "n", "dim", "cka_to_last"])
def test_names_that_are_taken(name):
    message = f"a measure of one's own needs a name of its own; got '{name}'"
    with pytest.raises(ValueError, match=message):
        score(network(), (X, Y), measures=["knowledge_quality", named_as(name)])


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (text, TypeError, "layer '1': measure 'text' must return a number; got 'high'"),
        (several, TypeError, "layer '1': measure 'several' must return a number; got tensor("),
        (failing, ValueError, "layer '1': no such thing"),
    ],
)
def test_functions_that_fail_name_the_layer(function, error, message):
    with pytest.raises(error, match=re.escape(message)):
        score(network(), (X, Y), measures=[function])


class Nameless:
    def __call__(self, features, labels):
        return 0.0


@pytest.mark.parametrize(
    ("measures", "error", "message"),
    [
        ("two_nn", TypeError, "measures must be a sequence of names and functions; got 'two_nn'"),
        ({"two_nn"}, TypeError, "measures must be a sequence"),
        ((), TypeError, "measures must be a sequence of names and functions; got ()"),
        ((3,), TypeError, "a measure must be a name or a function; got 3"),
        ((Nameless(),), TypeError, "a function that is a measure needs a __name__"),
        ((lambda x, y: 0.0,), ValueError, "needs a name of its own; got '<lambda>'"),
        (("entropy",), ValueError, f"measures must be among {NAMES} or functions; got 'entropy'"),
        (
            ("two_nn", public.two_nn),
            ValueError,
            "must be there once; got 'two_nn' tw",
        ),
        ((text, text), ValueError, "every measure must be there once; got 'text' twice"),
        (
            (public.procrustes_distance,),
            ValueError,
            "_distance compares two layers: 'cka_",
        ),
        ((public.cka,), ValueError, "cka compares two layers: 'cka_to_last' compares each with"),
    ],
)
def test_measures_that_cannot_be(measures, error, message):
    with pytest.raises(error, match=re.escape(message)):
        score(network(), (X, Y), measures=measures)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sweep": "50"}, TypeError, "sweep must be a sequence of sample sizes; got '50'"),
        ({"sweep": 50}, TypeError, "sweep must be a sequence of sample sizes; got 50"),
        ({"sweep": 50, "entropy_per_class": 9}, ValueError, "without null= and sweep="),
        ({"sweep": [50.0]}, TypeError, "a size in sweep must be an integer; got float 50.0"),
        ({"sweep": [5]}, ValueError, "a size in sweep must be at least 6; got 5"),
        ({"sweep": [60, 40]}, ValueError, "sweep must rise and stay below the 120 samples; got [6"),
        ({"sweep": [40, 40]}, ValueError, "sweep must rise and stay below the 120 samples"),
        ({"sweep": [40, 120]}, ValueError, "sweep must rise and stay below the 120 samples"),
        ({"null": -1}, ValueError, "null must be at least 0; got -1"),
        ({"null": 2.0}, TypeError, "null must be an integer; got float 2.0"),
        ({"center": 1}, TypeError, "center must be True or False; got 1"),
        ({"null": 19, "entropy_per_class": 9}, ValueError, "without null= and sweep="),
        ({"sweep": [60], "entropy_per_class": 9}, ValueError, "without null= and sweep="),
        ({"labels": "mine"}, ValueError, 'must be an array, "predicted" or "none"; got \'mine\''),
    ],
)
def test_options_that_cannot_be(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        score(network(), (X, Y), **options)


# ---- layers that say little ----------------------------------------------------------------------


def told(call):
    """Result and the texts of the warnings, all of which point to this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert {w.filename for w in caught} <= {__file__}
    return result, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("kept", "samples", "words"),
    [
        (N, 60, "the smallest of 3 has 20; .*: samples=75 or more asks for enough; got 60$"),
        (N - 6, 5000, "the smallest of 3 has 24; .*: the data have no more of it: add"),
    ],
)
def test_a_class_of_few_samples_is_told_once(kept, samples, words):
    rows = torch.argsort(Y, stable=True)[:kept]  # the last are of the smallest class, of 30
    _, texts = told(lambda: score(network(), (X[rows], Y[rows]), samples=samples))
    assert len(texts) == 1
    assert re.match(f"a class has fewer than 25 samples: {words}", texts[0])


@pytest.mark.parametrize(
    "options", [{"samples": 75}, {"samples": 60, "measures": ("two_nn", no_of_rows)}]
)
def test_few_samples_are_not_told_where_they_do_not_matter(options):
    assert told(lambda: score(network(), (X, Y), **options))[1] == []


IDENTITY = nn.Sequential(nn.Identity(), nn.Linear(6, 3).double())
NEAR = ("two_nn", "mle_dimension")


@pytest.mark.parametrize("copies", ["pairs", "one row many times"])
def test_equal_rows_are_dropped_draw_by_draw(copies):
    x = X.clone() + 100
    if copies == "pairs":
        x[60:75] = x[:15]
    else:
        x[torch.randperm(N, generator=torch.Generator().manual_seed(0))[:60]] = x[7].clone()
    equal = N - len(x.unique(dim=0))
    options = {"layers": ["0"], "subsamples": HALVES, "sweep": [70], "seed": SEED}
    measures = (*NEAR, "silhouette")
    scores, texts = told(lambda: score(IDENTITY, (x, Y), measures=measures, **options))
    assert texts == [
        f"layer '0': {equal} of 120 feature rows equal another and were dropped from the distances "
        "behind two_nn and mle_dimension"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_column(whole(scores), 0, {"0": x}, Y, slice(None), measures)
        for draw, rows in enumerate(half_rows(Y)):
            assert_column(scores.draws, draw, {"0": x}, Y, rows, measures)
        assert_column(scores.sweep, 0, {"0": x}, Y, smaller_rows(Y, [70])[0], measures)


class Dead(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


@pytest.mark.parametrize(("value", "zero"), [(0.0, 120), (0.1, 0)])
def test_dead_layers(value, zero):
    model = nn.Sequential(nn.Identity(), Dead(value), nn.Linear(6, 3).double())
    options = {"subsamples": 2, "sweep": [60], "null": 19, "seed": SEED, "layers": ["0", "1"]}
    scores, texts = told(lambda: score(model, (X, Y), measures=NAMES, **options))
    assert all(text.startswith("layer '1': ") for text in texts)
    said = "layer '1': 119 of 120 feature rows equal another and were dropped from the distances"
    assert sum(text.startswith(said) for text in texts) == 1
    assert sum("120 of 120 feature rows are zero" in text for text in texts) == (zero > 0)
    row = scores.frame.iloc[1]
    assert row[[*NEAR, "power_law_alpha"]].isna().all()
    nothing = ("pca_dimension", "participation_ratio", "effective_rank", "spectral_entropy")
    nothing += ("silhouette", "fisher_ratio", "isotropy", "h_score")
    for name in nothing:
        assert row[name] == 0 == values_of(name, torch.full_like(X, value), Y)[name], name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("neural_collapse", "logme", "gbc", "linear_probe"):
            for column, expected in values_of(name, torch.full_like(X, value), Y).items():
                assert row[column] == pytest.approx(float(expected), nan_ok=True), column
    # The last layer is the dead one: nothing is like it, and nothing of it is kept.
    assert list(scores.frame["cka_to_last"]) == [0, 0]
    assert not scores.grams[1].any() and scores.grams[0].any()
    alive = score(model, (X, Y), measures=NAMES, seed=SEED, layers=["0"]).frame
    for name in columns_of([n for n in NAMES if n != "cka_to_last"]):
        if name not in TERMS:
            expected = pytest.approx(scores.frame[name][0], rel=1e-12, nan_ok=True)
            assert alive[name][0] == expected, name


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**70])
def test_features_too_small_or_large_for_float32_squares(factor):
    x = X.float()
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 3))
    names = [n for n in NAMES if n not in ("knowledge_quality", *TERMS, "cka_to_last")]
    options = {"layers": ["0"], "measures": names, "seed": SEED, "sweep": [70]}
    scores = score(model, (x * factor, Y), **options)
    assert_column(whole(scores), 0, {"0": x * factor}, Y, slice(None), names, rel=1e-5)
    assert_column(scores.sweep, 0, {"0": x * factor}, Y, smaller_rows(Y, [70])[0], names, rel=1e-5)


# ---- memory --------------------------------------------------------------------------------------


class Widen(nn.Module):
    """Many features, each one of the input's scaled and shifted."""

    def __init__(self, width):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.index = torch.randint(6, (width,), generator=generator)
        self.scale, self.shift = torch.randn(2, width, generator=generator)

    def forward(self, x):
        return torch.tanh(x[:, self.index] * self.scale + self.shift)


def least_memory(call):
    with pytest.raises(ValueError, match="memory must be at least") as caught:
        call(memory=1)
    return int(re.search(r"at least (\d+) MB", str(caught.value)).group(1))


def test_a_layer_in_slices_gives_the_same():
    model = nn.Sequential(Widen(6_000), nn.Linear(6_000, 3))
    data, seen = (X.float(), Y), []

    def forward(model, batch):
        seen.append(len(batch))
        return model(batch)

    options = {"measures": NAMES, "subsamples": 1, "sweep": [60], "layers": ["0", "1"]}
    usual = score(model, data, forward=forward, **options)
    passes, usual_seen = sum(seen) / N, seen.copy()
    seen.clear()
    least = least_memory(lambda memory: score(model, data, memory=memory, **options))
    small = score(model, data, memory=f"{least}MB", forward=forward, **options)
    assert sum(seen) / N > passes + 3 and len(usual_seen) < len(seen)
    for table, other in ((whole(usual), whole(small)), (usual.draws, small.draws)):
        for name, values in table.items():
            np.testing.assert_allclose(values, other[name], rtol=2e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(usual.kept, small.kept, rtol=1e-5, atol=1e-4)
    text = r"layer '0': measure 'no_of_rows' needs all features of a layer at once; more memory="
    with pytest.raises(ValueError, match=text):
        own = least_memory(
            lambda memory: score(model, data, measures=[no_of_rows], layers=["0"], memory=memory)
        )
        score(model, data, measures=[no_of_rows], layers=["0"], memory=f"{own}MB")


@pytest.mark.parametrize("measures", [("two_nn",), ("effective_rank", "linear_probe")])
def test_the_least_memory_counts_the_measures(measures):
    y = torch.arange(900) % 3
    data = vectors(y, 6), y
    model = network((6, 8, 3))

    def call(memory, measures=measures):
        return score(model, data, measures=measures, memory=memory)

    least = least_memory(call)
    assert least > least_memory(lambda memory: call(memory, ("knowledge_quality",)))
    assert call(f"{least}MB").frame[measures[0]].notna().all()


# ---- labels --------------------------------------------------------------------------------------


def test_predicted_labels_are_the_models_own():
    model = network()
    predicted = captured(model, X, ["4"])["4"].argmax(dim=1)
    assert 2 <= int(predicted.bincount().min()) < int((predicted != Y).sum())
    measures = ("knowledge_quality", "knn_accuracy", "logme")
    options = {"measures": measures, "subsamples": 2, "seed": SEED}
    expected = score(model, (X, Y), labels=predicted, **options)
    for data in (X, (X, Y), TensorDataset(X, Y), TensorDataset(X), DataLoader(TensorDataset(X))):
        found = score(model, data, labels="predicted", **options)
        assert found.frame.equals(expected.frame)
        assert found.settings == expected.settings | {"labels": "predicted"}
    assert expected.settings["labels"] == "given"


def test_classes_predicted_once_are_left_out():
    class Lonely(nn.Module):
        def forward(self, x):
            found = torch.eye(3, dtype=x.dtype)[(x[:, 0] > 0.5).long()]
            found[(x == X[7]).all(dim=1)] = torch.tensor([0.0, 0.0, 1.0], dtype=x.dtype)
            return found

    scores = score(nn.Sequential(nn.Identity(), Lonely()), X, layers=["0"], labels="predicted")
    assert scores.settings["classes"] == 2 and scores.settings["samples"] == N - 1


def batches(*parts, size=25):
    return list(zip(*(part.split(size) for part in parts), strict=True))


@pytest.mark.parametrize("labels", [None, "none"])
def test_iterables(labels, scores):
    measures = LABEL_FREE if labels else NAMES
    found = score(network(), iter(batches(X, Y)), measures=measures, seed=SEED, labels=labels)
    for column in columns_of(measures):
        np.testing.assert_allclose(found.frame[column], scores.frame[column], rtol=1e-12)


@pytest.mark.parametrize(
    "data",
    [X, X.numpy(), (X, Y), TensorDataset(X), DataLoader(TensorDataset(X), 7)],
    ids=["tensor", "array", "pair", "dataset", "loader"],
)
def test_without_labels(data, scores):
    found = score(network(), data, measures=LABEL_FREE, seed=SEED, labels="none", subsamples=1)
    assert found.settings["labels"] == "none"
    assert found.settings["classes"] == 1 and found.settings["samples"] == N
    for column in columns_of(LABEL_FREE):
        np.testing.assert_allclose(found.frame[column], scores.frame[column], rtol=1e-12)
        if column != "power_law_alpha":  # of more than ten directions
            assert np.isfinite(found.draws[column]).all()


def test_batches_without_labels(scores):
    for data in (iter([X[:50], X[50:]]), [[X[:50]], [X[50:]]], [{"x": X[:50]}, {"x": X[50:]}]):
        found = score(
            network(),
            data,
            measures=["two_nn"],
            labels="none",
            forward=lambda m, x: m(x["x"] if isinstance(x, dict) else x),
        )
        assert found.settings["samples"] == N
        np.testing.assert_allclose(found.frame["two_nn"], scores.frame["two_nn"], rtol=1e-12)
    with pytest.raises(ValueError, match=r"of one length \(two batches .*\); got 50 and 70"):
        score(network(), [X[:50], X[50:]], measures=["two_nn"], labels="none")


def test_a_smaller_sample_without_labels_is_drawn_from_all():
    found = score(network(), X, measures=["two_nn"], labels="none", samples=80, sweep=[40])
    assert found.settings["samples"] == 80 and found.settings["dataset_size"] == 120
    with pytest.raises(ValueError, match="samples must be at least 4; got 3"):
        score(network(), X, measures=["two_nn"], labels="none", samples=3)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in LABEL_FREE])
def test_supervised_measures_need_labels(name):
    text = f"these measures need labels: ['{name}']; without: ['two_nn', 'mle_dimension', "
    with pytest.raises(ValueError, match=re.escape(text)):
        score(network(), X, measures=["two_nn", name], labels="none")


def test_predictions_need_data_that_is_read_twice_and_scores():
    with pytest.raises(ValueError, match=r"needs data of known length; got an iterable"):
        score(network(), iter(batches(X, Y)), labels="predicted")
    model = nn.Sequential(nn.Identity(), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"needs a model that gives \(B, C\) scores; got \(720,\)"):
        score(model, X, labels="predicted", layers=["0"])


def test_draws_that_are_all_of_the_subset_tell_nothing():
    """340 classes leave two samples of each in the subset, half of which are two again."""
    y = torch.arange(1020) % 340
    x = vectors(y % 3, 3, torch.float32)
    options = {"measures": ("h_score", "cka_to_last", "separation"), "subsamples": 4}
    scores = score(network((3, 14, 3), torch.float32), (x, y), layers=["1", "2"], **options)
    for by in ("h_score", "cka_to_last"):
        assert np.isnan(scores.draws[by]).all()
        ranks = scores.rank(by=by)
        assert ranks[["best", "worst", "low", "high"]].isna().all(axis=None)
        assert scores.curve(by)[1] is None
    assert scores.rank(by="separation")["low"].notna().all()


def test_sizes_beyond_the_subset_are_no_proof_that_an_order_has_settled():
    y = torch.arange(1800) % 3
    x = vectors(y, 3, torch.float32)
    options = {"measures": ("effective_rank",), "subsamples": 0, "sweep": [600, 1200]}
    scores = score(network((3, 14, 3), torch.float32), (x, y), layers=["1", "2"], **options)
    assert np.isnan(scores.swept()[:, 1]).all() and np.isfinite(scores.swept()[:, [0, 2]]).all()
    assert scores.settling()["tau"].isna().tolist() == [True, True]


@pytest.mark.parametrize("scale", [1e19, 1e-24])
def test_kept_grams_of_any_scale(scale):
    y = shuffled_labels((20, 20, 20))
    x = vectors(y, 3, torch.float32)

    class Scaled(nn.Module):
        def forward(self, features):
            return features * scale

    model = nn.Sequential(nn.Identity(), Scaled())
    options = {"measures": ("cka_to_last", "separation"), "layers": ["0", "1"], "subsamples": 0}
    scores = score(model, (x, y), definition="robust", **options)
    assert scores.frame["cka_to_last"].tolist() == pytest.approx([1, 1], rel=1e-5)
    each = scores.per_class().groupby("layer")["separation"].mean()
    assert each["1"] == pytest.approx(each["0"], rel=1e-4)
    assert each["1"] == pytest.approx(scores.frame["separation"][1], rel=1e-4)
