"""The settings of computing, and powers of two, against their definitions."""

import pytest
import torch

from geomkd.geometry.precision import (
    centred,
    exact_arithmetic,
    inverse,
    mean_of,
    one_thread,
    scale_of,
)


@pytest.mark.parametrize("newer", [False, True], ids=["older interface", "newer interface"])
def test_exact_arithmetic_restores_the_precision(newer):
    flags = torch.backends.cuda.matmul
    if newer and not hasattr(flags, "fp32_precision"):
        pytest.skip("this torch has one interface only")
    before = torch.get_float32_matmul_precision()
    try:
        if newer:
            old, flags.fp32_precision = flags.fp32_precision, "tf32"
        else:
            torch.set_float32_matmul_precision("medium")
        with pytest.raises(RuntimeError, match="inside"), exact_arithmetic(torch.device("meta")):
            if hasattr(flags, "fp32_precision"):
                assert flags.fp32_precision == "ieee"
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")
        assert torch.is_grad_enabled()
        if newer:
            assert flags.fp32_precision == "tf32"
        else:
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        if newer:
            flags.fp32_precision = old
        torch.set_float32_matmul_precision(before)


def test_one_thread_restores_the_number():
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


def test_inverse():
    assert inverse(torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.25]


# ---- scale ---------------------------------------------------------------------------------------

SINGLE = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, *SINGLE], ids=str)
def test_scale_is_one_near_one(dtype):
    for top in (0.0, 1.0, 2.0**-19, 2.0**13, torch.nan, torch.inf, -torch.inf):
        scale = scale_of(torch.tensor([0.0, top, -top / 2], dtype=dtype))
        assert (scale.item(), scale.dtype, scale.shape) == (1.0, torch.float64, ())


@pytest.mark.parametrize(
    ("dtype", "most", "powers"),
    [
        (torch.float32, 125, [-149, -130, -125, -30, -21, 21, 60, 127]),
        (torch.bfloat16, 125, [-130, -30, 127]),
        (torch.float64, 1000, [-1074, -1001, -1000, -30, 30, 1000, 1023]),
    ],
    ids=str,
)
def test_scale_is_a_power_of_two_that_brings_the_largest_near_one(dtype, most, powers):
    for power in powers:
        x = torch.tensor([0.1, -0.75, 0.5], dtype=torch.float64)
        x = (torch.ldexp(x, torch.tensor(power // 2)) * 2.0 ** (power - power // 2)).to(dtype)
        scale = scale_of(x)
        mantissa, exponent = torch.frexp(scale)
        assert mantissa == 0.5 and (exponent - 1).abs() <= most
        product = x.double() * scale
        if abs(power) < most:
            assert 0.5 <= product.abs().max() < 1
        assert torch.equal((x * scale).double(), product)  # exact, and a normal number, in dtype


def test_scale_beyond_what_a_type_can_hold():
    """What is kept of float32 may lie in float64; principal coordinates keep their scale longer."""
    x = torch.tensor([2.0**100, 1.0], dtype=torch.float64)
    assert scale_of(x, beyond=400) == 1
    assert scale_of(x * 2.0**400, beyond=400) == 2.0**-501
    assert scale_of(x * 2.0**40) == 2.0**-141
    assert scale_of(x * 2.0**40, torch.float32) == 2.0**-125


# ---- means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("n", [5, 1300])
def test_centred(n, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, 7, generator=generator) + 30).to(dtype)
    before, exact = x.clone(), x.double() * 4
    torch.testing.assert_close(mean_of(x, 4.0), exact.mean(dim=0), rtol=1e-14, atol=0)
    for own, near in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        moved, mean = centred(x, 4.0, own)
        assert (moved.dtype, mean.dtype) == (own, torch.float64)
        torch.testing.assert_close(mean, exact.mean(dim=0), rtol=1e-14, atol=0)
        torch.testing.assert_close(moved.double(), exact - exact.mean(dim=0), rtol=0, atol=near)
    assert torch.equal(x, before)


def test_means_of_features_whose_sum_leaves_float64():
    x = torch.full((9, 3), 1e308, dtype=torch.float64)
    assert mean_of(x, 2.0**-1000).isfinite().all()
