"""Pictures: what is drawn, where, and that nothing is shown."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scored import middle

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from geomkd.plots import plot_accuracy, plot_layers, plot_similarity, plot_training

TERMS = ("separation", "information", "efficiency", "quality")
FRAME = pd.DataFrame(
    {"layer": ["a", "b", "c"]} | {t: np.arange(3.0) + i + 1 for i, t in enumerate(TERMS)}
)


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a picture was shown")

    monkeypatch.setattr(plt, "show", refuse)
    yield
    plt.close("all")


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_layers_lines_bands_and_marks():
    bands = {"quality": np.array([[3.5, 4.5], [4.5, 5.5], [5.5, 6.5]])}
    ax = plot_layers(FRAME, TERMS, bands, ["b", "c"], level=0.9)
    labels = [f"{term} ({term[0].upper()})" for term in TERMS]
    assert texts(ax.get_legend()) == ["selected", *labels]
    assert ax.get_legend().get_title().get_text() == "bands: 90 %\nsubsampling spread"
    for line, term in zip(ax.get_lines(), TERMS, strict=True):
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == list(FRAME[term])
    assert len({line.get_color() for line in ax.get_lines()}) == 4
    assert len({line.get_marker() for line in ax.get_lines()}) == 4
    (band,) = ax.collections
    assert band.get_datalim(ax.transData).intervaly.tolist() == [3.5, 6.5]
    assert [middle(p) for p in ax.patches] == pytest.approx([1, 2])
    assert ax.get_ylim()[0] == 0.0
    ax.figure.canvas.draw()


def test_one_score_of_another_kind_has_its_own_unit():
    frame = FRAME.assign(two_nn=[20.0, 30.0, 25.0])
    bands = {"two_nn": np.array([[18.0, 22.0], [28.0, 32.0], [24.0, 26.0]])}
    ax = plot_layers(frame, ["two_nn"], bands, ["b"])
    (line,) = ax.get_lines()
    assert list(line.get_ydata()) == [20, 30, 25] and ax.get_ylim()[0] > 15
    assert texts(ax.get_legend()) == ["selected", "two nn"]
    (band,) = ax.collections
    assert band.get_datalim(ax.transData).intervaly.tolist() == [18, 32]


def test_layers_into_given_axes():
    _, ax = plt.subplots()
    assert plot_layers(FRAME, TERMS, {}, [], ax=ax) is ax
    assert plt.get_fignums() == [1]
    assert len(ax.collections) == len(ax.patches) == 0
    assert ax.get_legend().get_title().get_text() == ""


def test_layers_below_zero_are_seen():
    frame = FRAME.assign(separation=[-1.0, 0.0, 1.0])
    assert plot_layers(frame, TERMS, {}, []).get_ylim()[0] < -1


def test_own_figure_is_wide_enough_for_the_names():
    many = pd.concat([FRAME] * 10, ignore_index=True)
    widths = [plot_layers(f, TERMS, {}, []).figure.get_figwidth() for f in (FRAME, many)]
    assert widths[0] == 7.5 and widths[1] > 15


def test_accuracy_is_mean_and_deviation_of_the_runs():
    curves = {
        "features": [np.array([0.2, 0.4]), np.array([0.4, 0.8])],
        "labels": [np.array([0.1, 0.5])],
    }
    ax = plot_accuracy(curves, name="test accuracy")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "test accuracy (%)")
    first, second = ax.get_lines()
    assert list(first.get_xdata()) == [1, 2]
    assert first.get_ydata() == pytest.approx([30, 60])
    assert second.get_ydata() == pytest.approx([10, 50])
    assert first.get_linestyle() != second.get_linestyle()
    deviation = 20 * np.sqrt(2)  # of 40 and 80 with ddof = 1
    assert texts(ax.get_legend()) == [f"features: 60.0 ± {deviation:.1f}", "labels: 50.0"]
    assert ax.get_legend().get_title().get_text() == "last epoch, mean ± SD of 1/2 seeds"
    band = ax.collections[0].get_datalim(ax.transData).intervaly
    assert band == pytest.approx([30 - deviation / 2, 60 + deviation])


def test_accuracy_into_given_axes():
    _, ax = plt.subplots()
    assert plot_accuracy({"a": [np.array([0.5])]}, ax=ax) is ax
    assert ax.get_legend().get_title().get_text() == "last epoch"
    assert plt.get_fignums() == [1] and ax.get_ylabel() == "accuracy (%)"


HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3],
        "loss": [3.0, 2.0, 1.5],
        "train_accuracy": [0.1, 0.4, 0.6],
        "val_accuracy": [0.2, 0.3, 0.5],
    }
)


def test_training_has_accuracies_on_the_left_and_the_loss_on_the_right():
    ax = plot_training(HISTORY, "kd")
    _, right = ax.figure.axes
    train, validation = ax.get_lines()
    (loss,) = right.get_lines()
    columns = {"train_accuracy": train, "val_accuracy": validation, "loss": loss}
    for column, line in columns.items():
        assert list(line.get_xdata()) == [1, 2, 3]
        assert list(line.get_ydata()) == list(HISTORY[column])
    assert len({line.get_color() for line in columns.values()}) == 3
    assert (ax.get_ylabel(), right.get_ylabel()) == ("accuracy (share of 1)", "training loss")
    assert texts(ax.get_legend()) == ["train", "validation", "loss"]
    assert ax.get_legend().get_title().get_text() == "objective kd"
    ax.figure.canvas.draw()
    assert all(float(label.get_text()).is_integer() for label in ax.get_xticklabels())


def test_training_without_validation_into_given_axes():
    _, ax = plt.subplots()
    many = pd.concat([HISTORY.drop(columns="val_accuracy")] * 10, ignore_index=True)
    assert plot_training(many, "ce", ax) is ax and plt.get_fignums() == [1]
    assert texts(ax.get_legend()) == ["train", "loss"]
    assert ax.get_lines()[0].get_marker() == "None"  # of few epochs alone


def similarity(rows=3, columns=4, low=0.0, **attrs):
    values = np.linspace(low, 0.9, rows * columns).reshape(rows, columns)
    names = [[f"layer{i}.0.conv" for i in range(n)] for n in (rows, columns)]
    frame = pd.DataFrame(values, index=names[0], columns=names[1])
    frame.attrs.update(attrs)
    return frame


def test_similarity_is_a_heat_map_with_the_first_layers_at_the_lower_left():
    frame = similarity(measure="cka")
    ax = plot_similarity(frame)
    (image,) = ax.images
    assert np.array_equal(image.get_array(), frame.to_numpy())
    assert not ax.yaxis.get_inverted() and image.origin == "lower"
    assert image.get_clim() == (0.0, 1.0) and image.get_cmap().name == "viridis"
    assert [t.get_text() for t in ax.get_xticklabels()] == list(frame.columns)
    assert [t.get_text() for t in ax.get_yticklabels()] == list(frame.index)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer of b", "layer of a")
    assert image.colorbar.ax.get_ylabel() == "CKA (debiased, no unit)"


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (40, 3), (30, 30)], ids=str)
def test_similarity_is_not_clipped(size):
    ax = plot_similarity(similarity(*size))
    figure = ax.figure
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for part in figure.axes:
        box = part.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    boxes = [t.get_window_extent() for t in ax.get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


def test_similarity_below_zero_and_distances():
    assert plot_similarity(similarity(low=-0.2)).images[0].get_clim() == (-0.2, 1.0)
    image = plot_similarity(similarity(measure="procrustes")).images[0]
    assert image.get_clim() == (0.0, 0.9)
    assert image.colorbar.ax.get_ylabel() == "Procrustes distance (no unit)"


def test_similarity_into_given_axes_with_the_names_of_the_models():
    _, ax = plt.subplots()
    frame = similarity().rename_axis(index="ResNet-18", columns="ResNet-34")
    assert plot_similarity(frame, ax=ax) is ax and plt.get_fignums() == [1]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer of ResNet-34", "layer of ResNet-18")
