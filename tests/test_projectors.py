import numpy as np
import pytest
import torch
from torch import nn

from geomkd.distillation.projectors import Projector, make_projectors, to_grid
from geomkd.layers import Layer


def layer(kind, *shape, name="x"):
    return Layer(name, kind, shape)


def features(of, n=3):
    return torch.randn(n, *of.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("student", "teacher", "shape"),
    [
        (layer("map", 4, 8, 8), layer("map", 6, 8, 8), (6, 8, 8)),
        (layer("map", 4, 8, 8), layer("map", 6, 4, 4), (6, 4, 4)),
        (layer("map", 4, 2, 2), layer("map", 6, 7, 7), (6, 2, 2)),
        (layer("map", 4, 8, 2), layer("map", 6, 4, 4), (6, 4, 2)),
        (layer("map_last", 8, 8, 4), layer("map", 6, 4, 4), (6, 4, 4)),
        (layer("tokens", 17, 4), layer("tokens", 17, 6), (6, 17)),
        (layer("tokens", 18, 4), layer("tokens", 18, 6), (6, 18)),
        (layer("tokens", 17, 4), layer("tokens", 6, 6), (6, 2, 2)),
        (layer("tokens", 17, 4), layer("map", 6, 8, 8), (6, 4, 4)),
        (layer("map", 4, 8, 8), layer("tokens", 18, 6), (6, 4, 4)),
        (layer("vector", 4), layer("vector", 6), (6,)),
        (layer("map", 4, 8, 8), layer("vector", 6), (6, 1, 1)),
        (layer("vector", 4), layer("tokens", 9, 6), (6, 1, 1)),
    ],
)
def test_student_and_teacher_meet_in_one_shape(student, teacher, shape):
    projected, target = Projector(student, teacher)(features(student), features(teacher))
    assert projected.shape == target.shape == (3, *shape)


def test_maps_are_pooled_then_projected_by_a_1x1_convolution():
    student, teacher = layer("map", 2, 4, 4), layer("map", 3, 2, 2)
    projector = Projector(student, teacher).double()
    x, t = features(student).double(), features(teacher).double()
    projected, target = projector(x, t)
    pooled = x.numpy().reshape(3, 2, 2, 2, 2, 2).mean(axis=(3, 5))
    weight = projector.project.weight.detach().numpy()[:, :, 0, 0]
    np.testing.assert_allclose(projected.detach(), np.einsum("oc,bchw->bohw", weight, pooled))
    assert torch.equal(target, t)
    assert isinstance(projector.project, nn.Conv2d) and projector.project.bias is None


def test_the_teachers_larger_map_is_the_one_that_is_pooled():
    student, teacher = layer("map", 2, 2, 2), layer("map", 3, 4, 4)
    t = features(teacher)
    _, target = Projector(student, teacher)(features(student), t)
    expected = t.numpy().reshape(3, 3, 2, 2, 2, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)


def test_tokens_are_projected_one_by_one():
    student, teacher = layer("tokens", 5, 2), layer("tokens", 5, 3)
    projector = Projector(student, teacher).double()
    x, t = features(student).double(), features(teacher).double()
    projected, target = projector(x, t)
    weight = projector.project.weight.detach().numpy()
    np.testing.assert_allclose(projected.detach(), np.einsum("oc,btc->bot", weight, x.numpy()))
    assert torch.equal(target, t.transpose(1, 2))
    assert isinstance(projector.project, nn.Linear) and projector.project.bias is None


@pytest.mark.parametrize(
    ("n_tokens", "prefix"), [(1, 0), (4, 0), (5, 1), (6, 2), (16, 0), (17, 1), (18, 2), (21, 5)]
)
def test_tokens_lose_the_smallest_prefix_that_leaves_a_square(n_tokens, prefix):
    tokens = features(layer("tokens", n_tokens, 2))
    grid = to_grid(tokens, "tokens")
    side = round((n_tokens - prefix) ** 0.5)
    assert grid.shape == (3, 2, side, side)
    assert torch.equal(grid[:, :, -1, 0], tokens[:, prefix + side * (side - 1)])
    assert torch.equal(grid[:, :, 0, -1], tokens[:, prefix + side - 1])


@pytest.mark.parametrize("n_tokens", [7, 8, 12, 20])
def test_tokens_without_a_square_grid(n_tokens):
    student = layer("tokens", n_tokens, 2, name="encoder.3")
    with pytest.raises(ValueError, match=rf"layer 'encoder.3': .*square.*; got {n_tokens} tokens"):
        Projector(student, layer("map", 3, 2, 2))


def test_map_last_is_permuted_not_reshaped():
    x = features(layer("map_last", 4, 4, 2))
    assert torch.equal(to_grid(x, "map_last")[1, 0, 2, 3], x[1, 2, 3, 0])


def test_other_kinds_are_refused_with_the_pair():
    volume, flat = layer("other", 2, 3, 4, 4, name="conv"), layer("vector", 3, name="fc")
    with pytest.raises(ValueError, match=r"pair \('fc', 'conv'\): layer 'conv' must give maps"):
        make_projectors([(flat, volume)])


def test_projectors_are_seeded_and_leave_the_global_state():
    pairs = [
        (layer("map", 6, 4, 4), layer("map", 4, 8, 8)),
        (layer("vector", 5), layer("vector", 2)),
    ]
    before = torch.get_rng_state()
    one, same, other = (make_projectors(pairs, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_weights_have_the_spread_of_a_fresh_convolution():
    projector = Projector(layer("map", 256, 1, 1), layer("map", 512, 1, 1))
    bound = 256**-0.5
    assert projector.project.weight.abs().max() <= bound
    assert projector.project.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
