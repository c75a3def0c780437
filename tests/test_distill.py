"""The distillation loop, on real torchvision models where shapes matter."""

import copy
import itertools
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.models import MobileNetV2
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from geomkd.distillation import distill
from geomkd.distillation import loop as loop_module
from geomkd.distillation.batches import Batches
from geomkd.distillation.cut import split_student, student_outputs
from geomkd.distillation.loop import Run, train_step
from geomkd.distillation.networks import join
from geomkd.distillation.objectives import CrossEntropy, Features, LogitDistillation, StepTensors
from geomkd.layers import describe_layers
from geomkd.pairing import pair_layers

CPU = torch.device("cpu")


def seeded_model(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def resnet(n=3):
    return seeded_model(lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=n))


def resnet2(n=3):
    return seeded_model(lambda: ResNet(BasicBlock, [2, 1, 1, 1], num_classes=n), seed=1)


def mobilenet(n=3):
    return seeded_model(lambda: MobileNetV2(num_classes=n, width_mult=0.25))


def vit(n=3, width=16, layers=4, seed=0):
    return seeded_model(
        lambda: VisionTransformer(32, 8, layers, 2, width, 2 * width, num_classes=n), seed
    )


def wide_vit(n=3):
    return vit(n, width=24, layers=6, seed=1)


def mlp(widths=(6, 16, 16, 3), seed=0, dropout=0.0):
    def make():
        layers = []
        for i, o in itertools.pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout)]
        return nn.Sequential(*layers[:-2])

    return seeded_model(make, seed)


def images(n=8, classes=3, size=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, size, size, generator=generator)
    return x, torch.arange(n) % classes


def blobs(n=50):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    centres = 2 * torch.randn(3, 6, generator=generator)
    return centres[y] + torch.randn(n, 6, generator=generator), y


PAIRS = [("1", "1"), ("4", "4")]


def run_mlp(train=None, *, student=None, teacher=None, **options):
    options = {"pairs": PAIRS, "epochs": 2, "batch_size": 16, "progress": False} | options
    student = student or mlp()
    teacher = teacher or mlp((6, 32, 32, 3), seed=1)
    return distill(student, teacher, train or blobs(), **options)


def state(model):
    return copy.deepcopy(model.state_dict())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def pairs_of(teacher, student, k=4):
    ours = [s for _, s in pair_layers([str(i) for i in range(k)], teacher, images(2)[0])]
    return pair_layers(ours, student, images(2)[0])


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


def optimiser(networks, lr=0.01):
    optimiser = torch.optim.AdamW([{"params": g} for g in networks.groups], lr=lr)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=10)


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
    assert result.pairs == pairs and len(result.projectors) == 4


def test_a_head_input_as_last_pair():
    teacher, student = resnet2(), resnet()
    pairs = [("layer3.0", "layer3.0"), ("fc.input", "fc.input")]
    result = distill(student, teacher, images(), pairs=pairs, epochs=8, lr=0.003, progress=False)
    assert result.history["features"].iloc[-1] < result.history["features"].iloc[0]
    assert [type(p.project) for p in result.projectors] == [nn.Conv2d, nn.Linear]


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
        return networks.projectors[0].project.weight

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


# ---- data ----


def test_tensors_a_data_set_and_a_loader_give_the_same_student():
    x, y = blobs()
    data_set = TensorDataset(x, y)
    states = [
        state(run_mlp(train).student)
        for train in ((x, y), data_set, DataLoader(data_set, batch_size=3), (x.numpy(), y.numpy()))
    ]
    assert all(same(states[0], other) for other in states[1:])


def test_a_loaders_workers_and_collate_function_are_used():
    x, y = blobs()

    def doubled(items):
        x, y = torch.utils.data.default_collate(items)
        return 2 * x, y

    loader = DataLoader(TensorDataset(x, y), num_workers=1, collate_fn=doubled)
    assert same(
        state(run_mlp(loader, epochs=1).student), state(run_mlp((2 * x, y), epochs=1).student)
    )


class Dicts(Dataset):
    def __init__(self, more=()):
        self.x, self.y = blobs()
        self.more = dict(more)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input": self.x[i], "label": self.y[i], **self.more}


def test_batches_that_are_mappings():
    expected = state(run_mlp().student)
    assert same(expected, state(run_mlp(Dicts(), label_key="label").student))
    assert same(expected, state(run_mlp(Dicts()).student))
    keys = {"label_key": "label", "input_key": "input"}
    assert same(expected, state(run_mlp(Dicts({"other": 1}), **keys).student))

    def forward(model, batch):
        return model(batch["input"])

    more = Dicts({"other": 1})
    assert same(expected, state(run_mlp(more, label_key="label", forward=forward).student))


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 8, [3]), (3, 1, [1, 1, 1]), (8, 4, [4, 4])],
)
def test_a_last_batch_of_one_is_left_out_of_training_only(n, batch_size, sizes):
    data = (torch.arange(n)[:, None].float(), torch.zeros(n, dtype=torch.long))
    batches = Batches(data, batch_size, device=CPU, seed=0)
    assert [len(y) for _, y in batches] == sizes
    assert len(batches) == len(sizes) and batches.n_samples == sum(sizes)
    val = Batches(data, batch_size, device=CPU)
    assert torch.equal(torch.cat([x for x, _ in val]), data[0])


def test_every_epoch_has_an_order_of_its_own():
    data = (torch.arange(10)[:, None].float(), torch.zeros(10, dtype=torch.long))

    def epochs(seed):
        batches = Batches(data, 4, device=CPU, seed=seed)
        return [torch.cat([x for x, _ in batches]).flatten().tolist() for _ in range(2)]

    one, two = epochs(0)
    assert one != two and sorted(one) == sorted(two) == list(range(10))
    assert epochs(0) == [one, two] and epochs(1) != [one, two]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("train", "error", "text"),
    [
        (blobs()[0], TypeError, "train must be a pair of tensors, .*; got Tensor"),
        (Stream(), TypeError, "train must be .* map-style Dataset .*; got Stream"),
        (DataLoader(Stream()), TypeError, "train must be .*; got Stream"),
        (None, TypeError, "train must be .*; got NoneType"),
        ((*blobs(), 1), ValueError, r"train must be a pair \(inputs, labels\); got 3 items"),
        (([[0.0]], [0]), TypeError, "train inputs must be a torch.Tensor .*; got list"),
        ((torch.zeros(4), torch.zeros(4)), ValueError, r"train inputs must be \(n, ...\)"),
        ((torch.zeros(4, 6), torch.zeros(4)), TypeError, "train: 1-d labels must be integers"),
        (
            (torch.zeros(4, 6), torch.zeros(5, dtype=torch.long)),
            ValueError,
            "train: labels must be as many as the features, n = 4; got 5",
        ),
        (
            (torch.zeros(1, 6), torch.zeros(1, dtype=torch.long)),
            ValueError,
            "number of samples in train must be at least 2; got 1",
        ),
        (
            (torch.zeros(4, 6), torch.tensor([0, 1, 2, 3])),
            ValueError,
            r"train: labels must be 0 ... 2 for the student's 3 logits; got 0 ... 3",
        ),
        (
            (torch.zeros(4, 6), torch.tensor([0, 1, 2, -1])),
            ValueError,
            r"train: labels must be 0 ... 2 .*; got -1 ... 2",
        ),
        (
            TensorDataset(torch.zeros(4, 6)),
            ValueError,
            r"train: a batch must be \(inputs, labels\); got 1 item",
        ),
        (
            DataLoader(Dicts(), batch_size=None),
            ValueError,
            "train: a DataLoader with batch_size=None does not collate",
        ),
    ],
)
def test_training_data_is_checked_before_training(train, error, text):
    student = mlp()
    before = state(student)
    with pytest.raises(error, match=text):
        distill(student, mlp((6, 32, 32, 3)), train, pairs=PAIRS, progress=False)
    assert same(before, student.state_dict())


def test_validation_data_is_checked_before_training():
    student = mlp()
    before = state(student)
    with pytest.raises(ValueError, match=r"val: labels must be 0 ... 2"):
        run_mlp(student=student, val=(torch.zeros(4, 6), torch.tensor([0, 1, 2, 3])))
    assert same(before, student.state_dict())


def test_labels_that_a_data_set_keeps_are_checked_before_training():
    data_set = Dicts()
    data_set.targets = [0] * (len(data_set) - 1) + [7]
    with pytest.raises(ValueError, match=r"got 0 ... 7"):
        run_mlp(data_set)
    x, y = blobs()
    with pytest.raises(ValueError, match=r"train: labels must be 0 ... 2 .*; got 1 ... 3"):
        run_mlp(TensorDataset(x, y + 1))


def test_labels_that_come_later_are_checked_as_they_come():
    later = Dicts()
    later.y = later.y + 1
    with pytest.raises(ValueError, match=r"train: labels must be 0 ... 2 .*; got 1 ... 3"):
        run_mlp(later)


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
        ({"objective": "fkd"}, ValueError, r"one of \['features', 'ce', 'kd'\]; got 'fkd'"),
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
        return Features.__call__(Features(), step)

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


@pytest.mark.parametrize("objective", [Features(), Features("channel"), LogitDistillation()])
@pytest.mark.parametrize("make_student", [resnet, vit])
def test_a_step_runs_on_meta_tensors(objective, make_student):
    # No data there: a step that asked for a number, or made a tensor elsewhere, would raise.
    student, teacher = make_student(), resnet2()
    pairs = [("layer4.0", pairs_of(teacher, student, 1)[0][1])]
    networks = join(student, teacher, objective, pairs, images(2)[0])
    for module in (student, teacher, networks.projectors):
        module.to("meta")
    networks = join_again(networks)
    run = Run(networks, *optimiser(networks), clip_norm=1.0)
    x, y = (tensor.to("meta") for tensor in images())
    values = train_step(run, x, y)
    assert all(value.is_meta and value.shape == () for value in values.values())
    assert next(iter(values)) == "loss" and list(values)[-1] == "train_accuracy"


def join_again(networks):
    """The same networks with groups of the parameters that they have on another device."""
    from dataclasses import replace

    everything = [*networks.student.parameters(), *networks.projectors.parameters()]
    return replace(networks, groups=[everything])


def test_a_step_updates_each_side_by_its_own_clipped_gradient():
    x, y = blobs()
    networks = join(mlp(), mlp((6, 32, 32, 3), seed=1), Features(), PAIRS, x)
    sgd = torch.optim.SGD([{"params": group} for group in networks.groups], lr=1.0)
    before = [[p.detach().clone() for p in group] for group in networks.groups]
    constant = torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)
    train_step(Run(networks, sgd, constant, clip_norm=1e-3), x, y)
    for group, old in zip(networks.groups, before, strict=True):
        moved = torch.cat([(p - o).flatten() for p, o in zip(group, old, strict=True)])
        assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


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
