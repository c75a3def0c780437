"""The split of the held-out measures, against its definition."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from geomkd.geometry.split import check_share, held_out

SIZES = [1, 2, 3, 10, 25]


def labels(sizes=SIZES, seed=0):
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.3, [0, 1, 1, 3, 8]), (0.5, [0, 1, 2, 5, 13]), (1e-9, [0, 1, 1, 1, 1])],
)
def test_share_of_every_class(share, expected):
    index = labels()
    train, test = held_out(index, 5, share, seed=0)
    assert index[test].bincount(minlength=5).tolist() == expected
    assert torch.equal(train, ~test)


def test_every_class_keeps_a_training_row():
    train, _ = held_out(labels(), 5, 1 - 1e-9, seed=0)
    assert labels()[train].bincount().tolist() == [1, 1, 1, 1, 1]


def test_seeds():
    index, state = labels(), torch.get_rng_state()
    first, again, other = (held_out(index, 5, 0.3, seed=s)[1] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_every_row_is_as_likely():
    """Of 2,000 seeds, each of ten rows is held out in 30 %; five standard errors."""
    index = torch.zeros(10, dtype=torch.int64)
    drawn = torch.stack([held_out(index, 1, 0.3, seed=s)[1] for s in range(2000)])
    assert (drawn.double().mean(dim=0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 2000) ** 0.5


def test_class_numbers_do_not_enter():
    index = labels()
    renamed = torch.tensor([3, 0, 4, 1, 2])[index]
    assert torch.equal(held_out(index, 5, 0.3, 0)[1], held_out(renamed, 5, 0.3, 0)[1])


def test_on_a_device_that_does_not_exist():
    with FakeTensorMode(allow_non_fake_inputs=False):
        index = torch.zeros(20, dtype=torch.int64, device="cuda:0")
        train, test = held_out(index, 3, 0.3, seed=0)
    assert train.device == test.device == torch.device("cuda", 0)
    assert train.shape == test.shape == (20,)
    assert train.dtype == test.dtype == torch.bool


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match=rf"^test_share must be between 0 and 1; got {share}$"):
        check_share(share)


@pytest.mark.parametrize("share", [True, "0.3", None])
def test_share_of_another_type(share):
    with pytest.raises(TypeError, match=r"^test_share must be a number; got "):
        check_share(share)
