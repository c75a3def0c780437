"""Networks and data, as options name them."""

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import TensorDataset
from torchvision.models import resnet18, squeezenet1_1

from geomkd.cli.inputs import Transformed, check_takes_images, load_data, load_inputs
from geomkd.cli.models import load_model
from geomkd.cli.parser import parsed


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (20, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(20) % 2)
    return tmp_path / "images.npz"


def save(state, path):
    torch.save(state, path)
    return path


def test_random_weights_follow_the_seed_and_leave_the_global_state():
    before = torch.get_rng_state()
    same, again, other = (load_model("torchvision:resnet18", seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(same.model.conv1.weight, again.model.conv1.weight)
    assert not torch.equal(same.model.conv1.weight, other.model.conv1.weight)
    assert same.transform is None and "random, seed 0" in same.story


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_weights_bring_the_number_of_classes(tmp_path, wrap):
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    state = {f"module.{key}": value for key, value in state.items()}
    loaded = load_model("torchvision:resnet18", weights=save(wrap(state), tmp_path / "w.pth"))
    assert loaded.model.fc.out_features == 7
    assert torch.equal(loaded.model.fc.weight, state["module.fc.weight"])
    assert loaded.transform is None


def test_a_published_size_brings_the_transform_of_its_weights(tmp_path, images):
    state = torchvision.models.squeezenet1_1().state_dict()
    loaded = load_model("torchvision:squeezenet1_1", weights=save(state, tmp_path / "w.pth"))
    data, words = load_data(images, loaded)
    assert data[0][0].shape == (3, 224, 224)
    assert "the weights' own" in words and "0.485" in words
    assert data.targets.tolist() == [0, 1] * 10
    plain, words = load_data(images, loaded, mean=[0.5], std=[0.5])
    assert plain[0][0].shape == (3, 40, 40) and "mean [0.5]" in words


def test_a_factory_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\nmake = lambda: nn.Linear(2, 2)\nwrong = lambda: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_model("my_networks:make").model.in_features == 2
    with pytest.raises(TypeError, match=r"must make a torch.nn.Module; got int"):
        load_model("my_networks:wrong")
    with pytest.raises(ValueError, match=r"cannot be found: .*absent"):
        load_model("my_networks:absent")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "resnet18",
            "must be torchvision:NAME, timm:NAME, hf:NAME_OR_FOLDER or package.*; got 'resnet18'",
        ),
        ("torchvision:resnet99", "torchvision has no model 'resnet99'; close matches: resnet"),
        ("no_such_package:make", "cannot be found: No module named 'no_such_package'"),
    ],
)
def test_a_wrong_name(name, text):
    with pytest.raises(ValueError, match=text):
        load_model(name)


@pytest.mark.parametrize("form", ["npz", "idx"])
def test_arrays_take_no_image_size(images, form):
    path = images
    if form == "idx":
        path = images.parent / "idx"
        path.mkdir()
        header = bytes((0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1))
        (path / "train-images-idx3-ubyte").write_bytes(header + b"1")
        (path / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 1, 0)))
    plain = load_model("torchvision:squeezenet1_1")
    assert len(load_data(path, plain)[0])
    with pytest.raises(ValueError, match=r"--image-size is for folders of images; .* holds arrays"):
        load_data(path, plain, image_size=8)


def test_a_network_that_does_not_take_the_images(images):
    vit = load_model("torchvision:vit_b_32", n_classes=2)
    text = (
        r"--model v does not take these images, of shape \(3, 40, 40\): .*Expected 224 but got 40"
    )
    with pytest.raises(ValueError, match=text):
        check_takes_images("--model v", vit, load_data(images, vit)[0])
    assert vit.model.training


def test_transformed_keeps_length_and_labels():
    data = Transformed(TensorDataset(torch.ones(3, 2), torch.arange(3)), lambda x: 2 * x)
    assert len(data) == 3 and not hasattr(data, "targets")
    assert data[2][0].tolist() == [2, 2] and data[2][1] == 2


# ---- of a distillation ---------------------------------------------------------------------------


def inputs_of(*options, needs_teacher=True):
    arguments = ["distill", "--data", "images.npz", *options]
    return load_inputs(parsed(arguments), needs_teacher=needs_teacher)


def test_networks_without_weights_have_the_classes_of_the_data(here):
    torch.save(resnet18(num_classes=7).state_dict(), "seven.pth")
    names = ["--teacher", "torchvision:resnet18", "--student", "torchvision:resnet18"]
    found = inputs_of(*names, "--teacher-weights", "seven.pth")
    assert found.n_classes == found.student.model.fc.out_features == 4
    assert found.teacher.model.fc.out_features == 7
    assert found.teacher.story.endswith("weights " + str(here / "seven.pth"))
    untrained = inputs_of(*names)
    assert untrained.teacher.model.fc.out_features == 4
    assert untrained.teacher.story == "torchvision:resnet18, 4 classes, weights random, seed 0"
    again = inputs_of(*names, "--seed", "1").student.model.fc.weight
    assert not torch.equal(untrained.student.model.fc.weight, again)


def test_images_are_as_the_weights_want_them(here):
    torch.save(squeezenet1_1().state_dict(), "published.pth")
    student = ["--student", "torchvision:squeezenet1_1", "--student-weights", "published.pth"]
    found = inputs_of(*student, "--val-split", "test", needs_teacher=False)
    assert found.teacher is None and "the weights' own" in found.images
    assert found.train[0][0].shape == found.val[0][0].shape == (3, 224, 224)
    assert (len(found.train), len(found.val)) == (80, 20)


def test_validation_data_need_the_same_classes(here):
    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    np.savez("one.npz", x=x, y=y, classes=np.array(list("abcd")))
    np.savez("two.npz", x=x, y=y, classes=np.array(list("abdc")))
    student = ["--student", "tiny_nets:student", "--data", "one.npz"]
    np.savez("too.npz", x=x, y=y, classes=np.array(list("abcd")))
    assert len(inputs_of(*student, "--val-data", "too.npz", needs_teacher=False).val) == 4
    with pytest.raises(ValueError, match="--val-data are the training data; --val-split names"):
        inputs_of(*student, "--val-data", "one.npz", needs_teacher=False)
    with pytest.raises(ValueError, match=r"the same classes; got \['a', 'b', 'c', 'd'\] and"):
        inputs_of(*student, "--val-data", "two.npz", needs_teacher=False)
