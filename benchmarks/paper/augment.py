"""Random crops and flips of a batch, on its device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def augment_crop_flip(padding: int = 4) -> Callable[[Tensor], Tensor]:
    """Crops of the padded images at random places, mirrored every other time.

    What is made takes and returns images of shape (B, C, H, W) and draws from torch's global
    generator of their device. Images are normalised before they come here, so the zeros around
    them are the mean colour, not black.

    Examples
    --------
    >>> augment_crop_flip(padding=4)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    def augment(images: Tensor) -> Tensor:
        (n, _, height, width), device = images.shape, images.device
        top, left = torch.randint(2 * padding + 1, (2, n, 1), device=device)
        rows = top + torch.arange(height, device=device)
        columns = left + torch.arange(width, device=device)
        mirrored = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (padding,) * 4).movedim(1, -1)
        image = torch.arange(n, device=device)[:, None, None]
        return padded[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()

    return augment
