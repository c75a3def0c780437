"""LayerScores where several measures, sample sizes or kept Gram matrices meet."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau
from scored import legend_of, made, middle
from small import mlp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from geomkd import LayerScores, score_layers, separation
from geomkd.geometry import draws
from geomkd.geometry.draws import SampleDraws
from geomkd.measures import cka
from geomkd.scoring.loes import loes, redundancy
from geomkd.scoring.selection import top_apart

N, WIDTHS, SWEEP = 90, (6, 40, 12, 200, 11, 3), [24, 48]
Y = torch.arange(N) % 3
MEASURES = ("two_nn", "knowledge_quality", "participation_ratio", "neural_collapse", "gbc")


def vectors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, generator=generator)[Y] + torch.randn(N, 6, generator=generator)


X = vectors()


def score(**options):
    model = mlp(WIDTHS, seed=3)
    options = {"subsamples": 4, "measures": MEASURES, "progress": False} | options
    return score_layers(model, (X, Y), ["0", "3", "6", "9", "12.input", "12"], **options)


@pytest.fixture(scope="module")
def scores():
    return score(sweep=SWEEP)


@pytest.fixture(scope="module")
def features():
    """Centred features of the layers up to the head's input, float64."""
    model, found, x = mlp(WIDTHS, seed=3).eval(), [], X
    with torch.no_grad():
        for i, module in enumerate(model):
            if i == 12:
                found.append(x)
            x = module(x)
            if i in (0, 3, 6, 9):
                found.append(x)
    return [(x - x.mean(dim=0)).double() for x in found]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


# ---- choosing ------------------------------------------------------------------------------------


def test_layers_are_those_meant(scores, features):
    assert list(scores.frame["role"]) == ["named"] * 4 + ["head_input", "head"]
    assert list(scores.frame["dim"]) == [x.shape[1] for x in features] + [3]
    assert scores.grams.shape == (6, N, N) and scores.grams.dtype == np.float32
    for gram, x in zip(scores.grams, features, strict=False):
        np.testing.assert_allclose(gram, x @ x.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "gamma": 2.0, "eta": 0.0, "ridge": 0.1}])
def test_loes_is_that_of_the_captured_features(scores, features, k, options):
    grams = torch.stack([x @ x.T for x in features])
    dims = [x.shape[1] for x in features]
    steps = loes(grams, Y, 3, k, dims=dims, **options)
    names = scores.frame["layer"].tolist()
    expected = [names[i] for i in sorted(step.layer for step in steps)]
    assert scores.select(k, by="loes", **options) == expected
    assert "12" not in expected


def test_loes_without_labels(features):
    scores = score(measures=["two_nn"], labels="none", subsamples=0)
    grams = torch.stack([x @ x.T for x in features])
    steps = loes(grams, None, None, 3, dims=[x.shape[1] for x in features])
    names = scores.frame["layer"].tolist()
    assert scores.select(3, by="loes") == [names[i] for i in sorted(s.layer for s in steps)]


def test_cka_is_to_the_heads_input_where_a_layer_of_the_head_is_there_too(features):
    scores = score(measures=["cka_to_last"], subsamples=0)
    found = scores.frame["cka_to_last"].tolist()
    expected = [float(cka(x, features[4])) for x in features]
    assert found[:5] == pytest.approx(expected, rel=1e-5) and found[4] == pytest.approx(1)
    assert found[5] < 0.999


def test_options_of_loes_change_the_choice(scores):
    chosen = {tuple(scores.select(2, by="loes", gamma=g, alpha=a)) for g in (0, 9) for a in (0, 5)}
    assert len(chosen) > 1


@pytest.mark.parametrize("by", ["quality", "two_nn", lambda frame: -frame["gbc"]])
@pytest.mark.parametrize("weight", [0.2, 3.0])
def test_redundancy(scores, features, by, weight):
    alike = redundancy(torch.stack([x @ x.T for x in features]))
    values = scores.frame[by] if isinstance(by, str) else by(scores.frame)
    chosen = top_apart(values.to_numpy()[:5], alike, 3, weight)
    names = scores.frame["layer"].tolist()
    assert scores.select(3, by=by, redundancy=weight) == [names[i] for i in sorted(chosen)]


def test_what_does_not_go_with_loes(scores):
    with pytest.raises(ValueError, match="by='loes' has its own weight of redundancy: gamma="):
        scores.select(2, by="loes", redundancy=0.5)
    with pytest.raises(TypeError, match=r"\['gamma'\] are options of by='loes' alone"):
        scores.select(2, gamma=0.5)
    with pytest.raises(ValueError, match="between 1 and the 5 layers to choose from; got 6"):
        scores.select(6, by="loes")


def test_the_first_measure_is_the_default_where_there_is_no_quality(scores):
    assert scores.by == "quality"
    other = score(measures=["gbc", "two_nn"], subsamples=0)
    assert other.by == "gbc" and other.select(2) == other.select(2, by="gbc")
    best = other.frame.loc[other.frame["gbc"].idxmax()]
    assert repr(other) == (
        f"LayerScores(Sequential, 6 layers, n=90, best={best['layer']!r} ({best['gbc']:.3f} gbc))"
    )
    assert list(other.rank()["score"]) == sorted(other.frame["gbc"], reverse=True)


# ---- by class ------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1000, 40])
def test_separation_by_class_has_the_mean_of_separation(features, monkeypatch, most):
    """Of the subset that is kept: all 90 samples, or 39 of them."""
    monkeypatch.setattr(draws, "MOST", most)
    names = torch.tensor([7, -2, 30])  # whose order is not that of the class indices
    scores = score(labels=names[Y], measures=["gbc"], subsamples=0)
    table = scores.per_class()
    assert list(table)[:3] == ["layer", "class", "n"] and len(table) == 6 * 3
    assert set(table["n"]) == {min(most, 90) // 3} and list(table["class"][:3]) == [-2, 7, 30]
    rows = SampleDraws(Y, [30, 30, 30], seed=0).rows
    for name, x in zip(scores.frame["layer"], features, strict=False):
        x, y = x[rows], names[Y][rows]
        own = table[table["layer"] == name].set_index("class")
        expected = separation(x, y, definition="robust").item()
        assert own["separation"].mean() == pytest.approx(expected, abs=2e-6)
        x = torch.nn.functional.normalize(x - x.mean(dim=0))
        cosine = (x @ x.T).fill_diagonal_(torch.nan)
        for c in (-2, 7, 30):
            among = [cosine[y == c][:, y == b].nanmean().item() for b in (-2, 7, 30) if b != c]
            within = cosine[y == c][:, y == c].nanmean().item()
            found = own.loc[c, ["within_cosine", "between_cosine", "separation"]].tolist()
            expected = [within, np.mean(among), within - np.mean(among)]
            assert found == pytest.approx(expected, abs=2e-6)


def test_classes_are_those_of_a_file(scores, tmp_path):
    loaded = LayerScores.load(scores.save(tmp_path / "a"))
    pd.testing.assert_frame_equal(loaded.per_class(), scores.per_class())
    with pytest.raises(ValueError, match="needs labels and kept samples; got labels='none', 90"):
        score(measures=["two_nn"], labels="none", subsamples=0).per_class()
    with pytest.raises(ValueError, match="needs labels and kept samples; got labels='own', 0 s"):
        made().per_class()


# ---- sample sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, "nc1", lambda frame: frame["two_nn"] - frame["gbc"]])
def test_settling_by_scipy(scores, by):
    table = scores.settling(by=by)
    assert list(table["from_samples"]) == [24, 48] and list(table["to_samples"]) == [48, 90]

    def values(source):
        return source[by or "quality"] if not callable(by) else by(source)

    curves = [values({k: v[:, i] for k, v in scores.sweep.items()}) for i in range(2)]
    curves.append(values({k: scores.frame[k].to_numpy() for k in scores.sweep}))
    np.testing.assert_array_equal(scores.swept(by=by), np.transpose(curves))
    expected = [kendalltau(curves[i], curves[i + 1]).statistic for i in range(2)]
    assert list(table["tau"]) == pytest.approx(expected)


def test_settling_counts_pairs():
    scores = made(sweep=[20])
    swept = {"quality": np.array([[1.0], [2.0], [3.0], [9.0]])}  # one of six pairs turned
    scores = LayerScores(scores.frame, scores.draws, scores.how, swept)
    assert list(scores.settling()["tau"]) == pytest.approx([(5 - 1) / 6])


def test_one_sample_size_does_not_settle(scores):
    with pytest.raises(ValueError, match="there is one sample size; score_layers"):
        score(measures=["two_nn"], subsamples=0).settling()
    with pytest.raises(ValueError, match=r"one of \[.*'separation', .*\]; got 'mean_norm'"):
        scores.swept(by="mean_norm")


# ---- files ---------------------------------------------------------------------------------------


def test_everything_is_saved(scores, tmp_path):
    loaded = LayerScores.load(scores.save(tmp_path / "a"))
    pd.testing.assert_frame_equal(loaded.to_frame(), scores.to_frame())
    assert loaded.settings == scores.settings
    for name in ("draws", "sweep"):
        ours, theirs = getattr(scores, name), getattr(loaded, name)
        assert list(ours) == list(theirs)
        assert all(np.array_equal(ours[c], theirs[c]) for c in ours)
    assert loaded.kept.dtype == np.float32 and np.array_equal(loaded.grams, scores.grams)
    pd.testing.assert_frame_equal(loaded.settling(), scores.settling())
    assert loaded.select(3, by="loes") == scores.select(3, by="loes")
    assert loaded.by == scores.by and repr(loaded) == repr(scores)


def test_nan_is_saved(tmp_path):
    scores = score(measures=["power_law_alpha"], subsamples=2, sweep=[12])
    loaded = LayerScores.load(scores.save(tmp_path / "a"))
    assert np.isnan(loaded.frame["power_law_alpha"]).any()  # of layers of few features
    pd.testing.assert_frame_equal(loaded.to_frame(), scores.to_frame())


# ---- pictures ------------------------------------------------------------------------------------


def test_curves_are_on_their_own_ranges(scores):
    ax = scores.plot(measures=["two_nn", "gbc", "quality"], by="gbc", k=2)
    assert ax.get_ylabel() == "score, from its least to its greatest layer"
    assert [text.get_text() for text in ax.get_xticklabels()] == scores.frame["layer"].tolist()
    bounds = {c: (scores.frame[c].min(), scores.frame[c].max()) for c in ("two_nn", "gbc")}
    for line, column in zip(ax.get_lines(), ("two_nn", "gbc"), strict=False):
        low, high = bounds[column]
        expected = (scores.frame[column] - low) / (high - low)
        np.testing.assert_allclose(line.get_ydata(), expected)
        name = column.replace("_", " ")
        assert f"{name} ({low:.3g} to {high:.3g})" in legend_of(ax)
    assert len(ax.collections) == 3  # a band each
    names = scores.frame["layer"].tolist()
    marked = [names[round(middle(p))] for p in ax.patches]
    assert marked == scores.select(2, by="gbc")


def test_bands_are_on_the_curves_range(scores):
    ax = scores.plot(measures=["gbc", "two_nn"], level=0.5)
    low, high = scores.frame["gbc"].min(), scores.frame["gbc"].max()
    draws = scores.draws["gbc"]
    around = draws - draws.mean(axis=1, keepdims=True)
    edges = scores.frame["gbc"].to_numpy() + np.quantile(around, [0.25, 0.75], axis=1)
    edges = (edges - low) / (high - low)
    band = ax.collections[0].get_datalim(ax.transData).intervaly
    assert band == pytest.approx([edges.min(), edges.max()])


def test_many_curves_have_a_panel_and_a_band_each(scores):
    ax = scores.plot(k=2)
    _, *panels = ax.figure.axes
    assert len(scores.draws) == 10 == len(panels) and not ax.get_lines()
    for panel, name in zip(panels, scores.draws, strict=True):
        assert len(panel.get_lines()) == len(panel.collections) == 1 and len(panel.patches) == 2
        np.testing.assert_array_equal(panel.get_lines()[0].get_ydata(), scores.frame[name])
    assert "shaded: selected by quality; bands: 95 %" in panels[0].get_title(loc="left")
    with pytest.raises(ValueError, match=r"one of .*; got 'depths'"):
        scores.plot(measures=["depths"])


def test_quality_alone_keeps_its_axis(scores):
    ax = scores.plot(measures=["quality", "separation"])
    assert ax.get_ylabel() == "score (no unit)"
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), scores.frame["quality"])
    assert legend_of(ax)[1:] == ["quality (Q)", "separation (S)"]


@pytest.mark.parametrize("by", [None, "participation_ratio"])
def test_picture_of_the_sweep(scores, by):
    ax = scores.plot_sweep(by=by)
    assert ax.get_ylabel() == (by or "quality").replace("_", " ")
    assert ax.get_xlabel() == "samples (τ: Kendall's, between the orders of the layers)"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["24", "48", "90"]
    assert ax.get_xscale() == "log" and legend_of(ax) == scores.frame["layer"].tolist()
    for line, curve in zip(ax.get_lines(), scores.swept(by=by), strict=True):
        assert list(line.get_xdata()) == [24, 48, 90]
        np.testing.assert_array_equal(line.get_ydata(), curve)
    taus = [text.get_text() for text in ax.texts]
    assert taus == [f"τ {tau:.2f}" for tau in scores.settling(by=by)["tau"]]
    places = [text.xy[0] for text in ax.texts]
    assert places == pytest.approx([(24 * 48) ** 0.5, (48 * 90) ** 0.5])
    ax.figure.canvas.draw()


def test_picture_of_the_sweep_into_given_axes(scores):
    _, ax = plt.subplots()

    def twice(frame):
        return 2 * frame["gbc"]

    assert scores.plot_sweep(ax, by=twice) is ax
    assert ax.get_ylabel() == "twice" and len(plt.get_fignums()) == 1
