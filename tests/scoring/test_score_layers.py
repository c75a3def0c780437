"""score_layers against features captured by hand, and its options."""

import re

import numpy as np
import pytest
import torch
from oracle import DEFINITIONS, TERMS, reference
from teachers import (
    CLASSES,
    N,
    Y,
    assert_as_measured,
    assert_same,
    by_hand,
    images,
    least_of,
    resnet18,
    rows_of,
    score,
    sequential,
    vectors,
    vision_transformer,
    wide,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from geomkd import knowledge_quality
from geomkd.common import progress
from geomkd.data.sample import Sample
from geomkd.scoring import score_layers as scoring


class TwiceRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, CLASSES)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.fc(self.relu(self.b(self.relu(self.a(x)))))


# ---- the same as features captured by hand -------------------------------------------------------


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize(
    ("make", "inputs", "expected"),
    [
        (sequential, vectors(), ["1", "3", "5"]),
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
    features = by_hand(model, inputs, names)
    for name in names[:2]:
        features[name] = features[name][:, :5]
    assert_as_measured(scores, features, Y)
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
    assert list(frame["shape"])[1] == (16, 4, 4)
    assert list(frame["dim"]) == [64 * 256, 16 * 16, 32 * 4, 64, 4]
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
    text = "layer 'layer1.0': pool='cls' does not fit features of kind 'map', (2, 8, 8, 8)"
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


def test_the_papers_sampling_in_one_word():
    """A large map is pooled, and the entropy has samples of its own."""
    model, x, y = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()), images(8, 256), Y[:8] % 2
    own = {"entropy_per_class": 500, "pool": "published", "definition": "published"}
    paper, spelt, plain = (
        score(model, (x, y), layers=["1"], **options)
        for options in ({"protocol": "paper"}, own, {})
    )
    assert_same(paper, spelt, rel=0)
    assert paper.settings == spelt.settings | {"protocol": "paper"}
    assert paper.settings["samples"] == 8 and paper.to_frame()["dim"][0] == 5 * 128 * 128
    assert (plain.settings["protocol"], plain.to_frame()["dim"][0]) == (None, 5 * 256 * 256)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pool": "flatten"}, "protocol='paper' and pool='flatten' contradict each other"),
        ({"entropy_per_class": 50}, "protocol='paper' and entropy_per_class=50 contradict"),
        ({"samples": 400}, "protocol='paper' and samples=400 contradict each other: the protocol "),
        ({"definition": "robust"}, "protocol='paper' and definition='robust' contradict each"),
        ({"null": 19}, "protocol='paper' has samples of its own for the entropy: without null="),
        ({"sweep": [16]}, "protocol='paper' has samples of its own for the entropy: without null="),
        ({"protocol": "mine"}, "protocol must be one of (None, 'paper'); got 'mine'"),
    ],
)
def test_what_contradicts_the_papers_sampling(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        score(sequential(), (vectors(), Y), **{"protocol": "paper"} | options)


def test_half_samples():
    model, x = sequential(), vectors()
    scores = score(model, (x, Y), subsamples=6)
    assert {name: drawn.shape for name, drawn in scores.draws.items()} == dict.fromkeys(
        TERMS, (3, 6)
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
    assert out == "" and re.fullmatch(r"scoring \S+: 100%\S+ \[00:\d\d<00:00\]\n", err)


@pytest.mark.parametrize(
    "options", [{}, {"entropy_per_class": 8}, {"null": 19}, {"memory": 1}], ids=str
)
def test_the_bar_moves_to_its_end(options, monkeypatch, capfd):
    """With each batch that is read, and with each layer that is scored, by its name."""
    monkeypatch.setattr(progress, "SECONDS", 0)
    bars, bar_of = [], scoring.bar_of
    monkeypatch.setattr(scoring, "bar_of", lambda *a, **o: bars.append(bar_of(*a, **o)) or bars[0])
    model, data = wide(1024, 20_000), (vectors(), Y)
    if "memory" in options:  # the second layer in slices
        options = {"memory": f"{least_of(model, data) + 1} MB"}
    score(model, data, progress=True, **options)
    assert bars[0].n == bars[0].total
    lines = capfd.readouterr().err.splitlines()
    told = [re.match(r"(reading|scoring) (\S+): +(\d+)%", line).groups() for line in lines]
    assert list(dict.fromkeys(name for what, name, _ in told if what == "scoring")) == ["1", "3"]
    shares = [int(share) for *_, share in told]
    assert shares == sorted(shares) and len(set(shares)) > 4 and shares[-1] == 100
