"""Knowledge quality against stored figures and against a plain float64 implementation.

The stored figures are of the released analysis code, the same in float64, and the robust
definition in float64. The plain implementation is `oracle.reference`.
"""

from functools import partial

import numpy as np
import pytest
import torch
from oracle import CASES, DEFINITIONS, clusters, make_input, reference, values_of

from geomkd import knowledge_quality

both = pytest.mark.parametrize("definition", DEFINITIONS)


def assert_close(got, expected, rel=1e-4, absolute=1e-9):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=rel, abs=absolute), name


@both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["input"]["name"])
class TestStored:
    def test_arrays(self, case, definition):
        x, y = make_input(case["input"])
        q = knowledge_quality(
            x, y, dataset_size=case["input"]["dataset_size"], definition=definition
        )
        assert_close(values_of(q), case[definition])

    def test_flat_tensors_in_another_order(self, case, definition):
        x, y = make_input(case["input"])
        order = np.random.default_rng(0).permutation(len(x))
        x, y = torch.from_numpy(x[order]).flatten(1), torch.from_numpy(y[order])
        size = case["input"]["dataset_size"]
        q = knowledge_quality(x, y, dataset_size=size, definition=definition)
        assert_close(values_of(q), case[definition])

    def test_plain_implementation(self, case, definition):
        x, y = make_input(case["input"])
        got = reference(x, y, case["input"]["dataset_size"], definition)
        assert_close(got, case[definition], rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["input"]["name"])
def test_released_code(case):
    """Its own arithmetic is float32, hence the tolerance."""
    x, y = make_input(case["input"])
    q = knowledge_quality(x, y, dataset_size=case["input"]["dataset_size"])
    assert_close(values_of(q), case["released_code"], rel=5e-4)


# ---- further inputs, against the plain implementation --------------------------------------------


def unequal_classes():
    x, _ = clusters(255, 30)
    return x, np.repeat([0, 1, 2, 3], [2, 3, 50, 200])


def scaled(scale, dtype=np.float32, **shape):
    x, y = clusters(**shape)
    return (x.astype(np.float64) * scale).astype(dtype), y


def offset(by):
    x, y = clusters()
    return x + np.float32(by), y


def near_duplicates():
    """A common offset of norm 10, every sample 1e-3 away from one of the other class."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((100, 64)) + 10 / 8
    step = rng.standard_normal((100, 64))
    twin = base + 1e-3 * step / np.linalg.norm(step, axis=1, keepdims=True)
    return np.concatenate([base, twin]).astype(np.float32), np.repeat([0, 1], 100)


def exact_duplicates():
    x, y = clusters(200, 32, 4)
    x[1], x[6], x[9] = x[0], x[7], x[8]
    return x, y


def shared_clusters():
    """Every class visits every cluster: distances 1e-4 of the residual norm."""
    rng = np.random.default_rng(2)
    centre = rng.standard_normal((30, 50))
    x = centre[np.arange(240) % 30] + 1e-4 * rng.standard_normal((240, 50))
    return x.astype(np.float32), np.arange(240) // 30 % 4


def wide_twins_beside_a_collapsed_class(seed):
    """One pair nearly coincides in wide classes, whose products are too rough to show it.

    The nearest by the Gram matrix is then in the collapsed class: well resolved, and wrong.
    """
    rng = np.random.default_rng(seed)
    wide = 1e4 * rng.standard_normal((120, 16))
    wide[60] = wide[0] + 1e-2 * rng.standard_normal(16)
    narrow = wide[0] + 1.0 + 1e-4 * rng.standard_normal((30, 16))
    x = np.concatenate([wide, narrow])
    return x.astype(np.float32), np.repeat([0, 1, 2], [60, 60, 30])


def collapsed_classes_side_by_side():
    """Two pairs of classes without spread, far apart: the norms of float64 cancel too."""
    far = 1e4 * np.random.default_rng(7).standard_normal(20)
    y = np.arange(80) % 4
    x = np.where(y < 2, 1, -1)[:, None] * far
    x[y % 2 == 1, 3] += 1e-5
    return x, y


def small_rows(size):
    """A few samples far smaller than the others of their class."""
    x, y = clusters(200, 40, 4, relu=True, sep=2.0)
    x[[3, 4, 50, 51]] *= np.float32(size)
    return x, y


def rows_near_the_mean(size):
    rng = np.random.default_rng(4)
    x, y = clusters(200, 40, 4, sep=3.0)
    x[:4] = x.mean(axis=0) + size * rng.standard_normal((4, 40))
    return x, y


def outlier(size):
    x, y = clusters(160, 20, 4)
    x[7] *= np.float32(size)
    return x, y


def zero_variance():
    x, y = clusters(90, 20, 3)
    x[y == 1] = x[1]
    return x, y


def collapsed(dtype):
    x, y = clusters(90, 20, 3)
    return x[y].astype(dtype) * dtype(0.1), y


def few_directions(live):
    """Every class varies along ``live`` directions and no other."""
    rng = np.random.default_rng(6)
    x, y = clusters(600, 64, 3, noise=0.0)
    return (x + rng.standard_normal((600, live)) @ rng.standard_normal((live, 64))).astype(
        np.float32
    ), y


def labelled(change):
    x, y = clusters(130, 20, 3)
    order = np.random.default_rng(5).permutation(len(x))
    return x[order], change(y[order])


def columns_of_many_sizes():
    x, y = clusters(100, 40, 4)
    return x * np.logspace(-12, 6, 40).astype(np.float32), y


INPUTS = {
    "unequal_classes": unequal_classes,
    "two_classes": lambda: clusters(80, 16, 2),
    "many_classes": lambda: clusters(450, 40, 150),
    "one_feature": lambda: clusters(120, 1, 3),
    "two_features": lambda: clusters(120, 2, 3),
    "three_features": lambda: clusters(120, 3, 3),
    "more_features_than_samples": lambda: clusters(24, 2500, 3),
    "fewer_features_than_in_a_class": lambda: clusters(600, 8, 3),
    "two_samples_a_class": lambda: clusters(12, 8, 6),
    "scale_1e-30": lambda: scaled(1e-30),
    "scale_1e-38": lambda: scaled(1e-38),
    "scale_1e-8": lambda: scaled(1e-8),
    "scale_1e20": lambda: scaled(1e20),
    "scale_1e30": lambda: scaled(1e30),
    "scale_5e37": lambda: scaled(5e37),
    "double": lambda: scaled(1.0, np.float64),
    "offset_1e4": lambda: offset(1e4),
    "offset_1e4_double": lambda: (offset(1e4)[0].astype(np.float64) + 1 / 3, offset(1e4)[1]),
    "near_duplicates": near_duplicates,
    "exact_duplicates": exact_duplicates,
    "shared_clusters": shared_clusters,
    **{
        f"wide_twins_{seed}": partial(wide_twins_beside_a_collapsed_class, seed)
        for seed in range(4)
    },
    "three_blocks_unequal": lambda: (
        clusters(1300, 12)[0],
        np.repeat([0, 1, 2], [700, 590, 10]),
    ),
    "one_row_over_two_blocks": lambda: clusters(1025, 10, 10),
    "classes_end_with_blocks": lambda: clusters(1024, 10, 4),
    "small_rows_1e-2": lambda: small_rows(1e-2),
    "small_rows_1e-4": lambda: small_rows(1e-4),
    "small_rows_1e-7": lambda: small_rows(1e-7),
    "small_rows_1e-12": lambda: small_rows(1e-12),
    "near_the_mean_1e-2": lambda: rows_near_the_mean(1e-2),
    "near_the_mean_1e-4": lambda: rows_near_the_mean(1e-4),
    "outlier_1e3": lambda: outlier(1e3),
    "outlier_1e6": lambda: outlier(1e6),
    "columns_of_many_sizes": columns_of_many_sizes,
    "zero_variance": zero_variance,
    "collapsed": lambda: collapsed(np.float32),
    "collapsed_side_by_side": collapsed_classes_side_by_side,
    "collapsed_double": lambda: collapsed(np.float64),
    "one_direction": lambda: few_directions(1),
    "two_directions": lambda: few_directions(2),
    "unsorted": lambda: labelled(lambda y: y),
    "negative_labels": lambda: labelled(lambda y: -7 * y - 1),
    "huge_labels": lambda: labelled(lambda y: y * 2**61),
    "small_unsigned_labels": lambda: labelled(lambda y: (y + 250).astype(np.uint8)),
    "dead_features": lambda: (clusters()[0] * (np.arange(24) % 3 == 0), clusters()[1]),
}


@both
@pytest.mark.parametrize("name", INPUTS)
def test_plain_implementation(name, definition):
    x, y = INPUTS[name]()
    q = knowledge_quality(x, y, dataset_size=50_000, definition=definition)
    expected = reference(x, y, 50_000, definition)
    # A minimum of |cos| may be anywhere near 0, hence the absolute part.
    assert_close(values_of(q), expected, rel=1e-5, absolute=1e-7 * smallest(expected))


def smallest(expected):
    """The unit of absolute tolerance: 1, or the features' size where that is less."""
    return min(1.0, expected.get("mean_norm", expected.get("rms_norm")) or 1.0)


@both
@pytest.mark.parametrize("exponent", [-1060, -664, 664, 1015])
def test_far_scales_of_float64(exponent, definition):
    x, y = clusters(relu=True)
    expected = reference(x, y, definition=definition)
    lengths = "nearest_other_class_distance", "mean_norm", "rms_norm"
    got = values_of(
        knowledge_quality(np.ldexp(x.astype(np.float64), exponent), y, definition=definition)
    )
    for name in lengths:
        if name in got:
            got[name] = np.ldexp(got[name], -exponent)
    # Near the smallest float64 the numbers themselves are rounded.
    assert_close(got, expected, rel=1e-9 if exponent > -1000 else 1e-2, absolute=1e-12)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 5e3])
def test_half_precision_is_accumulated_in_float32(dtype, scale, definition):
    """Squares beyond the range of float16 included."""
    x, y = clusters(200, 300, 4, relu=True)
    rounded = (torch.from_numpy(x) * scale).to(dtype)
    q = knowledge_quality(rounded, torch.from_numpy(y), definition=definition)
    expected = reference(rounded.double().numpy(), y, definition=definition)
    assert_close(values_of(q), expected, rel=1e-5)


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool])
def test_one_hot_rows_are_their_class(dtype, definition):
    x, y = clusters(130, 20, 3)
    rows = np.eye(5)[y + 1].astype(dtype)  # columns without a one are no classes
    q = knowledge_quality(x, rows, definition=definition)
    assert values_of(q) == values_of(knowledge_quality(x, y, definition=definition))


@both
def test_zero_rows_have_cosine_0_and_one_warning(definition):
    x, y = clusters(120, 24, 4, relu=True)
    x[[3, 60, 61]] = 0
    expected = reference(x, y, definition=definition)
    if definition == "published":
        with pytest.warns(UserWarning, match=r"^3 of 120 feature rows are zero: .* as 0$") as seen:
            q = knowledge_quality(x, y, definition=definition)
        assert [w.filename for w in seen] == [__file__]
    else:
        q = knowledge_quality(x, y, definition=definition)  # zero is no special place there
    assert_close(values_of(q), expected, rel=1e-5)


def test_more_zero_rows_than_are_measured_again():
    """They must not take the place of small rows, nor be anything but 0 themselves."""
    x, y = clusters(900, 24, 3, relu=True, sep=2.0)
    x[np.flatnonzero(y == 0)[:290]] = 0
    x[[1, 2]] *= np.float32(1e-5)
    with pytest.warns(UserWarning, match=r"^290 of 900 feature rows are zero"):
        q = knowledge_quality(x, y)
    assert_close(values_of(q), reference(x, y), rel=1e-5)


@both
@pytest.mark.parametrize("value", [0.0, 0.1, 3e30, -7e-30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_features(value, dtype, definition):
    x, y = np.full((700, 9), value, dtype), np.arange(700) % 3
    if definition == "robust":
        with pytest.warns(UserWarning, match=r"^700 of 700 feature rows equal the mean of all"):
            q = knowledge_quality(x, y, definition=definition)
    elif value == 0:
        with pytest.warns(UserWarning, match=r"^700 of 700 feature rows are zero"):
            q = knowledge_quality(x, y, definition=definition)
    else:
        q = knowledge_quality(x, y, definition=definition)
    got = values_of(q)
    cosine = float(definition == "published" and value != 0)
    assert got["mean_within_cosine"] == pytest.approx(cosine)
    assert got["mean_between_cosine"] == pytest.approx(cosine)
    assert got["class_entropy"] == 0
    assert got["efficiency"] == 0
    assert got["quality"] == pytest.approx(0, abs=1e-12)
