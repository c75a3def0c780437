import html
import json

import numpy as np
import pandas as pd
import pytest
import torch
from processes import ended, start

from geomkd import LayerScores, quickstart
from geomkd.cli.main import main
from geomkd.datasets import Split
from geomkd.scoring.ranking import SETTLED
from geomkd.scoring.score_layers import _Job


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x, y_train=np.arange(40) % 4)
    return str(tmp_path / "images.npz")


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_score_writes_what_it_prints(images, tmp_path, capsys):
    out = tmp_path / "found"
    command = ["score", "--model", "torchvision:resnet18", "--data", images, "--out", str(out)]
    assert main([*command, "--subsamples", "5", "--by", "separation", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "images: scaled to [0, 1]" in printed.out and "random, seed 0" in printed.out
    table = pd.read_csv(out / "layers.csv")
    assert len(table) == 10 and all(name in printed.out for name in table["layer"])
    assert len(pd.read_csv(out / "ranks.csv")) == 10
    assert is_png(out / "layers.png")
    scores = LayerScores.load(out / "scores.npz")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["selected"] == scores.select(4, by="separation")
    assert summary["machine"]["torch"] == torch.__version__
    known = {key: scores.settings[key] for key in scores.settings if key != "subset_classes"}
    assert summary["settings"] == known


@pytest.mark.filterwarnings("ignore:the order of the layers has not settled")
def test_score_by_other_measures_and_sizes(images, tmp_path, capsys):
    out = tmp_path / "found"
    command = ["score", "--model", "torchvision:resnet18", "--data", images, "--out", str(out)]
    command += ["--measures", "fisher_ratio", "isotropy", "--sweep", "10", "--subsamples", "2"]
    assert main([*command, "--by", "loes", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "sweep.png" in said and is_png(out / "sweep.png")
    scores = LayerScores.load(out / "scores.npz")
    assert list(scores.draws) == ["fisher_ratio", "isotropy"]
    unsettled = scores.settling(by="fisher_ratio")["tau"].iloc[-1] < SETTLED
    assert ("note: the order of the layers has not settled" in said) == unsettled
    selected = json.loads((out / "summary.json").read_text())["selected"]
    assert selected == scores.select(4, by="loes")
    assert main([*command, "--by", "quality", "--quiet"]) == 2
    assert "--by must be one of fisher_ratio, isotropy, loes" in capsys.readouterr().err


def test_without_half_samples_ranks_are_open(images, tmp_path, capsys):
    command = ["score", "--model", "torchvision:resnet18", "--data", images, "--quiet"]
    command += ["--out", str(tmp_path / "o"), "--subsamples", "0", "--k", "99"]
    assert main(command) == 0
    selected = json.loads((tmp_path / "o" / "summary.json").read_text())["selected"]
    assert len(selected) == 10 and "nan" not in capsys.readouterr().out.lower()


def test_score_writes_a_page(images, tmp_path, capsys):
    with np.load(images) as old:
        x, y = old["x_train"], old["y_train"]
    x[:3] = 0
    np.savez(images, x_train=x, y_train=y)
    command = ["score", "--model", "torchvision:resnet18", "--data", images, "--quiet", "--report"]
    command += ["--out", str(tmp_path / "o"), "--layers", "relu", "layer1.0", "fc.input"]
    command += ["--subsamples", "2", "--k", "1", "--by", "sqrt_si", "--measures"]
    assert main([*command, "knowledge_quality", "two_nn"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "report.html" in printed.out.splitlines()[-1]
    text = (tmp_path / "o" / "report.html").read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>") and "of highest sqrt si" in text
    for said in ("images: scaled to", "random, seed 0", torch.__version__):
        assert said.removeprefix("images: ") in text
    notes = [line[6:] for line in printed.out.splitlines() if line.startswith("note: ")]
    few, *rows = sorted(notes)
    assert few.startswith("a class has fewer than 25 samples")
    assert rows and all("3 of 40" in note or "2 of 40" in note for note in rows)
    assert all(html.escape(note) in text for note in notes)
    assert text.count("a class has fewer than 25 samples") == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "resnet18"], "--model must be torchvision:NAME"),
        (["--model", "torchvision:resnet18", "--layers", "layer9"], "layer 'layer9'"),
        (["--model", "torchvision:resnet18", "--memory", "1KB"], "memory must be at least"),
        (["--model", "torchvision:resnet18", "--mean", "1", "2"], "mean"),
        (["--model", "torchvision:resnet18", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["--model", "torchvision:vit_b_32"], "does not take these images, of shape (3, 32, 32)"),
        (["--model", "torchvision:resnet18", "--image-size", "8"], "is for folders of images"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(images, tmp_path, monkeypatch, capsys, options, text):
    monkeypatch.chdir(tmp_path)
    assert main(["score", "--data", images, "--quiet", *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("geomkd score: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("geomkd-scores*"))


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("geomkd.quickstart.quickstart", interrupt)
    assert main(["quickstart"]) == 130
    assert capsys.readouterr().err == "geomkd quickstart: interrupted\n"


@pytest.fixture
def short(monkeypatch):
    few = Split(*(part[:100] for part in quickstart.digits()))
    monkeypatch.setattr(quickstart, "digits", lambda seed: few)
    monkeypatch.setattr(quickstart, "TEACHER_EPOCHS", 1)
    monkeypatch.setattr(quickstart, "PER_CLASS", 4)
    monkeypatch.setattr(quickstart, "TEACHER", {"widths": (4, 8, 8), "blocks": 3})


@pytest.mark.usefixtures("short")
def test_quickstart_writes_a_new_folder_each_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert main(["quickstart", "--epochs", "1", "--seeds", str(number), "--quiet"]) == 0
        assert f"to geomkd-quickstart-{number}" in capsys.readouterr().out
    first, second = (tmp_path / f"geomkd-quickstart-{number}" for number in (1, 2))
    names = ["layers.csv", "layers.png", "summary.json", "training.png"]
    assert sorted(path.name for path in first.iterdir()) == names
    assert is_png(first / "layers.png") and is_png(first / "training.png")
    table = pd.read_csv(first / "layers.csv")
    assert len(table) >= 8 and table["rank"].min() == 1
    once, twice = (json.loads((f / "summary.json").read_text()) for f in (first, second))
    accuracy = "test_accuracy_last_epoch"
    assert list(once[accuracy]) == list(quickstart.METHODS)
    for method, found in twice[accuracy].items():
        assert found["all"][0] == once[accuracy][method]["all"][0]  # the same seed, the same number
        assert found["mean"] == pytest.approx(np.mean(found["all"]))
        assert found["sd"] == pytest.approx(np.std(found["all"], ddof=1))
    assert once[accuracy]["ce"]["sd"] is None
    assert once["teacher_test_accuracy"] == twice["teacher_test_accuracy"]
    assert pd.read_csv(second / "layers.csv").equals(table)


def test_quickstart_keeps_a_folder_that_is_there(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["quickstart", "--out", str(tmp_path / "mine")]) == 2
    assert "mine is there already; results go into a new folder" in capsys.readouterr().err


def test_score_refuses_a_folder_that_is_there_before_it_loads_anything(tmp_path, capsys):
    command = ["score", "--model", "torchvision:none", "--data", "none", "--out", str(tmp_path)]
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("is there already; results go into a new folder\n")


def test_console_script_and_module_agree(tmp_path):
    assert ended(start("geomkd", ["--version"], output=tmp_path / "said")) == [0]
    assert (tmp_path / "said").read_text().startswith("geomkd 0.1.0")


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C after two layers."""
    row, done = _Job._row, []

    def stopped(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return row(*given)

    monkeypatch.setattr(_Job, "_row", stopped)


def test_an_interrupted_score_is_written_and_ends_with_130(images, tmp_path, capsys, interrupted):
    command = ["score", "--model", "torchvision:resnet18", "--data", images, "--quiet"]
    assert main([*command, "--k", "2", "--subsamples", "2", "--out", str(tmp_path / "o")]) == 130
    assert LayerScores.load(tmp_path / "o" / "scores.npz").settings["partial"]


def test_score_makes_its_folder_before_it_scores(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    command = ["score", "--model", "torchvision:resnet18", "--data", images, "--quiet", "--out"]
    monkeypatch.setattr(_Job, "_row", None)  # no layer is scored
    assert main([*command, str(tmp_path / "file" / "o")]) == 2
    assert main([*command, str(tmp_path / "o"), "--memory", "1"]) == 2
    assert not (tmp_path / "o").exists()  # nothing came into it
