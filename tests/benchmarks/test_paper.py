"""The paper's networks, data and grid, on generated files in the published formats."""

import doctest
import hashlib
import importlib
import json
import pickle
import signal
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from narrow import CLASSES, OneBlock
from pandas import DataFrame
from PIL import Image
from processes import CONTEXT, ended, start
from torchvision import datasets
from torchvision import models as published

import geomkd
from benchmarks.paper import estimate as estimates
from benchmarks.paper import models as networks
from benchmarks.paper.__main__ import main
from benchmarks.paper.augment import augment_crop_flip
from benchmarks.paper.data import Sizes, channel_statistics, load, read_cifar, read_tiny_imagenet
from benchmarks.paper.grid import cell, listing, tabulate
from benchmarks.paper.models import NETWORKS, build, head_prefix, load_body
from benchmarks.paper.places import Place
from benchmarks.paper.recipes import (
    PAIRS,
    Recipe,
    all_combinations,
    combination,
    layer_indices,
)
from benchmarks.paper.run import Teacher, accuracy_on, measured, paired_layers, train_student
from geomkd import DistillationResult, candidate_layers
from geomkd.distillation.running.fingerprints import weights_fingerprint

LAYERS = {"vgg19_bn": 19, "vgg11_bn": 11, "resnet34": 18, "resnet9": 6, "mobilenet_v2": 20}
LAYERS |= {"vit_b": 13, "vit_et": 9}  # the counts of arXiv 2511.14981


@pytest.fixture
def narrow(monkeypatch):
    """What is built are small networks of the same names."""
    for name, kind in CLASSES.items():
        monkeypatch.setattr(networks, name, kind)


# --- networks


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_as_the_paper_counts_them(name, size):
    with torch.device("meta"):  # shapes alone: no weights are drawn
        model, images = build(name, 7, size).eval(), torch.zeros(2, 3, size, size)
        assert len(candidate_layers(model, images)) == LAYERS[name]
        assert model(images).shape == (2, 7)


def test_last_grids():
    """Sides of the last maps by hand: 32 pixels halved by each stride that is left."""
    sides = {"resnet9": ("layer4", 4), "mobilenet_v2": ("features.17", 2), "vgg11_bn": ("27", 2)}
    for name, (layer, side) in sides.items():
        with torch.device("meta"):
            layers = candidate_layers(build(name, 10), torch.zeros(2, 3, 32, 32))
        maps = [found for found in layers if layer in found.name and found.kind == "map"]
        assert maps[-1].shape[1:] == (side, side)


def test_details_of_the_released_networks():
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    resnet, mobilenet, vgg, vit = (
        build(name, 5, 64).eval() for name in ("resnet9", "mobilenet_v2", "vgg11_bn", "vit_et")
    )
    stem = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    assert stem.shape[-1] == 32 and mobilenet.features[0](x).shape[-1] == 32
    assert resnet.layer1(stem).equal(stem)  # its block begins as the shortcut
    assert build("resnet9", 5).maxpool(stem).shape == stem.shape
    maps = vgg.features(x)
    assert maps.shape[-2:] == (2, 2)
    assert torch.equal(vgg(x), vgg.classifier(maps.mean(dim=(2, 3))))
    tokens = vit.encoder.layers.register_forward_hook(lambda m, i, out: seen.append(out))
    seen = []
    logits = vit(x)
    tokens.remove()
    torch.testing.assert_close(logits, vit.heads(vit.encoder.ln(seen[0]).mean(dim=1)))


def test_weights_follow_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (build("resnet9", 10, seed=seed).fc.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_networks_and_sizes():
    with pytest.raises(ValueError, match=r"network must be one of vgg19_bn, .*; got 'resnet18'"):
        build("resnet18", 10)
    with pytest.raises(ValueError, match="image_size must be 32 or 64; got 224"):
        build("resnet9", 10, 224)


def test_body_takes_what_fits(tmp_path):
    torch.manual_seed(0)
    imagenet = published.mobilenet_v2(num_classes=12).state_dict()
    torch.save(imagenet, tmp_path / "mobilenet.pth")
    model = build("mobilenet_v2", 10)
    head = model.classifier[1].weight.clone()
    taken = load_body(model, tmp_path / "mobilenet.pth")
    assert torch.equal(model.features[3].conv[0][0].weight, imagenet["features.3.conv.0.0.weight"])
    assert torch.equal(model.classifier[1].weight, head)
    assert taken.fresh == ["classifier.1.weight", "classifier.1.bias"]
    counted = [n for n in imagenet if n.startswith("features") and "num_batches" not in n]
    n = len(counted)
    assert taken.story == f"{n} of the body's {n} tensors taken from mobilenet.pth"


def test_body_names_what_it_leaves_out(tmp_path):
    model = published.resnet.ResNet(published.resnet.BasicBlock, [1, 1, 1, 1])
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    taken = load_body(build("resnet9", 10), tmp_path / "resnet.pth")
    assert taken.story.endswith("taken from resnet.pth; not taken: conv1.weight")
    assert taken.fresh == ["conv1.weight", "fc.weight", "fc.bias"]


def test_body_of_another_network(tmp_path):
    torch.save(build("vit_et", 10).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="holds no tensor that fits the body of ResNet"):
        load_body(build("resnet9", 10), tmp_path / "vit.pth")
    assert head_prefix(build("vit_et", 10)) == "heads."


# --- data


def write_cifar(root, n=4, classes=10):
    """CIFAR-10's python batches of noise, and a class of torchvision's that knows their hashes."""
    rng, folder = np.random.default_rng(0), root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    arrays = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = rng.permutation(np.arange(n) % classes).tolist()
        arrays[name] = data, labels
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    known = {
        "train_list": [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)],
        "test_list": [["test_batch", md5["test_batch"]]],
        "meta": datasets.CIFAR10.meta | {"md5": md5["batches.meta"]},
    }
    return type("Generated", (datasets.CIFAR10,), known), arrays


def test_cifar_batches_as_torchvision_reads_them(tmp_path):
    source, arrays = write_cifar(tmp_path)
    train, test = read_cifar(source, tmp_path)
    assert len(train) == 20 and len(test) == 4
    data, labels = arrays["data_batch_2"]  # one row: 1,024 red values, then green, then blue
    image, label = train[5]
    np.testing.assert_array_equal(image, data[1].reshape(3, 32, 32).astype(np.float32) / 255)
    assert label == labels[1]
    assert test.targets.tolist() == arrays["test_batch"][1]
    assert train.classes == list("abcdefghij")


def test_cifar_that_is_not_the_published_one(tmp_path):
    write_cifar(tmp_path)
    with pytest.raises(ValueError, match="cifar-10-batches-py: Dataset not found or corrupted"):
        load("cifar10", tmp_path)
    with pytest.raises(ValueError, match="cifar-100-python: Dataset not found"):
        load("cifar100", tmp_path)


def write_tiny_imagenet(root, *, per_class=6, classes=("n02", "n01"), size=64):
    """Tiny ImageNet's folders with one-coloured images: their colour tells class and number."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(classes) + "\n")
    lines = []
    for label, wnid in enumerate(classes):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(per_class):
            image = Image.new("RGB", (size, size), (100 * label, 40 * i, 50))
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        grey = Image.new("L", (size, size), 80 * (label + 1))
        grey.save(folder / "val" / "images" / f"val_{label}.JPEG")
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return folder


def test_tiny_imagenet_folders(tmp_path):
    write_tiny_imagenet(tmp_path)
    train, test = read_tiny_imagenet(tmp_path)
    assert train.classes == ["n02", "n01"]  # in the order of wnids.txt, not of the alphabet
    assert train.targets.tolist() == [0] * 6 + [1] * 6
    colour = train.images[8].reshape(-1, 3).float().mean(0)
    torch.testing.assert_close(colour, torch.tensor([100.0, 80.0, 50.0]), atol=3, rtol=0)
    assert test.targets.tolist() == [1, 0]
    assert test.images[0].unique().tolist() == [160]  # grey, in three channels


def test_tiny_imagenet_that_is_not_right(tmp_path):
    with pytest.raises(ValueError, match=r"expected the unpacked tiny-imagenet-200.zip"):
        load("tiny_imagenet", tmp_path)
    folder = write_tiny_imagenet(tmp_path)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"not in wnids.txt: \['n03'\]"):
        load("tiny_imagenet", tmp_path)
    for file in (folder / "train" / "n01" / "images").iterdir():
        file.unlink()
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match="no image of class n01"):
        load("tiny_imagenet", tmp_path)
    write_tiny_imagenet(tmp_path / "small", size=32)
    with pytest.raises(ValueError, match=r"expected 64 x 64 pixels; got \(32, 32\)"):
        load("tiny_imagenet", tmp_path / "small")


def write_npz(path, n_train=80, n_test=20, classes=4, side=32):
    rng = np.random.default_rng(1)
    arrays = {}
    for part, n in (("train", n_train), ("test", n_test)):
        labels = rng.permutation(np.arange(n) % classes)
        noise = rng.integers(0, 100, (n, side, side, 3))
        arrays |= {f"x_{part}": (noise + 30 * labels[:, None, None, None]).astype(np.uint8)}
        arrays |= {f"y_{part}": labels.astype(np.uint8)}
    np.savez(path, **arrays)
    return arrays


def test_channels_are_normalised_by_the_training_images(tmp_path):
    arrays = write_npz(tmp_path / "images.npz")
    data = load(f"npz:{tmp_path / 'images.npz'}")
    train = arrays["x_train"] / 255.0
    expected = (arrays["x_test"][3] / 255.0 - train.mean((0, 1, 2))) / train.std((0, 1, 2))
    np.testing.assert_allclose(data.test[3][0], expected.transpose(2, 0, 1), atol=1e-5)
    assert (data.n_classes, data.image_size, data.val) == (4, 32, None)


def test_channel_statistics_are_numpys():
    images = torch.randint(0, 256, (1500, 4, 5, 3), generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(images.to(torch.uint8))
    np.testing.assert_allclose(mean, (images.numpy() / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images.numpy() / 255).std((0, 1, 2)), rtol=1e-12)


def rows(images):
    return {bytes(image.flatten().tolist()) for image in images.images}


def test_validation_images_are_set_apart(tmp_path):
    write_npz(tmp_path / "images.npz")
    name = f"npz:{tmp_path / 'images.npz'}"
    whole, split, again = load(name), *(load(name, validation=True) for _ in range(2))
    assert torch.bincount(split.val.targets).tolist() == [4] * 4  # a fifth of 80
    assert torch.bincount(split.train.targets).tolist() == [16] * 4
    assert rows(split.train) | rows(split.val) == rows(whole.train)
    assert torch.equal(split.val.images, again.val.images)
    assert not torch.equal(split.val.images, load(name, validation=True, seed=1).val.images)
    assert rows(split.test) == rows(whole.test)
    assert torch.equal(split.val.mean, whole.train.mean)


def test_subset_is_balanced(tmp_path):
    write_npz(tmp_path / "images.npz")
    data = load(f"npz:{tmp_path / 'images.npz'}", subset=24, validation=True)
    assert torch.bincount(data.train.targets).tolist() == [6] * 4
    assert len(data.test) == 20  # no more than there are
    assert len(data.val) == 16
    assert not rows(data.train) & rows(data.val)


def test_images_of_another_size(tmp_path):
    write_npz(tmp_path / "images.npz", side=28)
    with pytest.raises(
        ValueError, match=r"train: images must be uint8 .* got torch.uint8 \(80, 28"
    ):
        load(f"npz:{tmp_path / 'images.npz'}")
    with pytest.raises(ValueError, match=r"dataset must be cifar10, .* or npz:FILE; got 'svhn'"):
        load("svhn")


# --- augmentation


def test_augmentation_against_a_loop():
    """The same draws, applied image by image with slices and `torch.flip`."""
    images = torch.rand(6, 3, 8, 10)
    torch.manual_seed(3)
    got = augment_crop_flip(2)(images)
    torch.manual_seed(3)
    top, left = torch.randint(5, (2, 6, 1))
    mirrored = torch.rand(6, 1) < 0.5
    assert 0 < mirrored.sum() < 6
    for i, image in enumerate(images):
        padded = torch.zeros(3, 12, 14)
        padded[:, 2:10, 2:12] = image
        crop = padded[:, top[i] : top[i] + 8, left[i] : left[i] + 10]
        assert torch.equal(got[i], crop.flip(2) if mirrored[i] else crop)
    assert got.is_contiguous()


def test_augmentation_draws_every_place_and_both_sides():
    """One lit pixel in the middle: 3 x 3 places, with and without mirror, all equally often."""
    images = torch.zeros(9000, 1, 4, 4)
    images[:, :, 1, 1] = 1
    torch.manual_seed(0)
    places = augment_crop_flip(1)(images)[:, 0].flatten(1)
    assert places.sum(1).eq(1).all()
    counts = torch.bincount(places.argmax(1), minlength=16).reshape(4, 4) / 9000
    columns = torch.tensor([1, 2, 2, 1]) / 6  # columns 0, 1, 2 or, mirrored, 3, 2, 1
    torch.testing.assert_close(counts[:3], (columns / 3).expand(3, 4), atol=0.02, rtol=0)


# --- recipes


@pytest.mark.parametrize("name", ["augment", "estimate", "models", "places", "recipes"])
def test_examples_of_the_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.paper.{name}"))
    assert found.attempted and not found.failed


def test_evenly_spaced_layers_are_the_stages_ends():
    layers = candidate_layers(build("resnet34", 10), torch.zeros(2, 3, 32, 32))
    chosen = combination("cifar10", "resnet34", "resnet9", "features", "paper_even", Recipe())
    student = candidate_layers(build("resnet9", 10), torch.zeros(2, 3, 32, 32))
    assert [(layers[t].name, student[s].name) for t, s in layer_indices(chosen)] == [
        ("layer1.2", "layer1.0"),
        ("layer2.3", "layer2.0"),
        ("layer3.5", "layer3.0"),
        ("layer4.2", "layer4.0"),
    ]


@pytest.mark.parametrize(
    ("dataset", "teacher", "layers", "expected"),
    [
        ("cifar100", "vgg19_bn", "paper_q", [11, 12, 13, 15]),
        ("tiny_imagenet", "vgg19_bn", "paper_q", [11, 12, 13, 16]),
        ("tiny_imagenet", "resnet34", "paper_q", [12, 13, 14, 15]),
        ("cifar10", "vgg19_bn", "paper_s", [15, 16, 17, 18]),
        ("cifar100", "vgg19_bn", "paper_e", [7, 8, 9, 11]),
        ("tiny_imagenet", "resnet34", "paper_ie", [12, 13, 14, 15]),
    ],
)
def test_layers_that_the_paper_picked(dataset, teacher, layers, expected):
    student = dict(reversed(PAIRS))[teacher]
    chosen = combination(dataset, teacher, student, "features", layers, Recipe())
    assert [t for t, _ in layer_indices(chosen)] == expected


@pytest.mark.parametrize(
    ("dataset", "layers", "blocks"),
    [
        ("cifar100", "paper_q", [6, 9, 10, 11]),
        ("npz:x.npz", "paper_q", [8, 9, 10, 11]),
        ("tiny_imagenet", "paper_i", [6, 7, 9, 10]),
        ("cifar10", "paper_even", [1, 3, 7, 9]),
    ],
)
def test_the_papers_numbers_of_a_transformer_begin_at_the_embedding(dataset, layers, blocks):
    chosen = combination(dataset, "vit_b", "vit_et", "features", layers, Recipe())
    layers = candidate_layers(build("vit_et", 10), torch.zeros(2, 3, 32, 32))
    assert [t for t, _ in layer_indices(chosen)] == blocks
    name = "encoder.layers.encoder_layer_{}".format
    assert [layers[s].name for _, s in layer_indices(chosen)] == [name(i) for i in (0, 2, 4, 6)]


def test_combinations_that_are_not_known():
    with pytest.raises(ValueError, match=r"teacher must be one of .*; got 'resnet9'"):
        combination("cifar10", "resnet9", "resnet9", "ce", "auto", Recipe())
    with pytest.raises(ValueError, match=r"method must be one of features, .*; got 'crd'"):
        combination("cifar10", "resnet34", "resnet9", "crd", "auto", Recipe())


# --- grid


def place_in(folder):
    device = torch.device("cpu")
    return Place(folder / "out", folder / "work", device, {}, progress=False, say=lambda line: None)


def write_results(place, chosen, accuracies):
    for seed, accuracy in enumerate(accuracies):
        path = place.student(chosen, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"failed": "NaN"} if accuracy is None else {"test_accuracy": accuracy}
        path.write_text(json.dumps(content))


def some(methods, **options):
    grid = all_combinations(["cifar10"], Recipe(**options))
    return [c for c in grid if c.method in methods and c.layers in (None, "paper_even")]


def test_size_of_the_grid():
    """Three data sets x four pairs x (11 methods, ours on seven choices); two cannot do tokens."""
    grid = list(all_combinations(["cifar10", "cifar100", "tiny_imagenet"], Recipe()))
    assert len(grid) == len(set(grid)) == 3 * 4 * (11 + 6)
    assert sum(c.obstacle is not None for c in grid) == 3 * 2
    assert {c.teacher for c in grid if c.obstacle} == {"vit_b"}


def test_states_of_combinations(tmp_path):
    place, grid = place_in(tmp_path), some(["kd", "simkd"])
    vgg, vgg_simkd, resnet, *_ = grid
    write_results(place, vgg, [0.5, 0.6, 0.7])
    write_results(place, vgg_simkd, [0.5])
    place.checkpoints(place.student(resnet, 2)).mkdir(parents=True)
    lines = listing(grid, 3, place).splitlines()
    states = [line.split("  ")[-1].strip() for line in lines[:-1]]
    assert states[:4] == ["done", "part: 1 of 3 seeds", "part: 0 of 3 seeds", "open"]
    assert states[7] == "skipped: needs maps, and transformers have tokens"
    assert lines[-1] == "8 combinations of 3 seeds: 1 done, 2 part, 4 open, 1 skipped"


def test_cells_of_the_table():
    runs = [{"test_accuracy": a} for a in (0.5, 0.6, 0.64)]
    deviation = np.std([50, 60, 64], ddof=1)
    assert cell(runs, 3) == f"58.00 ± {deviation:.2f}"
    assert cell([*runs[:2], None], 3) == "55.00 ± 7.07 (2 of 3)"
    assert cell([runs[0], {"failed": "NaN"}, None], 3) == "50.00 (1 of 3, 1 diverged)"
    assert cell([None] * 3, 3) == ""


def test_table_keeps_recipes_apart(tmp_path):
    place, grid, short = place_in(tmp_path), some(["kd", "simkd"]), some(["kd"], epochs=1)
    write_results(place, grid[2], [0.5, 0.6])
    write_results(place, short[1], [0.1, 0.2])
    place.teacher(grid[2]).write_text('{"test_accuracy": 0.9}')
    pairs = [c for c in grid if c.teacher != "vgg19_bn"]
    assert tabulate(pairs, 2, place).splitlines()[2:] == [
        "| cifar10 | layers | resnet34 → resnet9 | resnet34 → mobilenet_v2 | vit_b → vit_et |",
        "| --- | --- | ---: | ---: | ---: |",
        "| teacher |  | 90.00 | 90.00 |  |",
        "| kd |  | 55.00 ± 7.07 |  |  |",
        "| simkd | paper_even |  |  | – |",
    ]
    assert "15.00 ± 7.07" in tabulate(short, 2, place)
    assert "recipe epochs=1." in tabulate(short, 2, place)
    assert "90.00" not in tabulate(short, 2, place)


def test_listing_and_table_start_nothing(tmp_path, capsys):
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main(["grid", "--list", *places]) == 0
    assert main(["grid", "--tabulate", "--datasets", "tiny_imagenet", *places]) == 0
    assert (
        "204 combinations of 3 seeds: 0 done, 0 part, 198 open, 6 skipped"
        in capsys.readouterr().out
    )
    assert not list(tmp_path.iterdir())


def test_input_that_is_wrong(tmp_path, capsys):
    places = ["--data-root", str(tmp_path), "--out", str(tmp_path), "--work", str(tmp_path)]
    names = ["--teacher", "vit_b", "--student", "vit_et", "--method", "simkd"]
    assert main(["run", "--dataset", "cifar10", *names, *places]) == 2
    assert "simkd needs maps, and transformers have tokens" in capsys.readouterr().err
    assert main(["grid", "--datasets", "cifar10", *places]) == 2
    assert f"{tmp_path / 'cifar-10-batches-py'} is not there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["grid", "--imagenet-weights", "resnet9=file.pth"])
    assert "expected TEACHER=FILE" in capsys.readouterr().err


# --- estimate


def test_estimate_is_steps_times_seconds(tmp_path):
    """By hand: 50,000 images in batches of 128 are 391 steps an epoch."""
    place, grid = place_in(tmp_path), some(["kd", "semckd", "fitnet"], epochs=2)[3:6]
    write_results(place, grid[0], [0.5])
    place.work.mkdir()
    for names, seconds in (("", 1.0), ("-resnet9-features", 0.5), ("-resnet9-semckd", 4.0)):
        path = place.work / f"cost-resnet34{names}-32-128-fp32-False-cpu.json"
        path.write_text(json.dumps({"seconds": seconds, "bytes": 1e9}))
    first, last = estimates.estimate(grid, 3, {"cifar10": Sizes(10, 32, 50_000, "")}, place)
    hours = 2 * 391 * (1.0 + (2 + 3) * 0.5 + 3 * 4.0) / 3600
    assert first.startswith(f"cifar10, resnet34 -> resnet9: {hours:.1f} h, 1.2 GB (782 steps a run")
    assert "1 x teacher at 1 s a step, 5 x features at 0.5 s a step, 3 x semckd at 4 s" in first
    assert last.startswith(f"together about {hours:.1f} h on cpu")


def test_images_that_are_trained_on():
    assert estimates.n_images_of(50_000, Recipe(validation=True)) == 45_000
    assert estimates.n_images_of(1000, Recipe(validation=True)) == 800
    assert estimates.n_images_of(1000, Recipe(validation=True, subset=900)) == 800
    assert estimates.n_images_of(1000, Recipe(subset=200)) == 200


@pytest.mark.slow
def test_costs_are_measured_once(tmp_path, monkeypatch):
    # Another process, by a fork of what has loaded torch already.
    monkeypatch.setattr(estimates.multiprocessing, "get_context", lambda kind: CONTEXT)
    place = place_in(tmp_path)
    (chosen,) = [c for c in some(["kd"], batch_size=2) if c.student == "resnet9"]
    cost = estimates.cost(chosen, "features", 32, place)
    models = [build(name, 100) for name in ("resnet34", "resnet9")]
    teacher, student = (sum(p.nbytes for p in model.parameters()) for model in models)
    assert cost["bytes"] > teacher + 4 * student  # weights, gradient, two moments of AdamW
    assert cost["bytes"] < teacher + 4 * student + 1e9
    assert cost["seconds"] > 0
    (file,) = place.work.iterdir()
    before = file.stat().st_mtime_ns
    assert estimates.cost(chosen, "features", 32, place) == cost
    assert file.stat().st_mtime_ns == before


# --- runs


def test_a_student_that_diverges_is_written_down(tmp_path, narrow):
    write_npz(tmp_path / "images.npz", n_train=8, n_test=8)
    data, place = load(f"npz:{tmp_path / 'images.npz'}"), place_in(tmp_path)
    data.train.std = torch.zeros(3, 1, 1)  # infinite images
    chosen = combination("npz:images.npz", "resnet34", "resnet9", "ce", "auto", Recipe(epochs=1))
    teacher = Teacher(build("resnet9", 4), {"test_accuracy": 0.5, "fingerprint": "f"})
    train_student(chosen, 0, teacher, None, data, place)
    found = json.loads(place.student(chosen, 0).read_text())
    assert "became NaN or infinite in epoch 1" in found["failed"]
    assert "test_accuracy" not in found and found["recipe"]["epochs"] == 1
    assert not place.checkpoints(place.student(chosen, 0)).exists()


def test_layers_of_highest_q_are_scored_as_the_papers_were(tmp_path, monkeypatch):
    write_npz(tmp_path / "images.npz", n_train=16, n_test=8)
    data, given = load(f"npz:{tmp_path / 'images.npz'}"), []

    def spy(teacher, images, **options):
        given.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(geomkd, "score_layers", spy)
    chosen = combination("npz:images.npz", "resnet34", "resnet9", "features", "auto", Recipe())
    with pytest.raises(KeyboardInterrupt):
        paired_layers(chosen, build("resnet9", 4), data, place_in(tmp_path))
    assert given[0]["protocol"] == "paper" and "samples" not in given[0]


def test_students_start_from_their_seed(tmp_path, narrow):
    """The loss of the only step, on all images, against the plain network's."""
    write_npz(tmp_path / "images.npz", n_train=8, n_test=8)
    data, place = load(f"npz:{tmp_path / 'images.npz'}"), place_in(tmp_path)
    chosen = combination("npz:images.npz", "resnet34", "resnet9", "ce", "auto", Recipe(epochs=1))
    teacher = Teacher(build("resnet9", 4), {"test_accuracy": 0.5, "fingerprint": "f"})
    images, labels = (torch.stack(x) for x in zip(*[data.train[i] for i in range(8)], strict=True))
    for seed in (0, 1):
        train_student(chosen, seed, teacher, None, data, place)
        found = json.loads(place.student(chosen, seed).read_text())
        logits = build("resnet9", 4, seed=seed)(images)
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        assert found["history"]["loss"] == pytest.approx([expected], rel=1e-4)


def test_best_epoch_on_validation_images(tmp_path):
    write_npz(tmp_path / "images.npz", n_test=8)
    data = load(f"npz:{tmp_path / 'images.npz'}", validation=True)
    rows = {"epoch": [1, 2, 3], "val_accuracy": [0.2, 0.7, 0.5], "seconds": [1.0, 2.0, 4.0]}
    student = build("resnet9", 4)
    result = DistillationResult(student, torch.nn.ModuleList(), DataFrame(rows), [], "ce")
    (chosen, *_) = some(["ce"])
    found = measured(result, chosen, data, place_in(tmp_path))
    assert (found["best_validation_epoch"], found["best_validation_accuracy"]) == (2, 0.7)
    assert (found["seconds"], found["history"]) == (7.0, rows)
    assert found["images"] == {"train": 64, "test": 8}


def arguments(folder, *more, out="out"):
    """A run of two epochs of two steps, without what tells the method."""
    write_npz(folder / "images.npz", n_train=20, n_test=8, classes=2)
    options = {"dataset": f"npz:{folder / 'images.npz'}", "out": folder / out, "batch-size": 8}
    options |= {"work": folder / f"{out}-work", "teacher": "resnet34", "student": "mobilenet_v2"}
    return ["run", *more, "--quiet", *(x for k, v in options.items() for x in (f"--{k}", str(v)))]


@pytest.mark.slow
def test_run_from_the_command_line(tmp_path, narrow, capsys):
    imagenet = OneBlock(published.resnet.BasicBlock, [], num_classes=3).state_dict()
    torch.save(imagenet, tmp_path / "resnet34.pth")
    more = ["--method", "features", "--layers", "auto", "--seeds", "2", "--validation"]
    more += ["--epochs", "2"]
    more += ["--augment", "--imagenet-weights", str(tmp_path / "resnet34.pth")]
    assert main(arguments(tmp_path, *more)) == 0
    shown = capsys.readouterr().out
    assert "taken from resnet34.pth; not taken: conv1.weight" in shown
    files = sorted((tmp_path / "out" / "npz-images").glob("*.json"))
    first, second, teacher = (json.loads(file.read_text()) for file in files)
    check_teacher(teacher, next((tmp_path / "out-work").glob("*/*.pt")), imagenet, tmp_path)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["teacher_fingerprint"] == second["teacher_fingerprint"] == teacher["fingerprint"]
    assert first["pairs"] == second["pairs"] and len(first["pairs"]) == 4
    assert first["history"] != second["history"]
    assert first["images"] == {"train": 16, "test": 8}
    history = first["history"]
    assert history["epoch"] == [1, 2]
    assert first["best_validation_accuracy"] == max(history["val_accuracy"])
    assert first["best_validation_epoch"] == 1 + np.argmax(history["val_accuracy"])
    accuracies = [100 * first["test_accuracy"], 100 * second["test_accuracy"]]
    mean, deviation = statistics.mean(accuracies), np.std(accuracies, ddof=1)
    assert f"| features | auto | {mean:.2f} ± {deviation:.2f} |" in shown
    (left,) = (path for path in (tmp_path / "out-work").rglob("*") if path.is_file())
    assert left.name.startswith("teacher-resnet34")  # no checkpoints
    before = [file.stat().st_mtime_ns for file in files]
    assert main(arguments(tmp_path, *more)) == 0
    assert [file.stat().st_mtime_ns for file in files] == before


def check_teacher(about, weights, imagenet, folder):
    """The weights are those told of; they move little in body and new stem, freely behind."""
    model = build("resnet34", 2)
    start, start_of_head = model.conv1.weight.clone(), model.fc.weight.clone()
    model.load_state_dict(torch.load(weights, weights_only=True))
    assert weights_fingerprint(model) == about["fingerprint"]
    data = load(f"npz:{folder / 'images.npz'}", validation=True)
    images, labels = (torch.stack(x) for x in zip(*[data.test[i] for i in range(8)], strict=True))
    correct = (model.eval()(images).argmax(1) == labels).float().mean()
    assert about["test_accuracy"] == pytest.approx(float(correct))
    assert about["history"]["epoch"][-1] == 2
    moved = (model.layer4[0].conv2.weight - imagenet["layer4.0.conv2.weight"]).abs().max()
    fresh = (model.conv1.weight - start).abs().max()
    head = (model.fc.weight - start_of_head).abs().max()
    most = 4 * 0.01 * 0.0075 * 1.1  # four steps of AdamW, each of at most its rate
    assert 0 < moved < most and 0 < fresh < most < head


def place_untrained_teacher(folder, out, recipe):
    """A finished teacher's files, as if it had been trained."""
    place = replace(place_in(folder), out=folder / out, work=folder / f"{out}-work")
    path = place.teacher(combination("npz:images", *PAIRS[2], "ce", "auto", recipe))
    model = build("resnet34", 2)
    for file in (path, place.weights(path)):
        file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), place.weights(path))
    about = {"fingerprint": weights_fingerprint(model), "test_accuracy": 0.5}
    path.write_text(json.dumps(about))
    return path


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, narrow):
    more, recipe = ["--method", "ce", "--seeds", "1", "--epochs", "2"], Recipe(2, 8)
    whole, killed = (arguments(tmp_path, *more, out=out) for out in ("whole", "killed"))
    for out in ("whole", "killed"):
        place_untrained_teacher(tmp_path, out, recipe)
    assert main(whole) == 0
    (run,) = start(Path(__file__).parent / "narrow.py", killed, output=tmp_path / "said")
    while not list((tmp_path / "killed-work").rglob("step-*.pt")) and run.is_alive():
        time.sleep(0.01)
    run.kill()
    assert ended([run]) == [-signal.SIGKILL], (tmp_path / "said").read_text()
    name = "npz-images/resnet34-mobilenet_v2-ce-epochs=2-batch_size=8-seed=0.json"
    assert not (tmp_path / "killed" / name).exists()
    assert main(killed) == 0
    results = [json.loads((tmp_path / out / name).read_text()) for out in ("whole", "killed")]
    for found in results:
        del found["history"]["seconds"], found["seconds"]
    assert results[0] == results[1]


def test_a_teacher_of_other_weights_is_refused(tmp_path, narrow, capsys):
    path = place_untrained_teacher(tmp_path, "out", Recipe(2, 8))
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    assert main(arguments(tmp_path, "--method", "ce", "--epochs", "2")) == 2
    assert f"{path} tells of a teacher with fingerprint 0" in capsys.readouterr().err


def test_accuracy_in_batches():
    images = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    labels = images.argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    data = torch.utils.data.TensorDataset(images, labels)
    assert accuracy_on(data, torch.nn.Identity(), 4, torch.device("cpu")) == 0.7
