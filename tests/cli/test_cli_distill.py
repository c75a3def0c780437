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
from torchvision.models import resnet18, squeezenet1_1

from geomkd import LayerScores
from geomkd.cli.config import as_toml
from geomkd.cli.inputs import load_inputs
from geomkd.cli.main import main
from geomkd.cli.objective import objective_of
from geomkd.cli.parser import parsed
from geomkd.cli.processes import own_device
from geomkd.distillation.rivals import OBJECTIVES

NETWORKS = """
import os
from geomkd.quickstart import residual_network

def teacher():
    return residual_network(widths=(8, 16, 16), blocks=2, seed=0, channels=3, classes=4)

def student():
    return residual_network(widths=(4, 8), blocks=1, seed=1, channels=3, classes=4)

def not_made_in_the_second():
    if os.environ.get("RANK") == "1":
        raise ValueError("no network here")
    return student()

def fails_in_the_second():
    def fail(module, inputs):
        if module.training and os.environ.get("RANK") == "1":
            raise OSError("the disk is gone")
    network = student()
    network.register_forward_pre_hook(fail)
    return network
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


@pytest.fixture
def stripes(here):
    # A stripe's place is the class: scores disagree on the layers. Validation names the classes
    # wrongly, so what is learned there is lost: the best epoch is not the last.
    rng, y = np.random.default_rng(0), np.arange(80) % 4
    stripe = 200 * (np.arange(8) // 2 == y[:, None])[:, None, :, None]
    x = (stripe + rng.integers(0, 30, (80, 8, 8, 3))).astype(np.uint8)
    np.savez("stripes.npz", x_train=x, y_train=y, x_test=x[:20], y_test=(y[:20] + 1) % 4)
    return [*COMMAND, "--data", "stripes.npz", "--val-split", "test"]


def student_of(folder):
    return torch.load(folder / "student.pt", weights_only=True)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


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
        (["--layers", "even", "--k", "2"], ["block3", "block6"]),  # of six blocks
        (["--layers", "last", "--k", "2"], ["block5", "block6"]),
        (["--layers", "relu", "block3"], ["relu", "block3"]),
        (["--pairs", "block2:block1", "head.input:head.input"], ["block2", "head.input"]),
    ],
)
def test_layers_by_place_by_name_and_by_pairs(here, options, layers):
    assert main([*COMMAND, *options, "--epochs", "1", "--out", "run"]) == 0
    assert summary_of(here / "run")["layers"] == layers
    assert not (here / "run" / "scores.npz").exists()


def test_scores_are_not_made_twice(here, monkeypatch):
    command = [*COMMAND, "--k", "2", "--out", "run"]
    assert main([*command, "--checkpoint-steps", "0"]) == 2  # found out after scoring
    assert [p.name for p in (here / "run").glob("*.npz")] == ["scores.npz"]
    monkeypatch.delattr("geomkd.cli.layers.score_layers")
    assert main([*command, "--resume"]) == 0
    scores = LayerScores.load(here / "run" / "scores.npz")
    assert summary_of(here / "run")["layers"] == scores.select(2)
    assert summary_of(here / "run")["scores"] == scores.settings


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
    for name, there, given in (("lr", "0.0075", "0.5"), ("samples", "5000", "10")):
        assert main([*options, "--resume", f"--{name}", given]) == 2
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
        (["--set", "distance=l7"], "distance must be 'mse' or 'cosine' or 'huber'; got 'l7'"),
        (["--set", "colour=red"], "'features' has normalize, pairing, projector, distance"),
        (["--layers", "block9"], "layer 'block9'"),
        (["--k", "3"], "got 3 teacher layers for the 2 layers of the student"),
        (["--pairs", "block2"], "--pairs takes TEACHER_LAYER:STUDENT_LAYER; got 'block2'"),
        (["--layers", "last", "--pairs", "block2:block1"], "exclude each other"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--resume"], "--resume needs --out"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--teacher", "nowhere"], "--teacher must be torchvision:NAME or package.module:factory"),
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


# ---- what the options name -----------------------------------------------------------------------


def inputs_of(*options, needs_teacher=True):
    arguments = ["distill", "--data", "images.npz", *options]
    return load_inputs(parsed(arguments, distill=None), needs_teacher=needs_teacher)


def test_networks_without_weights_have_the_classes_of_the_data(here):
    torch.save(resnet18(num_classes=7).state_dict(), "seven.pth")
    names = ["--teacher", "torchvision:resnet18", "--student", "torchvision:resnet18"]
    found = inputs_of(*names, "--teacher-weights", "seven.pth")
    assert found.n_classes == found.student.model.fc.out_features == 4
    assert found.teacher.model.fc.out_features == 7
    assert found.teacher.story.endswith("weights " + str(here / "seven.pth"))
    untrained = inputs_of(*names)
    assert untrained.teacher.model.fc.out_features == 4
    assert untrained.teacher.story == "torchvision:resnet18, 4 classes, weights random, seed 0"
    again = inputs_of(*names, "--seed", "1").student.model.fc.weight
    assert not torch.equal(untrained.student.model.fc.weight, again)


def test_images_are_as_the_weights_want_them(here):
    torch.save(squeezenet1_1().state_dict(), "published.pth")
    student = ["--student", "torchvision:squeezenet1_1", "--student-weights", "published.pth"]
    found = inputs_of(*student, "--val-split", "test", needs_teacher=False)
    assert found.teacher is None and "the weights' own" in found.images
    assert found.train[0][0].shape == found.val[0][0].shape == (3, 224, 224)
    assert (len(found.train), len(found.val)) == (80, 20)


def test_validation_data_need_the_same_classes(here):
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    np.savez("one.npz", x=x, y=y, classes=np.array(list("abcd")))
    np.savez("two.npz", x=x, y=y, classes=np.array(list("abdc")))
    student = ["--student", "tiny_nets:student", "--data", "one.npz"]
    assert len(inputs_of(*student, "--val-data", "one.npz", needs_teacher=False).val) == 4
    with pytest.raises(ValueError, match=r"the same classes; got \['a', 'b', 'c', 'd'\] and"):
        inputs_of(*student, "--val-data", "two.npz", needs_teacher=False)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_goes_by_its_name(name):
    assert objective_of(name) == OBJECTIVES[name]()


def test_values_are_read_by_the_type_of_their_field():
    found = objective_of("feature_kd", ["all_pairs=true", "temperature=2"])
    assert found == OBJECTIVES["feature_kd"](all_pairs=True, temperature=2.0)
    for name, text, message in [
        ("feature_kd", "all_pairs=1", "all_pairs must be true or false; got '1'"),
        ("kd", "temperature=warm", "temperature must be a finite number; got 'warm'"),
        ("kd", "kd_weight=nan", "kd_weight must be a finite number; got 'nan'"),
        ("kd", "temperature=0", "temperature must be above 0"),
        ("kd", "temperature", "--set takes NAME=VALUE; got 'temperature'"),
        ("ce", "weight=1", "objective 'ce' has no options; got 'weight'"),
    ]:
        with pytest.raises(ValueError, match=message):
            objective_of(name, [text])
    with pytest.raises(ValueError, match="temperature is there more than once"):
        objective_of("kd", ["temperature=1", "temperature=2"])


# ---- configurations ------------------------------------------------------------------------------


def with_config(text, *options):
    with open("run.toml", "w", encoding="utf-8") as file:
        file.write(text)
    return parsed(["distill", "--config", "run.toml", *options], distill=None)


def test_a_config_takes_every_kind_of_option(here):
    found = with_config(
        """
        teacher-weights = "a file.pth"
        batch_size = 32
        lr = 1e-05
        mean = [0.5, -0.25]
        layers = "even"
        compile = true
        quiet = true
        resume = false
        set = {normalize = "channel", detaches_head = false}
        """,
        "--no-quiet",
    )
    assert found.teacher_weights == str(here / "a file.pth")
    assert (found.batch_size, found.lr, found.mean) == (32, 1e-5, [0.5, -0.25])
    assert (found.layers, found.set) == (["even"], ["normalize=channel", "detaches_head=false"])
    assert (found.compile, found.quiet, found.resume) == (True, False, False)


def test_pairs_on_the_command_line_are_in_place_of_the_layers_of_a_config(here):
    found = with_config("layers = ['auto']", "--pairs", "block2:block1")
    assert (found.layers, found.pairs) == (None, ["block2:block1"])
    found = with_config("pairs = ['block2:block1']", "--layers", "last")
    assert (found.layers, found.pairs) == (["last"], None)
    assert with_config("pairs = ['block2:block1']").pairs == ["block2:block1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epocs = 3", "there is no option 'epocs'; near it are epochs"),
        ("zzz = 3", "there is no option 'zzz'; there are teacher, "),
        ("config = 'a'", "there is no option 'config'"),
        ("batch-size = 3\nbatch_size = 4", "'batch-size' is there more than once"),
        ("epochs = 2.5", "invalid int value: '2.5'"),
        ("epochs = [3]", r"run.toml: epochs must be text or a number; got \[3\]"),
        ("compile = 'yes'", "run.toml: compile must be true or false; got 'yes'"),
        ("lr = ", "run.toml is no TOML file"),
    ],
)
def test_a_config_is_checked(here, text, message):
    with pytest.raises(ValueError, match=message):
        with_config(text)


def test_toml_that_is_written_says_the_same_when_it_is_read():
    names = ['a"b\\c', "tab\t, line\n, bell\x07, delete\x7f", "ö 層 😀"]
    settings = {"layers": names, "lr": 1e-30, "k": 3, "cache": False, "mean": [0.1, -2.0]}
    assert tomllib.loads(as_toml(settings)) == settings


# ---- processes -----------------------------------------------------------------------------------


def test_each_process_takes_an_accelerator_of_its_own(monkeypatch):
    # There may be none here: "meta" stands for one of two.
    taken = []
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_accelerator": lambda: torch.device("meta"),
        "set_device_index": taken.append,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device() == torch.device("meta", 1) and taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 \(from 0\) of this host finds 2"):
        own_device()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert own_device() is None


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
    options = ["--epochs", "20", "--checkpoint-steps", "1", "--out"]
    process = start(*options, "killed")
    checkpoints = here / "killed" / "checkpoints"
    late = "step-000000007"  # of a hundred, five an epoch
    while process.poll() is None and not any(p.name > late for p in checkpoints.glob("step-*.pt")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (here / "killed" / "student.pt").exists()
    state = torch.load(max(checkpoints.glob("step-*.pt")), weights_only=True)
    for folder, more in (("killed", ["--resume"]), ("whole", [])):
        process = start(*options, folder, *more)
        out = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert same(student_of(here / "killed"), student_of(here / "whole"))
    # It went on: the epochs before the kill kept the seconds that they took.
    seconds = pd.read_csv(here / "killed" / "history.csv")["seconds"]
    kept = [row["seconds"] for row in state["rows"]]
    assert kept and list(seconds[: len(kept)]) == pytest.approx(kept, rel=1e-12)


@pytest.mark.slow
def test_two_processes_make_one_folder(here):
    process = start("--out", "two", processes=2)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert [out.count(text) for text in ("teacher: ", "layers: ", "wrote student.pt")] == [1, 1, 1]
    assert sorted(p.name for p in (here / "two").iterdir()) == sorted(WRITTEN)
    assert summary_of(here / "two")["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "text"),
    [
        ("not_made_in_the_second", "no network here"),
        ("fails_in_the_second", "the disk is gone"),
        ("not_there", "cannot be found"),  # in both
    ],
)
def test_an_error_in_one_process_is_told_once(here, student, text):
    process = start("--student", f"tiny_nets:{student}", "--out", "two", processes=2)
    err = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("geomkd distill: ")]
    assert len(told) == 1 and text in told[0], err
    assert "exitcode  : 2 " in err and "exitcode  : 1 " not in err
    if student != "fails_in_the_second":  # where the first may be ended before it has tidied up
        assert not (here / "two").exists()
