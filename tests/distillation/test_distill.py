"""The distillation loop, on real torchvision models where shapes matter."""

import copy
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import pandas
import pytest
import torch
from sklearn.datasets import load_digits
from small import (
    CPU,
    PAIRS,
    blobs,
    images,
    mlp,
    mobilenet,
    pairs_of,
    resnet,
    resnet2,
    run_mlp,
    same,
    seeded_model,
    state,
    vit,
    wide_vit,
)
from torch import nn

from geomkd.distillation import distill
from geomkd.distillation import loop as loop_module
from geomkd.distillation.loop import Run, train_step
from geomkd.distillation.objectives import Features, LogitDistillation
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.distillation.running.batches import Batch
from geomkd.distillation.running.recipe import Recipe
from geomkd.distillation.running.setup import join
from geomkd.distillation.running.student_step import student_step
from geomkd.distillation.running.teacher import LiveTeacher

# ---- architectures ----


@pytest.mark.parametrize(
    ("make_teacher", "make_student"),
    [(resnet2, resnet), (resnet2, mobilenet), (wide_vit, vit), (resnet2, vit), (wide_vit, resnet)],
)
def test_every_mix_of_architectures_overfits_a_batch(make_teacher, make_student):
    teacher, student = make_teacher(), make_student()
    pairs = pairs_of(teacher, student)
    options = {"epochs": 10, "batch_size": 8, "lr": 0.003, "progress": False, "pairs": pairs}
    result = distill(student, teacher, images(), objective=Features("channel"), **options)
    first, last = result.history["loss"].iloc[0], result.history["loss"].iloc[-1]
    assert last < 0.9 * first
    assert result.pairs == pairs and len(result.projectors.projectors) == 4


def test_a_head_input_as_last_pair():
    teacher, student = resnet2(), resnet()
    pairs = [("layer3.0", "layer3.0"), ("fc.input", "fc.input")]
    result = distill(student, teacher, images(), pairs=pairs, epochs=8, lr=0.003, progress=False)
    assert result.history["features"].iloc[-1] < result.history["features"].iloc[0]


# ---- the teacher ----


@pytest.mark.parametrize("objective", ["features", "kd"])
def test_the_teacher_stays_bit_for_bit(objective):
    teacher = resnet2().train()
    teacher.layer1.eval()
    teacher.conv1.weight.requires_grad_(False)
    before, modes = state(teacher), [m.training for m in teacher.modules()]
    flags = [p.requires_grad for p in teacher.parameters()]
    distill(
        resnet(),
        teacher,
        images(),
        pairs=[("layer4.0", "layer4.0")],
        objective=objective,
        epochs=2,
        progress=False,
    )
    assert same(before, teacher.state_dict())
    assert modes == [m.training for m in teacher.modules()]
    assert flags == [p.requires_grad for p in teacher.parameters()]
    assert all(p.grad is None for p in teacher.parameters())


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return x


def test_the_teacher_is_run_no_further_than_needed():
    teacher = mlp((6, 32, 32, 3), seed=1)
    teacher.append(Counting())
    Counting.calls = 0
    run_mlp(teacher=teacher)
    few = Counting.calls  # once, when its layers are described
    run_mlp(teacher=teacher, objective="kd")
    assert few == 1 and Counting.calls - few == 1 + 2 * 4


def test_teacher_and_student_share_no_parameter():
    model = mlp()
    with pytest.raises(
        ValueError, match=r"may share no parameter with the teacher; got .*'0.weight'"
    ):
        run_mlp(student=model, teacher=model)


# ---- what comes out ----


def test_the_same_seed_gives_the_same_student_and_another_seed_another():
    def trained(seed):
        return state(run_mlp(student=mlp(dropout=0.2), seed=seed).student)

    torch.rand(3)  # the global state does not matter
    one = trained(0)
    torch.rand(3)
    assert same(one, trained(0))
    assert not same(one, trained(1))


def test_the_seed_is_the_projectors_too():
    x = blobs()[0]

    def weight(seed):
        networks = join(mlp(), mlp(seed=1), Features(), PAIRS, x, seed=seed)
        return networks.projectors.projectors[0].project.weight

    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(0), weight(1))


def test_the_global_random_state_is_put_back():
    before = torch.get_rng_state()
    run_mlp(student=mlp(dropout=0.2))
    assert torch.equal(before, torch.get_rng_state())


@dataclass(frozen=True)
class OtherObjective:
    """One that a user might write: logits only, and only the student's."""

    name: str = "mean square"
    uses_features: bool = False
    uses_teacher_logits: bool = False
    detaches_head: bool = False

    def __call__(self, step):
        one_hot = nn.functional.one_hot(step.labels, step.logits.shape[1])
        loss = ((step.logits - one_hot) ** 2).mean()
        return loss, {"square": loss}


@pytest.mark.parametrize("objective", ["ce", OtherObjective()])
def test_objectives_without_a_teacher(objective):
    result = distill(mlp(), None, blobs(), objective=objective, epochs=20, progress=False)
    assert result.accuracy > 0.8
    assert result.pairs == [] and len(result.projectors) == 0


def test_kd_learns_from_the_teacher_alone():
    x, y = blobs()
    teacher = distill(mlp(seed=1), None, (x, y), objective="ce", epochs=30, progress=False).student
    only_kd = LogitDistillation(ce_weight=0.0, kd_weight=1.0)
    wrong = (y + 1) % 3
    student = distill(mlp(), teacher, (x, wrong), objective=only_kd, epochs=60, progress=False)
    agree = (student.student(x).argmax(1) == teacher(x).argmax(1)).float().mean()
    assert agree > 0.95 and student.history["kd"].iloc[-1] < student.history["kd"].iloc[0]


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


def test_the_student_is_trained_in_place():
    student = mlp()
    before = state(student)
    result = run_mlp(student=student)
    assert result.student is student and not same(before, student.state_dict())
    assert all(p.grad is None for p in student.parameters())
    assert not student[0]._forward_hooks and not student._forward_pre_hooks


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
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "accuracy")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "train", "validation", "loss"
    ]  # fmt: skip
    assert result.plot(ax) is ax
    pyplot.close("all")


def test_a_small_student_learns_the_digits():
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    train, val = (x[:1200], y[:1200]), (x[1200:], y[1200:])

    def cnn(width, seed):
        return seeded_model(
            lambda: nn.Sequential(
                nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
            ),
            seed,
        )  # fmt: skip

    teacher = distill(cnn(32, 1), None, train, objective="ce", val=val, epochs=6, progress=False)
    assert teacher.accuracy > 0.85
    result = distill(
        cnn(16, 0), teacher.student, train, pairs=[("2", "2"), ("5", "5")], val=val, epochs=6,
        progress=False,
    )  # fmt: skip
    assert result.accuracy > 0.6  # ten classes; the backbone never saw a label


# ---- other arguments ----


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pairs": None}, ValueError, r"needs pairs=\[\(teacher layer, student layer\), ...\]"),
        ({"pairs": []}, ValueError, "at least one"),
        ({"pairs": "1"}, TypeError, "pairs must be a list of pairs of names; got str"),
        ({"pairs": ["14"]}, TypeError, r"\(teacher layer, student layer\) names; got '14'"),
        ({"pairs": [("1", 1)]}, TypeError, r"names; got \('1', 1\)"),
        ({"pairs": [("1", "1")] * 2}, ValueError, "pairs must differ from each other"),
        ({"pairs": [("9", "1")]}, ValueError, "pairs, teacher layer '9': the model has no module"),
        ({"pairs": [("1", "9")]}, ValueError, "pairs, student layer '9': the model has no module"),
        ({"objective": "fkd"}, ValueError, r"one of \['features', 'ce', 'kd', .*; got 'fkd'"),
        ({"objective": Features}, TypeError, "objective must be a name or an object with name"),
        ({"objective": print}, TypeError, "without name, uses_features"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1; got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer; got float"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"lr": 0.0}, ValueError, "lr must be finite and above 0; got 0.0"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got str 'fast'"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be finite and at least 0; got -1"),
        ({"clip_norm": float("nan")}, ValueError, "clip_norm must be finite and above 0; got nan"),
        ({"head_clip_norm": 0}, ValueError, "head_clip_norm must be finite and above 0; got 0"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1; got 0"),
        ({"precision": "int8"}, ValueError, r"one of \['fp32', 'bf16', 'fp16'\]; got 'int8'"),
        ({"lr_scale": 0.1}, TypeError, "lr_scale must map prefixes .* to factors; got float"),
        (
            {"lr_scale": {"0": -1}},
            ValueError,
            r"lr_scale\['0'\] must be finite and above 0; got -1",
        ),
        ({"lr_scale": {"fc": 1}}, ValueError, "none begins with 'fc', the first is '0.weight'"),
        ({"compile": True, "objective": "simkd"}, ValueError, "a teacher's head is put on maps"),
        (
            {"objective": "semckd", "batch_size": 9, "accumulate": 2},
            ValueError,
            "2 .* parts divide",
        ),
        (
            {"objective": "semckd", "batch_size": 64},
            ValueError,
            "in train must be at least 64; got 50",
        ),
    ],
)
def test_options_are_checked(options, error, text):
    with pytest.raises(error, match=text):
        run_mlp(**options)


def test_models_are_checked():
    with pytest.raises(TypeError, match=r"student must be a torch.nn.Module; got str"):
        run_mlp(student="resnet18")
    with pytest.raises(TypeError, match=r"teacher must be a torch.nn.Module; got str"):
        run_mlp(teacher="resnet18")
    with pytest.raises(ValueError, match="objective 'features' needs a teacher; got None"):
        distill(mlp(), None, blobs(), pairs=PAIRS)
    with pytest.raises(ValueError, match="the student has no parameters"):
        run_mlp(student=nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no parameter to train: none has requires_grad"):
        run_mlp(student=mlp().requires_grad_(False))
    with pytest.raises(ValueError, match=r"student must return logits of shape \(B, n_classes\)"):
        run_mlp(student=nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Unflatten(1, (2, 3))))


def test_kd_needs_equal_numbers_of_logits():
    with pytest.raises(ValueError, match="got 5 from the teacher and 3 from the student"):
        run_mlp(teacher=mlp((6, 8, 8, 5)), objective="kd")
    run_mlp(teacher=mlp((6, 8, 8, 5)), objective="features", epochs=1)


# ---- when something goes wrong ----


def test_a_loss_that_is_not_finite_is_named_with_its_epoch():
    x, y = blobs()
    teacher = mlp((6, 32, 32, 3), seed=1)
    with torch.no_grad():
        teacher[0].weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"loss part 'features' became NaN .* in epoch 1"):
        run_mlp((x, y), teacher=teacher)
    with pytest.raises(RuntimeError, match="loss part 'cross_entropy' became NaN"):
        run_mlp((x * 1e38, y), objective="ce")


def test_ctrl_c_leaves_no_hooks_and_the_teacher_as_it_was(monkeypatch):
    student, teacher = mlp(dropout=0.1), mlp((6, 32, 32, 3), seed=1)
    before, rng = state(teacher), torch.get_rng_state()
    steps = []

    def interrupted(step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        projected, _ = step.projectors[0](step.student_features[0], step.teacher_features[0])
        return projected.sum(), {}

    objective = OtherObjective("ours", True, False, True)
    monkeypatch.setattr(OtherObjective, "__call__", lambda self, step: interrupted(step))
    with pytest.raises(KeyboardInterrupt):
        run_mlp(student=student, teacher=teacher, objective=objective)
    for model in (student, teacher):
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
    assert same(before, teacher.state_dict()) and teacher.training
    assert torch.equal(rng, torch.get_rng_state())


# ---- a step ----


@contextmanager
def run_of(networks, **options):
    """A run put together as `distill` does it, for single steps."""
    recipe = Recipe(**options)
    optimisers, schedules = recipe.optimisers(networks.student, networks.groups, 10)
    with student_step(networks, nullcontext) as model:
        yield Run(
            networks=networks,
            train=None,
            val=None,
            recipe=recipe,
            device=CPU,
            model=model,
            ask_teacher=LiveTeacher(networks, nullcontext),
            optimisers=optimisers,
            schedules=schedules,
            scaler=recipe.scaler(CPU),
        )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make_student", [resnet, vit])
def test_a_step_runs_on_meta_tensors(name, make_student):
    # No data there: a step that asked for a number, or made a tensor elsewhere, would raise.
    if make_student is vit and name in ("attention_transfer", "simkd"):
        pytest.skip("needs maps")
    student, teacher = make_student(), resnet2()
    pairs = [("layer4.0", pairs_of(teacher, student, 1)[0][1])]
    objective = OBJECTIVES[name]()
    networks = join(student, teacher, objective, pairs, images(2)[0], batch_size=8)
    for module in (networks.student, teacher, networks.projectors):
        module.to("meta")
    everything = [*networks.student.parameters(), *networks.projectors.parameters()]
    networks = replace(networks, groups=[everything])
    x, y = (tensor.to("meta") for tensor in images())
    with run_of(networks, clip_norm=1.0) as run:
        ((n_samples, values),) = train_step(run, [Batch(x, y, list(range(8)), 1.0)])
    assert n_samples == 8
    assert all(value.is_meta and value.shape == () for value in values.values())
    assert next(iter(values)) == "loss" and list(values)[-1] == "train_accuracy"


@pytest.mark.parametrize(
    ("norms", "expected"),
    [((1e-3, None), (1e-3, 1e-3)), ((1e-3, 1e-2), (1e-3, 1e-2)), ((None, 1e-2), (None, 1e-2))],
)
def test_a_step_updates_each_side_by_its_own_clipped_gradient(norms, expected):
    x, y = blobs()
    networks = join(mlp(), mlp((6, 32, 32, 3), seed=1), Features(), PAIRS, x)
    before = [[p.detach().clone() for p in group] for group in networks.groups]
    with run_of(networks, clip_norm=norms[0], head_clip_norm=norms[1]) as run:
        run.optimisers = [torch.optim.SGD(group, lr=1.0) for group in networks.groups]
        run.schedules = [
            torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0) for sgd in run.optimisers
        ]
        train_step(run, [Batch(x, y, list(range(len(x))), 1.0)])
    for group, old, norm in zip(networks.groups, before, expected, strict=True):
        moved = torch.cat([(p - o).flatten() for p, o in zip(group, old, strict=True)])
        assert norm is None or moved.norm().item() == pytest.approx(norm, rel=1e-3)
        assert moved.norm() > 0


@pytest.mark.parametrize("objective", ["features", "feature_kd"])
def test_accumulated_parts_give_the_same_student(objective):
    x, y = blobs()
    options = {"objective": objective, "batch_size": 16, "epochs": 3, "clip_norm": 0.1}
    double = {"student": mlp().double(), "teacher": mlp((6, 32, 32, 3), seed=1).double()}
    whole = run_mlp((x.double(), y), **options, **copy.deepcopy(double))
    parts = run_mlp((x.double(), y), accumulate=3, **options, **copy.deepcopy(double))
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    left = ["lr", "seconds"]
    pandas.testing.assert_frame_equal(
        whole.history.drop(columns=left), parts.history.drop(columns=left), rtol=1e-9
    )


def test_lr_scale_takes_the_longest_prefix():
    student = mlp()
    before = state(student)
    rates = {"": 1e-30, "6": 1.0, "6.bias": 1e-30}
    after = run_mlp(student=student, lr_scale=rates, weight_decay=0.0).student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"6.weight"}


def test_augmentation_is_seen_by_both_networks_in_training_alone():
    seen = []

    def shift(x):
        seen.append(len(x))
        return x + torch.rand(len(x), 1)

    x, y = blobs(20)
    options = {"epochs": 1, "batch_size": 10}
    plain = run_mlp((x, y), val=(x, y), **options)
    first = run_mlp((x, y), val=(x, y), augment=shift, **options)
    second = run_mlp((x, y), val=(x, y), augment=shift, **options)
    assert seen == [10, 10] * 2
    assert same(first.student.state_dict(), second.student.state_dict())
    assert not same(first.student.state_dict(), plain.student.state_dict())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_nearly_the_same(precision):
    x, y = blobs()
    options = {"objective": "feature_kd", "epochs": 10, "val": (x, y)}
    full, half = run_mlp((x, y), **options), run_mlp((x, y), precision=precision, **options)
    assert all(p.dtype == torch.float32 for p in half.student.parameters())
    assert half.history["loss"].iloc[-1] == pytest.approx(full.history["loss"].iloc[-1], rel=0.05)
    assert not same(full.student.state_dict(), half.student.state_dict())


def test_under_half_precision_losses_are_float32():
    kinds = []

    class Watching(OtherObjective):
        def __call__(self, step):
            kinds.append((step.logits.dtype, step.student_features[0].dtype))
            assert not torch.is_autocast_enabled("cpu")
            return step.logits.sum() + step.student_features[0].sum(), {}

    run_mlp(objective=Watching(uses_features=True), precision="bf16", epochs=1)
    assert set(kinds) == {(torch.float32, torch.float32)}


class Overflowing(nn.Module):
    """A head whose scaled gradient leaves float16: its input is large."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x).detach() * 100 if self.training else self.body(x))


def test_a_head_that_overflows_skips_its_step_alone():
    x, y = blobs(32)
    student = Overflowing()
    before = state(student)
    options = {"pairs": [("4", "body")], "epochs": 1, "batch_size": 32, "precision": "fp16"}
    after = run_mlp((x, y), student=student, **options).student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"body.0.weight", "body.0.bias"}


def test_channels_last_gives_the_same_networks():
    options = {"pairs": [("layer4.0", "layer4.0")], "epochs": 1, "progress": False, "lr": 1e-4}
    plain = distill(resnet().double(), resnet2().double(), double_images(), **options)
    last = distill(
        resnet().double(), resnet2().double(), double_images(), channels_last=True, **options
    )
    weight = last.student.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert last.history["loss"][0] == pytest.approx(plain.history["loss"][0], rel=1e-9)


def double_images():
    x, y = images()
    return x.double(), y


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["features", "kd"])
def test_a_compiled_student_trains_the_same(objective):
    plain, compiled = (run_mlp(compile=on, objective=objective) for on in (False, True))
    assert not hasattr(compiled.student, "_orig_mod")
    assert compiled.history["loss"].iloc[-1] == pytest.approx(
        plain.history["loss"].iloc[-1], rel=1e-4
    )


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


def test_importing_the_loop_is_light():
    code = (
        "import sys, geomkd.distillation; "
        "print([m for m in ('pandas', 'matplotlib', 'sklearn', 'scipy.stats') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
