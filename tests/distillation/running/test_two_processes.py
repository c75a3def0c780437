"""Two real processes give what one gives."""

from pathlib import Path

import pytest
import torch
from processes import ended, start
from two_processes import run

SCRIPT = Path(__file__).parents[2] / "two_processes.py"
FLOAT64 = ["float64", "objective:ce", "objective:kd_standardized", "objective:feature_kd"]
FLOAT32 = ["float32", "everything", "cached", "checkpoints", "idle", "pca", "stopped"]
OTHER = ["different", "normalised", "resumed"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Every case in one pair of processes: most of its time is their start."""
    folder, cases = tmp_path_factory.mktemp("two"), FLOAT64 + FLOAT32 + OTHER
    said = folder / "said"
    started = start(SCRIPT, [folder, *cases], size=2, output=said)
    assert ended(started, timeout=300) == [0, 0], said.read_text()
    results = {c: torch.load(folder / c / "result.pt", weights_only=True) for c in cases}
    return folder, results


def history_of(result):
    return result.history.drop(columns="seconds").to_dict("list")


@pytest.mark.parametrize("case", FLOAT64 + FLOAT32)
def test_the_loss_curve_is_that_of_one_process(of_two, tmp_path, case):
    two, one = of_two[1][case], run(case, tmp_path)
    rel, history = 1e-9 if case in FLOAT64 else 1e-4, history_of(one)
    assert list(two["history"]) == list(history)
    print(f"{case}: loss {two['history']['loss']} in two processes, {history['loss']} in one")
    for name, values in history.items():
        assert two["history"][name] == pytest.approx(values, rel=rel, abs=1e-12), name
    assert (len(history["loss"]), one.stopped) == (2, case == "stopped")
    for name, value in one.student.state_dict().items():
        torch.testing.assert_close(two["student"][name], value, rtol=10 * rel, atol=rel)


def test_students_that_differ_begin_as_the_first_one(of_two, tmp_path):
    one = history_of(run("different", tmp_path))
    assert of_two[1]["different"]["history"]["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_batch_normalisation_sees_a_process_s_share(of_two, tmp_path):
    two, one = of_two[1]["normalised"]["history"], history_of(run("normalised", tmp_path))
    assert two["loss"] != pytest.approx(one["loss"], rel=1e-4)
    assert two["loss"] == pytest.approx(one["loss"], rel=0.2)


def test_two_processes_go_on_from_their_checkpoint(of_two):
    folder, results = of_two
    again, first = results["resumed"], results["checkpoints"]
    assert again["history"] == first["history"]
    assert all(torch.equal(again["student"][n], first["student"][n]) for n in first["student"])
    with pytest.raises(ValueError, match="processes is 2 there and 1 here"):
        run("checkpoints", folder / "checkpoints")
