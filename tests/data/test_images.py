"""Arrays become data sets, or an error that says why not: tested through the files they come in."""

import io
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from geomkd.datasets import load_npz


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_uint8_stays_uint8_and_reads_as_float(tmp_path):
    images, labels = random_images(6, 5, 4, 3), np.array([0, 1, 2, 2, 1, 0], np.uint8)
    path = write_npz(tmp_path / "a.npz", x=images, y=labels)
    data = load_npz(path)
    assert data.images.dtype == torch.uint8
    assert data.targets.dtype == torch.int64
    assert data.targets.tolist() == labels.tolist()
    assert data.classes is None
    assert len(data) == 6
    image, label = data[3]
    np.testing.assert_array_equal(image, images[3].transpose(2, 0, 1).astype(np.float32) / 255)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert label.item() == 2


def test_npz_grey_uint8(tmp_path):
    images = random_images(3, 5, 4)
    data = load_npz(write_npz(tmp_path / "a.npz", x=images, y=np.arange(3)))
    assert data[0][0].shape == (1, 5, 4)
    np.testing.assert_array_equal(data[2][0][0], images[2].astype(np.float32) / 255)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_npz_float_is_channels_first_and_taken_as_it_is(tmp_path, dtype):
    images = (random_images(4, 13, 6, 6) / 64 - 2).astype(dtype)
    data = load_npz(write_npz(tmp_path / "a.npz", x=images, y=np.arange(4)))
    np.testing.assert_array_equal(data[1][0], images[1].astype(np.float32))
    assert data[1][0].dtype == torch.float32


def test_npz_splits(tmp_path):
    path = write_npz(
        tmp_path / "a.npz",
        x_train=random_images(4, 5, 5, 3),
        y_train=np.array([0, 1, 0, 1]),
        x_test=random_images(2, 5, 5, 3),
        y_test=np.array([1, 0]),
        classes=np.array(["cat", "dog"]),
    )
    assert len(load_npz(path)) == 4
    test = load_npz(path, split="test")
    assert test.targets.tolist() == [1, 0]
    assert test.classes == ["cat", "dog"]
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: expected the arrays 'x_val' and")
    ) as e:
        load_npz(path, split="val")
    assert "found ['classes', 'x_test', 'x_train', 'y_test', 'y_train']" in str(e.value)


def test_npz_normalises_channels(tmp_path):
    images = random_images(3, 5, 4, 3)
    path = write_npz(tmp_path / "a.npz", x=images, y=np.arange(3))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (images[0] / 255 - np.array(mean)) / np.array(std)
    image = load_npz(path, mean=mean, std=std)[0][0]
    np.testing.assert_allclose(image, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
    one = load_npz(path, mean=[0.5], std=[0.5])[0][0]
    np.testing.assert_allclose(one, images[0].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean": [0.5]}, ValueError, "give mean and std together; got mean=[0.5], std=None"),
        ({"mean": [0.5] * 2, "std": [1.0]}, ValueError, "mean must hold 1 or 3 finite floats, got"),
        ({"mean": [0.5], "std": [1.0, 0, 1]}, ValueError, "std must be positive, got [1.0, 0, 1]"),
        ({"mean": [float("nan")], "std": [1.0]}, ValueError, "mean must hold 1 or 3 finite floats"),
        ({"mean": 0.5, "std": [1.0]}, ValueError, "mean must hold 1 or 3 finite floats, got 0.5"),
        ({"mean": "imagenet", "std": [1.0]}, TypeError, "mean must be a sequence of floats, got"),
    ],
)
def test_npz_refuses_bad_statistics(tmp_path, options, error, message):
    path = write_npz(tmp_path / "a.npz", x=random_images(3, 5, 4, 3), y=np.arange(3))
    with pytest.raises(error, match=re.escape(message)):
        load_npz(path, **options)


GOOD = {"x": random_images(3, 8, 8, 3), "y": np.arange(3)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": None}, "expected the arrays 'x' and 'y' for split='train'; found ['x']"),
        (
            {"x": None},
            "expected the arrays 'x_train' and 'y_train' for split='train' (or x and y);",
        ),
        (
            {"x": random_images(3, 3, 8, 8)},
            "x: uint8 images must be (n, H, W) or (n, H, W, C) with at most 4 channels; "
            "got (3, 3, 8, 8)",
        ),
        ({"x": random_images(3, 8)}, "at most 4 channels; got (3, 8)"),
        ({"x": random_images(0, 8, 8, 3)}, "at most 4 channels; got (0, 8, 8, 3)"),
        ({"x": np.zeros((3, 8, 8))}, "x: float images must be (n, C, H, W); got (3, 8, 8)"),
        ({"x": np.zeros((3, 8, 8, 3))}, "got (3, 8, 8, 3), which looks like (n, H, W, C)"),
        ({"x": np.zeros((3, 8, 8), int)}, "x: images must be uint8 or float; got int64 (3, 8, 8)"),
        ({"y": np.arange(2)}, "y: labels must be integers of shape (3,), one for each image; got"),
        ({"y": np.arange(3.0)}, "one for each image; got float64 (3,)"),
        ({"y": np.arange(3)[:, None]}, "one for each image; got int64 (3, 1)"),
        ({"y": np.array([0, -1, 1])}, "y: labels must be 0 or more; the smallest is -1"),
        (
            {"classes": np.array(["cat", "dog"])},
            "classes: expected at least 3 names, since the largest label is 2; got shape (2,)",
        ),
    ],
)
def test_npz_errors_name_the_file_and_what_came(tmp_path, arrays, message):
    arrays = {key: value for key, value in (GOOD | arrays).items() if value is not None}
    path = write_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_npz(path)
    assert str(error.value).startswith(f"{path}: ")


def test_npz_bytes_as_class_names(tmp_path):
    path = write_npz(tmp_path / "a.npz", **GOOD, classes=np.array([b"a", b"b", b"c"]))
    assert load_npz(path).classes == ["a", "b", "c"]


class Bomb:
    went_off = False

    def __reduce__(self):
        return setattr, (Bomb, "went_off", True)


@pytest.mark.parametrize("key", ["x", "y", "classes"])
def test_npz_unpickles_nothing(tmp_path, key):
    bomb = np.empty(3, dtype=object)
    bomb[:] = [Bomb(), Bomb(), Bomb()]
    path = write_npz(tmp_path / "bomb.npz", **(GOOD | {key: bomb}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: the array {key!r} cannot be read")):
        load_npz(path)
    assert not Bomb.went_off


def test_npz_that_is_something_else(tmp_path):
    path = tmp_path / "a.npz"
    for content in (b"", b"PK\x03\x04 not really", b"plain text", pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: not an .npz archive (")):
            load_npz(path)
    assert not Bomb.went_off
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"expected an \.npz archive, got a single .npy array"):
        load_npz(path)


def test_npz_with_a_damaged_member(tmp_path):
    path = write_npz(tmp_path / "a.npz", **GOOD)
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(content)
    assert zipfile.ZipFile(path).namelist() == ["x.npy", "y.npy"]
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: the array 'x' cannot be read (Bad CRC")
    ):
        load_npz(path)


def test_missing_npz_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_npz(tmp_path / "none.npz")


def test_dataset_goes_through_a_loader_with_workers(tmp_path):
    images = random_images(10, 5, 4, 3)
    data = load_npz(write_npz(tmp_path / "a.npz", x=images, y=np.arange(10)))
    batches = list(DataLoader(data, batch_size=4, num_workers=1))
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))
    x = torch.cat([x for x, _ in batches])
    np.testing.assert_array_equal(x, images.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def test_repr_says_shape_type_and_classes(tmp_path):
    path = write_npz(tmp_path / "a.npz", **GOOD)
    assert repr(load_npz(path)) == "ImageArrays((3, 8, 8, 3) uint8, 3 classes)"
