"""A student that ends in its teacher's head, on torchvision's architectures."""

import copy

import pytest
import torch
from formulas import pooled
from small import images, mobilenet, resnet, resnet2, same, seeded_model, state
from torch import nn
from torchvision.models import DenseNet, SwinTransformer, vgg11_bn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from geomkd.distillation import distill
from geomkd.distillation.teacher_head import FrozenHead, WithTeacherHead, head_behind
from geomkd.network.forward import evaluating
from geomkd.network.hooks import features_of

X, Y = images(4)


def vgg():
    """VGG-11 with a narrow classifier: the original's has 100 million weights."""
    with torch.device("meta"):
        model = vgg11_bn()
    model.to_empty(device="cpu")
    layers = nn.Linear(512 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3)
    model.classifier = nn.Sequential(*layers)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def densenet():
    return DenseNet(8, (2, 2), 16, num_classes=3)


def convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3)


def swin():
    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3)


class Plain(nn.Module):
    """A teacher of three channels whose forward is given."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.fc, self.how, self.calls = nn.Linear(3, 3), forward, 0

    def forward(self, x):
        return self.how(self, x)


HEADS = {
    "resnet": (resnet2, "layer4.0"),
    "resnet, earlier": (resnet2, "layer2.0"),
    "mobilenet": (mobilenet, "features.18"),
    "vgg": (vgg, "features"),
    "vgg, within": (vgg, "features.20"),
    "densenet": (densenet, "features.denseblock2"),
    "convnext": (convnext, "features.3"),
    "swin": (swin, "features.3"),
    "swin, normalised": (swin, "norm"),
}
heads = pytest.mark.parametrize(("make", "name"), HEADS.values(), ids=HEADS.keys())


def modes(model):
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@heads
def test_a_head_behind_a_layer_gives_the_models_logits(make, name):
    teacher = seeded_model(make)
    teacher.get_submodule(name).eval()  # modes may be mixed
    before, flags, rng = state(teacher), modes(teacher), torch.get_rng_state()
    head = head_behind(teacher, name, X[:2])
    # As it was, in training mode with dropout and batch statistics.
    assert same(before, teacher.state_dict()) and modes(teacher) == flags
    assert all(p.requires_grad for p in teacher.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    with evaluating(teacher), evaluating(head):
        features = features_of(teacher, X, [name])[name]
        torch.testing.assert_close(head(features), teacher(X))
    # Nothing of what comes before the layer, and no weight shared with the teacher.
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert not theirs & {p.data_ptr() for p in head.parameters()}
    assert sum(p.numel() for p in head.parameters()) < sum(p.numel() for p in teacher.parameters())


def test_a_head_holds_the_modules_behind_the_layer_alone():
    head = head_behind(seeded_model(resnet2), "layer4.0", X[:2])
    assert {name.split(".")[0] for name in head.state_dict()} == {"fc"}


def test_dropout_that_is_a_function_is_off_in_the_head():
    def drops(model, x):
        x = model.act(model.conv(x)).mean((2, 3))
        return model.fc(nn.functional.dropout(x, 0.5, model.training))

    teacher = seeded_model(lambda: Plain(drops))
    maps = torch.randn(4, 3, 2, 2)
    expected = teacher.fc(maps.mean((2, 3)))
    torch.testing.assert_close(head_behind(teacher, "act", X)(maps), expected)


def test_a_head_may_begin_at_an_input():
    teacher = seeded_model(resnet2)
    head = head_behind(teacher, "fc.input", X[:2])
    vectors = torch.randn(4, 64)
    torch.testing.assert_close(head(vectors), teacher.fc(vectors))


# ---- the student that comes out ----


def with_head(student=resnet, teacher=resnet2, pair=("layer4.0", "layer4.0"), seed=0):
    student, teacher = seeded_model(student), seeded_model(teacher)
    generator = torch.Generator().manual_seed(seed)
    return WithTeacherHead(student, teacher, pair, X, generator=generator), student, teacher


def test_logits_are_the_teachers_head_on_projected_features():
    model, student, teacher = with_head()
    with evaluating(model), evaluating(student), evaluating(teacher):
        features = features_of(student, X, ["layer4.0"])["layer4.0"]
        expected = teacher.fc(model.projector(features).mean((2, 3)))
        assert model(X).shape == (4, 3)
        torch.testing.assert_close(model(X), expected)
    assert [type(m).__name__ for m in model.projector] == [
        *("Conv2d", "BatchNorm2d", "ReLU") * 3,
    ]
    assert model.projector[0].weight.shape == (32, 64, 1, 1)


@pytest.mark.parametrize(
    ("pair", "sides"), [(("layer4.0", "layer2.0"), (4, 1)), (("layer2.0", "layer4.0"), (1, 4))]
)
def test_the_larger_of_the_two_maps_is_pooled(pair, sides):
    model, student, teacher = with_head(pair=pair)
    head = head_behind(teacher, pair[0], X)
    with evaluating(model), evaluating(student), evaluating(head):
        features = features_of(student, X, [pair[1]])[pair[1]]
        assert (features.shape[2], model.grid) == (sides[0], (1, 1))
        small = torch.from_numpy(pooled(features.numpy(), 1))
        torch.testing.assert_close(model(X), head(model.projector(small)), rtol=1e-4, atol=1e-5)


def test_a_teacher_with_channels_last():
    model, student, teacher = with_head(teacher=swin, pair=("features.3", "layer2.0"))
    with evaluating(model), evaluating(student), evaluating(teacher):
        features = features_of(student, X, ["layer2.0"])["layer2.0"]
        projected = model.projector(features).permute(0, 2, 3, 1)
        expected = teacher.head(teacher.norm(projected).mean((1, 2)))
        torch.testing.assert_close(model(X), expected)


def test_a_student_with_channels_last():
    model, student, teacher = with_head(student=swin, pair=("layer2.0", "features.3"))
    head = head_behind(teacher, "layer2.0", X)
    with evaluating(model), evaluating(student), evaluating(head):
        features = features_of(student, X, ["features.3"])["features.3"].permute(0, 3, 1, 2)
        torch.testing.assert_close(model(X), head(model.projector(features)))


def test_the_head_is_frozen_and_never_in_training_mode():
    model, _, _ = with_head(teacher=vgg, pair=("features", "layer4.0"))
    assert not any(p.requires_grad for p in model.head.parameters())
    dropout = next(m for m in model.head.modules() if isinstance(m, nn.Dropout))
    assert model.training and not dropout.training  # from the first
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert model.training is model.student.training is model.projector.training is mode
        assert not any(m.training for m in model.head.modules()) and not dropout.training
    assert isinstance(model.head, FrozenHead) and isinstance(model.head.train(), FrozenHead)


def test_the_gradient_reaches_student_and_projector_through_the_head():
    model, student, teacher = with_head()
    nn.functional.cross_entropy(model.train()(X), Y).backward()
    assert all(p.grad is not None for p in model.projector.parameters())
    assert all(p.grad is not None for p in student.layer4.parameters())
    assert all(p.grad is None for p in [*student.fc.parameters(), *model.head.parameters()])
    assert all(p.grad is None for p in teacher.parameters())


def test_inputs_come_as_the_student_takes_them():
    model, _, _ = with_head()
    with evaluating(model):
        assert torch.equal(model(x=X), model(X))
    student, teacher = seeded_model(resnet), seeded_model(resnet2)

    def forward(model, batch):
        return model(batch["picture"] / 2)

    halved = WithTeacherHead(
        student,
        teacher,
        ("layer4.0", "layer4.0"),
        {"picture": X},
        forward=forward,
        generator=torch.Generator().manual_seed(0),
    )
    with evaluating(halved), evaluating(model):
        torch.testing.assert_close(forward(halved, {"picture": X}), model(X / 2))


def test_the_projector_is_drawn_from_the_generator_alone():
    before = torch.get_rng_state()
    (one, _, _), (again, _, _), (other, _, _) = map(lambda seed: with_head(seed=seed), (3, 3, 4))
    assert same(one.projector.state_dict(), again.projector.state_dict())
    assert not torch.equal(one.projector[0].weight, other.projector[0].weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("teacher", "pair"), [(resnet2, ("layer4.0", "layer4.0")), (swin, ("features.3", "layer4.0"))]
)
def test_a_saved_state_is_loaded_into_a_new_one(tmp_path, teacher, pair):
    model, _, _ = with_head(teacher=teacher, pair=pair)
    with torch.no_grad():
        model.train()(X)  # statistics of batch normalisation move
    torch.save(model.state_dict(), tmp_path / "student.pt")
    fresh = WithTeacherHead(
        seeded_model(resnet, seed=5), seeded_model(teacher, seed=6), pair, X[:2]
    )
    with evaluating(model), evaluating(fresh):
        assert not torch.equal(fresh(X), model(X))
        fresh.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
        assert torch.equal(fresh(X), model(X))
    assert not any(p.requires_grad for p in fresh.head.parameters())


def test_distilling_gives_a_student_with_the_teachers_head(tmp_path):
    student, teacher = seeded_model(resnet), seeded_model(resnet2)
    before, own_head = state(teacher), copy.deepcopy(student.fc)
    pairs = [("layer3.0", "layer3.0"), ("layer4.0", "layer4.0")]
    options = {"objective": "simkd", "epochs": 2, "batch_size": 4, "progress": False}
    result = distill(student, teacher, images(), pairs=pairs, **options)
    assert isinstance(result.student, WithTeacherHead) and result.student.student is student
    assert result.pairs == pairs[-1:] and list(result.history)[1:3] == ["loss", "features"]
    assert same(before, teacher.state_dict()) and teacher.training
    assert same(own_head.state_dict(), student.fc.state_dict())
    assert all(p.requires_grad for p in [*teacher.parameters(), *student.parameters()])
    head = result.student.head.state_dict()
    assert {name.split("fc.")[1]: value for name, value in head.items()}.keys() == {
        "weight",
        "bias",
    }
    assert torch.equal(head["head.fc.weight"], before["fc.weight"])
    result.save(tmp_path / "student.pt")
    assert same(torch.load(tmp_path / "student.pt", weights_only=True), state(result.student))


# ---- what is refused ----


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("name", "kind"), [("fc.input", r"vector features of shape \(64,\)"), ("fc", "vector")]
)
def test_layers_that_are_no_maps_are_refused(side, name, kind):
    pair = ["layer4.0", "layer4.0"]
    pair[side] = name
    text = f"^a teacher's head is put on maps; layer '{name}' gives {kind}.* a sample$"
    with pytest.raises(ValueError, match=text):
        with_head(pair=tuple(pair))


def logits(model, x):
    return model.fc(x.mean((2, 3)))


def branches(model, x):
    x = model.act(model.conv(x))
    return logits(model, x if x.sum() > 0 else -x)


def wants_tensors(model, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected a tensor\ngot {x!r}")
    return logits(model, model.act(model.conv(x)))


def calls_twice(model, x):
    return logits(model, model.act(model.act(model.conv(x)) - 1))


def counts(model, x):
    model.calls += 1
    return logits(model, model.act(model.conv(x))) * model.calls


def goes_around(model, x):
    return logits(model, model.act(model.conv(x)) + x)


def skips(model, x):
    x = model.conv(x)
    return logits(model, model.act(x) - x)


def never_calls(model, x):
    return logits(model, model.conv(x))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (branches, "cannot be cut off: symbolically traced variables cannot be used as inputs"),
        (wants_tensors, "cannot be cut off: expected a tensor$"),
        (calls_twice, "cannot be cut off: its module is called 2 times"),
        (goes_around, "cannot be cut off: a path avoids it, through add"),
        (skips, "cannot be cut off: a path avoids it, through conv"),
        (counts, "gives other logits on its own"),
        (never_calls, "cannot be cut off: its module is called 0 times"),
    ],
)
def test_teachers_whose_head_cannot_be_cut_off(forward, reason):
    teacher = seeded_model(lambda: Plain(forward))
    teacher.fc.eval()
    before, flags = state(teacher), modes(teacher)
    with pytest.raises(ValueError, match=f"^the teacher's head behind 'act' {reason}") as caught:
        head_behind(teacher, "act", X)
    assert "\n" not in str(caught.value)
    assert same(before, teacher.state_dict()) and modes(teacher) == flags


def test_a_layer_within_a_residual_block_is_refused():
    text = "the teacher's head behind 'layer4.0.bn2' cannot be cut off: a path avoids it, through"
    with pytest.raises(ValueError, match=text):
        with_head(pair=("layer4.0.bn2", "layer4.0"))
