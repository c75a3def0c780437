"""Seeded draws, and the global random states as they were afterwards."""

import random

import numpy as np
import pytest
import torch

from geomkd.common.randomness import (
    HostDraws,
    all_seeded,
    generator_options,
    random_fingerprint,
    random_modules,
    random_states_kept,
    seed_of,
    seeded,
)

CPU = torch.empty(0).device


def draws():
    """What three global generators give next."""
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002


def states():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()


def test_seed_of_tells_numbers_and_their_order_apart():
    seeds = {seed_of(*numbers) for numbers in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 1, 1)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(3, 4) == seed_of(3, 4)


def test_generator_options_do_not_depend_on_the_default_device():
    plain = torch.rand(3, **generator_options(5))
    assert torch.equal(plain, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    with torch.device("meta"):
        assert torch.equal(torch.rand(3, **generator_options(5)), plain)


@pytest.mark.parametrize("device", [None, CPU])
def test_seeded(device):
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    before = states()
    with seeded(7, device):
        assert torch.equal(torch.rand(3), expected)
    assert states() == before


@pytest.mark.parametrize("context", [lambda: seeded(1), lambda: HostDraws(1), random_states_kept])
def test_states_are_put_back_after_an_error(context):
    before = states()[0]
    with pytest.raises(KeyboardInterrupt), context():
        torch.rand(3)
        raise KeyboardInterrupt
    assert states()[0] == before


@pytest.mark.parametrize(
    "context", [lambda: all_seeded(1), lambda: HostDraws(1), random_states_kept]
)
def test_states_of_all_three_generators_are_put_back(context):
    before = states()
    with pytest.raises(KeyboardInterrupt), context():
        draws()
        raise KeyboardInterrupt
    assert states() == before


def test_all_seeded():
    with all_seeded(7):
        first = draws()
    with all_seeded(7, CPU):
        assert draws() == first
    with all_seeded(8):
        assert all(a != b for a, b in zip(draws(), first, strict=True))


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), np.random.rand, random.random])
def test_fingerprint_changes_with_a_draw_from_any_generator(draw):
    before = random_fingerprint(CPU)
    torch.rand(3, generator=torch.Generator())
    assert random_fingerprint(CPU) == before
    with random_states_kept():
        draw()
        assert random_fingerprint(CPU) != before
    assert random_fingerprint(CPU) == before


def test_host_draws_go_on_where_they_were_left():
    before = states()
    with HostDraws(2):
        both = [draws(), draws()]
    assert states() == before
    draws()  # the same outside would hide what is not seeded
    stream = HostDraws(2)
    with stream:
        first = draws()
    with HostDraws(3):
        assert draws() != first
    draws()
    with stream:
        second = draws()
    assert [first, second] == both


def test_seeds_beyond_numpys_are_taken():
    with HostDraws(2**40 + 3):
        first = draws()
    with HostDraws(2**40 + 3):
        assert draws() == first


def test_only_an_accelerator_in_use_is_asked_for_its_state():
    assert random_modules() == random_modules(CPU, torch.device("meta")) == [torch]
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert random_modules(CPU, device) == [torch, torch.get_device_module(device)]


def test_an_accelerators_state_is_kept(monkeypatch):
    class Module:
        state = 3

        def get_rng_state(self):
            return self.state

        def set_rng_state(self, state):
            self.state = state

    module, device = Module(), torch.device("xpu", 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    with random_states_kept(CPU, device):
        module.state = 4
    assert module.state == 3
    with random_states_kept(CPU):
        module.state = 4
    assert module.state == 4
