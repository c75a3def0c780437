"""What a distillation gives back and shows: history, accuracies, files, curves, the bar."""

import re

import pytest
import torch
from small import blobs, mlp, run_mlp, same
from torch import nn

from geomkd.distillation import distill
from geomkd.distillation import loop as loop_module


def test_history_has_a_row_per_epoch():
    result = run_mlp(val=blobs(20), epochs=3)
    history = result.history
    assert list(history) == [
        "epoch", "loss", "features", "cross_entropy", "train_accuracy", "val_accuracy", "lr",
        "seconds",
    ]  # fmt: skip
    assert list(history["epoch"]) == [1, 2, 3]
    torch.testing.assert_close(
        torch.tensor(history["loss"]),
        torch.tensor(history["features"] + history["cross_entropy"]),
        rtol=1e-5,
        atol=0,
    )
    assert history["lr"].max() < 0.0075 and history["lr"].iloc[-1] < history["lr"].iloc[0]
    assert (history["seconds"] > 0).all()


def test_history_is_the_mean_over_samples():
    # With a rate next to 0 nothing moves: the mean over uneven batches is that over all samples.
    x, y = blobs(21)
    result = distill(mlp(), None, (x, y), objective="ce", epochs=1, batch_size=8, lr=1e-12,
                     progress=False)  # fmt: skip
    logits = mlp()(x)
    loss = nn.functional.cross_entropy(logits, y)
    assert result.history["loss"][0] == pytest.approx(loss.item(), rel=1e-5)
    assert result.history["train_accuracy"][0] == pytest.approx(
        (logits.argmax(1) == y).float().mean().item()
    )


def test_val_accuracy_is_of_the_finished_student_in_evaluation_mode():
    val = blobs(21)
    result = run_mlp(student=mlp(dropout=0.5), val=val)
    assert not result.student.training
    correct = (result.student(val[0]).argmax(1) == val[1]).float().mean().item()
    assert result.accuracy == pytest.approx(correct) and result.accuracy_on == "val"
    assert result.best_val_accuracy == result.history["val_accuracy"].max()


def test_without_validation_data_the_accuracy_is_of_training():
    result = run_mlp()
    assert result.accuracy_on == "train" and result.best_val_accuracy is None
    assert result.accuracy == result.history["train_accuracy"].iloc[-1]
    assert repr(result) == (
        f"DistillationResult(objective='features', pairs=2, epochs=2, "
        f"train_accuracy={result.accuracy:.4f})"
    )


def test_saving_and_loading(tmp_path):
    result = run_mlp()
    path = tmp_path / "student.pt"
    path.write_text("an older file")
    result.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["student.pt"]
    fresh = mlp(seed=5)
    fresh.load_state_dict(torch.load(path, weights_only=True))
    assert same(fresh.state_dict(), result.student.state_dict())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    result, path = run_mlp(), tmp_path / "student.pt"
    path.write_text("an older file")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        result.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["student.pt"]
    assert path.read_text() == "an older file"


def test_plot_draws_the_curves():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = run_mlp(val=blobs(20))
    ax = result.plot()
    assert [line.get_label() for line in ax.get_lines()] == ["train", "validation"]
    assert list(ax.get_lines()[1].get_ydata()) == list(result.history["val_accuracy"])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "accuracy (share of 1)")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "train", "validation", "loss"
    ]  # fmt: skip
    assert result.plot(ax) is ax
    *_, teacher = result.plot(teacher_accuracy=0.9).get_lines()
    assert set(teacher.get_ydata()) == {0.9} and teacher.get_linestyle() == "--"
    assert teacher.get_label() == "teacher (0.900)"
    with pytest.raises(
        ValueError, match="teacher_accuracy must be at least 0 and at most 1; got 9"
    ):
        result.plot(teacher_accuracy=90)
    pyplot.close("all")


def test_html_has_the_last_epoch_and_the_pairs():
    result = run_mlp(epochs=3)
    object.__setattr__(result, "pairs", [("a<b", "c")])
    text = result._repr_html_()
    assert text.startswith("<p><code>DistillationResult(objective='features', pairs=1, epochs=3")
    assert text.count("<tr") == 2 and "<td>3</td>" in text and "<li>a&lt;b → c</li>" in text
    assert "color" not in text and "background" not in text


def test_scalars_are_written_for_tensorboard(tmp_path):
    loaders = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run_mlp(val=blobs(20), log_dir=tmp_path)
    events = loaders.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(result.history) - {"epoch"}
    written = [event.value for event in events.Scalars("val_accuracy")]
    assert written == pytest.approx(list(result.history["val_accuracy"]))


def test_the_bar_shows_loss_and_accuracy(capsys):
    run_mlp(progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"epoch=2.*loss=.*accuracy=", shown) and "samples/s" in shown
    run_mlp(progress=False)
    assert capsys.readouterr().err == ""


def test_losses_are_read_within_long_epochs_too(monkeypatch):
    monkeypatch.setattr(loop_module, "STEPS_BETWEEN_READINGS", 2)
    expected = run_mlp(epochs=1).history["loss"][0]
    monkeypatch.undo()
    assert run_mlp(epochs=1).history["loss"][0] == pytest.approx(expected, rel=1e-6)
