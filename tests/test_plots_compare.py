"""Pictures that compare: teachers and checkpoints, many scores, classes."""

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scored import QUALITY, jumping, legend_of, made

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from geomkd.plots import compare, plot_classes, plot_layers, plot_training


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def fewer():
    """Scores of the first three layers only."""
    scores = made(jumping())
    draws = {name: drawn[:3] for name, drawn in scores.draws.items()}
    return replace(scores, frame=scores.frame[:3], draws=draws)


def looks(lines):
    return [{line.get_color() for line in lines}, {line.get_marker() for line in lines}]


def clipped(ax):
    """Whether anything of a figure of its own leaves it."""
    ax.figure.canvas.draw()
    width, height = ax.figure.canvas.get_width_height()
    boxes = [part.get_tightbbox() for part in ax.figure.axes]
    return any(b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height for b in boxes)


# ---- several scores ------------------------------------------------------------------------------


def test_compare_draws_a_curve_and_a_band_of_each():
    one, other = made(jumping()), made(jumping(), quality=[2.0, 1.0, 4.0, 3.0])
    ax = compare({"one": one, "other": other})
    assert legend_of(ax) == ["one", "other"]
    assert ax.get_legend().get_title().get_text() == "bands: 95 %\nsubsampling spread"
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [QUALITY, [2.0, 1.0, 4.0, 3.0]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer, in order of execution", "quality")
    assert [t.get_text() for t in ax.get_xticklabels()] == one.frame["layer"].tolist()
    assert len(ax.collections) == 2 and not clipped(ax)
    low, high = one.rank(by="quality").set_index("layer").loc["block", ["low", "high"]]
    band = ax.collections[0].get_paths()[0].vertices
    assert {low, high} <= set(band[band[:, 0] == 1][:, 1])


def test_compared_curves_differ_in_colour_and_mark_and_dashes():
    lines = compare({i: made() for i in range(6)}, by="separation").get_lines()
    assert [len(look) for look in looks(lines)] == [6, 6]
    assert len({line.get_linestyle() for line in lines[:3]}) == 3
    many = compare({i: made() for i in range(20)}).get_lines()
    assert len({(x.get_color(), x.get_marker(), x.get_linestyle()) for x in many}) == 20


def test_compare_networks_of_other_layers():
    scores = {"deep": made(), "shallow": fewer()}
    ax = compare(scores, by=lambda frame: 2 * frame["quality"])
    assert [list(line.get_xdata()) for line in ax.get_lines()] == [[0, 1, 2, 3], [0, 1, 2]]
    assert ax.get_xlabel() == "number of the layer, in order of execution"
    assert ax.get_ylabel() == "a function" and list(ax.get_lines()[1].get_ydata()) == [2, 6, 4]
    assert len(ax.collections) == 1 and ax.get_legend().get_title().get_text() != ""
    ax = compare(scores, x="relative depth")
    assert [list(line.get_xdata()) for line in ax.get_lines()][1] == [0.0, 0.5, 1.0]
    assert ax.get_xlabel() == "relative depth (0 first layer, 1 last)"


def test_heat_map_of_epochs():
    scores = {3: made(), 10: made(quality=[2.0, 1.0, 4.0, 3.0])}
    ax = compare(scores, heat=True)
    (image,) = ax.images
    assert image.get_array().tolist() == [
        list(row) for row in zip(QUALITY, [2, 1, 4, 3], strict=True)
    ]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["3", "10"]
    assert [t.get_text() for t in ax.get_yticklabels()] == made().frame["layer"].tolist()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "layer, in order of execution")
    assert image.colorbar.ax.get_ylabel() == "quality" and not clipped(ax)
    assert compare({"a": made()}, heat=True, by="separation").get_xlabel() == ""


def test_what_compare_refuses():
    with pytest.raises(ValueError, match=r"needs the same layers in all of \['a', 'b'\]"):
        compare({"a": made(), "b": fewer()}, heat=True)
    with pytest.raises(TypeError, match=r"scores must be \{name: LayerScores, ...\}, not empty"):
        compare({})
    with pytest.raises(TypeError, match=r"scores must be .*; got \[LayerScores"):
        compare([made()])
    with pytest.raises(ValueError, match=r"x must be one of \('depth', 'relative depth'\)"):
        compare({"a": made()}, x="layer")
    with pytest.raises(ValueError, match=r"by= must be a function or one of"):
        compare({"a": made()}, by="two_nn")


def test_scores_made_otherwise_are_told():
    with pytest.warns(UserWarning, match=r"the scores differ in definition: published, robust"):
        compare({"a": made(), "b": made(definition="robust")})
    with pytest.warns(UserWarning, match=r"the scores differ in samples: 60, 90"):
        compare({"a": made(), "b": made(samples=90)})


def test_layers_are_drawn_once_into_an_axes():
    _, ax = plt.subplots()
    made().plot(ax)
    for again in (made().plot, lambda ax: compare({"a": made()}, ax=ax)):
        with pytest.raises(ValueError, match=r"without curves of layers; got one .*plots.compare"):
            again(ax)
    ax.clear()
    assert compare({"a": made()}, ax=ax) is ax


# ---- many scores of one network ------------------------------------------------------------------


def many(k=7, layers=4):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({f"s_{i}": rng.normal(10**i, 1, layers) for i in range(k)})
    names = list(frame)
    bands = {name: np.stack([frame[name] - 1, frame[name] + 2], axis=1) for name in names}
    return frame.assign(layer=[f"block{i}.conv" for i in range(layers)]), names, bands


@pytest.mark.parametrize("layers", [4, 40])
def test_more_than_six_scores_have_panels_of_their_own(layers):
    frame, names, bands = many(layers=layers)
    ax = plot_layers(frame, names, bands, ["block1.conv"], selected_by="s_2")
    host, *panels = ax.figure.axes
    assert host is ax and not ax.axison and not ax.get_lines() and not clipped(ax)
    first, *titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == [f"s {i}" for i in range(1, 7)]
    assert first == (
        "scores (no unit) by layer, in order of execution\n"
        "shaded: selected by s 2; bands: 95 % subsampling spread\n\ns 0"
    )
    for panel, name in zip(panels, names, strict=True):
        (line,) = panel.get_lines()
        assert len(panel.collections) == 1 and list(line.get_ydata()) == list(frame[name])
        low, high = panel.get_ylim()
        assert low <= bands[name].min() and bands[name].max() <= high
        assert len(panel.patches) == 1 and panel.get_legend() is None


def test_panels_in_a_given_axes():
    frame, names, _ = many()
    _, (_, right) = plt.subplots(1, 2, layout="constrained")
    assert plot_layers(frame, names, {}, [], ax=right) is right and plt.get_fignums() == [1]
    right.figure.canvas.draw()
    assert all(panel.get_position().x0 > 0.5 for panel in right.figure.axes[2:])
    with pytest.raises(ValueError, match="got one that has some"):
        plot_layers(frame, names, {}, [], ax=right)
    with pytest.raises(ValueError, match=r"more than 6 scores need an ax of plt.subplots; got"):
        plot_layers(frame, names, {}, [], ax=plt.figure().add_axes((0, 0, 1, 1)))


def test_six_scores_share_an_axes_with_bands_inside():
    frame, names, bands = many(6)
    bands["s_0"] = bands["s_0"] * 50
    ax = plot_layers(frame, names, bands, [])
    assert len(ax.get_lines()) == len(ax.collections) == 6
    low, high = ax.get_ylim()
    extents = [band.get_datalim(ax.transData).intervaly for band in ax.collections]
    assert low <= min(x[0] for x in extents) and max(x[1] for x in extents) <= high


def test_one_score_is_in_its_own_unit():
    frame, names, bands = many()
    ax = plot_layers(frame, names[3:4], bands, [])
    assert list(ax.get_lines()[0].get_ydata()) == list(frame["s_3"]) and legend_of(ax) == ["s 3"]
    assert ax.get_ylabel() == "score (no unit)" and ax.get_ylim()[0] > 0


def test_the_legend_says_by_what_layers_were_selected():
    def twice(frame):
        return 2 * frame["separation"]

    for by, words in ((None, "quality"), ("mean_norm", "mean norm"), (twice, "twice")):
        assert legend_of(made().plot(by=by))[0] == f"selected by {words}"
    assert legend_of(made().plot(by=lambda frame: frame["n"]))[0] == "selected by a function"


# ---- classes, epochs -----------------------------------------------------------------------------


def test_classes_are_a_heat_map():
    table = [[layer, c, 10 * i + c] for i, layer in enumerate("ba") for c in (7, 3)]
    frame = pd.DataFrame(table, columns=["layer", "class", "within_cosine"])
    ax = plot_classes(frame, by="within_cosine")
    (image,) = ax.images
    assert image.get_array().tolist() == [[3, 7], [13, 17]] and not clipped(ax)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["3", "7"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("class", "layer, in order of execution")
    assert image.colorbar.ax.get_ylabel() == "within cosine (of cosines, no unit)"


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_epochs_are_whole_numbers(epochs):
    history = pd.DataFrame({"epoch": range(1, epochs + 1), "loss": 1.0, "train_accuracy": 0.5})
    ax = plot_training(history, "ce", teacher=0.9)
    ticks = [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
    assert ticks and all(float(tick).is_integer() for tick in ticks) and not clipped(ax)
    assert legend_of(ax) == ["train", "teacher (0.900)", "loss"]


def test_scores_about_other_origins_are_told_apart():
    with pytest.warns(UserWarning, match="the scores differ in center: True, False"):
        compare({"a": made(), "b": made(center=False)})
