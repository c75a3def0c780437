"""Layers of models: counts known from the papers and written out by hand, on real architectures."""

import re
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
import torchvision
from torch import nn

from geomkd.network.hooks import capture
from geomkd.network.layers import Layer, candidate_layers, describe_layers, survey


def names_of(layers):
    return [layer.name for layer in layers]


def roles_of(layers):
    return [(layer.name, layer.role) for layer in layers]


class Residual(nn.Module):
    """A residual block of the smallest kind, whose ReLU is called twice."""

    def __init__(self, channels, as_tuple=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.as_tuple = as_tuple

    def forward(self, x):
        y = self.relu(x + self.conv2(self.relu(self.conv1(x))))
        return (y, None) if self.as_tuple else y


class Small(nn.Module):
    """Stem, three blocks, head with an activation inside; everything the rules speak of."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.ModuleList(Residual(6, as_tuple) for _ in range(3))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 4))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(self.pool(x).flatten(1))


SMALL = ["stem.2", "blocks.0", "blocks.1", "blocks.2", "head.0.input", "head.1"]


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_paper_numbering_of_resnet34():
    with torch.device("meta"):  # shapes alone: no weights are drawn
        layers = candidate_layers(torchvision.models.resnet34(), torch.zeros(2, 3, 32, 32))
    blocks = [f"layer{i}.{j}" for i, depth in enumerate((3, 4, 6, 3), 1) for j in range(depth)]
    assert names_of(layers) == ["relu", *blocks, "fc.input"]
    assert layers[0] == Layer("relu", "map", (64, 16, 16), "activation")
    assert layers[-1] == Layer("fc.input", "vector", (512,), "head_input")
    assert layers[0].dim == 64 * 16 * 16


def test_video_has_other_kind():
    with torch.device("meta"):
        model = torchvision.models.video.r3d_18(num_classes=3)
        layers = candidate_layers(model, torch.zeros(2, 3, 2, 16, 16))
    assert [layer.kind for layer in layers] == ["other"] * 9 + ["vector"]


def test_segmentation_model_that_returns_a_mapping():
    options = {"weights_backbone": None, "num_classes": 3}
    with torch.device("meta"):
        model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(**options)
        images = torch.zeros(2, 3, 32, 32)
        assert {layer.kind for layer in candidate_layers(model, images)} == {"map"}
        assert describe_layers(model, [""], images)[0].shape == (3, 32, 32)


def test_every_role(images):
    assert roles_of(candidate_layers(Small(), images)) == [
        ("stem.2", "activation"),
        ("blocks.0", "block"),
        ("blocks.1", "block"),
        ("blocks.2", "block"),
        ("head.0.input", "head_input"),
        ("head.1", "head"),
    ]


def test_inside_own_module_and_sequential(images):
    class Wrapper(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).softmax(1)

    for model in (Wrapper(Small()), nn.Sequential(OrderedDict(net=Small()))):
        assert names_of(candidate_layers(model, images)) == [f"net.{name}" for name in SMALL]


def test_plain_sequential(images):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    assert names_of(candidate_layers(model, images)) == ["1", "3", "5.input"]


def test_mlp_has_its_last_linear_as_head():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2), nn.Sigmoid()
    )
    assert roles_of(candidate_layers(model, torch.zeros(2, 4))) == [
        ("1", "activation"),
        ("3", "activation"),
    ]  # and not the class scores
    assert [layer.feeds_head for layer in candidate_layers(model, torch.zeros(2, 4))] == [0, 1]


@pytest.mark.parametrize(
    ("behind", "inplace", "expected"),
    [
        ([nn.Dropout()], False, ["1", "3"]),  # hands on what it is given, in evaluation mode
        ([nn.Dropout(), nn.Identity()], True, ["1", "3"]),
        ([nn.LayerNorm(8)], False, ["1", "3", "5.input"]),
        ([nn.Flatten(0, -1), nn.Unflatten(0, (2, 8))], False, ["1", "3", "6.input"]),
    ],
)
def test_candidates_that_are_one_tensor_are_one(behind, inplace, expected):
    layers = [nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 8), nn.ReLU(inplace), *behind]
    model, x = nn.Sequential(*layers, nn.Linear(8, 2)), torch.zeros(2, 4)
    assert names_of(candidate_layers(model, x)) == expected
    own = f"{len(layers)}.input"
    assert names_of(describe_layers(model, ["3", own], x)) == ["3", own]  # both, where asked for


def test_what_is_changed_in_place_is_another_layer():
    """Blocks of which an activation outside them changes the very tensor that they gave."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x)

    model = nn.Sequential(Block(), nn.ReLU(inplace=True), Block(), nn.ReLU(True), nn.Linear(4, 2))
    assert names_of(candidate_layers(model, torch.zeros(2, 4))) == ["0", "1", "2", "3"]


def test_blocks_that_return_tuples(images):
    layers = candidate_layers(Small(as_tuple=True), images)
    assert names_of(layers) == SMALL
    assert layers[1].shape == (6, 8, 8)


def test_class_that_occurs_once_is_no_block(images):
    model = Small()
    model.blocks = nn.Sequential(model.blocks[0])
    assert names_of(candidate_layers(model, images)) == [
        "stem.2",
        "blocks.0.relu",
        "blocks.0.relu#2",
        "head.0.input",
        "head.1",
    ]


def test_each_call_of_a_shared_block_is_a_layer(images):
    model = Small()
    model.blocks = nn.ModuleList([model.blocks[0]] * 2)
    names = names_of(candidate_layers(model, images))
    assert names == ["stem.2", "blocks.0", "blocks.0#2", "head.0.input", "head.1"]
    # Either name will do for it.
    assert describe_layers(model, ["blocks.1#2"], images)[0].role == "block"


def test_the_model_itself_is_no_block():
    class Level(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.act = inner, nn.ReLU()

        def forward(self, x):
            return self.act(self.inner(x))

    model = Level(Level(nn.Linear(4, 4)))
    assert roles_of(candidate_layers(model, torch.zeros(2, 4))) == [
        ("inner", "block"),
        ("act", "activation"),
    ]


def test_softmax_and_attention_are_no_activations():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.act = nn.SiLU()
            self.softmax = nn.LogSoftmax(-1)

        def forward(self, x):
            return self.softmax(self.act(self.attention(x, x, x)[0]))

    assert names_of(candidate_layers(Attend(), torch.zeros(2, 3, 4))) == ["act"]


def test_activations_of_other_libraries():
    class HardSwish(nn.Module):
        def forward(self, x):
            return x * (x + 3).clamp(0, 6) / 6

    class LearnedTanh(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return (self.scale * x).tanh()

    model = nn.Sequential(nn.Linear(4, 4), HardSwish(), LearnedTanh(), nn.Linear(4, 2))
    assert names_of(candidate_layers(model, torch.zeros(2, 4))) == ["1", "3.input"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_transformer_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, batch_first=True, norm_first=norm_first, dropout=0.0
    )
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
    example = {"src": torch.randn(2, 5, 8), "src_key_padding_mask": mask}
    layers = candidate_layers(encoder, example)
    assert layers == [Layer(f"layers.{i}", "tokens", (5, 8), "block") for i in range(3)]
    assert torch.backends.mha.get_fastpath_enabled()


def test_sequence_first_layers_cannot_be_used():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(9, 8), encoder)
    tokens = torch.zeros(2, 5, dtype=torch.long)

    def forward(model, tokens):
        return model(tokens.T)

    expected = re.escape(
        "Sequential has no usable block or activation module; layer '1.layers.0': expected the "
        "batch axis first, (2, ...); got (5, 2, 8); name modules in layers=, for example "
        "layers=['name']"
    )
    with pytest.raises(ValueError, match=expected):
        candidate_layers(model, tokens, forward=forward)


def test_hugging_face_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    layers = candidate_layers(model, {"pixel_values": torch.zeros(2, 3, 8, 8)})
    assert [layer.role for layer in layers] == ["block"] * 3 + ["head_input"]
    assert {(layer.kind, layer.shape) for layer in layers[:3]} == {("tokens", (5, 8))}
    assert layers[-1] == Layer("classifier.input", "vector", (8,), "head_input")


def test_hugging_face_bert_of_token_ids():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    example = {
        "input_ids": torch.ones(2, 6, dtype=torch.long),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }
    assert roles_of(candidate_layers(model, example)) == [
        ("bert.encoder.layer.0", "block"),
        ("bert.encoder.layer.1", "block"),
        ("bert.pooler.dense.input", "head_input"),
        ("bert.pooler.activation", "head"),
    ]


def test_forward_and_positional_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.fc = nn.Linear(4, 2)

        def forward(self, x, scale):
            return self.fc(self.act(x * scale))

    x, scale = torch.ones(2, 4), torch.tensor(2.0)
    expected = ["act"]
    assert names_of(candidate_layers(Two(), (x, scale))) == expected
    assert names_of(candidate_layers(Two(), {"x": x, "scale": scale})) == expected
    forward = lambda model, batch: model(batch, scale) + model(batch, scale)  # noqa: E731
    assert names_of(candidate_layers(Two(), x, forward=forward)) == expected


def test_on_meta_tensors():
    model = Small().to("meta")
    assert names_of(candidate_layers(model, torch.zeros(2, 3, 8, 8, device="meta"))) == SMALL


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), (2, 6, 6, 6), "map"),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), (2, 6, 6, 6), "map_last"),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), (2, 4, 5, 6), "map_last"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), (2, 4, 5, 6), "map"),
        (nn.Sequential(nn.Identity(), nn.ReLU()), (2, 4, 5, 6), "map"),
        (nn.Sequential(nn.Identity(), nn.ReLU()), (2, 5, 5, 6), "map_last"),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), (2, 5, 6, 6), "map"),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU()), (2, 4, 5), "sequence"),
        (
            nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, 1, 1, 1, 6)), nn.ReLU()),
            (2, 6),
            "other",
        ),
    ],
)
def test_kinds(module, shape, kind):
    layer = candidate_layers(module, torch.zeros(shape))[0]
    assert layer.kind == kind


def test_the_nearest_neighbour_tells_the_kind():
    # The ReLU stands beside a linear layer; only further out there is a convolution.
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(6, 6, 1), inner)
    assert candidate_layers(model, torch.zeros(2, 6, 6, 6))[0].kind == "map_last"


@pytest.mark.parametrize(
    ("wrap", "backend"),
    [
        ("compile", "eager"),
        ("in place", "eager"),
        ("submodule", "eager"),
        ("block", "eager"),
        ("parallel", "eager"),
        pytest.param("compile", "inductor", marks=pytest.mark.slow),
    ],
)
def test_wrapped_models(wrap, backend, images):
    if backend == "inductor" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("inductor compiles for processors with vectors")
    torch.manual_seed(0)
    plain = Small().eval()
    with capture(plain, SMALL) as expected:
        plain(images)
    model = plain
    if wrap == "compile":
        model = torch.compile(plain, backend=backend)
    elif wrap == "in place":
        plain.compile(backend=backend)
    elif wrap == "submodule":
        plain.stem = torch.compile(plain.stem, backend=backend)
    elif wrap == "block":
        plain.blocks[1] = torch.compile(plain.blocks[1], backend=backend)
    else:
        model = nn.DataParallel(torch.compile(plain, backend=backend))
    with torch.no_grad():
        before = model(images)  # compiled graphs exist by now, made without any hook
        assert names_of(candidate_layers(model, images)) == SMALL
        assert names_of(describe_layers(model, ["stem.0", *SMALL], images)) == ["stem.0", *SMALL]
        for _ in range(2):
            with capture(model, SMALL) as features:
                model(images)
            assert list(features) == SMALL
            for name in SMALL:
                torch.testing.assert_close(features[name], expected[name])
            torch.testing.assert_close(model(images), before)


def test_compiled_model_runs_compiled_afterwards(images):
    runs = []

    def backend(graph, _):
        runs.append(graph)
        return lambda *args: (runs.append("run"), graph(*args))[1]

    plain = Small().eval()
    model = torch.compile(plain, backend=backend)
    with torch.no_grad():
        model(images)
        count = len(runs)
        candidate_layers(model, images)
        with capture(model, SMALL):
            model(images)
        assert len(runs) == count
        model(images)
    assert runs[count:] == ["run"]


def test_describe_keeps_the_order_asked_for(images):
    layers = describe_layers(Small(), ["head.3", "blocks.1", "stem.0", "stem.0.input"], images)
    assert layers == [
        Layer("head.3", "vector", (4,), "head"),
        Layer("blocks.1", "map", (6, 8, 8), "block"),
        Layer("stem.0", "map", (6, 8, 8), "named"),
        Layer("stem.0.input", "map", (3, 8, 8), "named"),
    ]
    orders = [layer.order for layer in layers]
    assert orders == sorted(orders, reverse=True)


def test_roles_of_layers_by_hand():
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2), nn.Tanh())
    names = ["4", "3", "3.input", "2", "0.input"]
    layers = describe_layers(mlp, names, torch.zeros(2, 4))
    assert roles_of(layers) == list(
        zip(names, ["head", "head", "head_input", "named", "named"], strict=True)
    )
    # Where neither a block nor an activation tells the layers, nothing tells the head.
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    layers = describe_layers(plain, ["0", "1.input", "1"], torch.zeros(2, 4))
    assert [layer.role for layer in layers] == ["named", "head_input", "named"]


@pytest.mark.parametrize("names", [None, SMALL[::-1]])
def test_a_survey_runs_the_model_once(names, images):
    runs = []

    def forward(model, batch):
        runs.append(len(batch))
        return model(batch)

    model = Small().double()
    found = survey(model, images.double(), names, forward=forward)
    assert runs == [2] and names_of(found.layers) == (names or SMALL)
    assert {layer.dtype for layer in found.layers} == {torch.float64}
    assert {layer.device for layer in found.layers} == {images.device}
    # Widest: a convolution of 6 channels in and out, 8 x 8 of float64 each; twice that.
    assert found.sample_bytes == 2 * 2 * 6 * 64 * 8


def test_a_model_that_forward_calls_twice():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(2, 4)
    forward = lambda model, x: (model(x.repeat(5, 1)), model(x))  # noqa: E731
    found = survey(model, x, forward=forward)
    assert found.sample_bytes == 2 * 5 * 2 * 4 * 4  # of the larger call
    assert names_of(found.layers) == ["1"]  # of the last call alone
    assert describe_layers(model, ["1"], x, forward=forward)[0].shape == (4,)
    with pytest.raises(ValueError, match="is run only 1 time in a forward pass"):
        describe_layers(model, ["1#2"], x, forward=forward)


def test_describe_second_call(images):
    names = ["blocks.0.relu", "blocks.0.relu#2", "blocks.0.relu.input#2"]
    layers = describe_layers(Small(), names, images)
    assert names_of(layers) == names
    with pytest.raises(
        ValueError,
        match=r"layer 'blocks.0.relu#3': its module is run only 2 times in a forward pass",
    ):
        describe_layers(Small(), ["blocks.0.relu#3"], images)


def test_errors_of_names(images):
    model = Small()
    with pytest.raises(
        ValueError,
        match=r"layer 'block.1': the model has no module 'block.1'; close matches: 'blocks.1'",
    ):
        describe_layers(model, ["block.1"], images)
    with pytest.raises(TypeError, match="must be a list of layer names; got str 'stem'"):
        describe_layers(model, "stem", images)
    with pytest.raises(TypeError, match=r"must hold layer names \(str\); got Layer"):
        describe_layers(model, candidate_layers(model, images), images)


def test_errors_of_layers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.index, self.flat, self.nothing, self.unused = (nn.Identity() for _ in range(4))

        def forward(self, x):
            self.index(x.argmax(1))
            self.flat(x.flatten())
            self.nothing(None)
            return self.act(x)

    example = torch.zeros(2, 4)
    assert names_of(candidate_layers(Odd(), example)) == ["act"]
    for name, message in {
        "unused": "layer 'unused': its module is never run in a forward pass in evaluation mode",
        "index": "layer 'index': expected floating-point features; got torch.int64",
        "flat": "layer 'flat': expected the batch axis first, (2, ...); got (8,)",
        "nothing": "layer 'nothing': expected a tensor, or a tuple, list or mapping that holds "
        "one; got NoneType",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            describe_layers(Odd(), [name], example)


def test_errors_of_models():
    with pytest.raises(
        ValueError,
        match=re.escape(
            "Sequential has no block and no activation module; name modules in layers=, for "
            "example layers=['0', '1']"
        ),
    ):
        candidate_layers(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got function"):
        candidate_layers(lambda x: x, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"example_input: expected a tensor, .*; got str"):
        candidate_layers(nn.ReLU(), "image.png")
    with pytest.raises(ValueError, match=r"example_input must have a batch axis; got a tensor of"):
        candidate_layers(nn.ReLU(), torch.tensor(1.0))


def test_torchscript(images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        script = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    model = nn.Sequential(script, nn.Conv2d(3, 3, 1), nn.ReLU())
    assert names_of(candidate_layers(model, images)) == ["2"]
    with pytest.raises(TypeError, match="model must run in Python; got a RecursiveScriptModule"):
        candidate_layers(script, images)


def hooks_of(model):
    return [
        (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._forward_hooks_with_kwargs))
        for m in model.modules()
    ]


def state_of(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        {key: value.clone() for key, value in model.state_dict().items()},
        torch.get_rng_state(),
        hooks_of(model),
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


class Drawing(Small):
    """Draws random numbers even in evaluation mode, and fails where it is told to."""

    fail = None

    def forward(self, x):
        x = super().forward(x + torch.rand(()))
        if self.fail:
            raise self.fail("on purpose")
        return x


@pytest.mark.parametrize("fail", [None, RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_it_was(fail, images):
    model = Drawing().train()
    model.blocks[1].eval()
    model.stem[0].weight.requires_grad_(False)
    model.blocks[0].relu.register_forward_hook(lambda *args: None)
    model(images).sum().backward()
    model.fail = fail
    before = state_of(model)
    for function in (
        lambda: candidate_layers(model, images),
        lambda: describe_layers(model, ["stem"], images),
    ):
        if fail:
            with pytest.raises(fail, match="on purpose"):
                function()
        else:
            function()
        torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)


def test_named_tuple_output():
    Output = namedtuple("Output", ["x", "index"])

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return Output(self.act(x), 3)

    model = nn.Sequential(Pair())
    assert describe_layers(model, ["0"], torch.zeros(2, 4))[0].shape == (4,)
