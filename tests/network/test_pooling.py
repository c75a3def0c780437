"""Poolings, each against its reduction written out."""

import math
import re

import pytest
import torch
from torch.nn.functional import max_pool2d

from geomkd.network.pooling import POOLS, PUBLISHED_LIMIT, check_pool, pooled

SHAPES = {"map": (3, 5, 4, 2), "map_last": (3, 4, 2, 5), "tokens": (3, 7, 5), "vector": (3, 5)}
SHAPES["sequence"] = (3, 5, 7)
CHANNELS = {"map": 1, "map_last": 3, "tokens": 2, "sequence": 1}


def features(kind):
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("pool", ["flatten", "published"])
def test_flatten(kind, pool):
    x = features(kind)
    assert torch.equal(pooled(x, kind, pool), x.reshape(3, -1))


@pytest.mark.parametrize("kind", CHANNELS)
def test_over_space(kind):
    x = features(kind)
    by_channel = x.movedim(CHANNELS[kind], 1).flatten(2)
    mean, most = pooled(x, kind, "mean"), pooled(x, kind, "max")
    torch.testing.assert_close(mean, by_channel.sum(dim=2) / by_channel.shape[2])
    assert torch.equal(most, by_channel.sort(dim=2).values[:, :, -1])


@pytest.mark.parametrize("pool", POOLS)
def test_vectors_stay(pool):
    x = features("vector")
    assert torch.equal(pooled(x, "vector", pool), x)


def test_one_token_or_step():
    x, steps = features("tokens"), features("sequence")
    assert torch.equal(pooled(x, "tokens", "cls"), x[:, 0])
    assert torch.equal(pooled(x, "tokens", "last"), x[:, 6])
    assert torch.equal(pooled(steps, "sequence", "last"), steps[:, :, 6])


REAL = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1]]) > 0


@pytest.mark.parametrize("kind", ["tokens", "sequence"])
@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_padded_positions_are_as_if_they_were_not_there(kind, pool):
    x = features(kind)
    time = 1 if kind == "tokens" else 2
    x = x.masked_fill(~(REAL[:, :, None] if time == 1 else REAL[:, None]), math.nan)
    found = pooled(x, kind, pool, REAL)
    for i, at in enumerate([slice(0, 3), slice(6, 7), slice(0, 7)]):
        alone = x[i, at].numpy() if time == 1 else x[i, :, at].numpy().T
        expected = {"mean": alone.mean(0), "max": alone.max(0), "last": alone[-1]}[pool]
        torch.testing.assert_close(found[i], torch.tensor(expected))


def test_the_class_token_is_the_first_real_one():
    x = features("tokens")
    assert torch.equal(pooled(x, "tokens", "cls", REAL), torch.stack([x[0, 0], x[1, 6], x[2, 0]]))


@pytest.mark.parametrize("kind", ["tokens", "sequence"])
@pytest.mark.parametrize("pool", ["flatten", "published"])
def test_as_many_real_positions_are_flattened(kind, pool):
    x, real = features(kind), REAL[:1].repeat(3, 1).clone()
    real[1] = real[1].flip(0)
    time = 1 if kind == "tokens" else 2
    parts = [x[0].narrow(time - 1, 0, 3), x[1].narrow(time - 1, 4, 3), x[2].narrow(time - 1, 0, 3)]
    assert torch.equal(pooled(x, kind, pool, real), torch.stack(parts).flatten(1))
    text = f"pool={pool!r} needs as many tokens in every sample; got 1 to 7 by the mask: pass pool="
    with pytest.raises(ValueError, match=re.escape(text)):
        pooled(x, kind, pool, REAL)


def test_a_sample_that_is_padding_alone():
    text = "pool='mean' needs some tokens in every sample; got 0 to 7 by the mask"
    with pytest.raises(ValueError, match=re.escape(text)):
        pooled(features("tokens"), "tokens", "mean", REAL & (torch.arange(3) > 1)[:, None])


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((4, 256, 256), 1), ((1, 512, 513), 2), ((64, 128, 128), 2), ((65, 128, 128), 3)],
)
def test_published_pools_large_maps(shape, kernel):
    dim = math.prod(shape)
    assert kernel == (math.ceil(math.sqrt(dim / PUBLISHED_LIMIT)) if dim > 262_144 else 1)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pooled(x, "map", "published"), max_pool2d(x, kernel).flatten(1))
    assert pooled(x, "map", "flatten").shape == (2, dim)


def test_published_pools_maps_alone():
    x = torch.zeros(1, 600, 500)
    assert pooled(x, "tokens", "published").shape == (1, 300_000)
    assert pooled(x.unsqueeze(3), "map_last", "published").shape == (1, 300_000)


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        *((kind, pool) for kind in ("map", "map_last") for pool in ("cls", "last")),
        *(("other", pool) for pool in ("mean", "max", "cls", "last")),
        ("sequence", "cls"),
    ],
)
def test_poolings_without_axes(kind, pool):
    text = f"pool={pool!r} does not fit features of kind {kind!r}, (3, 5, 4, 2)"
    with pytest.raises(ValueError, match=re.escape(text)):
        pooled(torch.zeros(3, 5, 4, 2), kind, pool)


def test_other_kinds_are_flattened():
    assert pooled(torch.zeros(3, 2, 2, 2, 2), "other", "flatten").shape == (3, 16)


def test_check_pool():
    assert [check_pool(pool) for pool in POOLS] == list(POOLS)
    with pytest.raises(ValueError, match=r"pool must be one of \('flatten', .*\); got 'sum'"):
        check_pool("sum")
