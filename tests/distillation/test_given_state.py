"""What a user hands over in some state: frozen parts, several heads, modes of the forward pass."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from geomkd import distill, score_layers
from geomkd.network.forward import frozen_modules

X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) + 3, torch.arange(64) % 3
RUN = {"epochs": 2, "batch_size": 32, "progress": False}


def network(kind=nn.Sequential, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5)]
        parts += [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
    return kind(*parts)


# ---- frozen parts --------------------------------------------------------------------------------


def freeze(student, whole):
    """The first two layers; in a student that is in training mode, or in evaluation mode."""
    if whole:
        student.eval()
    for module in student[:2]:
        module.requires_grad_(False).eval()


@pytest.mark.parametrize("objective", ["ce", "features"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_frozen_stays_still(objective, whole):
    student, modes = network(), []
    freeze(student, whole)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    student[6].register_forward_pre_hook(
        lambda *_: modes.append([m.training for m in student]) if student.training else None
    )
    distill(student, network(), (X, Y), pairs=[("2", "2"), ("5", "5")], objective=objective,
            val=(X, Y), **RUN)  # fmt: skip
    after = student.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"4.weight", "4.bias", "6.weight", "6.bias"}
    assert modes and all(m == [False, False, True, True, True, True, True] for m in modes)


def test_a_resumed_run_keeps_it_still(tmp_path):
    def run(epochs, **options):
        student = network()
        freeze(student, whole=False)
        return distill(student, None, (X, Y), objective="ce", **RUN | {"epochs": epochs}, **options)

    once = run(2, checkpoint_dir=tmp_path / "a").student.state_dict()
    again = run(2, checkpoint_dir=tmp_path / "a").student.state_dict()
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert once["1.num_batches_tracked"] == 0


def test_a_student_in_evaluation_mode_is_trained_as_one_in_training_mode():
    ran = []
    for student in (network(), network().eval()):
        distill(student, None, (X, Y), objective="ce", **RUN)
        ran.append(student.state_dict())
    assert all(torch.equal(ran[0][key], ran[1][key]) for key in ran[0])


def test_frozen_modules():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model = nn.Sequential(inner, nn.BatchNorm1d(2, affine=False), nn.Dropout())
    assert frozen_modules(model) == [] == frozen_modules(model.eval())
    inner.requires_grad_(False)
    frozen = frozen_modules(model.eval())
    # The model holds nothing but what is frozen, so it is frozen as a whole.
    assert frozen == list(model.modules())
    model.train()
    assert frozen_modules(model) == []
    model[1].eval()  # of which statistics are all there is
    assert frozen_modules(model) == [model[1]]
    inner.eval()[1].train()
    assert frozen_modules(model) == [inner, inner[0], inner[2], model[1]]


# ---- two heads -----------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Logits of a class and of a distillation token, whose mean counts in the end."""

    def __init__(self, always=False):
        super().__init__()
        self.body, self.always = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), always
        self.head, self.second = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        x = self.body(x)
        two = self.head(x), self.second(x)
        return two if self.training or self.always else sum(two) / 2


@pytest.mark.parametrize("objective", ["ce", "kd", "features"])
def test_a_second_head_in_training_is_refused(objective):
    with pytest.raises(ValueError, match="2 tensors of logits in training and 1 in evaluation"):
        distill(TwoHeads(), network(), (X, Y), pairs=[("2", "body")], objective=objective, **RUN)


def test_a_forward_that_makes_one_of_them_trains_both():
    def forward(model, x):
        found = model(x)
        return sum(found) / 2 if isinstance(found, tuple) else found

    student = TwoHeads()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    distill(student, None, (X, Y), objective="ce", forward=forward, **RUN)
    assert not any(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_two_heads_at_all_times_are_as_before():
    history = distill(TwoHeads(always=True), None, (X, Y), objective="ce", **RUN).history
    assert history["loss"].notna().all()


# ---- forward passes in modes of their own --------------------------------------------------------


WITH_VECTORS = ("features", "kd", "kd_standardized", "fitnet", "similarity_preserving")
WITH_VECTORS += ("relational", "feature_kd", "semckd")


class Inference(nn.Sequential):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("objective", WITH_VECTORS)
@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_under_inference_mode(tmp_path, objective, cached):
    options = {"pairs": [("2", "2"), ("5", "5")], "objective": objective, **RUN}
    if cached:
        options["cache_dir"] = tmp_path
    ran = [
        distill(network(), network(kind), (X, Y), **options) for kind in (nn.Sequential, Inference)
    ]
    assert ran[0].history["loss"].tolist() == ran[1].history["loss"].tolist()


class Checkpointed(nn.Module):
    """Its body is run within a checkpoint, in training alone."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.head, self.reentrant = nn.Linear(6, 16), nn.Linear(16, 3), reentrant
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(16, 16), nn.ReLU())

    def forward(self, x):
        x = self.first(x)
        if self.training:
            return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))
        return self.head(self.body(x))


def test_a_reentrant_checkpoint_around_a_layer_is_one_clear_line():
    run = {"pairs": [("2", "body.0")], "objective": "fitnet", **RUN}
    with pytest.raises(ValueError, match=r"student layer 'body.0' is not run with gradients"):
        distill(Checkpointed(True), network(), (X, Y), **run)
    assert distill(Checkpointed(False), network(), (X, Y), **run).history["loss"].notna().all()


def test_a_reentrant_checkpoint_before_a_layer_works():
    run, ran = {"pairs": [("2", "head.input")], **RUN}, []
    for kind in (True, False):
        torch.manual_seed(0)
        ran.append(distill(Checkpointed(kind), network(), (X, Y), **run).history)
    assert ran[0]["loss"].tolist() == pytest.approx(ran[1]["loss"].tolist())


# ---- offloaded weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_offloaded_weights_are_one_clear_line(which):
    networks = {"student": network(), "teacher": network()}
    networks[which][4].to("meta")
    with pytest.raises(ValueError, match=f"the {which}'s parameter '4.weight' has no values"):
        distill(networks["student"], networks["teacher"], (X, Y), pairs=[("2", "2")], **RUN)
    with pytest.raises(ValueError, match=r"the model's parameter '4.weight' has no values"):
        score_layers(networks[which], (X, Y), progress=False)
