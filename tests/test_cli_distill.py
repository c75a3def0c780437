"""``geomkd distill``: real runs at tiny size."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import pandas as pd
import pytest
import torch
from small import same

from geomkd import LayerScores
from geomkd.cli import main

NETWORKS = """
from geomkd.quickstart import residual_network

def teacher():
    return residual_network(widths=(8, 16, 16), blocks=1, seed=0, channels=3, classes=4)

def student():
    return residual_network(widths=(4, 8), blocks=1, seed=1, channels=3, classes=4)
"""
COMMAND = ["distill", "--teacher", "tiny_nets:teacher", "--student", "tiny_nets:student"]
COMMAND += ["--data", "images.npz", "--epochs", "2", "--batch-size", "16", "--quiet"]
WRITTEN = ["checkpoints", "config.toml", "history.csv", "student.pt", "summary.json"]
WRITTEN += ["training.png"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny_nets.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_nets", raising=False)
    rng, y = np.random.default_rng(0), np.arange(80) % 4
    x = rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)
    np.savez("images.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return tmp_path


def student_of(folder):
    return torch.load(folder / "student.pt", weights_only=True)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_it_writes_what_it_prints(here, capsys):
    options = ["--val-split", "test", "--k", "2", "--by", "separation", "--out", "run"]
    assert main([*COMMAND, *options]) == 0
    printed, folder = capsys.readouterr(), here / "run"
    assert printed.err == ""
    names = sorted([*WRITTEN, "layers.csv", "layers.png", "scores.npz"])
    assert sorted(path.name for path in folder.iterdir()) == names
    summary, history = summary_of(folder), pd.read_csv(folder / "history.csv")
    assert summary["layers"] == LayerScores.load(folder / "scores.npz").select(2, by="separation")
    assert all(teacher in printed.out for teacher in summary["layers"])
    assert summary["last_epoch"]["val_accuracy"] == history["val_accuracy"].iloc[-1]
    assert summary["best_validation_epoch"]["val_accuracy"] == history["val_accuracy"].max()
    assert summary["machine"]["torch"] == torch.__version__
    assert "student.pt" in printed.out and printed.out.rstrip().endswith("run")


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (["--layers", "even", "--k", "3"], ["block1", "block2", "block3"]),
        (["--layers", "last", "--k", "2"], ["block2", "block3"]),
        (["--layers", "relu", "block3"], ["relu", "block3"]),
        (["--pairs", "block2:block1", "head.input:head.input"], ["block2", "head.input"]),
    ],
)
def test_layers_by_place_by_name_and_by_pairs(here, capsys, options, layers):
    if "3" in options:  # the student has two blocks
        assert main([*COMMAND, *options, "--out", "run"]) == 2
        assert "got 3 teacher layers for the 2 layers" in capsys.readouterr().err
        return
    assert main([*COMMAND, *options, "--out", "run"]) == 0
    assert summary_of(here / "run")["layers"] == layers
    assert not (here / "run" / "scores.npz").exists()


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
    before = (here / "run" / "student.pt").read_bytes()
    assert main(options) == 2
    assert "run is there already: give another --out, or --resume" in capsys.readouterr().err
    assert main([*options, "--resume"]) == 0  # finished: its result again
    assert (here / "run" / "student.pt").read_bytes() == before
    assert main([*options, "--resume", "--lr", "0.5"]) == 2
    assert "another run: lr is 0.0075 there and 0.5 here" in capsys.readouterr().err


def test_logits_and_cached_features(here):
    assert main([*COMMAND, "--objective", "kd", "--cache", "--out", "kd"]) == 0
    assert summary_of(here / "kd")["pairs"] == []
    assert list((here / "kd" / "cache").glob("*/logits-00000.npy"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--objective", "fkd"], "objective"),
        (["--set", "distance=l7"], "distance must be 'mse' or 'cosine' or 'huber'; got 'l7'"),
        (["--set", "colour=red"], "colour"),
        (["--layers", "block9"], "block9"),
        (["--pairs", "block2"], "block2"),
        (["--layers", "last", "--pairs", "block2:block1"], "exclude each other"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--resume"], "--resume needs --out"),
        (["--teacher", "nowhere"], "torchvision:NAME or package.module:factory; got 'nowhere'"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(here, capsys, options, text):
    try:
        code = main([*COMMAND, *options])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and text in capsys.readouterr().err
    assert not list(here.glob("geomkd-distill*"))


def start(*options, processes=1):
    run = ["-m", "geomkd"]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        run += ["-m", "geomkd"]
    command = [sys.executable, *run, *COMMAND, "--layers", "last", "--k", "2", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


@pytest.mark.slow
def test_killed_and_resumed(here):
    options = ["--epochs", "60", "--checkpoint-steps", "1", "--out"]
    process = start(*options, "killed")
    checkpoints = here / "killed" / "checkpoints"
    while process.poll() is None and not len(list(checkpoints.glob("step-*"))) > 1:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (here / "killed" / "student.pt").exists()
    for folder, more in (("killed", ["--resume"]), ("whole", [])):
        process = start(*options, folder, *more)
        out = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert same(student_of(here / "killed"), student_of(here / "whole"))


@pytest.mark.slow
def test_two_processes_make_one_folder(here):
    process = start("--out", "two", processes=2)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count("wrote student.pt") == 1
    assert sorted(p.name for p in (here / "two").iterdir()) == sorted(WRITTEN)
    assert summary_of(here / "two")["processes"] == 2
