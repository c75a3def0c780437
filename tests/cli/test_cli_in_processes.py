"""``geomkd distill`` that is killed, and in several processes."""

import json
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import COMMAND, WRITTEN, student_of, summary_of
from processes import ended, start
from small import same

import geomkd.cli.main as main_module
from geomkd.cli.main import main
from geomkd.common.distributed import World
from geomkd.geometry.precision import one_thread

LAST = [*COMMAND, "--layers", "last", "--k", "2"]
SCRIPT = Path(__file__).parents[1] / "commands.py"


@pytest.mark.slow
def test_killed_and_resumed(here):
    command = [*LAST, "--epochs", "6", "--checkpoint-steps", "1", "--out"]
    (process,) = start(SCRIPT, [json.dumps([[*command, "killed"]])])
    checkpoints = here / "killed" / "checkpoints"
    late = "step-000000007"  # of thirty, five an epoch
    while process.is_alive() and not any(p.name > late for p in checkpoints.glob("step-*.pt")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert not (here / "killed" / "student.pt").exists()
    state = torch.load(max(checkpoints.glob("step-*.pt")), weights_only=True)
    with one_thread():  # as in the process that was killed
        assert main([*command, "killed", "--resume"]) == main([*command, "whole"]) == 0
    assert same(student_of(here / "killed"), student_of(here / "whole"))
    # It went on: the epochs before the kill kept the seconds that they took.
    seconds = pd.read_csv(here / "killed" / "history.csv")["seconds"]
    kept = [row["seconds"] for row in state["rows"]]
    assert kept and list(seconds[: len(kept)]) == pytest.approx(kept, rel=1e-12)


def told(text):
    return [line for line in text.splitlines() if line.startswith("geomkd distill: ")]


@pytest.mark.slow
def test_two_processes_make_one_folder_and_tell_an_error_of_one_in_training_once(here):
    # Both in one start of the processes.
    fails = [*LAST, "--student", "tiny_nets:fails_in_the_second", "--out", "failed"]
    score = ["score", "--model", "tiny_nets:teacher", "--data", "images.npz", "--quiet"]
    score += ["--subsamples", "2", "--out", "scored"]
    commands = json.dumps([score, [*LAST, "--out", "two"], fails])
    codes = ended(start(SCRIPT, [commands], size=2, output="said"))
    said = (here / "said").read_text()
    assert sorted(codes) == [-signal.SIGTERM, 2], said
    assert sorted(p.name for p in (here / "two").iterdir()) == sorted(WRITTEN)
    assert [said.count(text) for text in ("wrote student.pt", "layers: ", "teacher: ")] == [1, 2, 2]
    assert summary_of(here / "two")["processes"] == 2
    assert said.count("wrote layers.csv") == 1 and (here / "scored" / "summary.json").exists()
    (line,) = told(said)
    assert "the disk is gone" in line


@pytest.mark.slow
def test_an_error_of_one_process_before_training_is_told_once_under_torchrun(here):
    command = [*LAST, "--student", "tiny_nets:not_made_in_the_second", "--out", "two"]
    several = ["--standalone", "--nproc-per-node", "2", "-m", "geomkd", *command]
    (code,) = ended(start(SCRIPT.with_name("torchrun.py"), several, output="said"))
    said = (here / "said").read_text()
    assert code != 0
    (line,) = told(said)
    assert "no network here" in line
    assert "exitcode  : 2 " in said and "exitcode  : 1 " not in said
    assert not (here / "two").exists()


@pytest.mark.parametrize(
    ("rank", "error", "seconds"),
    [(0, ValueError, 0), (0, RuntimeError, 5), (1, ValueError, 5), (1, RuntimeError, 10)],
)
def test_who_may_not_be_the_first_to_fail_waits(monkeypatch, capsys, rank, error, seconds):
    done = []

    def fail(options, say):
        raise error("no disk")

    monkeypatch.setattr(main_module, "distilled", fail)
    assert main(["distill"]) == 2  # alone, at once
    monkeypatch.setattr(main_module, "world", lambda: World(rank, 2))
    monkeypatch.setattr(main_module.time, "sleep", done.append)
    monkeypatch.setattr(main_module.os, "_exit", lambda code: done.append(f"ended with {code}"))
    main(["distill"])
    assert done == [seconds, "ended with 2"]
    assert capsys.readouterr().err == "geomkd distill: no disk\n" * 2
