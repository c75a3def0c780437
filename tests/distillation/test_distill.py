"""The distillation loop, on real torchvision models where shapes matter."""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from small import (
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

from geomkd.datasets import load_folder
from geomkd.distillation import distill
from geomkd.distillation.objectives import Features, LogitDistillation
from geomkd.distillation.running.setup import join

# ---- architectures ----


@pytest.mark.parametrize(
    ("make_teacher", "make_student"),
    [(resnet2, resnet), (resnet2, mobilenet), (wide_vit, vit), (resnet2, vit), (wide_vit, resnet)],
)
def test_every_mix_of_architectures_overfits_a_batch(make_teacher, make_student):
    teacher, student = make_teacher(), make_student()
    pairs = pairs_of(teacher, student)
    options = {"epochs": 10, "batch_size": 8, "lr": 0.01, "progress": False, "pairs": pairs}
    result = distill(student, teacher, images(), objective=Features("channel"), **options)
    first, last = result.history["loss"].iloc[0], result.history["loss"].iloc[-1]
    assert last < 0.9 * first
    assert result.pairs == pairs and len(result.projectors.projectors) == 4


def test_a_head_input_as_last_pair():
    teacher, student = resnet2(), resnet()
    pairs = [("layer3.0", "layer3.0"), ("fc.input", "fc.input")]
    result = distill(student, teacher, images(), pairs=pairs, epochs=8, lr=0.01, progress=False)
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
    few = Counting.calls  # when its work is counted, and when its layers are described
    run_mlp(teacher=teacher, objective="kd")
    assert few == 2 and Counting.calls - few == 2 + 2 * 4


def test_teacher_and_student_share_no_parameter():
    model = mlp()
    with pytest.raises(
        ValueError, match=r"may share no parameter with the teacher; got .*'0.weight'"
    ):
        run_mlp(student=model, teacher=model)


# ---- the student ----


def test_the_student_is_trained_in_place():
    student = mlp()
    before = state(student)
    result = run_mlp(student=student)
    assert result.student is student and not same(before, student.state_dict())
    assert all(p.grad is None for p in student.parameters())
    assert not student[0]._forward_hooks and not student._forward_pre_hooks


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


def test_kd_needs_equal_numbers_of_logits():
    with pytest.raises(ValueError, match="got 5 from the teacher and 3 from the student"):
        run_mlp(teacher=mlp((6, 8, 8, 5)), objective="kd")
    run_mlp(teacher=mlp((6, 8, 8, 5)), objective="features", epochs=1)


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


# ---- when something goes wrong ----


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


def test_validation_classes_are_numbered_as_the_training_classes(tmp_path):
    for split, names in (("train", "abc"), ("val", "ac"), ("same", "abc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{i}.png")
    train, val, same = (load_folder(tmp_path / split) for split in ("train", "val", "same"))
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    options = {"objective": "ce", "epochs": 1, "progress": False}
    text = r"val must have the classes of train, \['a', 'b', 'c'\]; got \['a', 'c'\]"
    with pytest.raises(ValueError, match=text):
        distill(student, None, train, val=val, **options)
    distill(student, None, train, val=same, **options)
