"""Errors of input: type and wording; and forms of input that must simply work."""

import re

import numpy as np
import pytest
import torch
from oracle import clusters, values_of

from geomkd import efficiency, information, knowledge_quality, separation
from geomkd.common.checks import (
    about,
    as_classes,
    as_labels,
    check_choice,
    check_dataset_size,
    check_definition,
    check_int,
    check_names,
    check_number,
)

X, Y = (torch.from_numpy(t) for t in clusters(12, 4, 3))


def with_value(value, rows):
    x = X.clone()
    x[rows, 1] = value
    return x


def half_scores(value):
    scores = torch.eye(3)[Y]
    scores[2, 0] = value
    return scores


FEATURES = {
    "list": (X.tolist(), TypeError, "features must be a torch.Tensor or a numpy.ndarray; got list"),
    "none": (None, TypeError, "features must be a torch.Tensor or a numpy.ndarray; got NoneType"),
    "integer": (
        X.long(),
        TypeError,
        "features must be float64, float32, float16 or bfloat16; got int64 (convert with .float())",
    ),
    "boolean": (
        X.numpy() > 0,
        TypeError,
        "features must be float64, float32, float16 or bfloat16; got bool (convert with .float())",
    ),
    "complex": (
        X.to(torch.complex64),
        TypeError,
        "features must be float64, float32, float16 or bfloat16; got complex64",
    ),
    "objects": (
        X.numpy().astype(object),
        TypeError,
        "features must hold numbers torch knows; got a NumPy array of dtype object",
    ),
    "strings": (
        X.numpy().astype(str),
        TypeError,
        "features must hold numbers torch knows; got a NumPy array of dtype <U32",
    ),
    "records": (
        np.zeros(12, dtype=[("a", "f4")]),
        TypeError,
        "features must hold numbers torch knows; got a NumPy array of dtype [('a', '<f4')]",
    ),
    "long double": (
        X.numpy().astype(np.longdouble),
        TypeError,
        f"features must hold numbers torch knows; got a NumPy array of dtype {np.dtype('g')}",
    ),
    "sparse": (
        X.to_sparse(),
        TypeError,
        "features must be dense; got a tensor of layout torch.sparse_coo",
    ),
    "one axis": (X[:, 0], ValueError, "features must be (n, ...), at least 2-d; got shape (12,)"),
    "no sample": (X[:0], ValueError, "features must not be empty; got shape (0, 4)"),
    "no feature": (X[:, :0], ValueError, "features must not be empty; got shape (12, 0)"),
    "nan": (
        with_value(float("nan"), [3, 2]),
        ValueError,
        "features must be finite; got NaN or Inf in 2 of 12 rows, first in row 2",
    ),
    "inf": (
        with_value(float("inf"), [11]),
        ValueError,
        "features must be finite; got NaN or Inf in 1 of 12 rows, first in row 11",
    ),
    "minus inf in half precision": (
        with_value(-float("inf"), [0]).half(),
        ValueError,
        "features must be finite; got NaN or Inf in 1 of 12 rows, first in row 0",
    ),
}
FORM = "labels must be (n,) integers or exact one-hot rows (n, C) with C >= 2"


def rows_with(row, number=5, dtype=torch.float32):
    """One-hot rows, but for one."""
    rows = torch.eye(3, dtype=dtype)[Y]
    rows[number] = torch.tensor(row, dtype=dtype)
    return rows


LABELS = {
    "list": (Y.tolist(), TypeError, "labels must be a torch.Tensor or a numpy.ndarray; got list"),
    "1-d floats": (Y.float(), TypeError, "1-d labels must be integers; got float32"),
    "1-d booleans": (Y > 0, TypeError, "1-d labels must be integers; got bool"),
    "complex": (
        torch.zeros(12, 3, dtype=torch.complex64),
        TypeError,
        f"{FORM}; got complex64",
    ),
    "strings": (
        Y.numpy().astype(str),
        TypeError,
        "labels must hold numbers torch knows; got a NumPy array of dtype <U21",
    ),
    "sparse": (
        torch.eye(3)[Y].to_sparse(),
        TypeError,
        "labels must be dense; got a tensor of layout torch.sparse_coo",
    ),
    "one column": (
        Y[:, None],
        ValueError,
        f"{FORM}; got shape (12, 1) of int64",
    ),
    "three axes": (
        torch.zeros(12, 3, 2),
        ValueError,
        f"{FORM}; got shape (12, 3, 2) of float32",
    ),
    "no axis": (
        torch.tensor(1),
        ValueError,
        f"{FORM}; got shape () of int64",
    ),
    "fewer": (Y[:11], ValueError, "labels must be as many as the features, n = 12; got 11"),
    "none at all": (Y[:0], ValueError, "labels must be as many as the features, n = 12; got 0"),
    "another device": (
        Y.to("meta"),
        ValueError,
        "labels must be on the features' device, cpu; got meta",
    ),
    "nan scores": (
        half_scores(float("nan")),
        ValueError,
        f"{FORM}; got NaN or Inf in row 2",
    ),
    "inf scores": (
        half_scores(float("inf")).numpy(),
        ValueError,
        f"{FORM}; got NaN or Inf in row 2",
    ),
    "several classes": (
        rows_with([1, 0, 1], dtype=torch.bool),
        ValueError,
        f"{FORM}; got 2 ones (several labels of a sample, or none) in row 5",
    ),
    "no class": (
        rows_with([0, 0, 0]).numpy(),
        ValueError,
        f"{FORM}; got 0 ones (several labels of a sample, or none) in row 5",
    ),
    "tokens": (
        rows_with([-100, 7, 2], dtype=torch.int64),
        ValueError,
        f"{FORM}; got integers -100 ... 7 (labels of tokens or positions, or counts) in row 5",
    ),
    "mixtures": (
        rows_with([0.25, 0.75, 0], dtype=torch.float64),
        ValueError,
        f"{FORM}; got a mixture of classes (which only distill takes) in row 5",
    ),
    "nearly one-hot": (
        rows_with([0.99999, 0.00001, 0]),
        ValueError,
        f"{FORM}; got a mixture of classes (which only distill takes) in row 5",
    ),
    "scores": (
        rows_with([2.5, -1, 0], dtype=torch.bfloat16),
        ValueError,
        f"{FORM}; got scores -1 ... 2.5 of sum 1.5 in row 5",
    ),
    "ignored": (
        torch.where(torch.arange(12) == 4, -100, Y).numpy().astype(np.int8),
        ValueError,
        "labels must be classes; got -100, which stands for no label, first in row 4: leave such "
        "samples out",
    ),
    "one class": (
        Y * 0 + 7,
        ValueError,
        "at least 2 classes are needed; the labels hold 1: [7]",
    ),
    "lonely class": (
        torch.tensor([0] * 5 + [1] * 6 + [-4]),
        ValueError,
        "every class needs at least 2 samples; got 1 of class -4",
    ),
    "lonely classes": (
        torch.arange(12),
        ValueError,
        "every class needs at least 2 samples; got 1 of class 0, 1, 2, 3, 4, ...",
    ),
}


@pytest.mark.parametrize("function", [knowledge_quality, separation, information, efficiency])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, function):
    features, kind, message = FEATURES[name]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        function(features, Y[:0] if name == "no sample" else Y)


@pytest.mark.parametrize("function", [knowledge_quality, separation, information, efficiency])
@pytest.mark.parametrize("name", LABELS)
def test_labels(name, function):
    labels, kind, message = LABELS[name]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        function(X, labels)


@pytest.mark.parametrize("function", [knowledge_quality, separation, information, efficiency])
def test_definition(function):
    message = r"^definition must be one of \('published', 'robust'\); got 'paper'$"
    with pytest.raises(ValueError, match=message):
        function(X, Y, definition="paper")


@pytest.mark.parametrize("function", [knowledge_quality, efficiency])
@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        (11, ValueError, "dataset_size must be at least the number of samples, n = 12; got 11"),
        (-1, ValueError, "dataset_size must be at least the number of samples, n = 12; got -1"),
        (
            np.nan,
            ValueError,
            "dataset_size must be at least the number of samples, n = 12; got nan",
        ),
        (
            np.inf,
            ValueError,
            "dataset_size must be at least the number of samples, n = 12; got inf",
        ),
        ("100", TypeError, "dataset_size must be a number; got str '100'"),
        (True, TypeError, "dataset_size must be a number; got bool True"),
        (torch.tensor(100), TypeError, "dataset_size must be a number; got Tensor tensor(100)"),
    ],
)
def test_dataset_size(size, kind, message, function):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        function(X, Y, dataset_size=size)


def test_small_checks():
    assert check_definition("robust") == "robust"
    assert check_dataset_size(None, 7) == 7.0
    assert check_dataset_size(np.int64(8), 7) == check_dataset_size(8.0, 7) == 8.0
    assert check_int(np.int32(3), "k", 1) == 3
    with pytest.raises(ValueError, match=r"^k must be at least 1; got 0$"):
        check_int(0, "k", 1)
    for value, name in [(2.0, "float 2.0"), (True, "bool True"), ("2", "str '2'")]:
        with pytest.raises(TypeError, match=f"^k must be an integer; got {name}$"):
            check_int(value, "k", 1)


def test_classes():
    classes = as_classes(np.array([30, -2, 30, 30, -2], dtype=np.int16))
    assert classes.index.tolist() == [1, 0, 1, 1, 0]
    assert classes.sizes == [2, 3]
    assert classes.names == [-2, 30]


@pytest.mark.parametrize(
    "labels",
    [
        np.eye(3)[Y.numpy()],
        np.eye(3, dtype=bool)[Y.numpy()],
        torch.eye(3)[Y].half(),
        torch.eye(3)[Y].bfloat16(),
        torch.eye(3)[Y].numpy().astype(np.uint16),
        torch.eye(3, dtype=torch.uint8)[Y],
        Y.to(torch.uint8),
        Y.numpy().astype(np.uint16),
        Y.numpy().astype(np.uint64),
        Y.numpy().astype(">i4"),
        Y.numpy()[::-1][::-1],
    ],
    ids=lambda labels: f"{type(labels).__name__}-{labels.dtype}-{labels.ndim}d",
)
def test_forms_of_labels(labels):
    got = as_labels(labels, 12)
    assert got.dtype is torch.int64
    assert torch.equal(got, Y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_soft_labels_are_given_as_they_are(dtype):
    rows = torch.rand(12, 1000, generator=torch.Generator().manual_seed(0)).softmax(1).to(dtype)
    got = as_labels(rows, soft=True)
    assert got.dtype is torch.promote_types(dtype, torch.float32)
    assert torch.equal(got, rows.to(got.dtype))
    assert torch.equal(as_labels(torch.eye(3, dtype=torch.int64)[Y], soft=True), torch.eye(3)[Y])
    assert torch.equal(as_labels(Y, soft=True), Y)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([1, 1, 0], "2 ones"),
        ([0.5, 0.5, 0.01], "scores 0.01 ... 0.5 of sum 1.01"),
        ([1.5, -0.5, 0], "scores -0.5 ... 1.5 of sum 1"),
        ([0.5, float("nan"), 0.5], "NaN or Inf"),
    ],
)
def test_soft_labels_that_are_no_probabilities(row, what):
    with pytest.raises(
        ValueError, match=rf"rows \(n, C\) of probabilities .*got {what}.* in row 5"
    ):
        as_labels(rows_with(row), soft=True)


def read_only():
    x = X.numpy().copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    "features",
    [
        read_only(),
        X.numpy()[::-1, ::-1].copy()[::-1, ::-1],
        np.asfortranarray(X.numpy()),
        X.numpy().astype(">f4"),
        X.numpy().repeat(2, axis=1)[:, ::2],
        X.double().float().reshape(12, 2, 2).to(memory_format=torch.contiguous_format),
        X.reshape(12, 2, 2, 1).to(memory_format=torch.channels_last),
        X.t().contiguous().t(),
        X.repeat_interleave(3, dim=0)[::3],
        X.clone().requires_grad_(),
        torch.nn.Parameter(X.clone()),
    ],
    ids=[
        "read-only",
        "negative strides",
        "column order",
        "big-endian",
        "strided",
        "map",
        "channels last",
        "transposed",
        "rows apart",
        "requires grad",
        "parameter",
    ],
)
def test_forms_of_features(features):
    assert values_of(knowledge_quality(features, Y)) == pytest.approx(
        values_of(knowledge_quality(X, Y)), rel=1e-6
    )


# ---- numbers and choices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bounds", "words"),
    [
        (0, {"above": 0}, "finite and above 0"),
        (float("inf"), {"above": 0}, "finite and above 0"),
        (-0.5, {"least": 0}, "finite and at least 0"),
        (1, {"above": 0, "below": 1}, "between 0 and 1"),
        (1, {"least": 0, "below": 1}, "at least 0 and below 1"),
        (1.1, {"above": 0, "most": 1}, "above 0 and at most 1"),
        (float("nan"), {"least": 0}, "finite and at least 0"),
        (float("nan"), {"least": 0, "most": 1}, "at least 0 and at most 1"),
    ],
)
def test_number_out_of_its_range(value, bounds, words):
    with pytest.raises(ValueError, match=rf"^x must be {words}; got {value}$"):
        check_number(value, "x", **bounds)


@pytest.mark.parametrize("bounds", [{"least": 0.5}, {"most": 0.5}, {"above": 0, "below": 1}, {}])
def test_number_in_its_range(bounds):
    assert check_number(np.float32(0.5), "x", **bounds) == 0.5


def test_choice():
    assert check_choice(None, "kind", (None, "a")) is None
    with pytest.raises(ValueError, match=r"^kind must be one of \('a', 'b'\); got 'c'$"):
        check_choice("c", "kind", {"a": 1, "b": 2})


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["a", "b"], ("a", "b"), {"a": 1, "b": 2}, iter("ab")])
def test_names(names):
    assert check_names(names, "layers") == ["a", "b"]


def test_names_that_need_not_be_distinct():
    assert check_names([], "layers", distinct=False) == []
    assert check_names(["a", "a"], "layers", distinct=False) == ["a", "a"]


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ("relu", TypeError, "layers must be a list of layer names; got str 'relu'"),
        ({"a"}, TypeError, "layers must be a list of layer names; got set {'a'}"),
        (3, TypeError, "layers must be a list of layer names; got int 3"),
        (["a", 3], TypeError, "layers must hold layer names (str); got int 3"),
        ([], ValueError, "layers must hold at least one layer name; got none"),
        (list("abcab"), ValueError, "layers must differ from each other; got ['a', 'b'] more"),
    ],
)
def test_names_that_cannot_be(names, error, text):
    with pytest.raises(error, match=re.escape(text)):
        check_names(names, "layers")


class OwnError(ValueError):
    """Of another signature than its base."""

    def __init__(self, text, more):
        super().__init__(text)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(TypeError("b"), TypeError), (ValueError("b"), ValueError), (OwnError("b", 1), ValueError)],
)
def test_about_begins_the_text(error, kind):
    with pytest.raises(kind, match=r"^train: b$"), about("train"):
        raise error
    with pytest.raises(RuntimeError, match=r"^b$"), about("train"):
        raise RuntimeError("b")
