"""Options of the training: their checks, and what each does to a step or to a run."""

import copy
import inspect
import re
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial

import pandas
import pytest
import torch
from small import (
    CPU,
    PAIRS,
    blobs,
    images,
    mlp,
    resnet,
    resnet2,
    run_mlp,
    same,
    state,
    vit,
)
from torch import nn

from geomkd.distillation import distill
from geomkd.distillation.loop import train_step
from geomkd.distillation.objectives import Features, Objective
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.distillation.running.batches import Batch
from geomkd.distillation.running.recipe import Recipe
from geomkd.distillation.running.run_state import Run
from geomkd.distillation.running.setup import join
from geomkd.distillation.running.student_step import student_step
from geomkd.distillation.running.teacher import LiveTeacher


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
        ({"objective": "fkd"}, ValueError, r"one of \('features', 'ce', 'kd', .*; got 'fkd'"),
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
        ({"precision": "int8"}, ValueError, r"one of \('fp32', 'bf16', 'fp16'\); got 'int8'"),
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


# ---- a step ----


@contextmanager
def run_of(networks, **options):
    """A run put together as `distill` does it, for single steps."""
    defaults = inspect.signature(distill).parameters
    recipe = Recipe(**{f.name: defaults[f.name].default for f in fields(Recipe)} | options)
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


def maps(width=4):
    """A network of two maps, "2" and "5"."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )  # fmt: skip


ON_TOKENS = [(vit, name) for name in ("features", "kd", "similarity_preserving")]


@pytest.mark.parametrize(("make_student", "name"), [*((maps, n) for n in OBJECTIVES), *ON_TOKENS])
def test_a_step_runs_on_meta_tensors(name, make_student):
    # No data there: a step that asked for a number, or made a tensor elsewhere, would raise.
    student, teacher = make_student(), maps(width=6)
    pairs = [("5", "5" if make_student is maps else "encoder.layers.encoder_layer_3")]
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


# ---- a run ----


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

    class Watching(Objective):
        name, uses_features = "watching", True

        def __call__(self, step):
            kinds.append((step.logits.dtype, step.student_features[0].dtype))
            assert not torch.is_autocast_enabled("cpu")
            return step.logits.sum() + step.student_features[0].sum(), {}

    run_mlp(objective=Watching(), precision="bf16", epochs=1)
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


def double_images():
    x, y = images()
    return x.double(), y


def test_channels_last_gives_the_same_networks():
    options = {"pairs": [("layer4.0", "layer4.0")], "epochs": 1, "progress": False, "lr": 1e-4}
    plain = distill(resnet().double(), resnet2().double(), double_images(), **options)
    last = distill(
        resnet().double(), resnet2().double(), double_images(), channels_last=True, **options
    )
    weight = last.student.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert last.history["loss"][0] == pytest.approx(plain.history["loss"][0], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("objective, backend", [("features", "inductor"), ("kd", "eager")])
def test_a_compiled_student_trains_the_same(objective, backend, monkeypatch):
    if backend == "inductor" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("inductor compiles for processors with vectors")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    n = 48 if backend == "inductor" else 50  # batches of one size: those of two compile twice
    options = {"train": blobs(n), "objective": objective}
    plain, compiled = (run_mlp(compile=on, **options) for on in (False, True))
    assert not hasattr(compiled.student, "_orig_mod")
    assert compiled.history["loss"].iloc[-1] == pytest.approx(
        plain.history["loss"].iloc[-1], rel=1e-4
    )


@pytest.mark.parametrize("pair", [("1", "4"), ("4", "4")])
def test_pairs_turned_round(pair):
    words = f"in this order; got {pair}, and '4' is a layer of the teacher, not of the student"
    with pytest.raises(ValueError, match=re.escape(words)):
        run_mlp(student=mlp((6, 16, 3)), pairs=[pair])
