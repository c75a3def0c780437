"""Choices of layers by their scores, against counting by hand."""

import numpy as np
import pytest
import torch
from scored import made

from geomkd.scoring.selection import top, top_apart

RNG = np.random.default_rng
EYE = np.eye


# ---- the highest ---------------------------------------------------------------------------------


def test_top():
    assert top(np.array([0.1, 0.4, 0.2, 0.3]), 2) == [1, 3]
    assert top(np.array([1, 1, 1, 2]), 2) == [3, 0]
    assert top(np.array([1, 2, 3, 4]), 4) == [3, 2, 1, 0]


@pytest.mark.parametrize("k", [0, -1, 3])
def test_top_of_too_many(k):
    message = f"^k must be between 1 and the 2 layers to choose from; got {k}$"
    with pytest.raises(ValueError, match=message):
        top(np.array([1, 2]), k)


def test_top_of_no_whole_number():
    with pytest.raises(TypeError, match="k must be an integer; got float"):
        top(np.array([1, 2]), 1.5)


# ---- apart ---------------------------------------------------------------------------------------


def test_without_penalty_the_best_are_chosen():
    rng = RNG(0)
    scores, alike = rng.standard_normal(12), rng.uniform(size=(12, 12))
    chosen = top_apart(scores, alike, 5, gamma=0.0)
    assert chosen == np.argsort(-scores)[:5].tolist()
    assert chosen == top(scores, 5)
    assert top_apart(np.ones(4), np.zeros((4, 4)), 3) == [0, 1, 2]  # ties to the earlier


@pytest.mark.parametrize(("gamma", "second"), [(0.19, 1), (0.21, 2), (100.0, 2)])
def test_a_copy_is_chosen_only_for_a_small_gamma(gamma, second):
    """On [0, 1] the scores are 1, 1, 0.8, 0: the copy's lead of 0.2 is worth a gamma of 0.2."""
    alike = EYE(4)
    alike[0, 1] = alike[1, 0] = 1.0
    for scores in (np.array([5.0, 5.0, 4.0, 0.0]), np.array([-100.0, -100, -120, -200])):
        assert top_apart(scores, alike, 2, gamma=gamma) == [0, second]


def test_the_largest_redundancy_to_any_chosen_layer_counts():
    """To {0, 1} layer 2 is 0.6 and 0, layer 3 twice 0.4: more in sum and mean, less at most."""
    alike = EYE(5)
    for a, b, value in [(0, 2, 0.6), (0, 3, 0.4), (1, 3, 0.4)]:
        alike[a, b] = alike[b, a] = value
    scores = torch.tensor([1.0, 0.9, 0.5, 0.5, 0.0])
    assert top_apart(scores, torch.tensor(alike), 3, gamma=1.0) == [0, 1, 3]


@pytest.mark.parametrize(
    ("scores", "alike", "options", "message"),
    [
        ([1.0, 2.0], EYE(3), {}, r"scores must be \(L,\) and redundancy \(L, L\); got \(2,\) and"),
        ([1.0, np.nan], EYE(2), {}, "must be finite; got NaN or Inf"),
        ([1.0, 2.0], EYE(2) * np.nan, {}, "must be finite; got NaN or Inf"),
        ([1.0, 2.0], EYE(2), {"k": 3}, "k must be between 1 and the 2 layers"),
        ([1.0, 2.0], EYE(2), {"gamma": np.inf}, "gamma must be finite and at least 0; got inf"),
        ([], EYE(0), {}, "k must be between 1 and the 0 layers"),
    ],
)
def test_top_apart_refuses(scores, alike, options, message):
    with pytest.raises(ValueError, match=message):
        top_apart(np.array(scores, float), alike, **({"k": 1} | options))


# ---- of a LayerScores ----------------------------------------------------------------------------


def test_select_is_in_order_of_depth_and_before_the_head():
    assert made().select(1) == ["block"]
    assert made().select(2) == ["block", "fc.input"]
    assert made().select(3) == ["stem", "block", "fc.input"]


def test_select_by_column_or_function():
    assert made().select(1, by="separation") == ["stem"]
    assert made().select(1, by="dim") == ["stem"]
    assert made().select(1, by=lambda frame: -frame["quality"]) == ["stem"]
    seen = []
    made().select(2, by=lambda frame: seen.append(len(frame)) or np.arange(len(frame)))
    assert seen == [4]


@pytest.mark.parametrize("k", [0, 4, -1])
def test_select_too_many_or_none(k):
    with pytest.raises(ValueError, match=f"between 1 and the 3 layers to choose from; got {k}"):
        made().select(k)
