"""LayerScores: its table, ranks and pictures."""

import json
from dataclasses import FrozenInstanceError

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from oracle import TERMS
from scored import QUALITY, SETTINGS, jumping, legend_of, made, measured, middle, swept

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from geomkd import LayerScores
from geomkd.scoring.settings import Settings


@pytest.fixture(scope="module")
def scores():
    return measured()


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a picture was shown")

    monkeypatch.setattr(plt, "show", refuse)
    monkeypatch.setattr(matplotlib.figure.Figure, "show", refuse)
    yield
    plt.close("all")


# ---- the frame -----------------------------------------------------------------------------------


def test_columns(scores):
    frame = scores.to_frame()
    columns = ["layer", "depth", "kind", "role", "shape", "n", "dim", *TERMS[1:], "quality"]
    assert list(frame)[:11] == columns
    assert {"min_within_cosine", "class_entropy", "mean_norm", "size_factor"} < set(frame)
    assert list(frame["layer"]) == ["1", "3.input", "4"]
    assert list(frame["role"]) == ["activation", "head_input", "head"]
    assert list(frame["shape"]) == [(4, 6, 6), (144,), (4,)]
    assert list(frame["dim"]) == [144, 144, 4] and list(frame["n"]) == [40, 40, 40]
    assert all(frame[name].dtype == float for name in TERMS)


def test_to_frame_is_a_copy():
    scores = made()
    frame = scores.to_frame()
    frame["quality"] = 0.0
    assert scores.to_frame()["quality"].tolist() == QUALITY


def test_settings_say_how(scores):
    expected = {
        "model": "Sequential",
        "measures": ["knowledge_quality"],
        "definition": "published",
        "pool": "flatten",
        "center": True,
        "samples": 40,
        "samples_per_class": [10, 10],
        "classes": 4,
        "labels": "own",
        "subset": 40,
        "subset_classes": (torch.arange(40) % 4).tolist(),
        "entropy_per_class": None,
        "dataset_size": 40.0,
        "subsamples": 8,
        "sweep": [],
        "null": 0,
        "seed": 0,
        "partial": False,
        "protocol": None,
        "class_labels": [0, 1, 2, 3],
        "notes": [],
    }
    assert scores.settings == expected and list(scores.settings) == list(expected)
    assert json.loads(json.dumps(scores.settings)) == expected


def test_settings_stay_as_they_are(scores):
    scores.settings["samples"] = 1
    scores.settings["measures"].append("gbc")
    assert scores.settings["samples"] == 40 and scores.settings["measures"] == ["knowledge_quality"]
    with pytest.raises(FrozenInstanceError):
        scores.how.samples = 1
    assert isinstance(hash(scores.how), int)  # nothing in it can change


# ---- rank ----------------------------------------------------------------------------------------


def test_rank():
    table = made(jumping()).rank()
    columns = ["layer", "rank", "best", "worst", "score", "low", "high", "tied_with"]
    assert list(table) == columns
    assert list(table["layer"]) == ["fc.act", "block", "fc.input", "stem"]
    assert list(table["score"]) == [9.0, 3.0, 2.0, 1.0]
    assert list(table["rank"]) == [1, 2, 3, 4]
    assert list(table["best"]) == [1, 2, 2, 4]
    assert list(table["worst"]) == [1, 3, 3, 4]
    assert list(table["tied_with"]) == ["", "3", "2", ""]


@pytest.mark.parametrize("columns", [0, 20])
def test_print_shows_every_column(columns):
    """At the 80 characters of a terminal (0) or of a file (20), with resnet34's layers."""
    names = ["relu", *(f"layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n))]
    names, rng = [*names, "fc.input"], np.random.default_rng(0)
    estimate = -rng.uniform(1, 9, 18)
    draws = estimate[:, None] + rng.normal(0, 0.2, (18, 50))
    frame = pd.DataFrame({"layer": names, "quality": estimate})
    table = LayerScores(frame, {"quality": draws}, Settings.of(SETTINGS)).rank()
    assert max(map(len, table["tied_with"])) >= 6
    with pd.option_context("display.max_columns", columns, "display.width", 80):
        lines = str(table).split("\n")
    assert lines[0].split() == list(table) and len(lines) == 19
    assert 70 < max(map(len, lines)) <= 80 and not any("..." in line for line in lines)


def test_rank_at_a_lower_level_is_surer():
    table = made(jumping()).rank(0.7)
    assert list(table["best"]) == list(table["worst"]) == [1, 2, 3, 4]
    assert set(table["tied_with"]) == {""}


def test_rank_and_spread_by_a_direct_computation(scores):
    table = scores.rank(0.8).set_index("layer")
    frame, draws = scores.to_frame().set_index("layer"), scores.draws["quality"]
    for i, name in enumerate(frame.index):
        row = table.loc[name]
        assert row["score"] == frame.loc[name, "quality"]
        assert row["rank"] == 1 + sum(frame["quality"] > frame.loc[name, "quality"])
        taken = np.sort([1 + np.sum(drawn > drawn[i]) for drawn in draws.T])
        assert row["best"] == taken[0]  # the first of 8 reaches a share of 0.1
        assert row["worst"] == taken[7]
        around = draws[i] - draws[i].mean()
        assert row["low"] == pytest.approx(row["score"] + np.quantile(around, 0.1))
        assert row["high"] == pytest.approx(row["score"] + np.quantile(around, 0.9))


def test_equal_scores_share_a_rank():
    table = made(quality=[2.0, 5.0, 5.0, 1.0]).rank()
    assert list(table["rank"]) == [1, 1, 3, 4]
    assert list(table["layer"]) == ["block", "fc.input", "stem", "fc.act"]


OTHER = [1.0, 2.0, 3.0, 9.0]  # one of the six pairs of `QUALITY` is the other way round


@pytest.mark.parametrize("by", ["quality", lambda frame: 2 * frame["quality"]])
def test_an_order_that_has_not_settled_is_told(by):
    """Tau of the step to the whole sample is (5 - 1) / 6; steps before it do not count."""
    text = "not settled: from 30 to 60 samples Kendall's tau is 0.67, less than 0.9; rank sets"
    scores = swept(QUALITY, OTHER)
    with pytest.warns(UserWarning, match=text) as caught:
        table = scores.rank(by=by)
    assert [w.filename for w in caught] == [__file__] and table["rank"].tolist() == [1, 2, 3, 4]
    scores.rank(by="mean_norm")  # not in the sweep
    swept(OTHER, QUALITY).rank(by=by)


def test_rank_without_half_samples():
    table = made().rank()
    assert list(table["rank"]) == [1, 2, 3, 4]
    missing = ["best", "worst", "low", "high", "tied_with"]
    assert table[missing].isna().all(axis=None)


def test_rank_by_another_column_or_a_function():
    scores = made(jumping())
    assert scores.rank(by="separation")["layer"][0] == "stem"
    assert scores.rank(by="separation")["best"].tolist() == [1, 2, 3, 4]
    other = scores.rank(by="mean_norm")
    assert list(other["rank"]) == [1, 2, 3, 4] and other["best"].isna().all()
    twice = scores.rank(by=lambda frame: 2 * frame["quality"] + 0 * frame["mean_norm"])
    scaled = ["score", "low", "high"]
    pd.testing.assert_frame_equal(
        twice.drop(columns=scaled), scores.rank().drop(columns=scaled), check_exact=True
    )
    np.testing.assert_allclose(twice[scaled], 2 * scores.rank()[scaled])


@pytest.mark.parametrize("level", [0, 1, -0.5, 95])
def test_level_errors(level):
    for scores in (made(), made(jumping())):
        for use in (scores.rank, lambda level, scores=scores: scores.plot(level=level)):
            with pytest.raises(ValueError, match=f"level must be between 0 and 1; got {level}"):
                use(level)


def test_layer_without_a_score_is_named():
    scores = made(quality=[1.0, np.nan, 2.0, 9.0])
    with pytest.raises(ValueError, match=r"score to be ranked by; NaN for \['block'\]"):
        scores.rank()
    with pytest.raises(ValueError, match=r"score to be selected by; NaN for \['block'\]"):
        scores.select(1)


@pytest.mark.parametrize(
    ("by", "text"),
    [
        ("nothing", r"by= must be a function or one of \['depth', 'n', .*\]; got 'nothing'"),
        ("layer", r"by= must be a function or one of .*; got 'layer'"),
        (lambda frame: [1.0, 2.0], r"one number for each of 4 layers; got \(2,\)"),
        (lambda frame: 1.0, r"one number for each of 4 layers; got \(\)"),
    ],
)
def test_by_errors(by, text):
    for use in (made().select, lambda k=1, *, by: made().rank(by=by)):
        with pytest.raises(ValueError, match=text):
            use(1, by=by)


# ---- pictures and text ---------------------------------------------------------------------------


def test_plot(scores):
    ax = scores.plot()
    assert isinstance(ax, Axes)
    assert ax.get_xlabel() == "layer, in order of execution"
    assert ax.get_ylabel() == "score (no unit)"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "3.input", "4"]
    assert legend_of(ax) == [
        "selected by quality",
        *(f"{name} ({name[0].upper()})" for name in TERMS[1:]),
        "quality (Q)",
    ]
    assert ax.get_legend().get_title().get_text() == "bands: 95 %\nsubsampling spread"
    assert len(ax.collections) == 4
    quality = ax.get_lines()[3].get_ydata()
    assert list(quality) == list(scores.to_frame()["quality"])


def test_plot_into_given_axes_marks_the_selected():
    _, (left, right) = plt.subplots(1, 2)
    scores = made(jumping())
    assert scores.plot(right, k=2) is right and not left.has_data()
    marked = [middle(patch) for patch in right.patches]
    assert marked == pytest.approx([1, 2])
    assert len(plt.get_fignums()) == 1
    ax = scores.plot(left, k=1, by="separation", level=0.5)
    assert [middle(patch) for patch in ax.patches] == pytest.approx([0])
    assert ax.get_legend().get_title().get_text().startswith("bands: 50 %")


def test_plot_without_half_samples_has_no_bands():
    ax = made().plot()
    assert len(ax.collections) == 0 and ax.get_legend().get_title().get_text() == ""
    assert len(ax.patches) == 3  # no more than there are before the head


def test_repr_is_one_line():
    assert repr(made()) == (
        "LayerScores(Net, 4 layers, n=60, definition='published', best='fc.act' (9.000))"
    )
    assert repr(made(partial=True)).endswith("best='fc.act' (9.000), partial)")


def test_html():
    text = made(model="A<B>")._repr_html_()
    assert "LayerScores(A&lt;B&gt;, 4 layers" in text and "<B>" not in text
    for word in ("fc.input", "(16, 2, 2)", "separation", "quality", "3.000"):
        assert word in text
    assert text.count("<tr") == 5
