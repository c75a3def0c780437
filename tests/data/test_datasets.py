import builtins
import gzip
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from geomkd.common.checks import as_tensor
from geomkd.datasets import digits, load_folder, load_idx, open_dataset


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# --- digits


def test_digits_sizes_types_and_range():
    split = digits()
    assert [len(part) for part in split] == [1000, 1000, 297, 297, 500, 500]
    for images, labels in zip(split[::2], split[1::2], strict=True):
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert (images.min(), images.max()) == (0, 1)


def test_digits_parts_are_the_whole_and_do_not_overlap():
    split = digits(seed=3)
    pixels = torch.cat(split[::2]).flatten(1).mul(16).round().numpy()
    labels = torch.cat(split[1::2]).numpy()
    ours = np.column_stack([pixels, labels])
    theirs = np.column_stack(load_digits(return_X_y=True))
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_digits_are_stratified():
    split = digits()
    whole = torch.cat(split[1::2]).bincount() / 1797
    for labels in split[1::2]:
        share = labels.bincount(minlength=10)
        torch.testing.assert_close(share, whole * len(labels), atol=1.0, rtol=0, check_dtype=False)


def test_digits_depend_on_the_seed_alone():
    np.random.seed(0)  # noqa: NPY002 - the global state is what is under test
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x_train, other.x_train)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


# --- IDX


def idx_bytes(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_idx(folder, images, labels, *, prefix="train", separator="-", packed=False):
    folder.mkdir(exist_ok=True)
    for kind, array in ((f"images{separator}idx3", images), (f"labels{separator}idx1", labels)):
        content = idx_bytes(array)
        name = f"{prefix}-{kind}-ubyte"
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


IDX_IMAGES, IDX_LABELS = random_images(300, 6, 5), (np.arange(300) % 10).astype(np.uint8)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_idx_reads_images_and_labels(tmp_path, packed, separator):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS, packed=packed, separator=separator)
    data = load_idx(tmp_path)
    assert data.images.dtype == torch.uint8
    assert len(data) == 300
    assert data.targets.dtype == torch.int64
    assert data.targets.tolist() == IDX_LABELS.tolist()
    image, label = data[299]
    np.testing.assert_array_equal(image, IDX_IMAGES[299][None].astype(np.float32) / 255)
    assert label.item() == 9


@pytest.mark.parametrize("prefix", ["t10k", "test"])
def test_idx_test_split_and_normalisation(tmp_path, prefix):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS)
    write_idx(tmp_path, IDX_IMAGES[::-1], IDX_LABELS[::-1], prefix=prefix)
    data = load_idx(tmp_path, split="test", mean=[0.5], std=[0.25])
    np.testing.assert_allclose(data[0][0][0], (IDX_IMAGES[299] / 255 - 0.5) / 0.25, atol=1e-6)
    assert data.targets[0] == 9


def test_idx_members_packed_one_after_the_other(tmp_path):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS, packed=True)
    content = idx_bytes(IDX_IMAGES)
    packed = gzip.compress(content[:1000]) + gzip.compress(content[1000:])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    np.testing.assert_array_equal(load_idx(tmp_path).images[..., 0], IDX_IMAGES)


@pytest.mark.parametrize(("kept", "found"), [(9015, 9015), (16, 16), (9016 + 3, 9019)])
def test_idx_of_the_wrong_length(tmp_path, kept, found):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes((file.read_bytes() + b"more")[:kept])
    message = f"{file}: expected 9016 bytes for shape (300, 6, 5), found {found}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_idx(tmp_path)


def test_idx_with_a_truncated_gzip_file(tmp_path):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS, packed=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:5000])
    message = rf"{re.escape(str(file))}: expected 9016 bytes for shape .*, found (\d+)"
    with pytest.raises(ValueError, match=message) as error:
        load_idx(tmp_path)
    assert 0 < int(str(error.value).split()[-1]) < 9016


def test_idx_with_a_damaged_gzip_file(tmp_path):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS, packed=True)
    file = tmp_path / "train-labels-idx1-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[-8] ^= 0xFF  # the checksum
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{file}: damaged gzip file (")):
        load_idx(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unsigned bytes in 3 axes, 00 00 08 03; found an empty file"),
        (idx_bytes(IDX_LABELS), "unsigned bytes in 3 axes, 00 00 08 03; found 00 00 08 01"),
        (b"\0\0\x0d\x03" + bytes(12), "00 00 08 03; found 00 00 0d 03"),
        (b"\0\0\x08\x03" + bytes(4), "expected 16 bytes of header, found 8"),
        (idx_bytes(IDX_IMAGES[:0]), "at most 4 channels; got (0, 6, 5)"),
    ],
)
def test_idx_with_another_header(tmp_path, content, message):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_idx(tmp_path)
    assert str(error.value).startswith(f"{file}: ")


def test_idx_with_too_few_labels(tmp_path):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS[:-1])
    with pytest.raises(ValueError, match=r"integers of shape \(300,\), .* got uint8 \(299,\)"):
        load_idx(tmp_path)


def test_idx_missing_files_and_splits(tmp_path):
    write_idx(tmp_path, IDX_IMAGES, IDX_LABELS)
    names = "t10k-images-idx3-ubyte or test-images-idx3-ubyte"
    message = f"{tmp_path}: expected a file {names}, with or without .gz"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_idx(tmp_path, split="test")
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\); got 'val'"):
        load_idx(tmp_path, split="val")


# --- folders


def write_folder(folder, sizes, *, mode="RGB"):
    """One file for each size, in classes ``cat`` and ``dog`` by turns; returns the arrays."""
    arrays = []
    for i, (width, height) in enumerate(sizes):
        shape = (height, width, 3) if mode == "RGB" else (height, width)
        array = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
        file = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)
        arrays.append(array)
    return arrays


def test_folder_reads_images_and_labels(tmp_path):
    arrays = write_folder(tmp_path, [(6, 5)] * 4)
    data = load_folder(tmp_path)
    assert data.classes == ["cat", "dog"]
    assert data.targets.dtype == torch.int64
    assert data.targets.tolist() == [0, 0, 1, 1]
    image, label = data[1]  # cat/2.png
    assert label == 0
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image, arrays[2].transpose(2, 0, 1).astype(np.float32) / 255)


def test_folder_turns_grey_images_to_three_channels(tmp_path):
    arrays = write_folder(tmp_path, [(6, 5)] * 2, mode="L")
    image = load_folder(tmp_path)[0][0]
    np.testing.assert_array_equal(image, np.stack([arrays[0] / 255] * 3).astype(np.float32))


def test_folder_normalises(tmp_path):
    arrays = write_folder(tmp_path, [(6, 5)] * 2)
    image = load_folder(tmp_path, mean=[0.5], std=[0.1, 0.2, 0.4])[0][0]
    expected = (arrays[0] / 255 - 0.5) / np.array([0.1, 0.2, 0.4])
    np.testing.assert_allclose(image, expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)


def test_folder_of_different_sizes_needs_image_size(tmp_path):
    write_folder(tmp_path, [(6, 5), (12, 7)])
    first, other = tmp_path / "cat" / "0.png", tmp_path / "dog" / "1.png"
    message = (
        "images must have one size when neither image_size nor transform is given; "
        f"{first} is 6x5, {other} is 12x7 (width x height): pass image_size="
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load_folder(tmp_path)
    data = load_folder(tmp_path, image_size=4)
    assert [data[i][0].shape for i in range(2)] == [(3, 4, 4)] * 2


def test_folder_cuts_out_the_centre(tmp_path):
    (tmp_path / "cat").mkdir()
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "cat" / "wide.png")
    image = load_folder(tmp_path, image_size=4)[0][0]
    assert image.shape == (3, 4, 4)
    assert image.min() == 1


def test_folder_with_a_transform_of_the_users(tmp_path):
    write_folder(tmp_path, [(6, 5), (12, 7)])
    data = load_folder(tmp_path, transform=lambda image: image.size)
    assert [item[0] for item in data] == [(6, 5), (12, 7)]
    with pytest.raises(ValueError, match="give either transform or image_size, mean and std, not"):
        load_folder(tmp_path, transform=np.asarray, image_size=4)


@pytest.mark.parametrize(
    ("size", "error", "text"),
    [
        (0, ValueError, "image_size must be at least 1; got 0"),
        (2.0, TypeError, "image_size must be an integer; got float 2.0"),
        (True, TypeError, "image_size must be an integer; got bool True"),
        ((4, 4), TypeError, "image_size must be an integer; got tuple (4, 4)"),
    ],
)
def test_folder_refuses_bad_image_size(tmp_path, size, error, text):
    write_folder(tmp_path, [(6, 5)])
    with pytest.raises(error, match=re.escape(text)):
        load_folder(tmp_path, image_size=size)


def test_folder_without_classes_or_images(tmp_path):
    with pytest.raises(ValueError, match="expected a folder of class folders; there is no such"):
        load_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="expected a folder of class folders; Couldn't find any"):
        load_folder(tmp_path)
    write_folder(tmp_path, [(6, 5)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected a folder of class folders; .* classes empty"):
        load_folder(tmp_path)


def test_folder_of_splits_is_not_a_folder_of_classes(tmp_path):
    write_folder(tmp_path / "train", [(6, 5)] * 2)
    write_folder(tmp_path / "val", [(6, 5)] * 2)
    with pytest.raises(
        ValueError, match=re.escape("the sub-folders ['train', 'val'] are splits")
    ) as e:
        load_folder(tmp_path)
    assert str(e.value).endswith(f"open one of them, for example {tmp_path / 'train'}")


def test_folder_without_torchvision(tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "torchvision" or name == "geomkd.data.image_folder":
            monkeypatch.delitem(sys.modules, name)
    real_import = builtins.__import__

    def no_torchvision(name, *args, **kwargs):
        if name.split(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torchvision)
    with pytest.raises(ImportError, match=re.escape("pip install geomkd[vision]")):
        load_folder(tmp_path)


# --- open_dataset


def test_open_dataset_tells_the_forms_apart(tmp_path):
    npz = write_npz(tmp_path / "a.npz", x=random_images(3, 8, 8, 3), y=np.arange(3))
    idx = write_idx(tmp_path / "idx", IDX_IMAGES, IDX_LABELS, packed=True)
    write_folder(tmp_path / "folder", [(6, 5), (12, 7)])
    assert open_dataset(npz)[0][0].shape == (3, 8, 8)
    assert open_dataset(str(idx), mean=[0.5], std=[0.5]).images.shape == (300, 6, 5, 1)
    assert open_dataset(tmp_path / "folder", image_size=4).classes == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"expected the arrays 'x_test' and 'y_test' .* found"):
        open_dataset(npz, split="test")


def test_open_dataset_says_what_it_expected(tmp_path):
    expected = (
        ": expected an .npz file, a folder of IDX files (train-images-idx3-ubyte[.gz], …) "
        "or a folder of class folders with images; got "
    )
    Path(tmp_path, "notes.txt").write_text("hello")
    for path, came in (
        (tmp_path, "a folder of 1 files with neither"),
        (tmp_path / "notes.txt", "a .txt file"),
        (tmp_path / "none.npz", "nothing there"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{path}{expected}{came}")):
            open_dataset(path)


# --- folders as they are found


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


DEEP = np.random.default_rng(0).integers(0, 65536, (6, 5), dtype=np.uint16)


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("a.png", DEEP, DEEP / 65535),  # I;16
        ("a.tif", DEEP, DEEP / 65535),
        ("a.tif", DEEP.astype(np.int32), DEEP / 65535),  # I
        ("a.pgm", DEEP, DEEP / 65535),
        ("a.tif", (DEEP / 65535).astype(np.float32), DEEP / 65535),  # F
        ("a.png", (DEEP >> 8).astype(np.uint8), (DEEP >> 8) / 255),
    ],
)
def test_grey_levels_are_kept(tmp_path, name, array, expected):
    write_image(tmp_path / "cat" / name, array)
    image = load_folder(tmp_path)[0][0]
    assert image.shape == (3, 6, 5) and image.dtype == torch.float32
    np.testing.assert_allclose(image, np.stack([expected] * 3), atol=1e-6)
    resized = load_folder(tmp_path, image_size=5, mean=[0.5], std=[0.5])[0][0]
    assert resized.shape == (3, 5, 5) and len(resized.unique()) > 15
    own = load_folder(tmp_path, transform=np.asarray)[0][0]  # gets RGB, as the docstring says
    assert own.shape == (6, 5, 3) and own.dtype == np.uint8
    np.testing.assert_allclose(own[..., 1] / 255, expected, atol=0.51 / 255)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (DEEP.astype(np.int32) * 9, r"must lie in \[0, 65535\]"),
        (DEEP.astype(np.int32) - 40000, r"must lie in \[0, 65535\]"),
        (DEEP.astype(np.float32), r"must lie in \[0, 1\]"),
        (np.full((6, 5), np.nan, np.float32), r"must lie in \[0, 1\]; they are nan to nan"),
    ],
)
def test_images_of_unknown_range_are_refused_by_name(tmp_path, array, text):
    file = write_image(tmp_path / "cat" / "a.tif", array)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} cannot be read .*{text}"):
        load_folder(tmp_path)[0]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.tif", "a.webp", "a.ppm"])
def test_a_damaged_file_is_named(tmp_path, name):
    file = write_image(tmp_path / "cat" / name, random_images(40, 40, 3))
    write_image(tmp_path / "cat" / "b.png", random_images(40, 40, 3))
    data = load_folder(tmp_path)
    content = file.read_bytes()
    for kept in (content[: len(content) // 2], b"", b"nothing"):
        file.write_bytes(kept)
        with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read as an image: ")):
            data[0]
        if kept != content[: len(content) // 2]:  # the header is lost
            with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read as an image")):
                load_folder(tmp_path)


def test_the_error_of_a_damaged_file_can_leave_a_worker(tmp_path):
    file = write_image(tmp_path / "cat" / "a.png", random_images(40, 40, 3))
    data = load_folder(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError) as told:
        data[0]
    error = pickle.loads(pickle.dumps(told.value))  # a DataLoader makes it anew, from its text
    assert str(error) == str(told.value) == str(type(error)(str(error)))


def test_hidden_files_and_folders_are_no_class_and_no_image(tmp_path):
    root = tmp_path / ".cache"  # that the folder itself is in a hidden one does not matter
    arrays = write_folder(root, [(6, 5)] * 4)
    for place in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "cat/.trash/deep"):
        write_image(root / place / "x.png", arrays[0])
    for name in (".DS_Store", "cat/.DS_Store", "cat/._0.png", "._1.png", "._train-images-idx3"):
        (root / name).write_bytes(b"\0\5\x16\7")
    data = open_dataset(root)
    assert data.classes == ["cat", "dog"] and data.targets.tolist() == [0, 0, 1, 1]
    assert [Path(file).name for file, _ in data.samples] == ["0.png", "2.png", "1.png", "3.png"]
    (root / "empty").mkdir()
    (root / "empty" / "._0.png").write_bytes(b"\0")
    with pytest.raises(ValueError, match="classes empty"):
        load_folder(root)


def test_a_folder_with_nothing_but_hidden_folders(tmp_path):
    write_image(tmp_path / ".git" / "x.png", random_images(6, 5, 3))
    with pytest.raises(ValueError, match="a folder of 1 files with neither"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="Couldn't find any class folder"):
        load_folder(tmp_path)


def test_a_folder_can_be_sent_to_another_process(tmp_path):
    write_folder(tmp_path, [(6, 5)] * 2)
    data = load_folder(tmp_path, image_size=4)
    assert torch.equal(pickle.loads(pickle.dumps(data))[1][0], data[1][0])


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "dev")])
def test_folders_of_splits_by_other_names_are_no_classes(tmp_path, names):
    for name in names:
        (tmp_path / name / "a").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a" / "0.png")
    with pytest.raises(ValueError, match="are splits, not classes; open one of them"):
        load_folder(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing lists memory maps")
def test_a_memory_map_that_is_only_read_stays_on_disk(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(24, dtype=np.float32).reshape(6, 4))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    tensor = as_tensor(mapped, "x")
    assert tensor.tolist() == mapped.tolist()
    with open("/proc/self/maps") as file:
        (line,) = [line for line in file if line.endswith("x.npy\n") and " rw-p " in line]
    start, stop = (int(end, 16) for end in line.split()[0].split("-"))
    assert start < tensor.data_ptr() < stop
    tensor += 1  # of this process alone
    assert mapped[0, 0] == 0 and as_tensor(mapped[2:], "x").tolist() == mapped[2:].tolist()
