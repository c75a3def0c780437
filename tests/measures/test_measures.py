"""What every public measure does with unusual input, and in which precision."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from oracle import clusters

from geomkd import measures
from geomkd.measures import NeuralCollapse, WithNull

SUPERVISED = (
    "efficiency",
    "fisher_ratio",
    "gbc",
    "h_score",
    "information",
    "knn_accuracy",
    "knowledge_quality",
    "linear_probe",
    "logme",
    "nearest_class_mean",
    "neural_collapse",
    "separation",
    "silhouette",
)
ALONE = (
    "effective_rank",
    "isotropy",
    "mle_dimension",
    "participation_ratio",
    "pca_dimension",
    "power_law_alpha",
    "spectral_entropy",
    "two_nn",
)
OF_TWO = ("cka", "procrustes_distance")
ALL = (*SUPERVISED, *ALONE, *OF_TWO)
every = pytest.mark.parametrize("name", ALL)
supervised = pytest.mark.parametrize("name", SUPERVISED)


def run(name, x, y, other=None):
    """Numbers of a measure; ``other`` is the second layer of those of two."""
    measure = getattr(measures, name)
    if name in OF_TWO:
        return [measure(x, x if other is None else other).item()]
    found = measure(x) if name in ALONE else measure(x, y)
    if isinstance(found, torch.Tensor):
        assert (found.shape, found.dtype) == ((), torch.float64)
        return [found.item()]
    if isinstance(found, NeuralCollapse):
        return [v.item() for v in found[:3]]
    return [found.quality, found.separation, found.information, found.efficiency]


def silently(name, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zero rows of the published definition, equal rows
        return run(name, *arguments)


def sample(n=120, d=24, **options):
    x, y = clusters(n, d, 4, sep=0.5, **options)
    return torch.from_numpy(x), torch.from_numpy(y)


def second(x):
    """A second layer of the same samples, of another width."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(x[0].numel(), 9, generator=generator, dtype=torch.float64)
    return (x.flatten(1).double() @ mix).relu()


def test_all_are_here():
    results = {"KnowledgeQuality", "NeuralCollapse", "WithNull"}
    public = {name for name in measures.__all__ if name not in results}
    assert public == set(ALL)
    assert WithNull._fields == ("value", "null_mean", "null_95", "excess", "p_value")


# ---- precision -----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("d", [24, 400])
def test_float32_and_float64_of_the_same_values(name, d, offset):
    x = sample(120, d)[0] + offset
    y = sample()[1]
    single, double = (
        run(name, x.to(t), y, second(x).to(t)) for t in (torch.float32, torch.float64)
    )
    if name in OF_TWO:
        pair = second(x).float()
        single, double = run(name, x, y, pair), run(name, x.double(), y, pair.double())
    assert single == pytest.approx(double, rel=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    """As of the same values in float64; neither they nor the labels change."""
    x, y = sample()
    x = x.to(dtype).reshape(120, 6, 2, 2)
    before, labels, version = x.clone(), y.clone(), x._version
    pair = second(x).to(dtype)
    found, expected = silently(name, x, y, pair), silently(name, x.double(), y, pair.double())
    assert found == pytest.approx(expected, rel=1e-4)
    assert torch.equal(x, before)
    assert torch.equal(y, labels)
    assert x._version == version


# ---- unusual samples -----------------------------------------------------------------------------

CONSTANT = {  # of rows that are all equal, but not zero
    "cka": [0.0],
    "effective_rank": [0.0],
    "efficiency": [0.0],
    "fisher_ratio": [0.0],
    "gbc": [-12.0],
    "h_score": [0.0],
    "information": [0.0],
    "isotropy": [0.0],
    "knn_accuracy": None,  # ties: any
    "knowledge_quality": [0.0, 0.0, 0.0, 0.0],
    "linear_probe": [0.25],
    "logme": None,  # that of an intercept: see test_transfer
    "mle_dimension": ValueError,
    "nearest_class_mean": None,  # ties, by rounding
    "neural_collapse": [math.nan] * 3,
    "participation_ratio": [0.0],
    "pca_dimension": [0.0],
    "power_law_alpha": [math.nan],
    "procrustes_distance": [0.0],
    "separation": [0.0],
    "silhouette": [0.0],
    "spectral_entropy": [0.0],
    "two_nn": ValueError,
}


@every
@pytest.mark.parametrize("value", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features(name, value, dtype):
    x, y = torch.full((120, 24), value, dtype=dtype), sample()[1]
    if CONSTANT[name] is ValueError:
        with pytest.raises(ValueError, match=r"distinct feature rows are needed; got 1 of 120"):
            silently(name, x, y)
        return
    found = silently(name, x, y)
    if CONSTANT[name] is None:
        assert all(map(math.isfinite, found))
        assert name == "logme" or 0 <= found[0] <= 1
    else:
        assert found == pytest.approx(CONSTANT[name], abs=1e-9, nan_ok=True)


@every
def test_rows_twice(name):
    """What equal rows do: nothing to the dimensions but for a warning; all stay finite."""
    x, y = sample()
    twice, labels = torch.cat([x, x[:30]]), torch.cat([y, y[:30]])
    if name in ("two_nn", "mle_dimension"):
        with pytest.warns(UserWarning, match="^30 of 150 feature rows equal another"):
            found = run(name, twice, labels)
        assert found == pytest.approx(run(name, x, y), rel=1e-6)
    else:
        assert all(map(math.isfinite, run(name, twice, labels, second(twice))))


@every
def test_fewer_samples_than_features(name):
    """Rotated out of 2,000 axes into 30: equal Gram matrices, equal values."""
    x, y = clusters(32, 2000, 4, sep=0.5)
    x, y = torch.from_numpy(x).double(), torch.from_numpy(y)
    basis = torch.linalg.qr(x.T).Q
    found, inside = run(name, x, y, second(x)), run(name, x @ basis, y, second(x))
    if name in ("isotropy", "h_score", "knowledge_quality", "information", "efficiency"):
        assert all(map(math.isfinite, found))  # they know d
    else:
        assert found == pytest.approx(inside, rel=1e-6, abs=1e-9)


@every
def test_one_feature(name):
    x, y = sample()
    found = silently(name, x[:, :1], y, x[:, 1:2])
    if name == "power_law_alpha":
        assert math.isnan(found[0])
    else:
        assert all(map(math.isfinite, found))
    if name in ("two_nn", "mle_dimension"):
        assert found[0] == pytest.approx(1, abs=0.2)
    if name in ("pca_dimension", "participation_ratio", "effective_rank"):
        assert found == pytest.approx([1])


# ---- what is refused -----------------------------------------------------------------------------


@supervised
def test_a_single_class(name):
    with pytest.raises(ValueError, match=r"at least 2 classes are needed; .* hold 1: \[7\]"):
        run(name, sample()[0], torch.full((120,), 7))


@supervised
def test_one_sample_a_class(name):
    with pytest.raises(ValueError, match=r"every class needs at least 2 .*; got 1 of class 0, "):
        run(name, sample()[0], torch.arange(120))


@supervised
def test_labels_of_another_length(name):
    with pytest.raises(ValueError, match="as many as the features, n = 120; got 119"):
        run(name, sample()[0], sample()[1][:119])


@pytest.mark.parametrize("name", OF_TWO)
def test_layers_of_other_samples(name):
    with pytest.raises(ValueError, match="x and y must hold the same samples; got n = 120 and 119"):
        run(name, sample()[0], None, sample()[0][:119])


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite(name, value):
    x, y = sample()
    x[[7, 50], 3] = value
    message = r"must be finite; got NaN or Inf in 2 of 120 rows, first in row 7"
    with pytest.raises(ValueError, match=message):
        run(name, x, y, sample()[0])


@every
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(120), ValueError, r"must be \(n, ...\), at least 2-d; got shape \(120,\)"),
        (torch.ones(120, 3, dtype=torch.int64), TypeError, "must be float64, .*; got int64"),
        (
            torch.ones(120, 3, dtype=torch.complex64),
            TypeError,
            "must be float64, .*; got complex64",
        ),
        (torch.ones(120, 0), ValueError, r"must not be empty; got shape \(120, 0\)"),
        ([[1.0]], TypeError, "must be a torch.Tensor or a numpy.ndarray; got list"),
    ],
    ids=["1-d", "integers", "complex", "empty", "list"],
)
def test_what_is_not_features(name, x, error, message):
    with pytest.raises(error, match=message):
        run(name, x, sample()[1], sample()[0])


# ---- arrays of any kind, results that can be sent ------------------------------------------------


@every
def test_of_mapped_files_twice(name, tmp_path):
    """Files that are mapped can only be read; no call of a measure changes the next."""
    x, y = sample()
    given = {"x": x, "y": y, "other": second(x)}
    for key, tensor in given.items():
        np.save(tmp_path / f"{key}.npy", tensor.numpy())
    mapped = [np.load(tmp_path / f"{key}.npy", mmap_mode="r") for key in given]
    expected = run(name, *given.values())
    assert [run(name, *mapped), run(name, *mapped)] == [expected, expected]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in ALL), ("knowledge_quality", {"null": 2})]
)
@pytest.mark.filterwarnings("ignore:null_95 is NaN")
def test_results_pickle_and_copy(name, options):
    x, y = sample()
    given = (x,) if name in ALONE else (x, second(x) if name in OF_TWO else y)
    found = getattr(measures, name)(*given, **options)
    for again in (pickle.loads(pickle.dumps(found)), copy.copy(found), copy.deepcopy(found)):
        assert type(again) is type(found) and repr(vars_of(again)) == repr(vars_of(found))


def vars_of(result):
    return vars(result) if isinstance(result, measures.KnowledgeQuality) else result


# ---- what is left as it was ----------------------------------------------------------------------


@every
def test_input_and_global_state(name):
    x, y = sample()
    array, labels = x.numpy().copy(), y.numpy().copy()
    array.flags.writeable = labels.flags.writeable = False
    x.requires_grad_()
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    expected = run(name, x, y, second(x.detach()))
    assert run(name, array, labels, second(x.detach())) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert np.array_equal(x.detach().numpy(), array)
    assert torch.is_grad_enabled()
    assert x.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert run(name, x.detach(), y, second(x.detach()) if name in OF_TWO else None) == (
            pytest.approx(expected, rel=1e-6)
        )
