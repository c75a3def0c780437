"""Eigenvalues of many small matrices: each of its own block, whatever the number of threads."""

import pytest
import torch

from geomkd.geometry import eigenvalues as module
from geomkd.geometry.eigenvalues import eigenvalues
from geomkd.geometry.precision import one_thread


def blocks(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    for r, m in shapes:
        x = torch.randn(r, m, m, generator=generator, dtype=dtype)
        yield x + x.mT


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHAPES = [(1, 7), (12, 150), (3, 2), (2, 520), (1, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("in_hand", [2**22, 0], ids=["many in hand", "one by one"])
def test_of_every_block_its_own(dtype, in_hand, threads, monkeypatch):
    monkeypatch.setattr(module, "_IN_HAND", in_hand)
    found = list(eigenvalues(blocks(*SHAPES, dtype=dtype)))
    assert torch.get_num_threads() == threads
    with one_thread():
        expected = [torch.linalg.eigvalsh(block) for block in blocks(*SHAPES, dtype=dtype)]
    assert [len(values) for values in found] == [r for r, _ in SHAPES]
    assert all(map(torch.equal, found, expected))


def test_few_wait_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_IN_HAND", 3 * 40 * 40)
    read = []

    def told():
        for i, block in enumerate(blocks(*[(1, 40)] * 10)):
            read.append(i)
            yield block

    for i, _ in enumerate(eigenvalues(told())):
        assert len(read) <= i + 4


def test_failure_is_told(threads):
    with pytest.raises(torch.linalg.LinAlgError, match="converge"):
        list(eigenvalues([torch.full((2, 8, 8), torch.nan)]))
    assert torch.get_num_threads() == threads
