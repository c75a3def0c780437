"""similarity_matrix against plain numpy on the captured features, batch by batch."""

import numpy as np
import pytest
import torch
from alike import hsic, pair, plain_cka
from small import images, mlp, mobilenet, resnet, resnet2, same, state, vit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from geomkd.data.sample import Sample
from geomkd.measures.similarity import cka, procrustes_distance
from geomkd.network.forward import evaluating
from geomkd.network.hooks import features_of
from geomkd.network.layers import candidate_layers
from geomkd.scoring.similarity_matrix import similarity_matrix

LAYERS_A, LAYERS_B = ["relu", "layer2.0", "fc.input"], ["features.3", "features.17"]
DATA = images(50)


def compared(a, b=None, data=DATA, **options):
    return similarity_matrix(a, b, data, **{"progress": False} | options)


def whole(model, names, x):
    with evaluating(model):
        return {k: v.flatten(1).double() for k, v in features_of(model, x, names).items()}


def plain(left, right, batches):
    """Nguyen et al.: unbiased HSIC of every batch, averaged, then the ratio."""
    grams = [
        [[(f[i] @ f[i].T).numpy() for f in side.values()] for i in batches]
        for side in (left, right)
    ]

    def mean(one, other):
        return np.mean([hsic(*grams, True) for grams in zip(one, other, strict=True)])

    left, right = ([list(layer) for layer in zip(*side, strict=True)] for side in grams)
    return np.array(
        [[mean(k, l) / np.sqrt(mean(k, k) * mean(l, l)) for l in right] for k in left]  # noqa: E741
    )


def batches_of(data, samples, size, count, seed=0):
    """The seeded order of the sample: mixed over classes, which the data need not be."""
    chosen = Sample(data, samples, seed=seed).indices
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return list(chosen[order][: size * count].split(size))


# ---- models --------------------------------------------------------------------------------------


def test_one_batch_is_cka_of_all_samples():
    a, b = resnet(), mobilenet()
    frame = compared(a, b, layers_a=LAYERS_A, layers_b=LAYERS_B, samples=48)
    rows = batches_of(DATA, 48, 48, 1)[0]
    left, right = (
        whole(a, LAYERS_A, DATA[0][rows]),
        whole(b, LAYERS_B, DATA[0][rows]),
    )
    assert list(frame.index) == LAYERS_A and list(frame.columns) == LAYERS_B
    for i in LAYERS_A:
        for j in LAYERS_B:
            assert frame.loc[i, j] == pytest.approx(plain_cka(left[i], right[j]), abs=1e-5)
            assert frame.loc[i, j] == pytest.approx(cka(left[i], right[j]).item(), abs=1e-5)
    assert frame.attrs == {
        "measure": "cka",
        "n": 48,
        "batch_size": 48,
        "pool": "flatten",
        "seed": 0,
    }


@pytest.mark.parametrize(("batch_size", "size", "count"), [(16, 16, 3), (13, 12, 4), (10, 9, 5)])
def test_batches_are_averaged_before_the_ratio(batch_size, size, count):
    a, b = resnet().double(), vit().double()
    names = [layer.name for layer in candidate_layers(b, DATA[0].double()[:2])][:2]
    data = (DATA[0].double(), DATA[1])
    options = {"layers_a": LAYERS_A, "layers_b": names, "samples": 48, "seed": 3}
    frame = compared(a, b, data, batch_size=batch_size, **options)
    batches = batches_of(data, 48, size, count, seed=3)
    expected = plain(whole(a, LAYERS_A, data[0]), whole(b, names, data[0]), batches)
    np.testing.assert_allclose(frame.to_numpy(), expected, atol=1e-10)
    assert (frame.attrs["n"], frame.attrs["batch_size"]) == (size * count, size)


def test_remainder_is_left_out_and_batches_are_not_below_four():
    data = (DATA[0][:14], DATA[1][:14])
    attrs = compared(resnet(), None, data, samples=14, batch_size=5, layers_a=["fc.input"]).attrs
    assert (attrs["n"], attrs["batch_size"]) == (12, 4)  # 4 of each of 3 classes
    attrs = compared(resnet(), None, data, samples=6, batch_size=4, layers_a=["fc.input"]).attrs
    assert (attrs["n"], attrs["batch_size"]) == (6, 6)


def test_data_in_order_of_class_is_mixed():
    x = DATA[0] + 3 * DATA[1][:, None, None, None]
    order = DATA[1].argsort(stable=True)
    frames = [
        compared(resnet(), resnet2(), (x[i], DATA[1][i]), layers_a=LAYERS_A, batch_size=16)
        for i in (torch.arange(50), order)
    ]
    np.testing.assert_allclose(*frames, atol=0.15)
    assert (frames[1].to_numpy() > 0.3).all()  # within one class far less is in common


def test_model_with_itself():
    frame = compared(resnet(), batch_size=16, samples=48)
    names = [layer.name for layer in candidate_layers(resnet(), DATA[0][:2])]
    assert list(frame.index) == list(frame.columns) == names
    np.testing.assert_allclose(np.diag(frame), 1, atol=1e-12)
    np.testing.assert_allclose(frame, frame.T, atol=1e-12)
    twice = compared(resnet(), resnet(), batch_size=16, samples=48)
    np.testing.assert_allclose(twice, frame, atol=1e-12)


def test_one_model_is_run_once_for_the_layers_of_both():
    model, runs = resnet(), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    before = compared(model, layers_a=LAYERS_A, layers_b=["layer4.0"], batch_size=16, samples=48)
    counted = len(runs)
    full = compared(resnet(), batch_size=16, samples=48)
    np.testing.assert_allclose(before, full.loc[LAYERS_A, ["layer4.0"]], atol=1e-12)
    runs.clear()
    compared(model, layers_a=LAYERS_A, layers_b=["layer4.0"], batch_size=48, samples=48)
    assert counted - len(runs) == 3 - 1


def test_models_are_left_as_they_were():
    a, b = resnet().train(), mobilenet().eval()
    a.layer1.eval()
    before = state(a), state(b), torch.random.get_rng_state()
    flags = [m.training for m in (*a.modules(), *b.modules())]
    x, y = DATA[0].clone(), DATA[1].clone()
    compared(a, b, (x, y), batch_size=16)
    assert same(state(a), before[0]) and same(state(b), before[1])
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert flags == [m.training for m in (*a.modules(), *b.modules())]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in a.modules())
    assert torch.equal(x, DATA[0]) and torch.equal(y, DATA[1])


def test_kinds_of_data_and_seeds():
    expected = compared(resnet(), mobilenet(), batch_size=16, seed=1)
    loader = DataLoader(TensorDataset(*DATA), batch_size=7)
    for data in (loader, TensorDataset(*DATA)):
        got = compared(resnet(), mobilenet(), data, batch_size=16, seed=1)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    other = compared(resnet(), mobilenet(), batch_size=16, seed=2)
    assert not np.allclose(other, expected, atol=1e-6)


def test_mapping_batches_and_forward():
    model = mlp()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    data = [{"x": x[i : i + 10], "label": torch.arange(10) % 2} for i in (0, 10, 20)]
    frame = compared(model, None, data, forward=lambda m, batch: m(batch["x"]), samples=30)
    assert frame.loc["1", "1"] == pytest.approx(1) and frame.attrs["n"] == 30


def test_pooling_is_applied():
    frame = compared(resnet(), layers_a=["layer2.0", "layer3.0"], pool="mean")
    rows = batches_of(DATA, 5000, 50, 1)[0]
    with evaluating(resnet()):
        maps = features_of(resnet().eval(), DATA[0][rows], ["layer2.0", "layer3.0"])
    left, right = (m.mean(dim=(2, 3)).detach() for m in maps.values())
    assert frame.iloc[0, 1] == pytest.approx(plain_cka(left, right), abs=1e-5)


def test_a_layer_without_variance():
    model = mlp()
    with torch.no_grad():  # not the first alone: of equal rows a product need not make equal ones
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    frame = compared(model, None, (x, torch.arange(30) % 2), batch_size=10)
    assert (frame == 0).all(axis=None)


def test_features_that_are_not_finite_name_their_layer():
    x = DATA[0].clone()
    x[:] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'relu': features must be finite; .* 50 of 50"):
        compared(resnet(), None, (x, DATA[1]))


class Changing(nn.Module):
    """Returns another number of features from its third call on."""

    def __init__(self):
        super().__init__()
        self.relu, self.calls = nn.ReLU(), 0

    def forward(self, x):
        self.calls += 1
        return self.relu(x[:, : 6 if self.calls < 4 else 5])


def test_another_width_is_noticed():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"layer 'relu': expected features of 10 samples, 6 each"):
        compared(Changing(), None, (x, torch.arange(30) % 2), batch_size=10, layers_a=["relu"])


# ---- features that are there ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [60, 500])
@pytest.mark.parametrize(
    ("measure", "function"), [("cka", cka), ("procrustes", procrustes_distance)]
)
def test_mappings_are_compared_whole(n, measure, function):
    a = dict(zip("pq", pair(n, 20, 12), strict=True)) | {"map": pair(n, 48, 1)[0].view(n, 3, 4, 4)}
    b = dict(zip("rs", pair(n, 30, 9, seed=1), strict=True))
    b["s"] = b["s"].float().numpy()
    frame = similarity_matrix(a, b, measure=measure)
    assert list(frame.index) == ["p", "q", "map"] and list(frame.columns) == ["r", "s"]
    for i in a:
        for j in b:
            expected = function(a[i], torch.as_tensor(b[j])).item()
            assert frame.loc[i, j] == pytest.approx(expected, abs=1e-6)
    assert (frame.attrs["measure"], frame.attrs["n"]) == (measure, n)
    part = similarity_matrix(a, b, measure=measure, layers_a=["map", "p"], layers_b=["s"])
    np.testing.assert_allclose(part, frame.loc[["map", "p"], ["s"]], atol=1e-6)
    alone = similarity_matrix(a, measure=measure)
    np.testing.assert_allclose(np.diag(alone), 1.0 if measure == "cka" else 0.0, atol=1e-7)


# ---- checks --------------------------------------------------------------------------------------

FEATURES = dict(zip("pq", pair(20, 5, 4), strict=True))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((FEATURES,), {"measure": "cca"}, ValueError, r"one of \('cka', 'procrustes'\); got 'cca'"),
        ((FEATURES, mlp()), {}, TypeError, "both be models or both mappings; got mapping and mod"),
        ((3,), {}, TypeError, "a must be a torch.nn.Module or a mapping .*; got int"),
        ((FEATURES, None, DATA), {}, ValueError, "data= and pool= are for models"),
        ((FEATURES,), {"pool": "mean"}, ValueError, "data= and pool= are for models"),
        ((mlp(),), {}, ValueError, "models need data="),
        ((mlp(), None, DATA), {"measure": "procrustes"}, ValueError, "needs whole features"),
        ((mlp(), None, DATA), {"batch_size": 3}, ValueError, "batch_size must be at least 4"),
        ((FEATURES,), {"layers_a": ["p", "z"]}, ValueError, r"a has no layers \['z'\]; it has"),
        ((FEATURES,), {"layers_a": ["p", "p"]}, ValueError, "layers_a must differ from"),
        ((FEATURES,), {"layers_b": []}, ValueError, "layers_b must hold at least one"),
        (
            (FEATURES, {"r": pair(19)[0]}),
            {},
            ValueError,
            r"same n >= 4 .*; got n = \[19, 20\]",
        ),
        (({"r": torch.zeros(3, 2)},), {}, ValueError, r"n >= 4 samples; got n = \[3\]"),
        (({},), {}, ValueError, r"n >= 4 samples; got n = \[\]"),
        ((FEATURES,), {"layers_a": "p"}, TypeError, "layers_a must be a list .*; got str 'p'"),
        (
            (FEATURES, {"r": torch.full((20, 2), torch.nan)}),
            {},
            ValueError,
            r"b\['r'\] must be",
        ),
        ((resnet(), None, DATA), {"layers_a": ["layer9"]}, ValueError, "no module 'layer9'"),
        ((resnet(), None, DATA), {"layers_a": ["relu"] * 2}, ValueError, "layers_a must differ"),
    ],
)
def test_input_is_checked(arguments, options, error, text):
    with pytest.raises(error, match=text):
        similarity_matrix(*arguments, progress=False, **options)
