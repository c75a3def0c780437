"""The page of a report: what it says, that it stands alone, and that nothing said can break it."""

import re
import warnings
from collections import OrderedDict
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from pages import NASTY, Read, many, scored, trained
from scored import jumping, made, measured, swept
from small import blobs, run_mlp
from torch import nn

from geomkd import score_layers
from geomkd.common import files
from geomkd.measures.table import TABLE
from geomkd.report import page
from geomkd.report.pages import meaning
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.ranking import sqrt_si


def written(contents, folder, **options):
    path = folder / "page.html"
    assert page(contents, path, **options) == path
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Every measure of 18 layers."""
    return written(many(), tmp_path_factory.mktemp("large"))


# ---- one file ------------------------------------------------------------------------------------


def test_every_measure_of_resnet34_stays_small(large):
    assert len(large.encode()) < 1_000_000


def test_nothing_is_fetched(large):
    read = Read(large)
    policy = read.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][1]["content"]
    assert policy.startswith("default-src 'none'")
    for tag, attributes, _ in read.elements:
        assert "src" not in attributes and tag not in ("iframe", "object", "embed", "base")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert not re.search(r"https?:|@import|url\((?!#)", large)


def test_ids_are_unique_and_references_resolve(large):
    read = Read(large)
    ids = [attributes["id"] for _, attributes, _ in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 500
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', large)) <= set(ids)


def test_the_script_is_short(large):
    (script,) = Read(large).all("script")
    assert len(script[2].strip().splitlines()) < 100
    assert not re.search("innerHTML|eval|fetch|XMLHttp|import ", script[2])


def test_style_decides_every_colour(large, tmp_path):
    several = written({"a": scored(["a"]), "b": scored(["b"]), "c": trained()}, tmp_path)
    for text in (large, several):
        style, drawn = Read(text).texts("style")[0], text[text.index("<body") :]
        used = set(re.findall(r"var\((--c-[0-9a-f]{6})\)", drawn))
        assert len(used) > 5
        for place in (style, style[style.index("prefers-color-scheme: dark") :]):
            assert used <= set(re.findall(r"(--c-[0-9a-f]{6}):", place))
        assert not re.search(r"(fill|stroke|color): ?#", drawn)


def test_pictures_do_not_depend_on_the_style_of_the_session(tmp_path):
    plain = written(made(), tmp_path)
    with matplotlib.style.context(["dark_background", {"font.size": 30}]):
        assert written(made(), tmp_path) == plain


def test_an_older_page_is_replaced_or_left_whole(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("older")

    def full(file):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        made().to_html(path)
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    assert made().to_html(path) == path and path.read_text().startswith("<!DOCTYPE html>")


# ---- names ---------------------------------------------------------------------------------------


def test_names_are_text(tmp_path):
    scores = scored([NASTY, "b$", "c"], model=NASTY)
    given = {"about": {NASTY: NASTY}, "notes": [NASTY]}
    read = Read(written({NASTY: scores, "plain": scores}, tmp_path, **given))
    assert len(read.all("script")) == 1 and "alert" not in read.texts("script")[0]
    for tag in ("h1", "h2", "li", "dt", "dd", "th", "td", "title"):
        said = NASTY.replace("_", " ") if tag == "dt" else NASTY
        assert any(said in text for text in read.texts(tag)), tag
    assert any(text.startswith(f"{NASTY}: quality") for text in read.texts("title"))


def test_names_in_letters_that_matplotlib_lacks(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "層一" in written(scored(["層一", "層二"]), tmp_path)


def test_long_names_are_whole(tmp_path):
    name = "model." + "encoder." * 12 + "output"
    read = Read(written(scored([name, "b"]), tmp_path))
    assert [th for th in read.texts("th") if th == name]


def test_how_they_were_made_is_told_in_words(tmp_path):
    scores = replace(scored(["a", "b"], samples_per_class=[9, 30]), made="1 May, torch 2.0")
    read = Read(written(scores, tmp_path))
    told = dict(zip(read.texts("dt"), read.texts("dd"), strict=True))
    wanted = {"center": "yes", "partial": "no", "protocol": "–", "sweep": "–", "null": "0"}
    wanted |= {"samples per class": "9 to 30", "dataset size": "60", "made": "1 May, torch 2.0"}
    assert wanted.items() <= told.items()


# ---- curves --------------------------------------------------------------------------------------


def test_points_lie_on_what_is_drawn_and_tell_the_scores(large):
    """Where matplotlib drew its marks; values and spreads as they were given."""
    scores = many()
    frame = scores.to_frame().set_index("layer")
    for figure in re.findall(r"<figure>.*?</figure>", large, flags=re.S):
        curves = re.findall(r'<g class="curve".*?</g>', figure, flags=re.S)
        points = [
            (float(x), float(y), told)
            for x, y, told in re.findall(
                r'cx="(\S+)" cy="(\S+)" r="7"><title>(.*?)</title>', figure
            )
        ]
        clipped = re.findall(r'<g clip-path="[^"]+">\s*((?:<use [^>]+>\s*)+)</g>', figure)
        marks = re.findall(r'<use href="\S+" x="(\S+)" y="(\S+)"', "".join(clipped))
        drawn = np.array([mark for mark in marks if mark[0] != "0"], float)  # others: of bands
        assert len(points) == 18 * len(curves) == len(drawn)
        assert np.allclose(np.array([p[:2] for p in points]), drawn, atol=0.06)
        for _, _, told in points:
            layer, name, value, low, high = re.fullmatch(
                r"(\S+): (\D+|nc.*?) (?:\(.\) )?(\S+), spread (\S+) to (\S+)", told
            ).groups()
            column = re.sub(r" \(.\)$", "", name).replace(" ", "_")
            assert float(value) == pytest.approx(frame.loc[layer, column], rel=1e-3)
            assert float(low) < float(high)
    ranks = scores.rank().set_index("layer")
    row = ranks.loc["layer2.1"]
    told = "layer2.1: quality (Q) {:.4g}, spread {:.4g} to {:.4g}"
    assert told.format(row["score"], row["low"], row["high"]) in large


def test_every_score_has_a_curve(large):
    names = [g[1]["aria-label"] for g in Read(large).all("g", **{"class": "curve"})]
    expected = [c.replace("_", " ") for c in many().draws]
    assert [re.sub(r" \(.\)$", "", name) for name in names] == expected


def test_a_score_that_is_missing_has_no_point(tmp_path):
    scores = made(quality=[1.0, np.nan, 2.0, 3.0])
    read = Read(written(scores, tmp_path))
    told = [text for text in read.texts("title") if "quality" in text]
    assert len(told) == 3 and not any("nan" in text for text in told)
    assert "spread" not in told[0]  # without half-samples
    assert "Ranks" not in read.texts("h2")
    assert "not every layer has a score by quality: there are no ranks" in read.texts("li")


# ---- ranks, tables, words ------------------------------------------------------------------------


def cells(text, title):
    part = text[text.index(f">{title}</h") :]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", part[: part.index("</table>")], flags=re.S)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


def test_ranks_and_scores_are_told(tmp_path):
    text = written(made(jumping()), tmp_path)
    head, *rows = cells(text, "Ranks")
    assert head == ["layer", "rank", "best", "worst", "score", "low", "high", "tied with"]
    assert rows[1][:5] == ["block", "2", "2", "3", "3"] and rows[1][-1] == "3"
    head, *rows = cells(text, "Every score")
    assert head[:6] == ["layer", "selected", "depth", "kind", "shape", "dim"]
    assert rows[0][:6] == ["stem", "yes", "0", "map", "8 × 4 × 4", "128"]
    assert rows[3][1] == ""  # behind the head's input
    assert "2 of 4 layers are tied: their order is open" in Read(text).texts("li")


@pytest.mark.parametrize(
    ("by", "why"),
    [
        (None, "of highest quality, among"),
        ("separation", "of highest separation, among"),
        (sqrt_si, "of highest sqrt si, among"),
        ("loes", "chosen together by LOES, among"),
    ],
)
def test_selected_layers_and_why(by, why, tmp_path):
    scores = measured()
    text = written(scores, tmp_path, by=by, k=1)
    said = dict(zip(*(Read(text).texts(tag) for tag in ("dt", "dd")), strict=True))
    assert said["why"] == f"{why} the layers up to the head's input"
    assert [said["selected"]] == scores.select(1, by=by)


def test_of_layers_behind_the_head_none_is_selected(tmp_path):
    scores = made()
    scores.frame["role"] = "head"
    said = Read(written(scores, tmp_path))
    assert "–" in said.texts("dd")


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        (made(), "a class has fewer than 25 samples: the smallest of 4 has 15; scores move"),
        (made(partial=True), "scoring was interrupted: layers are missing"),
        (
            swept([1, 2, 3, 4], [4, 3, 2, 1]),
            "the order of the layers has not settled: from 30 to 60 samples",
        ),
        (made(quality=[1.0, 2.0, 2.0, 3.0]), "2 of 4 layers are tied"),
    ],
)
def test_warnings(scores, text, tmp_path):
    assert [w for w in Read(written(scores, tmp_path)).texts("li") if w.startswith(text)]


def test_enough_samples_are_not_warned_of(large):
    assert not [w for w in Read(large).texts("li") if "fewer" in w or "settled" in w]


def test_what_is_noted_is_said_once(tmp_path):
    few = "a class has fewer than 25 samples: the smallest of 4 has 15; scores move with that "
    notes = [f"{few}number, and layers change places: the data have no more", "1 row is zero"]
    items = Read(written(made(), tmp_path, notes=notes)).texts("li")
    assert items[:2] == notes and not [w for w in items[2:] if "fewer" in w]


def test_what_every_score_means_comes_from_its_documentation():
    lines = {c: meaning(c) for row in TABLE.values() for c in row.columns_given}
    assert all(20 < len(line) < 110 and line.endswith(".") for line in lines.values())
    assert len(set(lines.values())) == len(lines)
    assert lines["quality"] == "Knowledge quality of one layer's features: Q = S + sqrt(I E)."
    assert lines["nc2_angles"].startswith("Unequal angles")
    assert meaning("probe") == meaning("table") == "A function of the caller's own."


def test_how_the_scores_were_made_is_told(tmp_path):
    text = written(made(), tmp_path, about={"images": "40 of mine"})
    said = dict(zip(*(Read(text).texts(tag) for tag in ("dt", "dd")), strict=True))
    assert said["samples per class"] == "15" and said["definition"] == "published"
    assert said["images"] == "40 of mine" and "subset classes" not in said
    assert "No score, Q included, picked better layers" in text


def test_permuted_labels_have_tables(tmp_path):
    scores = made()
    scores.frame["quality_p_value"] = [0.05, 0.1, 0.2, 1.0]
    head, *rows = cells(written(scores, tmp_path), "Permuted labels: p value")
    assert head == ["layer", "quality"] and rows[0] == ["stem", "0.05"]


# ---- several, and distillations ------------------------------------------------------------------


def test_a_distillation(tmp_path):
    result = trained()
    assert result.to_html(tmp_path / "page.html") == tmp_path / "page.html"
    text = (tmp_path / "page.html").read_text("utf-8")
    read = Read(text)
    said = dict(zip(*(read.texts(tag) for tag in ("dt", "dd")), strict=True))
    assert said["val accuracy"] == f"{result.accuracy:.4g}" and said["objective"] == "features"
    assert said["pairs of layers"] == ", ".join(f"{a} → {b}" for a, b in result.pairs)
    loss = result.history["loss"][1]
    assert f"epoch 2: loss {loss:.4g}" in read.texts("title")
    assert [row[0] for row in cells(text, "Every epoch")] == ["epoch", "1", "2", "3"]
    assert "Warnings" not in [ul[1].get("aria-label") for ul in read.all("ul")]


def test_without_validation_data_it_is_said_what_the_accuracy_is_of(tmp_path):
    items = Read(written(run_mlp(epochs=1), tmp_path)).texts("li")
    assert "no validation data: the accuracy is of the images trained on" in items


def test_several_stand_side_by_side(tmp_path):
    contents = {"one": scored(["a", "b"]), "other": made(jumping()), "student": trained()}
    text = written(contents, tmp_path)
    read = Read(text)
    assert read.texts("h1") == ["one, other, student"]
    titles = [*contents, "Side by side", "What the evidence advises", "How to read this page"]
    assert sorted(read.texts("h2")) == sorted(titles)
    head, *rows = cells(text, "Side by side")
    assert [row[0] for row in rows] == list(contents)
    assert rows[1][head.index("best layer")] == "fc.act" and rows[1][head.index("epochs")] == "–"
    ids = [attributes["id"] for _, attributes, _ in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_networks_are_compared_by_the_score_that_they_share(tmp_path):
    one, other = scored(["a", "b", "c"]), scored(["d", "e"], seed=1, pool="mean")
    read = Read(written({"one": one, "other": other}, tmp_path))
    first = read.all("g", **{"class": "curve"})[:2]
    assert [curve[1]["aria-label"] for curve in first] == ["one", "other"]
    values, band = other.curve("quality")
    told = "e: other {:.4g}, spread {:.4g} to {:.4g}".format(values[1], *band[1])
    assert told in read.texts("title")
    assert "the scores differ in pool: flatten, mean" in read.texts("li")


def test_networks_are_compared_by_one_score_or_not_at_all(tmp_path):
    contents = {"one": scored(["a", "b"]), "other": scored(["a", "b"], ["two_nn"])}
    curves = Read(written(contents, tmp_path)).all("g", **{"class": "curve"})
    assert curves[0][1]["aria-label"] == "separation (S)"
    contents = {"one": measured(), "other": measured()}
    compared = Read(written(contents, tmp_path, by="loes", k=1))
    assert compared.all("g", **{"class": "curve"})[0][1]["aria-label"] == "one"


def test_a_run_that_a_callback_ended(tmp_path):
    result = run_mlp(epochs=3, val=blobs(20), callbacks=[lambda row: True])
    assert "a callback ended the run before its last epoch" in Read(
        written(result, tmp_path)
    ).texts("li")


@pytest.mark.parametrize("contents", [pd.DataFrame(), {"a": 1}])
def test_of_anything_else_there_is_no_page(contents, tmp_path):
    with pytest.raises(TypeError, match="a page is of LayerScores and DistillationResult; got"):
        page(contents, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="by= must be a function or one of"):
        made().to_html(tmp_path / "page.html", by="beauty")


def test_what_was_warned_of_while_scoring_is_on_the_page(tmp_path):
    x, y = blobs(90)
    x[:5] = 0
    model = nn.Sequential(OrderedDict(act=nn.ReLU(), head=nn.Linear(6, 3)))
    with pytest.warns(UserWarning, match="5 of 90 feature rows are zero"):
        scores = score_layers(model, (x, y), ["act"], subsamples=5, progress=False)
    scores.save(tmp_path / "scores.npz")
    for told in (scores, LayerScores.load(tmp_path / "scores.npz")):
        items = Read(written(told, tmp_path)).texts("li")
        assert [item for item in items if "layer 'act': 5 of 90 feature rows are zero" in item]
    text = written({"a": scores, "b": made()}, tmp_path)
    assert "feature rows are zero" in text


def test_names_of_a_page_may_be_epochs_and_none_is_refused(tmp_path):
    headings = Read(written({10: made(), 20: made()}, tmp_path)).texts("h2")
    assert [text for text in headings if text in ("10", "20")] == ["10", "20"]
    with pytest.raises(ValueError, match="got none of them"):
        written({}, tmp_path)
