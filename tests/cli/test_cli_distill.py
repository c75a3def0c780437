"""``geomkd distill``: real runs at tiny size."""

import tomllib
from dataclasses import replace
from functools import wraps

import numpy as np
import pandas as pd
import pytest
import torch
from commands import COMMAND, WRITTEN, student_of, summary_of
from small import same

from geomkd import LayerScores, score_layers
from geomkd.cli.main import main

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def stripes(here):
    # A stripe's place is the class: scores disagree on the layers. Validation names the classes
    # wrongly, so what is learned there is lost: the best epoch is not the last.
    rng, y = np.random.default_rng(0), np.arange(80) % 4
    stripe = 200 * (np.arange(8) // 2 == y[:, None])[:, None, :, None]
    x = (stripe + rng.integers(0, 30, (80, 8, 8, 3))).astype(np.uint8)
    np.savez("stripes.npz", x_train=x, y_train=y, x_test=x[:20], y_test=(y[:20] + 1) % 4)
    return [*COMMAND, "--data", "stripes.npz", "--val-split", "test"]


def test_it_writes_what_it_prints(here, stripes, capsys):
    assert main([*stripes, "--k", "2", "--by", "information", "--out", "run"]) == 0
    printed, folder = capsys.readouterr(), here / "run"
    assert printed.err == ""
    names = sorted([*WRITTEN, "layers.csv", "layers.png", "scores.npz"])
    assert sorted(path.name for path in folder.iterdir()) == names
    summary, history = summary_of(folder), pd.read_csv(folder / "history.csv")
    scores = LayerScores.load(folder / "scores.npz")
    assert summary["layers"] == scores.select(2, by="information") != scores.select(2)
    assert all(teacher in printed.out for teacher in summary["layers"])
    assert summary["last_epoch"]["val_accuracy"] == history["val_accuracy"].iloc[-1]
    assert summary["best_validation_epoch"]["val_accuracy"] == history["val_accuracy"].max()
    assert summary["machine"]["torch"] == torch.__version__
    assert "student.pt" in printed.out and printed.out.rstrip().endswith("run")


def test_what_it_tells_in_its_last_lines(here, stripes, capsys):
    options = ["--pairs", "block2:block1", "--epochs", "6", "--lr", "0.05", "--out", "run"]
    assert main([*stripes, *options]) == 0
    out, summary = capsys.readouterr().out, summary_of(here / "run")
    assert "teacher layer  student layer\nblock2         block1\n" in out
    last, best = summary["last_epoch"], summary["best_validation_epoch"]
    val_accuracy = pd.read_csv(here / "run" / "history.csv")["val_accuracy"].to_numpy()
    assert best["epoch"] == 1 + np.argmax(val_accuracy) < last["epoch"] == 6
    assert f"last epoch, 6: training accuracy {last['train_accuracy']:.1%}" in out
    assert f"best validation epoch, {best['epoch']}: {best['val_accuracy']:.1%}" in out
    assert summary["command"].startswith("geomkd distill --teacher tiny_nets:teacher --student")
    assert summary["settings"]["pairs"] == ["block2:block1"] and "layers" not in summary["settings"]


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (["--k", "2"], ["block4", "head.input"]),  # of six blocks and what the head gets
        (["--layers", "auto", "--k", "1"], ["head.input"]),
        (["--layers", "even", "--k", "2"], ["block3", "block6"]),  # of six blocks
        (["--layers", "last", "--k", "2"], ["block5", "block6"]),
        (["--layers", "even", "--k", "2", "--granularity", "stages"], ["block4", "block6"]),
        (["--layers", "relu", "block3"], ["relu", "block3"]),
        (["--pairs", "block2:block1", "head.input:head.input"], ["block2", "head.input"]),
    ],
)
def test_layers_by_place_by_name_and_by_pairs(here, options, layers):
    assert main([*COMMAND, *options, "--epochs", "1", "--out", "run"]) == 0
    assert summary_of(here / "run")["layers"] == layers
    assert not (here / "run" / "scores.npz").exists()


def test_scores_are_not_made_twice(here, monkeypatch):
    command = [*COMMAND, "--by", "quality", "--k", "2", "--out", "run"]
    assert main([*command, "--checkpoint-steps", "0"]) == 2  # found out after scoring
    assert [p.name for p in (here / "run").glob("*.npz")] == ["scores.npz"]
    refuse = wraps(score_layers)(lambda *data, **options: pytest.fail("scored again"))
    monkeypatch.setattr("geomkd.cli.distill.score_layers", refuse)
    assert main([*command, "--resume"]) == 0
    scores = LayerScores.load(here / "run" / "scores.npz")
    assert summary_of(here / "run")["layers"] == scores.select(2)
    assert summary_of(here / "run")["scores"] == scores.settings


@pytest.mark.parametrize(
    ("options", "by"),
    [
        (["--by", "sqrt_si", "--definition", "robust", "--pool", "mean"], "sqrt_si"),
        (["--measures", "fisher_ratio", "isotropy", "--samples", "40"], "fisher_ratio"),
    ],
)
def test_layers_are_scored_as_score_scores_them(here, options, by, capsys):
    options = [*options, "--k", "2"]
    assert main([*COMMAND, *options, "--epochs", "1", "--out", "run"]) == 0
    assert f"layers: the 2 of highest {by}" in capsys.readouterr().out
    score = ["score", "--model", "tiny_nets:teacher", "--data", "images.npz", "--quiet"]
    assert main([*score, *options, "--out", "scores"]) == 0
    ours, theirs = (LayerScores.load(here / name / "scores.npz") for name in ("run", "scores"))
    assert ours.to_frame().equals(theirs.to_frame()) and ours.settings == theirs.settings
    assert summary_of(here / "run")["layers"] == summary_of(here / "scores")["selected"]
    again = ["distill", "--config", "run/config.toml", "--out", "run", "--resume"]
    assert main(again) == 0  # the same options


def test_scores_of_a_file_are_in_place_of_scoring(here, monkeypatch, capsys):
    score = ["score", "--model", "tiny_nets:teacher", "--data", "images.npz", "--quiet"]
    assert main([*score, "--measures", "two_nn", "knowledge_quality", "--out", "scores"]) == 0
    refuse = wraps(score_layers)(lambda *data, **options: pytest.fail("scored again"))
    monkeypatch.setattr("geomkd.cli.distill.score_layers", refuse)
    options = ["--scores", "scores/scores.npz", "--by", "two_nn", "--k", "2", "--epochs", "1"]
    assert main([*COMMAND, *options, "--out", "run"]) == 0
    scores = LayerScores.load(here / "scores" / "scores.npz")
    assert summary_of(here / "run")["layers"] == scores.select(2, by="two_nn")
    assert summary_of(here / "run")["scores"] == scores.settings
    (here / "scores" / "scores.npz").unlink()  # the run has them
    assert main([*COMMAND, *options, "--out", "run", "--resume"]) == 0
    capsys.readouterr()
    assert main([*COMMAND, *options[2:], "--out", "other", "--scores", "run/scores.npz"]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--scores", "nowhere.npz"], "nowhere.npz"),
        (["--scores", "images.npz"], "images.npz does not hold geomkd.LayerScores"),
        (["--scores", "s.npz", "--by", "two_nn"], "--by must be one of separation, information, "),
        (["--scores", "s.npz", "--samples", "9"], "--scores are there already: --samples would"),
        (["--scores", "s.npz", "--pool", "mean"], "--scores are there already: --pool would say"),
        (["--scores", "s.npz", "--layers", "even"], "--scores is about scoring, which --layers"),
        (
            ["--by", "two_nn"],
            "--by must be one of separation, information, efficiency, quality, lo",
        ),
        (["--by", "quality", "--layers", "last"], "--by is about scoring, which --layers auto al"),
        (["--measures", "none"], "measures must be among"),
        (
            ["--scores", "s.npz", "--teacher", "tiny_nets:student"],
            "s.npz has scores of another network: layer 'block3': the model has no module 'block3'",
        ),
        (
            ["--scores", "s.npz", "--teacher", "tiny_nets:wide"],
            "layer 'relu' is (16, 8, 8) in the teacher, (8, 8, 8) there",
        ),
    ],
)
def test_scores_that_are_not_the_teachers(here, scores_file, capsys, options, text):
    assert main([*COMMAND, "--k", "1", *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("geomkd distill: ") and error.count("\n") == 1
    assert not list(here.glob("geomkd-distill*"))


@pytest.fixture
def scores_file(here):
    """Scores of the teacher, and a network whose layers have the same names and other shapes."""
    with open("tiny_nets.py", "a") as file:
        file.write(
            "\ndef wide():\n"
            "    return residual_network(widths=(16, 16, 16), blocks=2, seed=0, channels=3)\n"
        )
    from tiny_nets import teacher

    rng, y = np.random.default_rng(0), torch.arange(40) % 4
    x = torch.from_numpy(rng.random((40, 3, 8, 8), dtype=np.float32))
    score_layers(teacher(), (x, y), subsamples=0, progress=False).save("s.npz")


def test_scores_of_a_file_that_lack_layers(here, scores_file, capsys):
    scores = LayerScores.load("s.npz")
    replace(scores, how=replace(scores.how, partial=True)).save("part.npz")
    assert main([*COMMAND, "--k", "1", "--scores", "part.npz"]) == 2
    assert "part.npz is of a scoring that was interrupted: layers are missing" in (
        capsys.readouterr().err
    )


def test_layers_by_the_papers_sampling(here):
    assert main([*COMMAND, "--k", "2", "--protocol", "paper", "--epochs", "1", "--out", "run"]) == 0
    scores = summary_of(here / "run")["scores"]
    assert (scores["protocol"], scores["entropy_per_class"]) == ("paper", 500)
    assert 'protocol = "paper"' in (here / "run" / "config.toml").read_text()


def test_config_toml_repeats_the_run(here, capsys):
    options = ["--layers", "last", "--k", "2", "--set", "normalize=channel", "distance=huber"]
    assert main([*COMMAND, *options, "--lr", "0.01", "--out", "one"]) == 0
    config = tomllib.loads((here / "one" / "config.toml").read_text())
    assert config["lr"] == 0.01 and config["set"] == ["normalize=channel", "distance=huber"]
    again = ["distill", "--config", "one/config.toml"]
    assert main([*again, "--out", "two"]) == 0
    assert same(student_of(here / "one"), student_of(here / "two"))
    assert summary_of(here / "two")["objective"]["distance"] == "huber"
    assert main([*again, "--seed", "5", "--out", "three"]) == 0  # the command line has the word
    assert not same(student_of(here / "one"), student_of(here / "three"))
    (here / "wrong.toml").write_text("epocs = 3\n")
    assert main([*COMMAND, "--config", "wrong.toml", "--out", "four"]) == 2
    assert "no option 'epocs'; near it are epochs" in capsys.readouterr().err
    assert not (here / "four").exists()


def test_a_folder_that_is_there_needs_resume(here, capsys):
    options = [*COMMAND, "--layers", "last", "--k", "2", "--out", "run"]
    assert main(options) == 0
    # The history holds the seconds of every epoch: another training would have others.
    before = [(here / "run" / name).read_bytes() for name in ("student.pt", "history.csv")]
    assert main(options) == 2
    assert "run is there already: give another --out, or --resume" in capsys.readouterr().err
    assert main([*options, "--resume", "--memory", "1GB"]) == 0  # finished: its result again
    after = [(here / "run" / name).read_bytes() for name in ("student.pt", "history.csv")]
    assert after == before
    for name, there, given in (("lr", "0.0075", "0.5"), ("batch-size", "16", "10")):
        assert main([*options, "--resume", f"--{name}", given]) == 2
        name = name.replace("-", "_")
        text = f"config.toml belongs to another run: {name} is {there} there and {given} here"
        assert text in capsys.readouterr().err


def test_logits_and_cached_features(here):
    assert main([*COMMAND, "--objective", "kd", "--cache", "--out", "kd"]) == 0
    assert summary_of(here / "kd")["pairs"] == []
    assert list((here / "kd" / "cache").glob("*/logits-00000.npy"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--objective", "fkd"], "argument --objective: invalid choice: 'fkd'"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--set", "distance=l7"], "distance must be one of ('mse', 'cosine', 'huber'); got 'l7'"),
        (["--set", "colour=red"], "'features' has normalize, pairing, projector, distance"),
        (["--layers", "block9"], "layer 'block9'"),
        (["--k", "3"], "got 3 teacher layers for the 2 layers of the student"),
        (["--pairs", "block2"], "--pairs takes TEACHER_LAYER:STUDENT_LAYER; got 'block2'"),
        (["--layers", "last", "--pairs", "block2:block1"], "exclude each other"),
        (["--pairs", "block2:block1", "--granularity", "stages"], "and pairs name them"),
        (["--protocol", "paper", "--samples", "40", "--k", "1"], "'paper' and samples=40 contrad"),
        (["--protocol", "paper", "--layers", "even"], "which --layers auto alone does"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--resume"], "--resume needs --out"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--teacher", "nowhere"], "--teacher must be torchvision:NAME, timm:NAME, hf:"),
        (["--val-data", "nowhere.npz"], "nowhere.npz"),
        (["--image-size", "4"], "--image-size is for folders of images"),
        (["--layers", "last", "--k", "1", "--device", "nowhere"], "device string: nowhere"),
        (["--student", "torchvision:resnet18", "--mean", "0"], "give mean and std together"),
        (["--layers", "last", "--k", "1", "--lr", "1e30"], "became NaN or infinite"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(here, capsys, options, text):
    assert main([*COMMAND, *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("geomkd distill: ") and error.count("\n") == 1
    assert not list(here.glob("geomkd-distill*"))


def test_what_is_missing_is_named(here, capsys):
    for name, command in (("data", COMMAND[:5]), ("student", ["distill", "--objective", "ce"])):
        assert main(command) == 2
        assert f"--{name} is needed" in capsys.readouterr().err
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("geomkd: ")


def test_a_folder_of_something_else_is_left_alone(here, capsys):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("...")
    assert main([*COMMAND, "--out", "mine", "--resume"]) == 2
    assert "is no folder of a run: it has no config.toml" in capsys.readouterr().err
    assert [path.name for path in (here / "mine").iterdir()] == ["thesis.txt"]
