"""What trains the parameters in place of AdamW and one cycle; runs whose head learns nothing."""

import warnings

import pytest
import torch
from small import blobs, mlp, run_mlp, same, state
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.utils.data import TensorDataset

from geomkd.distillation.running.recipe import ADAMW

# The paper's second recipe, its 240 epochs a fortieth as long: steps at 150, 180 and 210.
RECIPE = {
    "optimizer": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "schedule": lambda o, n: MultiStepLR(o, [n * 150 // 40, n * 180 // 40, n * 210 // 40]),
}


def test_the_second_recipe_steps_at_its_epochs():
    n = 4  # steps of an epoch: 50 samples in batches of 16
    made = []

    def schedule(optimizer, steps_per_epoch):
        made.append(steps_per_epoch)
        return RECIPE["schedule"](optimizer, steps_per_epoch)

    result = run_mlp(epochs=6, optimizer=RECIPE["optimizer"], schedule=schedule)
    assert made == [n, n]  # of backbone with projectors, and of the head
    # Of each epoch the rate of its last step: steps 15, 18 and 21 begin the lower ones.
    expected = [0.05, 0.05, 0.05, 0.005, 5e-4, 5e-5]
    assert result.history["lr"].tolist() == pytest.approx(expected)


def test_the_same_as_torch_steps_alone():
    x, y = blobs()
    student, alone = mlp(), mlp()
    options = {"objective": "ce", "batch_size": len(x), "epochs": 3}
    decaying = {"schedule": lambda o, n: CosineAnnealingLR(o, 3 * n)}
    run_mlp((x, y), student=student, **options, **decaying, optimizer=RECIPE["optimizer"])
    optimizer = RECIPE["optimizer"](alone.parameters())
    schedule = decaying["schedule"](optimizer, 1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(alone(x), y).backward()
        optimizer.step()
        schedule.step()
    for ours, theirs in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_adamw_and_one_cycle_are_the_default():
    lr, weight_decay = ADAMW
    as_given = {
        "optimizer": lambda p: AdamW(p, lr=lr, weight_decay=weight_decay),
        "schedule": lambda o, n: OneCycleLR(o, lr, total_steps=2 * n),
    }
    default, given = run_mlp(), run_mlp(**as_given)
    assert same(state(default.student), state(given.student))
    # One cycle over another optimizer moves its rate, and leaves its momentum.
    cycled = run_mlp(optimizer=RECIPE["optimizer"]).history["lr"]
    assert cycled.max() <= 0.05 and cycled.iloc[-1] < 1e-4


def test_lr_scale_goes_with_groups_of_ones_own():
    student = mlp()
    before = state(student)

    def groups(parameters):
        flat = [p for p in parameters if p.ndim == 1]
        rest = [p for p in parameters if p.ndim > 1]
        return SGD([{"params": flat, "lr": 0.0}, {"params": rest}], lr=0.1)

    rates = {"": 0.0001, "6": 1.0}
    options = {"objective": "ce", "schedule": lambda o, n: ConstantLR(o, 1.0)}
    run_mlp(student=student, optimizer=groups, lr_scale=rates, **options)
    moved = {k: (student.state_dict()[k] - v).norm().item() for k, v in before.items()}
    assert moved["0.bias"] == moved["6.bias"] == 0
    assert 0 < 100 * moved["0.weight"] < moved["6.weight"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer must be callable; got str"),
        ({"schedule": 3}, TypeError, "schedule must be callable; got int"),
        ({"optimizer": SGD, "lr": 0.1}, ValueError, "lr and weight_decay are AdamW's: leave them"),
        ({"optimizer": SGD, "weight_decay": 0}, ValueError, "lr and weight_decay are AdamW's"),
        (
            {"optimizer": lambda p: SGD(p[1:], lr=0.1)},
            ValueError,
            "return an Optimizer of all the parameters that it is given, and of no others; got SGD",
        ),
        ({"optimizer": lambda p: SGD([*p, *mlp().parameters()])}, ValueError, "no others; got SGD"),
        ({"optimizer": lambda p: None}, ValueError, "and of no others; got None"),
        ({"schedule": lambda o, n: None}, TypeError, "return an LRScheduler .*; got NoneType"),
        (
            {"schedule": lambda o, n: ReduceLROnPlateau(o)},
            TypeError,
            "that needs no metric; got ReduceLROnPlateau",
        ),
        (
            {"schedule": lambda o, n: ConstantLR(SGD(mlp().parameters()))},
            TypeError,
            "return an LRScheduler of the optimizer it is given",
        ),
    ],
)
def test_what_is_made_is_checked(options, error, text):
    student = mlp()
    before = state(student)
    with pytest.raises(error, match=text):
        run_mlp(student=student, **options)
    assert same(before, state(student))


# ---- checkpoints ---------------------------------------------------------------------------------


class Stop(Exception):
    pass


def interrupted(folder, epochs, **options):
    def augment(x):
        if len(list(folder.glob("step-*"))) >= epochs:
            raise Stop
        return x

    with pytest.raises(Stop):
        run_mlp(epochs=4, checkpoint_dir=folder, augment=augment, **options)


def test_a_run_goes_on_with_them(tmp_path):
    def plain(x):
        return x

    whole = run_mlp(epochs=4, augment=plain, **RECIPE)
    interrupted(tmp_path, 2, **RECIPE)
    went_on = run_mlp(epochs=4, checkpoint_dir=tmp_path, augment=plain, **RECIPE)
    assert same(state(whole.student), state(went_on.student))
    assert whole.history["lr"].tolist() == went_on.history["lr"].tolist()


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({}, r"optimizer is .SGD \[.* there and None here"),
        ({"optimizer": lambda p: AdamW(p, lr=0.05)}, r"optimizer is .SGD \[.* there and .AdamW \["),
        (
            {"optimizer": lambda p: SGD(p, lr=0.05, momentum=0.8, weight_decay=5e-4)},
            r"optimizer is .SGD \[.*'momentum': 0.9.* there and .SGD \[.*'momentum': 0.8",
        ),
        (
            {"schedule": lambda o, n: MultiStepLR(o, [n, 2 * n])},
            r"schedule is .MultiStepLR \[.*18: 1.* there and .MultiStepLR \[.*4: 1, 8: 1",
        ),
        ({"schedule": lambda o, n: LambdaLR(o, float)}, "there and .LambdaLR"),
    ],
)
def test_a_checkpoint_of_another_one_is_refused(tmp_path, other, text):
    interrupted(tmp_path, 1, **RECIPE)
    with pytest.raises(ValueError, match=f"belongs to another run: .*{text}"):
        run_mlp(epochs=4, checkpoint_dir=tmp_path, augment=abs, **(RECIPE | other if other else {}))


def test_a_checkpoint_of_the_default_is_refused(tmp_path):
    interrupted(tmp_path, 1)
    with pytest.raises(ValueError, match=r"optimizer is None there and .SGD"):
        run_mlp(epochs=4, checkpoint_dir=tmp_path, augment=abs, **RECIPE)


# ---- a head that learns nothing ------------------------------------------------------------------

NOTHING = "the student's head has learned nothing: its training accuracy in the last epoch, {}"


def labelled(n=300, shares=(1, 1, 1)):
    """Noise without classes, and labels in these shares."""
    y = torch.arange(n) % sum(shares)
    y = torch.bucketize(y, torch.tensor(shares).cumsum(0), right=True)
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0)), y


FORMS = {
    "tensors": lambda x, y: (x, y),
    "data set": TensorDataset,
    "samples": lambda x, y: list(zip(x, y.tolist(), strict=True)),
    "probabilities": lambda x, y: (x, 0.1 / 3 + 0.9 * torch.eye(3)[y]),
}


@pytest.mark.parametrize(
    ("form", "shares"),
    # Of a list of samples the shares are not known, and chance is that of balanced classes.
    [(form, (1, 1, 1)) for form in FORMS] + [(form, (8, 1, 1)) for form in FORMS if form[0] != "s"],
)
def test_it_says_so(form, shares):
    x, y = labelled(shares=shares)
    chance = max(shares) / sum(shares)
    # Rates so small that the head says what it said at first, or the commonest label alone.
    student = mlp()
    with torch.no_grad():
        student[-1].bias.copy_(torch.tensor([50.0, 0, 0]))
    options = {"objective": "ce", "lr": 1e-12, "epochs": 1, "student": student}
    with pytest.warns(UserWarning, match=NOTHING.format(f"{chance:.3f}, .* chance, {chance:.3f}")):
        run_mlp(FORMS[form](x, y), **options)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_has_learned_is_not_spoken_of(form):
    x, y = blobs(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run_mlp(FORMS[form](x, y), objective="ce", lr=0.05, epochs=3)
    assert result.history["train_accuracy"].iloc[-1] > 0.6
