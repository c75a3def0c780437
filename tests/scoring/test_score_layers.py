"""score_layers against features captured by hand, its plan of memory, and what it leaves behind."""

import re
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
import torchvision
from oracle import DEFINITIONS, TERMS, reference, values_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from geomkd import candidate_layers, knowledge_quality, score_layers
from geomkd.data.sample import Sample
from geomkd.scoring import score_layers as scoring
from geomkd.scoring.plan import Stored, parse_bytes, plan_of

N, CLASSES = 60, 4
Y = torch.arange(N) % CLASSES


def images(n=N, size=32, channels=3):
    """Images of classes that differ, from an own generator."""
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(CLASSES, channels, size, size, generator=generator)
    noise = torch.randn(n, channels, size, size, generator=generator)
    return 0.5 * means[torch.arange(n) % CLASSES] + noise


def vectors(n=N, d=8):
    return images(n, 1, d).flatten(1)


def sequential(width=16, depth=3, *, seed=0, d=8):
    """Linear layers with ReLU; `candidate_layers` lists every ReLU and the last one's input."""
    torch.manual_seed(seed)
    layers = [nn.Linear(d, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def resnet18(seed=0):
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=CLASSES)


def vision_transformer():
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=CLASSES,
    )


class Widen(nn.Module):
    """More features, cheaply: each is one of the input's, scaled and shifted."""

    def __init__(self, d, width):
        super().__init__()
        generator = torch.Generator().manual_seed(width)
        self.register_buffer("index", torch.randint(d, (width,), generator=generator))
        self.weight = nn.Parameter(torch.randn(width, generator=generator))
        self.bias = nn.Parameter(torch.randn(width, generator=generator))

    def forward(self, x):
        return x[:, self.index] * self.weight + self.bias


def wide(*widths):
    """ReLU layers "1", "3", ... of these widths, of inputs of 8 features; then a head."""
    layers = []
    for d, width in zip((8, *widths), widths, strict=False):
        layers += [Widen(d, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


class TwiceRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.fc(self.relu(self.b(self.relu(self.a(x)))))


def by_hand(model, inputs, names):
    """Features of layers from hooks written here, whole, in one forward pass."""
    model = deepcopy(model).eval()
    modules, found, handles = dict(model.named_modules()), {}, []
    for name in names:
        path, _, number = name.removesuffix(".input").partition("#")
        seen = []

        def keep(module, args, output=None, *, name=name, number=int(number or 1), seen=seen):
            value = args[0] if output is None else output
            seen.append(value[0] if isinstance(value, tuple) else value)
            if len(seen) == number:
                found[name] = seen[-1].clone()

        module = modules[path]
        is_input = name.endswith(".input")
        register = module.register_forward_pre_hook if is_input else module.register_forward_hook
        handles.append(register(keep))
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found


def rows_of(scores):
    return scores.to_frame().set_index("layer")


def assert_as_measured(scores, features, labels, rel=1e-6, **options):
    rows = rows_of(scores)
    for name, x in features.items():
        expected = values_of(knowledge_quality(x, labels, **options))
        got = {key: rows.loc[name, key] for key in expected}
        assert {t: got[t] for t in TERMS} == pytest.approx({t: expected[t] for t in TERMS}, rel=rel)
        assert got == pytest.approx(expected, rel=rel, abs=1e-6), name  # a cosine may be near 0


def assert_same(scores, others, rel=1e-6):
    a, b = rows_of(scores), rows_of(others)
    assert list(a.index) == list(b.index)
    for term in TERMS:
        np.testing.assert_allclose(a[term], b[term], rtol=rel, atol=rel)
        np.testing.assert_allclose(scores.draws[term], others.draws[term], rtol=rel, atol=rel)


def score(model, data, **options):
    return score_layers(model, data, **({"subsamples": 0, "progress": False} | options))


# ---- the same as features captured by hand -------------------------------------------------------


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize(
    ("make", "inputs", "expected"),
    [
        (sequential, vectors(), ["1", "3", "5", "6.input"]),
        (
            resnet18,
            images(),
            ["relu", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "fc.input"],
        ),
        (
            vision_transformer,
            images(),
            [*(f"encoder.layers.encoder_layer_{i}" for i in (0, 1)), "heads.head.input"],
        ),
    ],
    ids=["Sequential", "resnet18", "VisionTransformer"],
)
def test_scores_are_knowledge_quality_of_the_features(make, inputs, expected, definition):
    model = make()
    scores = score(model, (inputs, Y), definition=definition)
    assert list(rows_of(scores).index) == expected
    assert_as_measured(scores, by_hand(model, inputs, expected), Y, definition=definition)


def test_hugging_face_model_with_mapping_batches():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(30, (N, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    items = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": Y[i]} for i in range(N)]
    scores = score(model, DataLoader(items, batch_size=7))
    names = list(rows_of(scores).index)
    assert names[:2] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert_as_measured(scores, by_hand(model, inputs, names), Y)
    unmasked = score(model, DataLoader(items, batch_size=7), input_key="input_ids")
    assert not np.allclose(rows_of(unmasked)["quality"], rows_of(scores)["quality"], rtol=1e-4)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_scores_by_a_plain_float64_computation(definition):
    model = sequential().double()
    x = vectors().double()
    rows = rows_of(score(model, (x, Y), definition=definition, dataset_size=1000))
    for name, features in by_hand(model, x, rows.index).items():
        expected = reference(features.numpy(), Y.numpy(), 1000, definition)
        got = {key: rows.loc[name, key] for key in expected}
        assert got == pytest.approx(expected, rel=1e-7), name


def test_sample_of_larger_data_in_another_form():
    model, x = sequential(), vectors()
    chosen = Sample((x, Y), 24, seed=3).indices
    for data in (
        (x, Y),
        (x.numpy(), Y.numpy()),
        TensorDataset(x, Y),
        DataLoader(TensorDataset(x, Y), batch_size=7, shuffle=True),
    ):
        scores = score(model, data, samples=24, seed=3)
        features = by_hand(model, x[chosen], ["1", "5"])
        assert_as_measured(scores, features, Y[chosen], dataset_size=N)
        assert set(scores.to_frame()["n"]) == {24}
        assert scores.settings["samples_per_class"] == [6, 6]
        assert scores.settings["dataset_size"] == N


def test_forward_function_and_tuples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = sequential()

        def forward(self, x, shift):
            return self.body(x + shift)

    model, x, shift = Two(), vectors(), torch.ones(N, 8)
    features = by_hand(model.body, x + shift, ["1"])
    expected = {"body.1": features["1"]}
    assert_as_measured(score(model, TensorDataset(x, shift, Y)), expected, Y)
    scores = score(model, (x, Y), forward=lambda model, batch: model(batch, 1.0))
    assert_as_measured(scores, expected, Y)


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float64, 1e-9), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_models_of_other_precision(dtype, rel):
    model, x = sequential().to(dtype), vectors().to(dtype)
    scores = score(model, (x, Y))
    features = by_hand(model, x, ["1", "3", "5"])
    assert features["1"].dtype is dtype
    assert_as_measured(scores, features, Y, rel=rel)


def test_compiled_model_has_the_same_scores():
    model, x = sequential(), vectors()
    plain = score(model, (x, Y), subsamples=4)
    compiled = score(torch.compile(model, backend="eager"), (x, Y), subsamples=4)
    assert_same(plain, compiled, rel=0)
    assert compiled.settings["model"] == "Sequential"


# ---- options -------------------------------------------------------------------------------------


def test_layers_come_out_in_order_of_execution():
    model = resnet18()
    names = ["fc.input", "layer3.0.conv1", "conv1", "layer2", "fc"]
    scores = score(model, (images(), Y), layers=names)
    frame = scores.to_frame()
    assert list(frame["layer"]) == ["conv1", "layer2", "layer3.0.conv1", "fc.input", "fc"]
    assert list(frame["depth"]) == [0, 1, 2, 3, 4]
    assert list(frame["role"]) == ["named", "named", "named", "head_input", "head"]
    assert list(frame["kind"]) == ["map", "map", "map", "vector", "vector"]
    assert list(frame["shape"])[1] == (128, 4, 4)
    assert list(frame["dim"]) == [64 * 256, 128 * 16, 256 * 4, 512, 4]
    assert_as_measured(scores, by_hand(model, images(), names), Y)


def test_second_call_of_a_module():
    model = TwiceRelu()
    scores = score(model, (vectors(), Y), layers=["relu#2", "relu"])
    frame = scores.to_frame()
    assert list(frame["layer"]) == ["relu", "relu#2"]
    assert list(frame["dim"]) == [12, 10]
    assert_as_measured(scores, by_hand(model, vectors(), ["relu", "relu#2"]), Y)


@pytest.mark.parametrize(
    ("layers", "error", "text"),
    [
        (["1", "1"], ValueError, "layers must differ from each other; got ['1'] more than once"),
        ([], ValueError, "layers must hold at least one layer name; got none"),
        (["nowhere"], ValueError, "nowhere"),
        ("1", TypeError, "'1'"),
    ],
)
def test_layers_that_cannot_be(layers, error, text):
    with pytest.raises(error, match=re.escape(text)):
        score(sequential(), (vectors(), Y), layers=layers)


def published_map(x):
    return nn.functional.max_pool2d(x, 2).flatten(1)


@pytest.mark.parametrize(
    ("make", "layer", "pool", "by"),
    [
        (resnet18, "layer2.0", "mean", lambda x: x.mean(dim=(2, 3))),
        (resnet18, "layer2.0", "max", lambda x: x.amax(dim=(2, 3))),
        (resnet18, "layer2.0", "published", lambda x: x.flatten(1)),
        (vision_transformer, "encoder.layers.encoder_layer_0", "cls", lambda x: x[:, 0]),
        (vision_transformer, "encoder.layers.encoder_layer_0", "mean", lambda x: x.mean(dim=1)),
        (resnet18, "fc.input", "mean", lambda x: x),
    ],
)
def test_pool(make, layer, pool, by):
    model = make()
    scores = score(model, (images(), Y), layers=[layer], pool=pool)
    expected = by(by_hand(model, images(), [layer])[layer])
    frame = scores.to_frame()
    assert frame["dim"][0] == expected.flatten(1).shape[1]
    assert_as_measured(scores, {layer: expected}, Y)
    assert scores.settings["pool"] == pool


def test_published_pool_of_a_large_map():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())  # 5 * 256 * 256 is above 262,144
    x = images(8, 256)
    scores = score(model, (x, Y[:8]), layers=["1"], pool="published")
    expected = published_map(by_hand(model, x, ["1"])["1"])
    assert scores.to_frame()["dim"][0] == expected.shape[1] == 5 * 128 * 128
    assert_as_measured(scores, {"1": expected}, Y[:8])


def test_pool_that_does_not_fit_names_the_layer():
    text = "layer 'layer1.0': pool='cls' does not fit features of kind 'map', (2, 64, 8, 8)"
    with pytest.raises(ValueError, match=re.escape(text)):
        score(resnet18(), (images(), Y), layers=["layer1.0"], pool="cls")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pool": "sum"}, ValueError, "pool must be one of ('flatten', 'mean', 'max', 'cls', "),
        ({"definition": "new"}, ValueError, "definition must be one of ('published', 'robust')"),
        ({"measures": ("cka",)}, ValueError, "measures must be among ('knowledge_quality', "),
        ({"memory": "much"}, ValueError, "memory must be bytes or a text such as '2GB'; got 'm"),
        ({"memory": 0}, ValueError, "memory must be bytes or a text such as '2GB'; got 0"),
        ({"subsamples": -1}, ValueError, "subsamples must be at least 0; got -1"),
        ({"subsamples": 2.0}, TypeError, "subsamples must be an integer; got float 2.0"),
        ({"dataset_size": 59}, ValueError, "at least the number of samples, n = 60; got 59"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"samples": 7}, ValueError, "samples must be at least 2 for each of the 4 classes"),
    ],
)
def test_option_errors(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        score(sequential(), (vectors(), Y), **options)


def test_model_that_is_none():
    with pytest.raises(TypeError, match="str"):
        score("model", (vectors(), Y))


def test_labels_in_place_of_the_datas_own():
    model, x, other = sequential(), vectors(), Y.flip(0) // 2
    features = by_hand(model, x, ["1", "5"])
    assert_as_measured(score(model, (x, Y), labels=other), features, other)
    assert_as_measured(score(model, (x, Y), labels=other.numpy()), features, other)


def test_dataset_size():
    model, x = sequential(), vectors()
    features = by_hand(model, x, ["1"])
    scores = score(model, (x, Y), dataset_size=50_000)
    assert_as_measured(scores, features, Y, dataset_size=50_000)
    assert scores.settings["dataset_size"] == 50_000
    factor = (50_000 / N) ** (1 / 16)
    own = rows_of(score(model, (x, Y)))
    ratio = rows_of(scores).loc["1", "efficiency"] / own.loc["1", "efficiency"]
    assert ratio == pytest.approx(factor)


def test_workers_and_collate_function_of_a_loader():
    model, x = sequential(), vectors()
    loader = DataLoader(TensorDataset(x, Y), batch_size=7, num_workers=2, collate_fn=tripled)
    assert_as_measured(score(model, loader), by_hand(model, 3 * x, ["1", "5"]), Y)


def tripled(items):
    x, y = zip(*items, strict=True)
    return 3 * torch.stack(x), torch.stack(y)


def test_batches_that_can_be_read_but_once():
    model, x = wide(1024, 20_000), vectors()
    once = iter(list(zip(x.split(7), Y.split(7), strict=True)))
    least = least_of(model, (x, Y), layers=["1", "3"])
    scores = score(model, once, layers=["1", "3"], memory=f"{least + 1}MB")  # two passes and more
    assert_as_measured(scores, by_hand(model, x, ["1", "3"]), Y)


class Moved(nn.Linear):
    """A layer that notes where it is sent."""

    def to(self, *args, **options):
        self.__dict__.setdefault("sent", []).append(args)
        return super().to(*args, **options)


def test_device():
    model, x = Moved(8, 5), vectors()
    home = x.device
    plain = score(model, (x, Y), layers=[""])
    same = score(model, (x, Y), layers=[""], device=str(home))
    assert_same(plain, same, rel=0)
    assert "sent" not in vars(model)
    # No forward pass runs where tensors have no data, but the model goes there and comes back.
    with pytest.raises((NotImplementedError, RuntimeError)):
        score(model, (x, Y), layers=[""], device="meta")
    assert vars(model)["sent"] == [(torch.device("meta"),), (home,)]


@pytest.mark.parametrize("memory", ["2GB", "small"])
@pytest.mark.parametrize(("samples", "most"), [(24, 12), (40, 5)])
def test_entropy_per_class(samples, most, memory, plans):
    model, x = wide(10_000, 10_000), vectors()
    options = {"samples": samples, "seed": 1, "entropy_per_class": most, "layers": ["1", "3"]}
    if memory == "small":
        memory = f"{least_of(model, (x, Y), **options)}MB"
    scores = score(model, (x, Y), memory=memory, **options)
    assert (plans[-1].width < 10_000) == (memory != "2GB")
    sample = Sample((x, Y), samples, seed=1, entropy_per_class=most)
    for name, features in by_hand(model, x, ["1", "3"]).items():
        spectra, k = [], []
        for a in range(CLASSES):
            own = torch.cat(list(sample.batches(99, of_class=a)))
            rows = [(x == row).all(dim=1).nonzero().item() for row in own]
            assert len(rows) == most and all(Y[i] == a for i in rows)
            block = features[rows].double()
            p = torch.linalg.svdvals(block - block.mean(dim=0)) ** 2
            spectra.append(p / p.sum())
            k.append(min(most - 1, 1 + int((spectra[-1].cumsum(0) < 0.95).sum())))
        kept = [p[: sum(k)] / p[: sum(k)].sum() for p in spectra]
        entropy = np.mean([-torch.xlogy(p, p).sum().item() for p in kept])
        chosen = sample.indices
        q = knowledge_quality(features[chosen], Y[chosen], dataset_size=N)
        row = rows_of(scores).loc[name]
        expected = (1 - q.details["min_within_cosine"]) * entropy / np.log(5)
        assert row["class_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert row["class_dimension_95"] == np.mean(k)
        assert row["information"] == pytest.approx(expected, rel=1e-5)
        assert row["separation"] == pytest.approx(q.separation, rel=1e-6)
        assert row["efficiency"] == pytest.approx(q.efficiency, rel=1e-6)
    assert scores.settings["entropy_per_class"] == most


def test_half_samples():
    model, x = sequential(), vectors()
    scores = score(model, (x, Y), subsamples=6)
    assert {name: drawn.shape for name, drawn in scores.draws.items()} == dict.fromkeys(
        TERMS, (4, 6)
    )
    assert np.isfinite(scores.draws["quality"]).all()
    assert (scores.draws["quality"].std(axis=1) > 0).all()
    parts = scores.draws
    root = np.sqrt(np.maximum(0, parts["information"] * parts["efficiency"]))
    np.testing.assert_allclose(parts["quality"], parts["separation"] + root)


def test_no_half_samples():
    scores = score(sequential(), (vectors(), Y), subsamples=0)
    assert {drawn.size for drawn in scores.draws.values()} == {0}
    assert scores.settings["subsamples"] == 0
    with_some = score(sequential(), (vectors(), Y), subsamples=5)
    assert list(with_some.to_frame()["quality"]) == list(scores.to_frame()["quality"])


def test_same_seed_same_scores():
    model, x = sequential(), vectors()
    state = torch.random.get_rng_state()
    first, again, other = (
        score(model, (x, Y), samples=24, subsamples=5, seed=seed) for seed in (0, 0, 1)
    )
    assert_same(first, again, rel=0)
    assert not np.allclose(rows_of(first)["quality"], rows_of(other)["quality"])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_progress(capfd):
    score(sequential(), (vectors(), Y), progress=False)
    assert capfd.readouterr() == ("", "")
    score(sequential(), (vectors(), Y), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "samples" in err


# ---- the model is left as it was -----------------------------------------------------------------


def hooks_of(model):
    return [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]


def stop(model, batch):
    model(batch)
    raise KeyboardInterrupt


def fail(model, batch):
    model(batch)
    raise RuntimeError("no more")


@pytest.mark.parametrize("how", ["done", "error", "Ctrl-C", "NaN"])
def test_model_is_left_as_it_was(how):
    model = resnet18().train()
    model.layer2.eval()
    model.layer3.requires_grad_(False)
    handle = model.layer1.register_forward_hook(lambda *_: None)
    flags = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    state = deepcopy(model.state_dict())
    hooks = hooks_of(model)
    x = images(16)
    if how == "done":
        score(model, (x, Y[:16]))
    elif how == "NaN":
        x[3] = float("nan")
        with pytest.raises(ValueError, match="layer 'relu': features must be finite"):
            score(model, (x, Y[:16]))
    else:
        forward, error = {"error": (fail, RuntimeError), "Ctrl-C": (stop, KeyboardInterrupt)}[how]
        with pytest.raises(error):
            score(model, (x, Y[:16]), forward=forward)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert hooks_of(model) == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.is_grad_enabled()
    handle.remove()


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture
def plans(monkeypatch):
    """Every plan that is made."""
    made, plan_of = [], scoring.plan_of

    def spy(*args, **options):
        made.append(plan_of(*args, **options))
        return made[-1]

    monkeypatch.setattr(scoring, "plan_of", spy)
    return made


WIDTHS = (1024, 1024, 20_000, 1024)  # the last is the head's input too


def least_of(model, data, **options):
    """Megabytes that the error for too small a budget asks for."""
    with pytest.raises(ValueError, match="memory must be at least") as caught:
        score(model, data, memory=1, **options)
    return int(re.search(r"at least (\d+) MB", str(caught.value)).group(1))


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_small_memory_takes_groups_and_slices(definition, plans):
    model, n = wide(*WIDTHS), 400
    data = (vectors(n), torch.arange(n) % CLASSES)
    options = {"definition": definition, "subsamples": 3, "memory": "2GB"}
    whole = score(model, data, **options)
    assert [len(group) for group in plans[-1].groups] == [5] and plans[-1].passes == 1
    least = least_of(model, data, subsamples=3)
    options["memory"] = f"{least + 3}MB"
    small = score(model, data, **options)
    plan = plans[-1]
    names = [[s.layer.name for s in group] for group in plan.groups]
    assert names == [["1", "3"], ["5"], ["7", "8.input"]]
    assert 1024 <= plan.width < 20_000
    assert plan.passes == 2 + -(-20_000 // plan.width)
    assert_same(whole, small)


def test_order_of_the_groups_is_that_of_execution(plans):
    model, n = wide(*WIDTHS), 400
    data = (vectors(n), torch.arange(n) % CLASSES)
    least = least_of(model, data)
    scores = score(model, data, memory=f"{least}MB", layers=["7", "1", "3"])
    assert [[s.layer.name for s in group] for group in plans[-1].groups] == [["1"], ["3"], ["7"]]
    assert list(rows_of(scores).index) == ["1", "3", "7"]


def test_impossible_budget_names_the_least(plans):
    model, data = sequential(width=3000), (vectors(), Y)
    least = least_of(model, data, subsamples=2)
    text = (
        rf"memory must be at least {least} MB for 60 samples of this model .*; got {least - 1} MB"
    )
    with pytest.raises(ValueError, match=text):
        score(model, data, subsamples=2, memory=f"{least - 1}MB")
    assert_same(
        score(model, data, subsamples=2, memory=f"{least}MB"), score(model, data, subsamples=2)
    )
    assert plans[-2].passes > plans[-1].passes == 1


def test_entropy_samples_of_every_layer_count_as_memory(plans):
    model, x, y = sequential(), vectors(1000), torch.arange(1000) % CLASSES
    options = {"samples": 16, "entropy_per_class": 250}
    least, without = (least_of(model, (x, y), **o) for o in (options, {"samples": 16}))
    squares = 8 * CLASSES * 250**2 / 1e6  # one class's Gram matrix after the other
    assert least - without > squares
    score(model, (x, y), memory=f"{least}MB", **options)
    assert [len(group) for group in plans[-1].groups] == [1, 1, 1, 1]
    score(model, (x, y), memory=f"{least + 2 * squares:.0f}MB", **options)
    assert [len(group) for group in plans[-1].groups] == [3, 1]


def test_least_budget_leaves_room_for_a_slice():
    model, x = sequential(), vectors(400)
    sample = Sample((x, torch.arange(400) % CLASSES), 400, seed=0)
    layers = candidate_layers(model, x[:2])
    stored = [Stored(layer, layer.dim, torch.float32, x.device) for layer in layers]

    def plan(budget):
        return plan_of(stored, sample, budget, 256, halves=False)

    low, high = 1, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(middle)
            high = middle
        except ValueError:
            low = middle
    assert plan(high).batch_size == 1
    assert all(plan(high + more).width >= 16 for more in range(0, 10**5, 1000))


def test_kept_inputs_count_as_memory():
    model, x = sequential(d=300_000), torch.randn(N, 300_000)
    kept = x.nbytes / 1e6
    batches = list(zip(x.split(7), Y.split(7), strict=True))
    difference = least_of(model, batches) - least_of(model, (x, Y))
    assert abs(difference - kept) <= 1


def test_forward_passes_are_as_many_as_planned(plans):
    model, n, rows = wide(*WIDTHS), 400, []
    data = (vectors(n), torch.arange(n) % CLASSES)
    least = least_of(model, data)

    def forward(model, batch):
        rows.extend([len(batch)] * len(plans))  # not before there is a plan
        return model(batch)

    score(model, data, memory=f"{least + 3}MB", forward=forward)
    # All slices are read again where distances so small that products lose them are re-measured.
    again = sum(rows) / n - plans[-1].passes
    assert again >= 0 and again % -(-20_000 // plans[-1].width) == 0
    rows.clear()
    plans.clear()
    score(model, data, layers=["1", "3"], forward=forward)
    assert plans[0].passes == 1 and sum(rows) == n


@pytest.mark.parametrize(
    ("text", "value"), [("2GB", 2e9), (" 512 MiB", 2**29), ("1e6", 1e6), ("3b", 3), (7.9, 7)]
)
def test_parse_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "2 TB", "nan", "inf", "-1GB", None, "0.1"])
def test_parse_bytes_errors(text):
    with pytest.raises(ValueError, match=re.escape(f"such as '2GB'; got {text!r}")):
        parse_bytes(text)


PEAK = """
import torch, torchvision
from geomkd import score_layers

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.set_num_threads(1)
model = torchvision.models.resnet18(num_classes=4)
x, y = torch.randn(1000, 3, 32, 32), torch.arange(1000) % 4
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident("VmRSS")
scores = score_layers(model, (x, y), memory="300MB", subsamples=10, progress=False)
print(len(scores.to_frame()), resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_memory_stays_under_the_budget():
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    layers, growth = map(int, run.stdout.split())
    assert layers == 10
    assert 20e6 < growth <= 300e6


# ---- what goes wrong midway ----------------------------------------------------------------------


def interrupted(model, data, plans, after, **options):
    """Scores where Ctrl-C comes once more than ``after`` samples were read by the plan."""
    made, rows = len(plans), 0

    def forward(model, batch):
        nonlocal rows
        rows += len(batch) * (len(plans) > made)
        if rows > after:
            raise KeyboardInterrupt
        return model(batch)

    return score(model, data, forward=forward, **options)


def test_ctrl_c_midway_gives_what_is_done(plans):
    model, n = wide(*WIDTHS), 400
    data = (vectors(n), torch.arange(n) % CLASSES)
    options = {"memory": f"{least_of(model, data, subsamples=2) + 3}MB", "subsamples": 2}
    whole = score(model, data, **options)
    plan = plans[-1]
    done = len(plan.groups[0])
    assert len(plan.groups) > 2 and done == 2
    part = interrupted(model, data, plans, n, **options)
    assert part.settings["partial"] is True and whole.settings["partial"] is False
    assert list(rows_of(part).index) == list(rows_of(whole).index)[:done]
    assert list(rows_of(part)["quality"]) == list(rows_of(whole)["quality"])[:done]
    assert part.draws["quality"].shape == (done, 2)
    assert "partial" in repr(part) and "partial" not in repr(whole)


def test_ctrl_c_before_any_layer_is_raised(plans):
    with pytest.raises(KeyboardInterrupt):
        interrupted(sequential(), (vectors(), Y), plans, 0)
    assert len(plans) == 1


class Spoiled(nn.Module):
    """Sigmoid features, then rows that are ``value`` where the input's first feature is large."""

    def __init__(self, value, width):
        super().__init__()
        self.widen, self.act, self.spoil, self.value = Widen(8, width), nn.Sigmoid(), Spoil(), value

    def forward(self, x):
        return self.spoil(self.act(self.widen(x)), x[:, :1] > 9, self.value)


class Spoil(nn.Module):
    def forward(self, x, where, value):
        return x.masked_fill(where, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("memory", ["2GB", "small"])
def test_features_that_are_not_finite_name_the_layer(value, memory, plans):
    model, x = Spoiled(value, width=10_000), vectors()
    x[[40, 7, 12], 0] = 10
    options = {"layers": ["act", "spoil"]}
    if memory == "small":
        memory = f"{least_of(model, (x, Y), **options)}MB"
    text = "layer 'spoil': features must be finite; got NaN or Inf in 3 of 60 rows, first in row 7"
    with pytest.raises(ValueError, match=text):
        score(model, (x, Y), memory=memory, **options)
    assert (plans[-1].width < 10_000) == (memory != "2GB")


@pytest.mark.parametrize("subsamples", [0, 3])
def test_zero_rows_warn_once_a_layer(subsamples):
    x = vectors()
    x[[40, 7, 12], 0] = 10
    model = nn.ModuleDict({"one": Spoiled(0.0, 16), "two": Spoiled(0.0, 12)})
    layers = [f"{part}.{name}" for part in ("one", "two") for name in ("act", "spoil")]
    with pytest.warns(UserWarning, match="feature rows are zero") as caught:
        scores = score(
            model,
            (x, Y),
            layers=layers,
            subsamples=subsamples,
            forward=lambda model, batch: [part(batch) for part in model.values()],
        )
    assert [str(warning.message) for warning in caught] == [
        f"layer '{part}.spoil': 3 of 60 feature rows are zero: their cosines are taken as 0"
        for part in ("one", "two")
    ]
    assert caught[0].filename == __file__
    assert np.isfinite(scores.to_frame()["quality"]).all()


def test_robust_definition_warns_of_rows_at_the_mean():
    text = (
        "layer 'act': 60 of 60 feature rows equal the mean of all rows: "
        "their cosines are taken as 0"
    )
    with pytest.warns(UserWarning) as caught:
        rows = rows_of(score(Equal(), (vectors(), Y), layers=["act"], definition="robust"))
    assert [str(warning.message) for warning in caught] == [text]
    assert rows.loc["act", "quality"] == 0


def test_robust_definition_gives_zero_rows_a_direction():
    x = vectors()
    x[[40, 7, 12]] = 0  # warnings are errors in these tests
    scores = score(nn.Sequential(nn.Identity()), (x, Y), layers=["0"], definition="robust")
    assert_as_measured(scores, {"0": x}, Y, definition="robust")


class Equal(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.Sigmoid()

    def forward(self, x):
        return self.act(0 * x)


def test_tokens_of_another_length_are_named():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.act = nn.Embedding(9, 6), nn.ReLU()

        def forward(self, ids):
            return self.act(self.embed(ids))

    ids = torch.arange(9).repeat(40)
    batches = [(ids[: 16 * length].view(16, length), Y[:16]) for length in (3, 3, 5)]
    text = r"layer 'act': expected \d+ features of each of 48 samples .* pool='mean' helps"
    with pytest.raises(ValueError, match=text):
        score(Tokens(), batches, layers=["act"])
    assert score(Tokens(), batches, layers=["act"], pool="mean").to_frame()["dim"][0] == 6


def test_features_too_small_or_large_for_float32_squares():
    model, x = sequential(depth=1), vectors()
    options = {"layers": ["1"], "entropy_per_class": 10}
    plain = rows_of(score(model, (x, Y), **options))
    for factor in (1e-25, 1e25):
        scaled = deepcopy(model)
        with torch.no_grad():
            scaled[0].weight *= factor
            scaled[0].bias *= factor
        rows = rows_of(score(scaled, (x, Y), **options))
        np.testing.assert_allclose(rows[list(TERMS)], plain[list(TERMS)], rtol=1e-5)
