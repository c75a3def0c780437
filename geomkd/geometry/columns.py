"""What is read of a layer's features, a slice of columns at a time, in float64.

A layer larger than memory is never whole: ``columns()`` yields (n, width) slices of it, in at least
float32, and may be called again, which may cost a forward pass of the network.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from geomkd.geometry.precision import BLOCK, COLUMNS, centred, exact_arithmetic, mean_of

Columns = Callable[[], Iterator[Tensor]]


def column_slices(features: Tensor, scale: float = 1.0) -> Iterator[Tensor]:
    """Slices of at most 1,024 columns of an (n, d) tensor, in at least float32, times ``scale``."""
    for start in range(0, features.shape[1], COLUMNS):
        piece = features[:, start : start + COLUMNS]
        piece = piece.float() if piece.dtype in (torch.float16, torch.bfloat16) else piece
        yield piece if scale == 1.0 else piece * scale


def residual_gram(
    columns: Columns, samples: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Gram matrix of one class about its mean, (m, m), from slices of its columns."""
    gram = torch.zeros(samples, samples, dtype=dtype, device=device)
    with exact_arithmetic(device):
        for piece in columns():
            exact, _ = centred(piece, dtype=dtype)
            gram.addmm_(exact, exact.T)
            del piece, exact
    return gram.double()


def exact_dots(
    columns: Columns, rows: Tensor, n: int, *, raw: bool = False
) -> tuple[Tensor, Tensor]:
    """Dot products of (m,) rows with all, (m, n), and all squared norms, about the mean or raw."""
    dots = torch.zeros(len(rows), n, dtype=torch.float64, device=rows.device)
    sq = torch.zeros(n, dtype=torch.float64, device=rows.device)
    with exact_arithmetic(rows.device):
        for piece in columns():
            mean = 0.0 if raw else mean_of(piece)
            left = piece[rows].double() - mean
            for start in range(0, n, BLOCK):
                block = slice(start, start + BLOCK)
                right = piece[block].double() - mean
                dots[:, block].addmm_(left, right.T)
                sq[block] += torch.linalg.vector_norm(right, dim=1).square()
            del piece
    return dots, sq


def exact_sq_distances(columns: Columns, rows: Tensor, n: int) -> Tensor:
    """Squared distances of (m,) rows to all, from products in float64: (m, n)."""
    dots, sq = exact_dots(columns, rows, n)
    return dots.mul_(-2).add_(sq[rows, None]).add_(sq)


def sq_differences(columns: Columns, rows: Tensor, at: Tensor) -> Tensor:
    """Squared distances from (m,) ``rows`` to (m, k) rows ``at``, by difference: (m, k)."""
    total = torch.zeros(at.shape, dtype=torch.float64, device=at.device)
    with exact_arithmetic(at.device):
        for piece in columns():
            step = max(1, BLOCK * COLUMNS // (at.shape[1] * piece.shape[1]))
            for left, right, out in zip(*(t.split(step) for t in (rows, at, total)), strict=True):
                there = piece[right.flatten()].double().view(*right.shape, -1)
                out += there.sub_(piece[left].double().unsqueeze(1)).square_().sum(dim=2)
            del piece
    return total
