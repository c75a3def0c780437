"""How numbers are computed: in which precision, on how many threads, and what 1/0 is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

COLUMNS = 1024  # features that are centred and multiplied at a time
# A product of two rows is off by about this share of |x||y|.
DOT_ERROR = {torch.float32: 2.0**-21, torch.float64: 2.0**-50}
SQ_DISTANCE_ERROR = 1e-5  # share of a squared distance that may come from products
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
def one_thread() -> Iterator[None]:
    """One thread for small eigenproblems: more wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0.0)
