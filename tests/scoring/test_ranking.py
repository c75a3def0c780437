"""Ranks, rank sets and spreads, against counting by hand."""

import numpy as np
import pytest

from geomkd.scoring.ranking import _spans, check_scored, rank_sets, rank_table, ranks, spread

RNG = np.random.default_rng


def test_ranks():
    assert ranks(np.array([0.1, 3.0, 2.0])).tolist() == [3, 1, 2]
    assert ranks(np.array([2.0, 1.0, 2.0, 0.0])).tolist() == [1, 3, 1, 4]
    columns = np.array([[1.0, 5.0], [2.0, 4.0]])
    assert ranks(columns).tolist() == [[2, 1], [1, 2]]


def test_certain_order():
    estimate = np.array([1.0, 3.0, 2.0])
    draws = estimate[:, None] - 0.5 + RNG(0).uniform(-0.1, 0.1, (3, 50))
    sets = rank_sets(estimate, draws)
    assert sets.rank.tolist() == sets.best.tolist() == sets.worst.tolist() == [3, 1, 2]
    assert sets.ties == [[], [], []]


def test_order_that_is_not_certain():
    """Layers 0 and 1 change places in 6 of 50 draws, layer 2 never moves."""
    draws = np.tile([[3.0], [2.0], [1.0]], 50)
    draws[0, :6] = 1.5
    sets = rank_sets(np.array([3.0, 2.0, 1.0]), draws, level=0.95)
    assert (sets.rank.tolist(), sets.best.tolist()) == ([1, 2, 3], [1, 1, 3])
    assert sets.worst.tolist() == [2, 2, 3]
    assert sets.ties == [[1], [0], []]
    surer = rank_sets(np.array([3.0, 2.0, 1.0]), draws, level=0.7)
    assert surer.worst.tolist() == [1, 2, 3]
    assert surer.ties == [[], [], []]


@pytest.mark.parametrize(("flips", "tied"), [(25, False), (26, True)])
def test_tie_needs_more_than_its_share_of_flips(flips, tied):
    draws = np.tile([[2.0], [1.0]], 100)
    draws[0, :flips] = 0.0
    sets = rank_sets(np.array([2.0, 1.0]), draws, level=0.75)  # 0.25 is exact
    assert sets.ties == ([[1], [0]] if tied else [[], []])


def test_central_share_of_the_ranks():
    """The 2nd-lowest to the 2nd-highest of 50 ranks at 95 percent."""
    draws = RNG(1).standard_normal((6, 50))
    sets = rank_sets(np.zeros(6), draws, level=0.95)
    drawn = np.sort([[1 + (column > s).sum() for s in column] for column in draws.T], axis=0)
    assert sets.best.tolist() == drawn[1].tolist()
    assert sets.worst.tolist() == drawn[-2].tolist()
    assert (sets.best <= sets.worst).all()


def test_equal_layers():
    sets = rank_sets(np.ones(3), np.ones((3, 5)))
    assert sets.rank.tolist() == [1, 1, 1]
    assert sets.ties == [[], [], []]  # equal always, so never the other way


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, float("nan")])
def test_level(level):
    with pytest.raises(ValueError, match=f"^level must be between 0 and 1; got {level}$"):
        rank_table(["a", "b"], np.ones(2), None, level)


@pytest.mark.parametrize("shape", [(3, 5), (2, 0), (2,)])
def test_shape_of_draws(shape):
    with pytest.raises(ValueError, match=r"^draws must be \(2, R\), R > 0; got \("):
        rank_sets(np.ones(2), np.ones(shape))


def test_scores_that_are_no_numbers():
    draws = np.ones((2, 5))
    with pytest.raises(ValueError, match=r"^scores must not be NaN; got 1 of 2 layers without$"):
        rank_sets(np.array([1.0, np.nan]), draws)
    draws[0, 3] = np.nan
    with pytest.raises(ValueError, match=r"^scores must not be NaN; got 1 of 2 layers without$"):
        rank_sets(np.ones(2), draws)


def test_spread_is_about_the_estimate():
    draws = RNG(2).standard_normal((4, 200)) * 0.1 + 5
    estimate = np.array([1.0, 2.0, 3.0, 4.0])
    band = spread(estimate, draws, 0.9)
    for row, own, expected in zip(draws, estimate, band, strict=True):
        around = row - row.mean()
        assert expected == pytest.approx(own + np.quantile(around, [0.05, 0.95]))
    assert (band[:, 0] < estimate).all()
    assert (band[:, 1] > estimate).all()


def test_spread_of_a_skewed_score():
    band = spread(np.array([0.0]), np.array([[0.0] * 9 + [10.0]]), level=0.8)
    assert band == pytest.approx(np.array([[-1.0, 0.0]]))


@pytest.mark.parametrize(
    ("lost", "lowest_of_other", "tied"), [(2, 2, False), (3, 1, False), (5, 1, False), (6, 1, True)]
)
def test_rank_sets_are_central_and_ties_need_more_flips_than_the_level_leaves(
    lost, lowest_of_other, tied
):
    draws = np.ones((2, 100)) * [[2.0], [1.0]]
    draws[0, :lost] = 0.0
    sets = rank_sets(np.array([2.0, 1.0]), draws, level=0.95)
    assert sets.worst.tolist() == [3 - lowest_of_other, 2]
    assert sets.best.tolist() == [1, lowest_of_other]
    assert sets.ties == ([[1], [0]] if tied else [[], []])


def test_layers_without_a_score_are_named():
    with pytest.raises(ValueError, match=r"needs a score to be selected by; NaN for \['b'\]$"):
        check_scored(["a", "b"], np.array([1, np.nan]), "selected")
    check_scored(["a", "b"], np.array([1, -np.inf]), "selected")


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([3, 2], "2..3"), ([1, 9, 5, 4, 3, 5], "1,3..5,9")]
)
def test_numbers_as_a_short_text(numbers, text):
    assert _spans(numbers) == text
