"""``geomkd distill`` that is killed, and in several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import COMMAND, WRITTEN, make_files, student_of, summary_of
from small import same

import geomkd.cli.main as main_module
from geomkd.cli.main import main
from geomkd.common.distributed import World
from geomkd.geometry.precision import one_thread

LAST = [*COMMAND, "--layers", "last", "--k", "2"]


def start(folder, *commands, processes=1):
    """A process that runs commands one after another, or several that do so together."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [str(Path(__file__).parents[1] / "commands.py"), json.dumps(commands)]
    return subprocess.Popen(
        [sys.executable, *(run if processes > 1 else []), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_and_resumed(here):
    command = [*LAST, "--epochs", "20", "--checkpoint-steps", "1", "--out"]
    process = start(here, [*command, "killed"])
    checkpoints = here / "killed" / "checkpoints"
    late = "step-000000007"  # of a hundred, five an epoch
    while process.poll() is None and not any(p.name > late for p in checkpoints.glob("step-*.pt")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (here / "killed" / "student.pt").exists()
    state = torch.load(max(checkpoints.glob("step-*.pt")), weights_only=True)
    with one_thread():  # as in the process that was killed
        assert main([*command, "killed", "--resume"]) == main([*command, "whole"]) == 0
    assert same(student_of(here / "killed"), student_of(here / "whole"))
    # It went on: the epochs before the kill kept the seconds that they took.
    seconds = pd.read_csv(here / "killed" / "history.csv")["seconds"]
    kept = [row["seconds"] for row in state["rows"]]
    assert kept and list(seconds[: len(kept)]) == pytest.approx(kept, rel=1e-12)


def told(err):
    """Lines of errors, and that torchrun saw the command's own code."""
    assert "exitcode  : 2 " in err and "exitcode  : 1 " not in err, err
    return [line for line in err.splitlines() if line.startswith("geomkd distill: ")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder, output and errors of two commands; most of their time is the start of processes."""
    folder = tmp_path_factory.mktemp("two")
    make_files(folder)
    fails = [*LAST, "--student", "tiny_nets:fails_in_the_second", "--out", "failed"]
    process = start(folder, [*LAST, "--out", "two"], fails, processes=2)
    out, err = process.communicate(timeout=200)
    assert process.returncode != 0
    return folder, out, err


@pytest.mark.slow
def test_two_processes_make_one_folder(two):
    folder, out, err = two
    assert sorted(p.name for p in (folder / "two").iterdir()) == sorted(WRITTEN), err
    assert [out.count(text) for text in ("layers: ", "wrote student.pt")] == [2, 1]  # of two
    assert out.count("teacher: ") == 2
    assert summary_of(folder / "two")["processes"] == 2


@pytest.mark.slow
def test_an_error_of_one_process_in_training_is_told_once(two):
    (line,) = told(two[2])
    assert "the disk is gone" in line


@pytest.mark.slow
def test_an_error_of_one_process_before_training_is_told_once(here):
    command = [*LAST, "--student", "tiny_nets:not_made_in_the_second", "--out", "two"]
    process = start(here, command, processes=2)
    err = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    (line,) = told(err)
    assert "no network here" in line
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
