"""Where the student is cut, and what reaches its backbone."""

import copy

import pytest
import torch
from small import blobs, images, mlp, mobilenet, resnet, run_mlp, same, state, vit
from torch import nn

from geomkd.distillation.detached_head import split_student, student_outputs, tapped
from geomkd.distillation.objectives import CrossEntropy, Features, LogitDistillation, StepTensors
from geomkd.network.layers import describe_layers

# ---- what reaches the backbone ----


def gradients(student, pairs, objective, *, cut):
    """Gradients by parameter of one step's loss, with the head cut off or not."""
    x, y = images()
    names = [name for _, name in pairs]
    student.train()
    features, logits = student_outputs(student, x, names, cut=cut)
    step = StepTensors(y, logits, student_features=list(features.values()))
    student.zero_grad(set_to_none=True)
    objective(step)[0].backward()
    return {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize(
    ("make", "cut", "head"),
    [
        (resnet, "layer4.0", {"fc.weight", "fc.bias"}),
        (resnet, "layer4", {"fc.weight", "fc.bias"}),
        (resnet, "fc.input", {"fc.weight", "fc.bias"}),
        (vit, "encoder.layers.encoder_layer_3", {"encoder.ln", "heads"}),
        (vit, "heads.head.input", {"heads"}),
        (mobilenet, "features.18", {"classifier"}),
    ],
)
def test_cross_entropy_stays_out_of_the_backbone(make, cut, head):
    def in_head(name):
        return any(name.startswith(prefix) for prefix in head)

    student = make()
    with_cut = gradients(student, [("", cut)], CrossEntropy(), cut=cut)
    assert all((gradient is not None) == in_head(name) for name, gradient in with_cut.items())
    without = gradients(student, [("", cut)], CrossEntropy(), cut=None)
    assert all(gradient is not None for gradient in without.values())


def test_the_cut_changes_neither_features_nor_logits():
    student, x = resnet().eval(), images()[0]
    features, logits = student_outputs(student, x, ["layer4.0"], cut="layer4.0")
    torch.testing.assert_close(logits, student(x), rtol=0, atol=0)
    assert features["layer4.0"].requires_grad and logits.requires_grad


def test_logit_losses_do_not_change_the_backbones_training():
    # Other labels: another head, the same backbone to the last bit, clipping included.
    x, y = blobs()
    options = {"clip_norm": 0.1, "pairs": [("4", "4")]}
    one = run_mlp((x, y), **options).student.state_dict()
    two = run_mlp((x, (y + 1) % 3), **options).student.state_dict()
    equal = {name: torch.equal(one[name], two[name]) for name in one}
    assert equal == {name: name[0] in "03" for name in one}


class InPlaceAfterBlock(nn.Module):
    def __init__(self):
        super().__init__()
        # The backward pass of tanh needs its output, which the next module overwrites.
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.act(self.body(x)))


def test_an_in_place_operation_behind_the_cut_is_harmless():
    result = run_mlp(student=InPlaceAfterBlock(), pairs=[("4", "body")])
    student, x = result.student, blobs()[0]
    features, _ = student_outputs(student, x, ["body"], cut="body")
    assert (features["body"] < 0).any()


def test_features_are_those_before_an_in_place_operation():
    student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    features, _ = student_outputs(student, blobs()[0], ["0"])
    assert (features["0"] < 0).any()


def test_nothing_is_taken_without_gradients():
    student, x = mlp(), blobs()[0]
    with tapped(student, ["1"], cut="4") as features:
        with torch.no_grad():
            student(x)
        assert not features
        student(x)
        assert [name for name in features if isinstance(name, str)] == ["1"]
    student(x + 1)
    assert not student[1]._forward_hooks and not student[4]._forward_hooks


class TupleBlock(nn.Module):
    def __init__(self, leak=False):
        super().__init__()
        self.linear, self.leak = nn.Linear(6, 6), leak

    def forward(self, x):
        y = torch.relu(self.linear(x))
        return y, (y if self.leak else None)


class TupleNet(nn.Module):
    def __init__(self, leak=False):
        super().__init__()
        self.one, self.two, self.head = TupleBlock(), TupleBlock(leak), nn.Linear(6, 3)

    def forward(self, x):
        y, extra = self.two(self.one(x)[0])
        return {"logits": self.head(y if extra is None else y + extra)}


def test_blocks_that_return_tuples():
    result = run_mlp(student=TupleNet(), pairs=[("1", "one"), ("4", "two")])
    assert result.history["features"].notna().all()


class SharedReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.head(self.relu(self.b(self.relu(self.a(x)))))


@pytest.mark.parametrize(
    ("layer", "backbone"), [("relu", {"a"}), ("relu#2", {"a", "b"}), ("b.input", {"a"})]
)
def test_the_cut_is_at_the_call_that_is_named(layer, backbone):
    student, x = SharedReLU(), blobs()[0]
    split = split_student(student, x, describe_layers(student, [layer], x))
    names = {id(p): name for name, p in student.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in split.backbone} == backbone
    assert {names[id(p)].split(".")[0] for p in split.head} == {"a", "b", "head"} - backbone


def test_the_cut_is_at_the_layer_that_is_run_last_whatever_the_order_of_the_pairs():
    student, x = mlp(), blobs()[0]
    for names in (["1", "4"], ["4", "1"]):
        assert split_student(student, x, describe_layers(student, names, x)).cut == "4"


def test_every_forward_pass_is_cut():
    student, (x, y) = mlp(), blobs()

    def twice(model, batch):
        model(batch)
        return model(batch)

    _, logits = student_outputs(student, x, ["4"], cut="4", forward=twice)
    nn.functional.cross_entropy(logits, y).backward()
    assert student[0].weight.grad is None and student[6].weight.grad is not None


# ---- paths around the cut ----


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.body(x) + x)


def test_a_path_around_the_cut_is_named():
    text = (
        r"path from parameter 'stem.weight' to the logits avoids 'body', the last paired student "
        r"layer \(2 such parameters\)"
    )
    before = state(student := Shortcut())
    with pytest.raises(ValueError, match=text):
        run_mlp(student=student, pairs=[("4", "body")])
    assert same(before, student.state_dict())


def test_a_second_tensor_of_a_block_is_a_path_too():
    with pytest.raises(
        ValueError, match=r"path from parameter 'one.linear.weight' .* avoids 'two'"
    ):
        run_mlp(student=TupleNet(leak=True), pairs=[("4", "two")])


def test_tied_parameters_are_a_path_too():
    student = mlp((6, 6, 6, 6))
    student[6].weight = student[0].weight
    with pytest.raises(ValueError, match=r"path from parameter '0.weight' .* avoids '4'"):
        run_mlp(student=student)


def test_a_residual_inside_a_block_is_a_path_around_its_parts():
    x = images(2)[0]
    student = resnet()
    with pytest.raises(ValueError, match=r"avoids 'layer4.0.bn2'"):
        split_student(student, x, describe_layers(student, ["layer4.0.bn2"], x))


def test_nothing_to_train_on_one_side_of_the_cut():
    with pytest.raises(ValueError, match="no trainable parameter behind '6'"):
        run_mlp(student=mlp(), pairs=[("4", "6")])
    student = mlp()
    student[0].requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter before '1'"):
        run_mlp(student=student, pairs=[("4", "1")])


def test_the_probe_leaves_no_trace():
    student, x = resnet(), images(4)[0]
    student.fc.weight.grad = torch.ones_like(student.fc.weight)
    student.layer1.eval()
    before, modes = state(student), [m.training for m in student.modules()]
    rng = torch.get_rng_state()
    split_student(student, x, describe_layers(student, ["layer4.0"], x))
    assert same(before, student.state_dict())
    assert modes == [m.training for m in student.modules()]
    grads = {name for name, p in student.named_parameters() if p.grad is not None}
    assert grads == {"fc.weight"} and (student.fc.weight.grad == 1).all()
    assert torch.equal(rng, torch.get_rng_state())


def test_parameters_that_nothing_reaches_are_left_alone():
    student = mlp()
    student.unused = nn.Linear(2, 2)
    student.unused.weight.grad = torch.ones(2, 2)
    student.forward = lambda x: nn.Sequential(*list(student)[:7])(x)
    before = student.unused.weight.clone()
    run_mlp(student=student, weight_decay=0.5)
    assert torch.equal(student.unused.weight, before)


def by_parts(model, x):
    """The same numbers, but the model itself is not called."""
    for module in model:
        x = module(x)
    return x


@pytest.mark.parametrize("objective", ["features", "feature_kd"])
def test_forward_need_not_call_the_student_itself(objective):
    plain, other = (
        run_mlp(objective=objective, forward=forward, epochs=3) for forward in (None, by_parts)
    )
    assert same(plain.student.state_dict(), other.student.state_dict())


def test_of_several_calls_the_last_counts_on_both_sides():
    seen = []

    class Spying(Features):
        def __call__(self, step):
            seen.append((step.student_features[0].detach(), step.teacher_features[0]))
            return super().__call__(step)

    twin = mlp(seed=1)
    for objective in (Spying(), Spying() + LogitDistillation()):
        student, teacher = copy.deepcopy(twin), copy.deepcopy(twin)
        options = {"pairs": [("1", "1")], "epochs": 1, "batch_size": 50, "lr": 1e-12}
        run_mlp(student=student, teacher=teacher, objective=objective, **options,
                forward=lambda m, x: m(x) + m(-x))  # fmt: skip
        torch.testing.assert_close(*seen.pop(0))
        seen.clear()


def test_a_student_of_another_width_in_training_is_refused():
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = mlp((6, 16, 8)), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x)) if self.training else self.body(x)

    text = r"student returns \(16, 3\) in training and \(B, 8\) in evaluation: give forward="
    with pytest.raises(ValueError, match=text):
        run_mlp(student=Embedding(), objective="ce", pairs=None)


def test_a_student_that_was_compiled_and_run_before():
    plain, compiled = mlp(), mlp()
    compiled.compile(backend="eager")
    for training in (True, False):
        compiled.train(training)(blobs()[0])
    results = [run_mlp(student=student.train()) for student in (plain, compiled)]
    assert same(*(result.student.state_dict() for result in results))
