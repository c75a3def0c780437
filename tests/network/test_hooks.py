"""Capturing features: what is copied, when, and that nothing stays behind."""

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn

from geomkd.network.forward import (
    call,
    evaluating,
    first_tensor,
    modules_by_name,
    replace_first_tensor,
    unwrap,
)
from geomkd.network.hooks import capture, features_of


class Twice(nn.Module):
    """Calls one ReLU twice and one of its layers never."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(3, 3) for _ in range(3))
        self.relu = nn.ReLU()
        self.finished = 0

    def forward(self, x):
        y = self.second(self.relu(self.first(x)))
        y = self.relu(y)
        self.finished += 1
        return y


@pytest.fixture
def x():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Twice().eval()


def test_every_call_and_a_single_call(model, x):
    with capture(model, ["relu"]) as every, capture(model, ["relu#2"]) as second:
        expected = model(x)
    assert list(every) == ["relu", "relu#2"]
    assert list(second) == ["relu#2"]
    assert torch.equal(second["relu#2"], expected)
    assert torch.equal(every["relu"], model.first(x).relu())


def test_counting_starts_again_with_each_forward_pass(model, x):
    with capture(model, ["relu"]) as features:
        model(x)
        model(x[:1])
        assert list(features) == ["relu", "relu#2"]
        assert {len(tensor) for tensor in features.values()} == {1}
        model.relu(x)  # outside of a forward pass it goes on
        assert list(features) == ["relu", "relu#2", "relu#3"]


def test_input_of_a_module(model, x):
    with capture(model, ["second.input", "relu.input#2", "first.input"]) as features:
        model(x)
    assert list(features) == ["first.input", "second.input", "relu.input#2"]
    assert torch.equal(features["first.input"], x)
    assert torch.equal(features["second.input"], model.first(x).relu())


def test_input_given_by_keyword(x):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(input=x + 1)

    with capture(Keyword(), ["inner.input"]) as features:
        model = Keyword()
        model(x)
    assert features == {}  # another object's calls are not seen
    with capture(model, ["inner.input"]) as features:
        model(x)
    assert torch.equal(features["inner.input"], x + 1)


def test_module_that_is_named_input(x):
    model = nn.Sequential(OrderedDict(input=nn.Linear(3, 2)))
    with capture(model, ["input", "input.input"]) as features:
        y = model(x)
    assert torch.equal(features["input"], y)
    assert torch.equal(features["input.input"], x)


def test_in_place_operations_do_not_reach_the_copies(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    names = ["0", "1.input"]
    with torch.no_grad():
        before = model[0](x)
        assert (before < 0).any()
        with capture(model, names) as features:
            model(x)
        for name in names:
            assert torch.equal(features[name], before)
            assert torch.equal(features_of(model, x, [*names, "2"])[name], before)


def test_gradients_flow_if_asked_for(model, x):
    with capture(model, ["first"]) as features:
        model(x)
    assert not features["first"].requires_grad
    with capture(model, ["first"], detach=False) as features:
        model(x)
    features["first"].sum().backward()
    assert torch.allclose(model.first.bias.grad, torch.full((3,), 4.0))


@pytest.mark.parametrize("fail", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_whatever_happens(model, x, fail):
    with pytest.raises(fail), capture(model, ["relu", "first.input"]):
        model(x)
        raise fail
    with (
        pytest.raises(ValueError, match="no module 'nowhere'"),
        capture(model, ["relu", "nowhere"]),
    ):
        pass
    with pytest.raises(ValueError, match="layers never run"):
        features_of(model, x, ["unused"])
    features_of(model, x, ["relu"])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_features_of_stops_early(model, x):
    features = features_of(model, x, ["second", "relu"])
    assert list(features) == ["second", "relu"]
    assert torch.equal(features["relu"], model.first(x).relu())  # the first call alone
    assert model.finished == 0
    assert not features["second"].requires_grad
    assert torch.equal(features_of(model, x, ["relu#2"])["relu#2"], model(x))


def test_features_of_takes_what_it_is_told_to(model, x):
    taken = features_of(model, x, ["relu", "first"], take=lambda name, t: (name, t.sum()))
    assert taken["first"] == ("first", model.first(x).sum())
    assert list(taken) == ["relu", "first"]


def test_features_of_with_forward_and_structured_batches(model, x):
    expected = features_of(model, x, ["relu#2"])["relu#2"]
    for batch in ([x], (x,), {"x": x}, UserDict(x=x)):
        assert torch.equal(features_of(model, batch, ["relu#2"])["relu#2"], expected)
    batch = {"image": x, "label": 1}
    forward = lambda model, batch: model(batch["image"])  # noqa: E731
    assert torch.equal(features_of(model, batch, ["relu#2"], forward=forward)["relu#2"], expected)


def test_features_of_names_what_is_wrong(model, x):
    with pytest.raises(
        ValueError, match="layers never run in this forward pass: 'unused', 'relu#3'"
    ):
        features_of(model, x, ["unused", "first", "relu#3"])
    with pytest.raises(TypeError, match="names must be a list of layer names; got str 'relu'"):
        features_of(model, x, "relu")
    model.unused = nn.Module()
    model.unused.forward = lambda _: None
    model.relu.register_forward_hook(lambda *args: model.unused(0))
    with pytest.raises(ValueError, match=r"layer 'unused': expected a tensor, .*; got NoneType"):
        features_of(model, x, ["unused"])


def test_padding_mask_does_not_bring_nested_tensors():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    names = ["layers.0", "layers.1.linear1"]
    features = features_of(model, {"src": x, "src_key_padding_mask": mask}, names)
    assert [tuple(features[name].shape) for name in names] == [(2, 5, 8), (2, 5, 16)]


def test_evaluating_restores_each_flag_and_the_random_state():
    model = nn.Sequential(
        nn.Dropout(), nn.BatchNorm1d(3).eval(), nn.Sequential(nn.Dropout()).eval()
    )
    model[2][0].train()
    flags = [module.training for module in model.modules()]
    for fail in (RuntimeError, KeyboardInterrupt):
        state = torch.get_rng_state()
        with pytest.raises(fail), evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            raise fail
        assert [module.training for module in model.modules()] == flags
        assert torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):  # noqa: SIM117
        with evaluating("model"):
            pass


def test_evaluating_keeps_autocast(x):
    model = nn.Linear(3, 3)
    with torch.autocast(x.device.type, torch.bfloat16), evaluating(model):
        assert model(x).dtype == torch.bfloat16


def test_evaluating_a_compiled_model():
    plain = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3).eval())
    with evaluating(torch.compile(plain)):
        assert not plain[0].training
    assert (plain.training, plain[0].training, plain[1].training) == (True, True, False)


def test_unwrap():
    plain = nn.ReLU()
    assert unwrap(nn.DataParallel(torch.compile(nn.DataParallel(plain)))) is plain

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = self._orig_mod = nn.ReLU()

    holder = Holder()
    assert unwrap(holder) is holder  # only the wrappers themselves, not what has their names
    assert sorted(modules_by_name(nn.Sequential(holder))) == ["", "0", "0._orig_mod", "0.module"]


def test_distributed_model_is_unwrapped(x):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        model = nn.parallel.DistributedDataParallel(plain)
        assert unwrap(model) is plain
        with capture(model, ["1"]) as features:
            expected = model(x)
        assert torch.equal(features["1"], expected)
    finally:
        torch.distributed.destroy_process_group()


def test_call():
    def model(*args, **kwargs):
        return args, kwargs

    assert call(model, 1) == ((1,), {})
    assert call(model, [1, 2]) == ((1, 2), {})
    assert call(model, {"a": 1}) == ((), {"a": 1})
    assert call(model, 3, lambda m, b: m(b, b=b)) == ((3,), {"b": 3})


Pair = namedtuple("Pair", ["loss", "states"])
A, B, C = torch.ones(1), torch.zeros(2), torch.full((3,), 7.0)


@pytest.mark.parametrize(
    ("output", "replaced"),
    [
        (A, C),
        ((A, B), (C, B)),
        ([None, A], [None, C]),
        ({"a": 1, "b": [A], "c": B}, {"a": 1, "b": [C], "c": B}),
        (Pair(None, (A, B)), Pair(None, (C, B))),
        (OrderedDict(x=((), B)), OrderedDict(x=((), C))),
    ],
)
def test_first_tensor_is_replaced_in_its_structure(output, replaced):
    before = repr(output)
    first = first_tensor(output)
    assert any(first is tensor for tensor in (A, B))
    result = replace_first_tensor(output, C)
    assert first_tensor(result) is C
    assert type(result) is type(output)
    assert repr(result) == repr(replaced)
    assert repr(output) == before


def test_first_tensor_of_a_model_output():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(last_hidden_state=A, hidden_states=(B,))
    result = replace_first_tensor(output, C)
    assert type(result) is type(output)
    assert result.last_hidden_state is result[0] is C
    assert output.last_hidden_state is A


@pytest.mark.parametrize("output", [None, (), {"a": [1, "x"]}, 3.0])
def test_no_tensor(output):
    message = f"expected a tensor, or a tuple, list or mapping.*got {type(output).__name__}"
    for function in (first_tensor, lambda output: replace_first_tensor(output, A)):
        with pytest.raises(TypeError, match=message):
            function(output)
