"""How numbers are computed: in what blocks, scale and precision, and what 1/0 is."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

BLOCK = 512  # rows that are taken to float64 at a time: 2 MB a square block, which stays in cache
_CACHED = 2**18  # numbers that are taken to float64 at a time where each is read once: 2 MB
COLUMNS = 1024  # features that are centred and multiplied at a time
# A product of two rows is off by about this share of |x||y|.
DOT_ERROR = {torch.float32: 2.0**-21, torch.float64: 2.0**-50}
ZERO_VARIANCE = 2.0**-88  # of the squared norms: what rounding a float64 mean leaves


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast, and float32 products in float32 (TF32 keeps ten bits)."""
    autocast = torch.amp.is_autocast_available(device.type)
    off = torch.autocast(device.type, enabled=False) if autocast else nullcontext()
    with torch.no_grad(), off, _float32_products():
        yield


@contextmanager
def _float32_products() -> Iterator[None]:
    # Two interfaces of one setting: the older fails where the caller has used the newer.
    products = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    newer = [backend for backend in products if hasattr(backend, "fp32_precision")]
    before = [b.fp32_precision for b in newer] or torch.get_float32_matmul_precision()
    try:
        for backend in newer:
            backend.fp32_precision = "ieee"
        if not newer:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for backend, own in zip(newer, before, strict=False):
            backend.fp32_precision = own
        if not newer:
            torch.set_float32_matmul_precision(before)


@contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """One thread for work so small that more wait for each other, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if when else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0.0)


def scale_of(x: Tensor, dtype: torch.dtype | None = None, *, beyond: int = 20) -> Tensor:
    """Power of two that brings the largest magnitude near 1, so that no square leaves ``dtype``.

    1 where it lies within 2^-beyond ... 2^beyond. A 0-d float64 tensor: nothing waits for a device.
    """
    low, high = torch.aminmax(x)
    top = torch.maximum(-low, high).double()
    exponent = torch.frexp(top).exponent
    ordinary = (exponent.abs() <= beyond) | ~top.isfinite()
    # Such a power is a normal number of the type, so that products with it are exact.
    most = 1000 if (dtype or x.dtype) is torch.float64 else 125
    exponent = exponent.clamp(-most, most).masked_fill(ordinary, 0)
    return torch.ldexp(torch.ones_like(top), -exponent)


def few_rows(x: Tensor) -> tuple[Tensor, ...]:
    """Split (n, d) features into rows that stay in cache as float64."""
    return x.split(max(1, min(BLOCK, _CACHED // max(1, x.shape[1]))))


def mean_of(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Mean of the rows of (n, d) features times a power of two, float64, a few at a time."""
    return sum(in_float64(part, scale).sum(dim=0) for part in few_rows(x)) / len(x)


def in_float64(x: Tensor, scale: Tensor | float) -> Tensor:
    """Features times a power of two; of a scale of 1.0 they may be ``x`` itself."""
    return x.double() if isinstance(scale, float) and scale == 1.0 else x.double() * scale


def centred(
    x: Tensor, scale: Tensor | float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(n, d) features times a power of two about their mean, and that mean, which is float64."""
    mean = mean_of(x, scale)
    high = mean.to(dtype)
    exact = (x.to(dtype) * scale).sub_(high)
    # Of the mean in two parts, a difference is as near as if it were taken in float64 and rounded.
    return exact if dtype is torch.float64 else exact.sub_((mean - high).to(dtype)), mean
