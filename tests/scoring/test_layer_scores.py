"""LayerScores: its table, ranks, choice of layers, file and picture."""

import json
import os
import zipfile

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from oracle import TERMS
from torch import nn

from geomkd import LayerScores, score_layers

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUALITY = [1.0, 3.0, 2.0, 9.0]


def made(draws=None, quality=QUALITY, **settings):
    """Scores of four layers, the last after the head's input, with given half-samples."""
    n = len(quality)
    frame = pd.DataFrame(
        {
            "layer": ["stem", "block", "fc.input", "fc.act"][:n],
            "depth": range(n),
            "kind": ["map", "map", "vector", "vector"][:n],
            "role": ["activation", "block", "head_input", "head"][:n],
            "shape": [(8, 4, 4), (16, 2, 2), (16,), (5,)][:n],
            "n": 60,
            "dim": [128, 64, 16, 5][:n],
            "separation": [0.4, 0.3, 0.2, 0.1][:n],
            "information": [0.5, 0.5, 0.5, 0.5][:n],
            "efficiency": [0.1, 0.2, 0.3, 0.4][:n],
            "quality": quality,
            "mean_norm": [1.0, 2.0, 3.0, 4.0][:n],
        }
    )
    if draws is None:
        drawn = {name: np.empty((n, 0)) for name in TERMS}
    else:
        drawn = {name: np.tile(frame[name].to_numpy()[:, None], draws.shape[1]) for name in TERMS}
        drawn["quality"] = draws
    defaults = {"model": "Net", "definition": "published", "samples": 60, "partial": False}
    return LayerScores(frame, drawn, defaults | settings)


def jumping(flips=6, total=50):
    """Half-samples in which "block" falls below "fc.input" in ``flips`` of ``total``."""
    draws = np.tile(np.array(QUALITY)[:, None], total)
    draws[1, :flips] = 1.5
    return draws


@pytest.fixture(scope="module")
def scores():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4), nn.Tanh())
    y = torch.arange(40) % 4
    x = torch.randn(4, 1, 8, 8)[y] + torch.randn(40, 1, 8, 8)
    return score_layers(model, (x, y), subsamples=8, progress=False)


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
    assert scores.settings == {
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
    }


# ---- rank ----------------------------------------------------------------------------------------


def test_rank():
    table = made(jumping()).rank()
    assert list(table["layer"]) == ["fc.act", "block", "fc.input", "stem"]
    assert list(table["score"]) == [9.0, 3.0, 2.0, 1.0]
    assert list(table["rank"]) == [1, 2, 3, 4]
    assert list(table["lowest_rank"]) == [1, 2, 2, 4]
    assert list(table["highest_rank"]) == [1, 3, 3, 4]
    assert list(table["tied_with"]) == ["", "fc.input", "block", ""]


def test_rank_at_a_lower_level_is_surer():
    table = made(jumping()).rank(0.7)
    assert list(table["lowest_rank"]) == list(table["highest_rank"]) == [1, 2, 3, 4]
    assert set(table["tied_with"]) == {""}


def test_rank_and_spread_by_a_direct_computation(scores):
    table = scores.rank(0.8).set_index("layer")
    frame, draws = scores.to_frame().set_index("layer"), scores.draws["quality"]
    for i, name in enumerate(frame.index):
        row = table.loc[name]
        assert row["score"] == frame.loc[name, "quality"]
        assert row["rank"] == 1 + sum(frame["quality"] > frame.loc[name, "quality"])
        taken = np.sort([1 + np.sum(drawn > drawn[i]) for drawn in draws.T])
        assert row["lowest_rank"] == taken[0]  # the first of 8 reaches a share of 0.1
        assert row["highest_rank"] == taken[7]
        around = draws[i] - draws[i].mean()
        assert row["spread_low"] == pytest.approx(row["score"] + np.quantile(around, 0.1))
        assert row["spread_high"] == pytest.approx(row["score"] + np.quantile(around, 0.9))


def test_equal_scores_share_a_rank():
    table = made(quality=[2.0, 5.0, 5.0, 1.0]).rank()
    assert list(table["rank"]) == [1, 1, 3, 4]
    assert list(table["layer"]) == ["block", "fc.input", "stem", "fc.act"]


def test_rank_without_half_samples():
    table = made().rank()
    assert list(table["rank"]) == [1, 2, 3, 4]
    missing = ["lowest_rank", "highest_rank", "spread_low", "spread_high", "tied_with"]
    assert table[missing].isna().all(axis=None)


def test_rank_by_another_column_or_a_function():
    scores = made(jumping())
    assert scores.rank(by="separation")["layer"][0] == "stem"
    assert scores.rank(by="separation")["lowest_rank"].tolist() == [1, 2, 3, 4]
    other = scores.rank(by="mean_norm")
    assert list(other["rank"]) == [1, 2, 3, 4] and other["lowest_rank"].isna().all()
    twice = scores.rank(by=lambda frame: 2 * frame["quality"] + 0 * frame["mean_norm"])
    pd.testing.assert_frame_equal(
        twice.drop(columns=["score", "spread_low", "spread_high"]),
        scores.rank().drop(columns=["score", "spread_low", "spread_high"]),
    )


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


# ---- select --------------------------------------------------------------------------------------


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


# ---- files ---------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(scores, tmp_path):
    path = scores.save(tmp_path / "a.scores")
    assert path == tmp_path / "a.scores" and list(tmp_path.iterdir()) == [path]
    loaded = LayerScores.load(path)
    pd.testing.assert_frame_equal(loaded.to_frame(), scores.to_frame())
    assert list(loaded.to_frame()["shape"]) == [(4, 6, 6), (144,), (4,)]
    assert loaded.settings == scores.settings
    assert list(loaded.draws) == list(scores.draws)
    for name in TERMS:
        assert np.array_equal(loaded.draws[name], scores.draws[name])
    assert loaded.kept.dtype == np.float32 and np.array_equal(loaded.kept, scores.kept)
    pd.testing.assert_frame_equal(loaded.rank(), scores.rank())


def test_scores_without_half_samples_are_saved_too(tmp_path):
    loaded = LayerScores.load(made().save(tmp_path / "a"))
    pd.testing.assert_frame_equal(loaded.to_frame(), made().to_frame())
    assert loaded.draws["quality"].shape == (4, 0)
    assert loaded.rank()["tied_with"].isna().all()


def test_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = made().save(tmp_path / "a")
    before = path.read_bytes()

    def half(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(OSError, match="disk full"):
        made(jumping()).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def header_of(path):
    return json.loads(np.load(path)["header"].tobytes())


def rewrite(path, header):
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, header=text)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def damaged(path):
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(20)
    path.write_bytes(data)


def foreign(path):
    with path.open("wb") as file:
        np.savez(file, x=np.zeros(3))


def objects(path):
    with path.open("wb") as file:
        np.savez(file, header=np.array([{"format": "geomkd.LayerScores/2"}], dtype=object))


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("header", "{}")


SPOILS = {
    "truncated": truncated,
    "damaged": damaged,
    "foreign npz": foreign,
    "object array": objects,
    "npy": one_array,
    "zip": other_zip,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("layer,quality\nfc,1.0\n"),
    "other format": lambda path: rewrite(path, header_of(path) | {"format": "other/1"}),
    "older format": lambda path: rewrite(
        path, header_of(path) | {"format": "geomkd.LayerScores/1"}
    ),
    "no half-samples": lambda path: rewrite(path, header_of(path)),
    "no columns": lambda path: rewrite(path, {"format": "geomkd.LayerScores/2"}),
    "list": lambda path: rewrite(path, [1]),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_other_files_are_refused(spoil, tmp_path):
    path = made(jumping()).save(tmp_path / "a")
    SPOILS[spoil](path)
    with pytest.raises(ValueError, match=r"a does not hold geomkd.LayerScores/2"):
        LayerScores.load(path)


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    scores, rng = made(jumping()), np.random.default_rng(0)
    path = scores.save(tmp_path / "a")
    whole, refused = path.read_bytes(), 0
    for turn in range(300):
        data, start = bytearray(whole), rng.integers(len(whole))
        data[start : len(whole) if turn % 3 == 0 else start + 8] = rng.bytes(turn % 3 * 4)
        path.write_bytes(data)
        try:
            loaded = LayerScores.load(path)
        except ValueError as error:
            assert "does not hold geomkd.LayerScores/2" in str(error)
            refused += 1
        else:
            pd.testing.assert_frame_equal(loaded.to_frame(), scores.to_frame())
            assert np.array_equal(loaded.draws["quality"], scores.draws["quality"])
    assert refused > 200


class Unpickled:
    """Leaves a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_is_unpickled(tmp_path):
    path, folder = tmp_path / "a", tmp_path / "left"
    with path.open("wb") as file:
        np.savez(file, header=np.array([Unpickled(str(folder))], dtype=object))
    with pytest.raises(ValueError, match=r"a does not hold geomkd.LayerScores/2: Object arrays"):
        LayerScores.load(path)
    assert not folder.exists()


def test_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        LayerScores.load(tmp_path / "none")


# ---- pictures and text ---------------------------------------------------------------------------


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot(scores):
    ax = scores.plot()
    assert isinstance(ax, Axes)
    assert ax.get_xlabel() == "layer, in order of execution"
    assert ax.get_ylabel() == "score (no unit)"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "3.input", "4"]
    assert legend_of(ax) == [
        "selected",
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
    marked = [patch.get_x() + patch.get_width() / 2 for patch in right.patches]
    assert marked == pytest.approx([1, 2])
    assert len(plt.get_fignums()) == 1
    ax = scores.plot(left, k=1, by="separation", level=0.5)
    assert [patch.get_x() + patch.get_width() / 2 for patch in ax.patches] == pytest.approx([0])
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
