"""What is read of columns in float64, against numpy on whole features."""

import numpy as np
import pytest
import torch

from geomkd.common.checks import as_classes
from geomkd.geometry.class_sums import ClassSums
from geomkd.geometry.columns import (
    column_slices,
    exact_dots,
    exact_sq_distances,
    residual_gram,
    sq_differences,
)
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import Rows, searched_again
from geomkd.geometry.precision import BLOCK, COLUMNS

ROWS = torch.tensor([1099, 3, 700])
AT = torch.tensor([[0, 3], [3, 1099], [701, 6]])


@pytest.fixture(scope="module", params=[torch.float16, torch.float32, torch.float64], ids=str)
def sample(request):
    """Three blocks, two slices and a common offset; and squared distances of some rows."""
    x = torch.randn(1100, COLUMNS + 50, generator=torch.Generator().manual_seed(0)) + 8
    x = x.to(request.param)
    exact = x.double().numpy()
    return x, exact, ((exact[ROWS, None] - exact) ** 2).sum(axis=2)


def test_column_slices_are_views_in_float32_at_least():
    x = torch.randn(3, 2 * COLUMNS + 1, generator=torch.Generator().manual_seed(0))
    pieces = list(column_slices(x))
    assert [p.shape[1] for p in pieces] == [COLUMNS, COLUMNS, 1]
    assert pieces[1].data_ptr() == x[:, COLUMNS:].data_ptr()
    assert torch.equal(torch.cat(list(column_slices(x, 4.0)), 1), 4 * x)
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert next(column_slices(x.to(dtype))).dtype is expected


def test_residual_gram(sample):
    x, exact, _ = sample
    exact = exact - exact.mean(axis=0)
    for dtype, near in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        gram = residual_gram(lambda: column_slices(x), len(x), dtype, x.device)
        assert gram.dtype is torch.float64
        np.testing.assert_allclose(gram, exact @ exact.T, atol=near * COLUMNS)


@pytest.mark.parametrize("raw", [True, False])
def test_exact_dots(sample, raw):
    x, exact, _ = sample
    exact = exact if raw else exact - exact.mean(axis=0)
    dots, sq = exact_dots(lambda: column_slices(x), ROWS, len(x), raw=raw)
    np.testing.assert_allclose(dots, exact[ROWS] @ exact.T, atol=1e-9)
    np.testing.assert_allclose(sq, (exact**2).sum(axis=1), rtol=1e-12)


def test_distances(sample):
    """By products and by difference: of plain features, of sorted ones, and scaled."""
    x, _, expected = sample
    for scale in (1.0, 0.25):
        columns = lambda scale=scale: column_slices(x, scale)  # noqa: E731
        products = exact_sq_distances(columns, ROWS, len(x)) / scale**2
        np.testing.assert_allclose(products, expected, rtol=1e-11, atol=1e-9)
        differences = sq_differences(columns, ROWS, AT) / scale**2
        np.testing.assert_allclose(differences, np.take_along_axis(expected, AT.numpy(), 1), 1e-13)
    gram = ClassGram.of(x, torch.arange(1100) % 3)
    back = torch.argsort(gram.order)
    for source, place in ((Rows(x), torch.arange(1100)), (gram, back)):
        found = source.exact_rows(place[ROWS])[:, place]
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-9)
        np.testing.assert_array_equal(source.measure(place[ROWS], place[AT]), differences)


# ---- memory --------------------------------------------------------------------------------------


def peak_of(profile):
    allocated, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def test_memory_of_adding_a_slice():
    """A centred copy of the slice and a few blocks of rows, nothing of n x d besides."""
    n = 4 * BLOCK
    x = torch.ones(n, COLUMNS)
    sums = ClassSums(as_classes(torch.arange(n) % 4), torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        sums.add(x)
    centred, block = 4 * n * COLUMNS, 8 * BLOCK * COLUMNS
    assert centred < peak_of(profile) < centred + 4 * block


def test_memory_of_measuring_again():
    """Blocks of rows again, beside what is returned and the distances."""
    n, few = 4 * BLOCK, 100
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, COLUMNS, generator=generator), torch.arange(n) % 4
    gram = ClassGram.of(x, y)
    with torch.profiler.profile(profile_memory=True) as profile:
        searched_again(gram, torch.arange(few), 1)
    block = 8 * BLOCK * COLUMNS
    assert block < peak_of(profile) < 8 * few * n + 4 * block
