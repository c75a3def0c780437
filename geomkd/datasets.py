"""Labelled images from a user's disk, and the digits that ship with scikit-learn.

Nothing here downloads. `digits` is a tuple of tensors; every loader returns a map-style dataset of
``(image, label)`` with ``.targets`` (all labels, so that sampling by class need not open an image)
and ``.classes``.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geomkd.common.checks import check_choice
from geomkd.data.images import ImageArrays, checked_classes, checked_images, checked_labels, hidden

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchvision.datasets import ImageFolder

__all__ = ["ImageArrays", "Split", "digits", "load_folder", "load_idx", "load_npz", "open_dataset"]

_IDX_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
_SPLIT_NAMES = {"train", "training", "test", "testing"}
_SPLIT_NAMES |= {"val", "valid", "validation", "dev", "eval"}


class Split(NamedTuple):
    """Images and labels of a training, a validation and a test part."""

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(*, seed: int = 0) -> Split:
    """Load scikit-learn's handwritten digits, split by class.

    Parameters
    ----------
    seed : int, default 0
        Seed of the split.

    Returns
    -------
    Split
        1,000 training, 297 validation and 500 test images: float32 (n, 1, 8, 8) in [0, 1], with
        int64 labels. Every part has the ten classes in the proportions of the whole.

    Examples
    --------
    >>> split = digits()
    >>> split.x_train.shape, split.x_val.shape, split.x_test.shape
    (torch.Size([1000, 1, 8, 8]), torch.Size([297, 1, 8, 8]), torch.Size([500, 1, 8, 8]))
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    labels = labels.astype(np.int64)
    own = {"random_state": seed}
    x, x_test, y, y_test = train_test_split(images, labels, test_size=500, stratify=labels, **own)
    x_train, x_val, y_train, y_val = train_test_split(x, y, test_size=297, stratify=y, **own)
    return Split(*map(torch.from_numpy, (x_train, y_train, x_val, y_val, x_test, y_test)))


def load_npz(
    path: str | os.PathLike[str],
    *,
    split: str = "train",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageArrays:
    """Load images and labels from a NumPy archive.

    Parameters
    ----------
    path : str or path
        An ``.npz`` file with the arrays ``x_train`` and ``y_train`` (``x_test``, ``y_test``, …) or,
        for the training split, ``x`` and ``y``; optionally ``classes``, the names. Images are uint8
        (n, H, W, C) with at most 4 channels, uint8 (n, H, W), or float (n, C, H, W).
    split : str, default "train"
        Which arrays: ``x_<split>`` and ``y_<split>``.
    mean, std : sequence of 1 or C floats, optional
        Normalisation of the channels, see `ImageArrays`.

    Returns
    -------
    ImageArrays
        The split. Object arrays are refused: an archive cannot run code.

    Raises
    ------
    ValueError
        When the file is no ``.npz`` archive, lacks the arrays, or their shapes or types do not fit.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "images.npz")
    ...     np.savez(path, x=np.zeros((5, 32, 32, 3), np.uint8), y=np.array([0, 1, 2, 1, 0]))
    ...     load_npz(path)
    ImageArrays((5, 32, 32, 3) uint8, 3 classes)
    """
    with open(path, "rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not an .npz archive ({error})") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: expected an .npz archive, got a single .npy array")
        with archive:
            found = archive.files
            x_key, y_key = f"x_{split}", f"y_{split}"
            if split == "train" and x_key not in found and "x" in found:
                x_key, y_key = "x", "y"
            if not {x_key, y_key} <= set(found):
                raise ValueError(
                    f"{path}: expected the arrays {x_key!r} and {y_key!r} for split={split!r}"
                    f"{' (or x and y)' if x_key == 'x_train' else ''}; found {sorted(found)}"
                )
            images, labels = (_read_array(path, archive, key) for key in (x_key, y_key))
            names = _read_array(path, archive, "classes") if "classes" in found else None
    images = checked_images(f"{path}: {x_key}", images)
    targets = checked_labels(f"{path}: {y_key}", labels, len(images))
    classes = None if names is None else checked_classes(f"{path}: classes", names, targets)
    return ImageArrays(images, targets, classes=classes, mean=mean, std=std)


def load_idx(
    folder: str | os.PathLike[str],
    *,
    split: str = "train",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageArrays:
    """Load the IDX files in which MNIST, Fashion-MNIST and their kin are published.

    Parameters
    ----------
    folder : str or path
        Holds ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte`` or, for the test split,
        the same with ``t10k`` or ``test``; with or without ``.gz``, with ``-idx`` or ``.idx``.
    split : {"train", "test"}, default "train"
        Which pair of files.
    mean, std : sequence of 1 float, optional
        Normalisation, see `ImageArrays`.

    Returns
    -------
    ImageArrays
        Items are float32 (1, H, W) in [0, 1].

    Raises
    ------
    ValueError
        When a file is missing, truncated, or holds something else.
    """
    check_choice(split, "split", _IDX_PREFIXES)
    image_file = _find_idx(folder, split, "images-idx3-ubyte")
    label_file = _find_idx(folder, split, "labels-idx1-ubyte")
    images = checked_images(str(image_file), _read_idx(image_file, n_axes=3))
    targets = checked_labels(str(label_file), _read_idx(label_file, n_axes=1), len(images))
    return ImageArrays(images, targets, mean=mean, std=std)


def load_folder(
    path: str | os.PathLike[str],
    *,
    transform: Callable | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageFolder:
    """Load a folder that has one sub-folder of image files for each class.

    Parameters
    ----------
    path : str or path
        The folder; its sub-folders' names are the classes. Hidden files and folders are left out.
    transform : callable, optional
        From a PIL image in RGB to what the dataset shall return; replaces the other options.
        Without it images become float32 (3, H, W) in [0, 1], those of 16 bits or floats included.
    image_size : int, optional
        The shorter side is resized to it and the centre square cut out. Without it all images must
        have the same size, which is checked here by reading every file's header.
    mean, std : sequence of 1 or 3 floats, optional
        Normalisation of the channels. Give both or none.

    Returns
    -------
    torchvision.datasets.ImageFolder
        With ``targets`` as an int64 tensor.

    Raises
    ------
    ImportError
        Without torchvision.
    ValueError
        When there are no class folders, a class has no image, sizes differ, or options contradict;
        on reading, an image that is damaged or whose values have no known range, by its name.
    """
    try:
        from geomkd.data.image_folder import ImageFolder, check_one_size
    except ModuleNotFoundError as error:
        message = "load_folder needs torchvision: pip install geomkd[vision]"
        raise ImportError(message) from error

    if transform is not None and (image_size, mean, std) != (None, None, None):
        raise ValueError("give either transform or image_size, mean and std, not both")
    if not Path(path).is_dir():
        raise ValueError(f"{path}: expected a folder of class folders; there is no such folder")
    try:
        data = ImageFolder(str(path), transform, image_size=image_size, mean=mean, std=std)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a folder of class folders; {error}") from error
    if {name.lower() for name in data.classes} <= _SPLIT_NAMES:
        raise ValueError(
            f"{path}: the sub-folders {data.classes} are splits, not classes; open one of them, "
            f"for example {Path(path, data.classes[0])}"
        )
    if transform is None and image_size is None:
        check_one_size([file for file, _ in data.samples])
    data.targets = torch.tensor(data.targets, dtype=torch.int64)
    return data


def open_dataset(path: str | os.PathLike[str], **options) -> ImageArrays | ImageFolder:
    """Open whichever of the known forms `path` has.

    Parameters
    ----------
    path : str or path
        An ``.npz`` file, a folder of IDX files, or a folder of class folders.
    **options
        Passed to `load_npz`, `load_idx` or `load_folder`.

    Returns
    -------
    ImageArrays or torchvision.datasets.ImageFolder
        The dataset.

    Raises
    ------
    ValueError
        When `path` is none of the three.

    Examples
    --------
    >>> open_dataset("no/such/folder")
    Traceback (most recent call last):
    ValueError: no/such/folder: expected an .npz file, a folder of IDX files ... nothing there
    """
    loader = loader_of(path)
    if loader is not None:
        return loader(path, **options)
    path = Path(path)
    if path.is_dir():
        came = f"a folder of {len(list(path.iterdir()))} files with neither"
    else:
        came = f"a {path.suffix or 'nameless'} file" if path.exists() else "nothing there"
    raise ValueError(
        f"{path}: expected an .npz file, a folder of IDX files (train-images-idx3-ubyte[.gz], …) "
        f"or a folder of class folders with images; got {came}"
    )


def loader_of(path: str | os.PathLike[str]) -> Callable | None:
    """Which of `load_npz`, `load_idx` and `load_folder` reads what is at a path, if one does."""
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".npz":
        return load_npz
    entries = [entry for entry in path.iterdir() if not hidden(entry.name)] if path.is_dir() else []
    if any("-idx" in entry.name or ".idx" in entry.name for entry in entries if entry.is_file()):
        return load_idx
    return load_folder if any(entry.is_dir() for entry in entries) else None


def _read_array(path, archive, key: str) -> np.ndarray:
    try:
        return archive[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: the array {key!r} cannot be read ({error})") from error


def _find_idx(folder: str | os.PathLike[str], split: str, ending: str) -> Path:
    names = [f"{prefix}-{ending}" for prefix in _IDX_PREFIXES[split]]
    for name in names:
        for stem in (name, name.replace("-idx", ".idx")):
            for file in (Path(folder, stem), Path(folder, f"{stem}.gz")):
                if file.is_file():
                    return file
    raise ValueError(f"{folder}: expected a file {' or '.join(names)}, with or without .gz")


def _read_idx(file: Path, *, n_axes: int) -> np.ndarray:
    """Unsigned bytes, after a header: two zeros, type, number of axes, big-endian sizes."""
    content = _gunzip(file) if file.suffix == ".gz" else file.read_bytes()
    magic = bytes((0, 0, 0x08, n_axes))
    n_header = 4 + 4 * n_axes
    if content[:4] != magic:
        raise ValueError(
            f"{file}: expected the IDX header of unsigned bytes in {n_axes} axes, "
            f"{magic.hex(' ')}; found {content[:4].hex(' ') or 'an empty file'}"
        )
    if len(content) < n_header:
        raise ValueError(f"{file}: expected {n_header} bytes of header, found {len(content)}")
    shape = np.frombuffer(content, ">u4", count=n_axes, offset=4).tolist()
    expected = n_header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise ValueError(
            f"{file}: expected {expected} bytes for shape {tuple(shape)}, found {len(content)}"
        )
    # A copy, since torch wants memory that can be written to.
    return np.frombuffer(content, np.uint8, offset=n_header).reshape(shape).copy()


def _gunzip(file: Path) -> bytes:
    """All that can be unpacked, so that a truncated file is told by how much it falls short."""
    packed, parts = file.read_bytes(), []
    while packed:
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            parts.append(member.decompress(packed))
        except zlib.error as error:
            raise ValueError(f"{file}: damaged gzip file ({error})") from error
        packed = member.unused_data
    return b"".join(parts)
