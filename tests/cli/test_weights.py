"""Files of weights as people have them: loaded, or one line that says what is in them."""

import argparse
import builtins
import os
import pathlib
import pickle
from collections import defaultdict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from geomkd.cli.main import main
from geomkd.cli.models import load_model
from geomkd.cli.parser import parsed
from geomkd.cli.weights import fitted, read_state_dict

NAME = "torchvision:squeezenet1_1"


@pytest.fixture(scope="module")
def state():
    return models.squeezenet1_1(num_classes=5).state_dict()


def save(content, path):
    torch.save(content, path)
    return path


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


SORTS = {
    "as it is": lambda s: s,
    "sorted": lambda s: dict(sorted(s.items())),
    "turned round": lambda s: dict(reversed(s.items())),
    "trainer": lambda s: {"model_state_dict": s, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda s: {"state_dict": s},
    "model": lambda s: {"model": s, "model_ema": s},
    "net": lambda s: {"net": s, "acc": 93.2},
    "a setting named model": lambda s: {"model": {"name": "squeezenet"}, "net": s},
    "twice": lambda s: {"state_dict": {"model": s}},
    "data-parallel": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "both": lambda s: prefixed("module._orig_mod.", s),
    "both, turned round": lambda s: prefixed("_orig_mod.module.", s),
    "a part of it": lambda s: {k.replace("features.", "features.module."): v for k, v in s.items()},
    "held by a trainer": lambda s: {"state_dict": prefixed("model._orig_mod.", s)},
    "float16": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("sort", SORTS)
def test_every_sort_of_state_dict(tmp_path, state, sort):
    path = save(SORTS[sort](state), tmp_path / "w.pth")
    loaded = load_model(NAME, weights=path)
    assert loaded.model.num_classes == 5 and loaded.transform is None
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[key], value.half().float() if sort == "float16" else value)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("densenet121", "classifier"),
        ("shufflenet_v2_x0_5", "fc"),
    ],
)
def test_classes_are_those_of_the_models_own_head(tmp_path, name, head):
    state = models.get_model(name, weights=None, num_classes=3).state_dict()
    path = save(dict(sorted(state.items())), tmp_path / "w.pth")
    loaded = load_model(f"torchvision:{name}", weights=path)
    assert loaded.model.get_submodule(head).out_features == 3
    assert torch.equal(loaded.model.state_dict()[f"{head}.weight"], state[f"{head}.weight"])


def test_safetensors(tmp_path, state, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_file({f"module.{key}": value.contiguous() for key, value in state.items()}, path)
    loaded = load_model(NAME, weights=path)
    assert torch.equal(loaded.model.state_dict()["classifier.1.bias"], state["classifier.1.bias"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"w.safetensors is no file of weights .SafetensorError"):
        load_model(NAME, weights=path)

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"w.safetensors needs pip install geomkd\[safetensors\]"):
        read_state_dict(path)


class Own:
    pass


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Own(), "holds objects beside tensors, .*: test_weights.Own; save the state dict alone"),
        ({"model": {}, "args": argparse.Namespace(lr=1)}, "argparse.Namespace; save the state"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear; save"),
        (defaultdict(list), "collections.defaultdict; save"),
        ([1, 2], "must hold a state dict, by itself or under .*net; it holds a list"),
        (torch.ones(2), "it holds a Tensor"),
        ({}, "it holds nothing"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, r"holds epoch \(int\), weights \(dict\)"),
        ({"state_dict": {"a": torch.ones(1), "step": 3}}, r"it holds step \(int\)$"),
        (dict.fromkeys("abcdef", 1), r"a \(int\), .*, d \(int\) and 2 more"),
        ({"classifier.1.bias": torch.zeros(3)}, ": it lacks features.0"),
        ({"fc.weight": torch.zeros(3, 5)}, "it lacks .* more; has besides fc.weight$"),
        ({"features.0.weight": torch.ones(3)}, r"has features.0.weight \(3,\) for \(64, 3, 3, 3\)"),
    ],
)
def test_what_is_no_state_dict_says_what_it_is(tmp_path, monkeypatch, content, text):
    monkeypatch.setattr(Own, "__module__", "test_weights")
    path = save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=text) as error:
        load_model(NAME, weights=path)
    assert str(error.value).startswith(str(path))
    assert "\x1b" not in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"hello " * 99, pickle.dumps({"a": 1}), b"PK\x03\x04" + b"0" * 99, b"\x80\x02." * 9],
)
def test_files_of_another_kind(tmp_path, capsys, content):
    (tmp_path / "w.pth").write_bytes(content)
    command = ["score", "--model", NAME, "--data", "x.npz", "--weights", str(tmp_path / "w.pth")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "w.pth is no file of weights (" in error
    assert error.count("\n") == 1 and len(error) < 700 and "\x1b" not in error


def test_truncated_weights(tmp_path, state):
    path = save(state, tmp_path / "w.pth")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no file of weights"):
        load_model(NAME, weights=path)


def test_a_network_with_a_wrapper_in_it_or_a_part_named_like_one():
    inside = nn.DataParallel(nn.Sequential(nn.Linear(1, 1))).state_dict()
    assert fitted({"0.bias": torch.ones(1)}, inside).keys() == {"module.0.bias"}
    kept = {"model.fc.bias": torch.ones(1), "model.fc.weight": torch.ones(1)}
    assert fitted(kept, kept) == kept


# ---- names of torchvision's weights --------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Torch's folder of downloads, and no way to download."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.DEFAULT"])
def test_published_weights_that_are_on_disk(cache, weights):
    published = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    state = models.squeezenet1_1().state_dict()
    path = cache / pathlib.Path(published.url).name
    with pytest.raises(FileNotFoundError, match="not on disk, and nothing is downloaded") as error:
        load_model(NAME, weights=weights)
    assert published.url in str(error.value) and str(path) in str(error.value)
    torch.save(state, path)
    loaded = load_model(NAME, weights=weights)
    assert torch.equal(loaded.model.state_dict()["classifier.1.bias"], state["classifier.1.bias"])
    assert str(loaded.transform) == str(published.transforms())
    assert loaded.story == f"{NAME}, weights {weights}"


def test_the_transform_is_that_of_the_weights_named(cache):
    first, second = models.ResNet50_Weights
    torch.save(models.resnet50().state_dict(), cache / pathlib.Path(first.url).name)
    loaded = load_model("torchvision:resnet50", weights="IMAGENET1K_V1")
    assert str(loaded.transform) == str(first.transforms()) != str(second.transforms())


def test_names_of_no_weights(cache):
    text = "no file IMAGENET; torchvision's weights are IMAGENET1K_V1, DEFAULT"
    with pytest.raises(FileNotFoundError, match=text):
        load_model(NAME, weights="IMAGENET")
    with pytest.raises(FileNotFoundError, match=r"^there is no file DEFAULT$"):
        load_model("torch.nn:Identity", weights="DEFAULT")


def test_distill_keeps_names_and_makes_files_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    given = ["distill", "--teacher-weights", "DEFAULT", "--student-weights", "w.pth"]
    options = parsed(given)
    named = "ResNet50_Weights.IMAGENET1K_V2"
    assert parsed(["distill", "--teacher-weights", named]).teacher_weights == named
    assert options.teacher_weights == "DEFAULT"
    assert options.student_weights == os.path.join(os.getcwd(), "w.pth")


def test_a_backbone_is_not_downloaded(cache):
    assert load_model("torchvision:deeplabv3_mobilenet_v3_large").transform is None


def test_published_weights_are_read_by_torchvisions_own_loader(cache):
    """It may build another network than without weights, and read names of older files."""
    published = models.GoogLeNet_Weights.IMAGENET1K_V1
    torch.save(
        models.googlenet(init_weights=False).state_dict(), cache / pathlib.Path(published.url).name
    )
    model = load_model("torchvision:googlenet", weights="DEFAULT").model
    assert model.transform_input and model.aux1 is None


def test_published_weights_of_another_shape(cache):
    published = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    torch.save(
        models.squeezenet1_1(num_classes=5).state_dict(), cache / pathlib.Path(published.url).name
    )
    with pytest.raises(ValueError, match=r"^DEFAULT does not fit squeezenet1_1: .*size mismatch"):
        load_model(NAME, weights="DEFAULT")


def test_versions_of_modules_are_kept(tmp_path):
    state = models.mnasnet0_5(num_classes=5).state_dict()
    torch.save(state, tmp_path / "w.pth")
    found = load_model("torchvision:mnasnet0_5", weights=tmp_path / "w.pth").model.state_dict()
    assert torch.equal(found["classifier.1.weight"], state["classifier.1.weight"])
    torch.save(dict(state), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth does not fit .*mnasnet0_5: version should be set"):
        load_model("torchvision:mnasnet0_5", weights=tmp_path / "w.pth")
