"""Labelled images in memory: the dataset, and the checks of the arrays it is made of."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class ImageArrays(Dataset):
    """Images held in one tensor, converted to float32 one by one as they are read.

    uint8 images stay uint8 in memory: a quarter of what their float32 copies would take.

    Parameters
    ----------
    images : Tensor, shape (n, H, W, C) of uint8 or (n, C, H, W) of float32
        uint8 values are divided by 255 on reading; float values are taken as they are.
    targets : Tensor, shape (n,), int64
        The labels.
    classes : list of str, optional
        Their names.
    mean, std : sequence of 1 or C floats, optional
        Subtracted from and divided into each channel, after the division by 255. Give both or none.

    Raises
    ------
    ValueError
        For a `mean` or `std` that does not fit the channels.

    Examples
    --------
    >>> black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    >>> data = ImageArrays(black, torch.tensor([0, 1]), mean=[0.5], std=[0.25])
    >>> image, label = data[1]
    >>> image.shape, image.dtype, image.max().item(), label.item()
    (torch.Size([3, 4, 4]), torch.float32, -2.0, 1)
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        classes: list[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.images, self.targets, self.classes = images, targets, classes
        n_channels = images.shape[-1 if images.dtype == torch.uint8 else 1]
        self.mean, self.std = channel_statistics(mean, std, n_channels)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if image.dtype == torch.uint8:
            # Contiguous, as an image made by any other road would be.
            image = image.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
            image = image / 255
        if self.mean is not None:
            image = (image - self.mean) / self.std
        return image, self.targets[index]

    def __repr__(self) -> str:
        images = f"{tuple(self.images.shape)} {self.images.dtype}".replace("torch.", "")
        return f"ImageArrays({images}, {len(self.targets.unique())} classes)"


def checked_images(where: str, images: np.ndarray) -> Tensor:
    """Images as uint8 (n, H, W, C) or float32 (n, C, H, W)."""
    shape = images.shape
    if images.dtype == np.uint8:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] > 4 or images.size == 0:
            raise ValueError(
                f"{where}: uint8 images must be (n, H, W) or (n, H, W, C) with at most 4 channels; "
                f"got {shape}"
            )
        return torch.from_numpy(np.ascontiguousarray(images))
    if images.dtype.kind != "f":
        raise ValueError(f"{where}: images must be uint8 or float; got {images.dtype} {shape}")
    expected = f"{where}: float images must be (n, C, H, W); got {shape}"
    if images.ndim != 4 or images.size == 0:
        raise ValueError(expected)
    if shape[-1] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise ValueError(f"{expected}, which looks like (n, H, W, C)")
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def checked_labels(where: str, labels: np.ndarray, n: int) -> Tensor:
    """Labels as int64, one for each of n images."""
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: labels must be integers of shape ({n},), one for each image; "
            f"got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0:
        raise ValueError(f"{where}: labels must be 0 or more; the smallest is {labels.min()}")
    return torch.from_numpy(labels.astype(np.int64))


def checked_classes(where: str, names: np.ndarray, targets: Tensor) -> list[str]:
    """Names of the classes, as many as the labels need."""
    n_classes = int(targets.max()) + 1
    if names.ndim != 1 or len(names) < n_classes:
        raise ValueError(
            f"{where}: expected at least {n_classes} names, since the largest label is "
            f"{n_classes - 1}; got shape {names.shape}"
        )
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]


def channel_statistics(mean, std, n_channels: int) -> tuple[Tensor | None, Tensor | None]:
    """Mean and std as (C or 1, 1, 1) tensors, or two times None."""
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError(f"give mean and std together; got mean={mean!r}, std={std!r}")
    checked = []
    for name, values in (("mean", mean), ("std", std)):
        try:
            array = np.array(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a sequence of floats, got {values!r}") from error
        if array.shape not in ((1,), (n_channels,)) or not np.isfinite(array).all():
            expected = "1" if n_channels == 1 else f"1 or {n_channels}"
            raise ValueError(f"{name} must hold {expected} finite floats, got {values!r}")
        if name == "std" and array.min() <= 0:
            raise ValueError(f"std must be positive, got {values!r}")
        checked.append(torch.from_numpy(array).reshape(-1, 1, 1))
    return checked[0], checked[1]


def hidden(name: str) -> bool:
    """Whether a file or folder is a system's own, as ``.DS_Store`` and ``._x.png`` are."""
    return name.startswith(".")
