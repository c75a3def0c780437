"""Functions that are told of every epoch, and may end the run."""

import numpy as np
import pytest
import torch
from small import blobs, run_mlp, same

from geomkd.distillation.running.checkpoint import NAME


def test_callbacks_are_told_every_row_of_the_history():
    rows, again = [], []
    result = run_mlp(val=blobs(20), epochs=3, callbacks=[rows.append, again.append])
    assert rows == again == result.history.to_dict("records")
    assert not result.stopped and "stopped" not in repr(result)
    rows[0]["loss"] = again[0]["loss"] + 1  # a copy each
    assert result.history["loss"][0] == again[0]["loss"]


def test_the_checkpoint_is_written_before(tmp_path):
    def steps(row):
        found.append(max(int(NAME.fullmatch(path.name)[1]) for path in tmp_path.iterdir()))

    found = []
    run_mlp(callbacks=[steps], checkpoint_dir=tmp_path)
    assert found == [4, 8]  # of 50 samples by 16, the last two included


@pytest.mark.parametrize("true", [True, np.True_])
def test_true_ends_the_run(true):
    told = []
    callbacks = [lambda row: true if row["epoch"] == 2 else None, told.append]
    result = run_mlp(epochs=5, callbacks=callbacks)
    assert list(result.history["epoch"]) == [1, 2] == [row["epoch"] for row in told]
    assert result.stopped and "epochs=2, stopped, train_accuracy=" in repr(result)
    assert not result.student.training
    last = run_mlp(callbacks=[lambda row: row["epoch"] == 2])
    assert len(last.history) == 2 and not last.stopped


@pytest.mark.parametrize(
    "answer",
    [1, "yes", torch.tensor(True), object()],
    ids=lambda value: type(value).__name__,
)
def test_what_else_a_client_returns_does_not(answer):
    assert len(run_mlp(callbacks=[lambda row: answer]).history) == 2


def test_a_run_that_was_ended_goes_on_without_what_ended_it(tmp_path):
    whole, told = run_mlp(epochs=3), []

    def end(row):
        told.append(row["epoch"])
        return True

    options = {"epochs": 3, "checkpoint_dir": tmp_path}
    first, again = (run_mlp(callbacks=[end], **options) for _ in range(2))
    assert told == [1, 1]  # not trained again
    assert first.stopped and again.stopped and len(again.history) == 1
    assert same(first.student.state_dict(), again.student.state_dict())
    rest = []
    result = run_mlp(callbacks=[rest.append], **options)
    assert [row["epoch"] for row in rest] == [1, 2, 3] and not result.stopped
    assert same(result.student.state_dict(), whole.student.state_dict())
    drop = {"columns": "seconds"}
    assert result.history.drop(**drop).equals(whole.history.drop(**drop))


def test_what_a_callback_raises_ends_the_run():
    with pytest.raises(KeyError, match="val_accuracy"):
        run_mlp(callbacks=[lambda row: row["val_accuracy"]])


@pytest.mark.parametrize("wrong", [print, [None], "abc", None, {print}], ids=str)
def test_callbacks_are_a_list_of_functions(wrong):
    with pytest.raises(TypeError, match=r"callbacks must be a list of functions of a row; got"):
        run_mlp(callbacks=wrong)
