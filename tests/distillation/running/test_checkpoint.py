"""A run that is killed at any moment ends, resumed, bit for bit where it would have ended."""

import functools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from killed import network, run
from processes import ended, start
from small import same, state

from geomkd.distillation.running.checkpoint import Checkpoints

SCRIPT = Path(__file__).parents[2] / "killed.py"
STEPS = 2 * 10


def without_time(result):
    return result.history.drop(columns="seconds")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), folder


@pytest.fixture(scope="module")
def uninterrupted(whole):
    return state(whole[0].student), without_time(whole[0])


def steps_done(folder):
    return (folder / "steps").stat().st_size if (folder / "steps").exists() else 0


def kill_after(folder, n_steps, how):
    """Start the run, and signal it and its workers once it has done so many more steps."""
    (process,), before = start(SCRIPT, [folder]), steps_done(folder)
    while steps_done(folder) < before + n_steps and process.is_alive():
        time.sleep(0.005)
    os.killpg(process.pid, how)
    process.join(60)
    assert process.exitcode == -how  # at once, and by nothing of ours
    return steps_done(folder) - before


@pytest.mark.slow
def test_killed_at_random_steps_a_run_ends_bit_for_bit_where_it_would_have(tmp_path, uninterrupted):
    chance = random.Random(time.time_ns())
    signals = [signal.SIGKILL, signal.SIGTERM]  # out of memory, shut down
    kills = [kill_after(tmp_path, chance.randint(1, 7), how) for how in signals]
    print(
        f"killed after {kills} steps; checkpoints {sorted(Path(tmp_path, 'checkpoints').iterdir())}"
    )
    assert {path.name for path in files(tmp_path)} <= {"checkpoints", "steps"}
    for path in Path(tmp_path, "checkpoints").glob("step-*"):
        torch.load(path, weights_only=True)  # whole, as whatever has its name
    said = tmp_path / "said"
    assert ended(start(SCRIPT, [tmp_path], output=said)) == [0], said.read_text()
    # Steps between a checkpoint and a kill are done twice, all others once.
    assert STEPS <= steps_done(tmp_path) <= STEPS + sum(kills)
    student, history = uninterrupted
    assert same(torch.load(tmp_path / "student.pt", weights_only=True), student)
    assert (tmp_path / "history.json").read_text() == history.to_json(double_precision=15)


class Stop(Exception):
    pass


def stop_after(n_steps):
    done = []

    def after_step():
        done.append(1)
        if len(done) > n_steps:
            raise Stop

    return after_step


def interrupted(folder, n_steps, **options):
    with pytest.raises(Stop):
        run(folder, after_step=stop_after(n_steps), **options)


def files(folder):
    return sorted(Path(folder).iterdir())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders of checkpoints of runs that an error ended, by the number of their steps."""

    @functools.cache
    def made(n_steps):
        folder = tmp_path_factory.mktemp("stopped")
        interrupted(folder, n_steps, workers=0)
        return folder

    return made


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy, to go on from or to spoil."""
    return lambda n_steps: shutil.copytree(stopped(n_steps), tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("n_steps", [0, 1, 3, 10, 19])
def test_resumed_after_an_error(tmp_path, uninterrupted, n_steps):
    interrupted(tmp_path, n_steps, workers=0)  # nor does the number of workers matter
    result = run(tmp_path)
    student, history = uninterrupted
    assert same(state(result.student), student)
    assert without_time(result).equals(history)


def test_a_finished_run_returns_its_result(whole, uninterrupted):
    result = run(whole[1], student=network(4, 9), after_step=stop_after(0))
    student, history = uninterrupted
    assert same(state(result.student), student) and without_time(result).equals(history)
    assert not result.student.training


def test_two_files_are_kept(whole):
    assert [path.name[:14] for path in files(whole[1])] == ["step-000000018", "step-000000020"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    ],
    ids=["truncated", "empty", "one bit"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, copied, uninterrupted, damage):
    copied(17)
    older, last = files(tmp_path)
    assert (older.name[:14], last.name[:14]) == ("step-000000012", "step-000000015")
    last.write_bytes(damage(last.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{last.name} is damaged: .*; an earlier checkpoint is"):
        result = run(tmp_path)
    assert same(state(result.student), uninterrupted[0])
    assert len(files(tmp_path)) == 2


def test_with_every_checkpoint_damaged_the_run_begins_anew(tmp_path, copied, uninterrupted):
    copied(17)
    for path in files(tmp_path):
        path.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="is damaged: its 7 bytes are not those"):
        result = run(tmp_path)
    assert same(state(result.student), uninterrupted[0])


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path, copied):
    copied(17)
    left = tmp_path / ".step-000000018-0123456789abcdef.pt.x1y2z3"
    left.write_bytes(b"half")
    run(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 5}, "epochs is 2 there and 5 here"),
        ({"lr": 0.1}, "lr is 0.0075 there and 0.1 here"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"batch_size": 40}, "batch_size is 20 there and 40 here"),
        ({"augment": None}, "augment is True there and False here"),
        ({"pairs": [("5", "5")]}, r"pairs is .*'2'.* there and \"\[\('5', '5'\)\]\" here"),
        ({"objective": "ce"}, "objective is .Features.* there and .CrossEntropy"),
        ({"teacher": network(8, 5)}, "teacher is '.*' there and '.*' here"),
        ({"student": network(6, 1)}, "student is '.*' there and '.*' here"),
        ({"precision": "bf16", "clip_norm": None}, "clip_norm is 1.0 .*; precision is 'fp32'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, copied, options, text):
    copied(4)
    before = [path.read_bytes() for path in files(tmp_path)]
    with pytest.raises(ValueError, match=rf"step-000000003-.* belongs to another run: .*{text}"):
        run(tmp_path, **options)
    assert [path.read_bytes() for path in files(tmp_path)] == before


def test_other_data_is_another_run(tmp_path, copied, monkeypatch):
    copied(4)
    monkeypatch.setattr("killed.Shifted.__len__", lambda self: 180)
    with pytest.raises(ValueError, match=r"another run: train is '.*' there and '.*' here; give"):
        run(tmp_path)


def test_resume_false_refuses_a_folder_with_checkpoints(tmp_path, copied):
    copied(4)
    with pytest.raises(ValueError, match=r"resume=False needs a folder without .*step-000000003"):
        run(tmp_path, resume=False)
    shutil.rmtree(tmp_path)
    run(tmp_path, resume=False, epochs=1)


def test_checkpoint_steps_is_checked(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_steps must be at least 1; got 0"):
        run(tmp_path, checkpoint_steps=0)


def test_files_are_read_without_unpickling(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, {"anything": 1})
    (path,) = files(tmp_path)
    assert torch.load(path, weights_only=True)["format"] == "geomkd.checkpoint/1"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with room for two checkpoints and a half."""
    run(tmp_path / "measured", epochs=1)
    size = max(path.stat().st_size for path in files(tmp_path / "measured"))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_loses_nothing_that_was_there(small_disk, tmp_path, uninterrupted):
    with pytest.warns(UserWarning, match="checkpoint of step .* could not be written .*No space"):
        result = run(small_disk)
    assert same(state(result.student), uninterrupted[0])  # training went on
    kept = files(small_disk)
    assert [path.name[:14] for path in kept] == ["step-000000003", "step-000000006"]
    shutil.copytree(small_disk, tmp_path / "larger")
    assert same(state(run(tmp_path / "larger").student), uninterrupted[0])
