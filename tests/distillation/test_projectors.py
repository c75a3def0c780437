"""Projectors against plain numpy, and principal components against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from formulas import layer, maps, meeting_of, projected, weights_of
from sklearn.decomposition import PCA
from torch import nn

from geomkd.distillation.projectors import (
    PrincipalComponents,
    Projector,
    make_projector,
    pooled_to,
    to_grid,
    to_map,
)

KINDS = ("linear", "mlp", "bottleneck", "hint", "none")


def features(of, n=3, seed=0):
    return torch.randn(n, *of.shape, generator=torch.Generator().manual_seed(seed))


# ---- shapes ----


@pytest.mark.parametrize(
    ("student", "teacher", "shape"),
    [
        (layer("map", 4, 8, 8), layer("map", 6, 8, 8), (6, 8, 8)),
        (layer("map", 4, 8, 8), layer("map", 6, 4, 4), (6, 4, 4)),
        (layer("map", 4, 2, 2), layer("map", 6, 7, 7), (6, 2, 2)),
        (layer("map", 4, 8, 2), layer("map", 6, 4, 4), (6, 4, 2)),
        (layer("map_last", 8, 8, 4), layer("map", 6, 4, 4), (6, 4, 4)),
        (layer("tokens", 17, 4), layer("tokens", 17, 6), (6, 17, 1)),
        (layer("tokens", 18, 4), layer("tokens", 18, 6), (6, 18, 1)),
        (layer("tokens", 7, 4), layer("tokens", 7, 6), (6, 7, 1)),
        (layer("tokens", 17, 4), layer("tokens", 6, 6), (6, 2, 2)),
        (layer("tokens", 17, 4), layer("map", 6, 8, 8), (6, 4, 4)),
        (layer("map", 4, 8, 8), layer("tokens", 18, 6), (6, 4, 4)),
        (layer("vector", 4), layer("vector", 6), (6, 1, 1)),
        (layer("map", 4, 8, 8), layer("vector", 6), (6, 1, 1)),
        (layer("vector", 4), layer("tokens", 9, 6), (6, 1, 1)),
    ],
)
def test_student_and_teacher_meet_in_one_shape(student, teacher, shape):
    found, target = Projector(student, teacher)(features(student), features(teacher))
    assert found.shape == target.shape == (3, *shape)


@pytest.mark.parametrize("kind", ["mlp", "bottleneck"])
def test_neighbours_of_tokens_are_those_of_the_square_grid(kind):
    student, teacher = layer("tokens", 10, 4), layer("tokens", 10, 6)
    projector = Projector(student, teacher, kind=kind).double()
    x, t = features(student).double(), features(teacher).double()
    found, target = projector(x, t)
    grid = x[:, 1:].transpose(1, 2).reshape(3, 4, 3, 3).numpy()
    np.testing.assert_allclose(found.detach(), projected(grid, kind, weights_of(projector)))
    assert torch.equal(target, t[:, 1:].transpose(1, 2).reshape(3, 6, 3, 3))


def test_tokens_of_images_that_are_not_square():
    """Token by token, or as their mean; on no grid, which is not known."""
    student, teacher = (replace(layer("tokens", 16, n), place="oblong") for n in (4, 6))
    projected, target = Projector(student, teacher)(features(student), features(teacher))
    assert projected.shape == target.shape == (3, 6, 16, 1)
    x = features(teacher)
    _, target = Projector(layer("vector", 4), teacher)(features(layer("vector", 4)), x)
    torch.testing.assert_close(target, x.mean(dim=1)[:, :, None, None])
    for other, kind in ((layer("map", 4, 2, 8), "linear"), (student, "mlp")):
        with pytest.raises(ValueError, match=r"only tokens of square images have a grid .* 16 tok"):
            Projector(other, teacher, kind=kind)


def test_maps_are_pooled_then_projected_by_a_1x1_convolution():
    student, teacher = layer("map", 2, 4, 4), layer("map", 3, 2, 2)
    projector = Projector(student, teacher).double()
    x, t = features(student).double(), features(teacher).double()
    found, target = projector(x, t)
    small = x.numpy().reshape(3, 2, 2, 2, 2, 2).mean(axis=(3, 5))
    weight = projector.project.weight.detach().numpy()[:, :, 0, 0]
    np.testing.assert_allclose(found.detach(), np.einsum("oc,bchw->bohw", weight, small))
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
    found, target = projector(x, t)
    weight = projector.project.weight.detach().numpy()[:, :, 0, 0]
    expected = np.einsum("oc,btc->bot", weight, x.numpy())
    np.testing.assert_allclose(found.detach()[..., 0], expected)
    assert torch.equal(target[..., 0], t.transpose(1, 2))


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


def test_map_last_is_permuted_not_reshaped():
    x = features(layer("map_last", 4, 4, 2))
    for function in (to_grid, to_map):
        assert torch.equal(function(x, "map_last")[1, 0, 2, 3], x[1, 2, 3, 0])


def test_pooling_leaves_a_map_of_that_size_alone():
    x = features(layer("map", 2, 4, 6))
    assert pooled_to(x, (4, 6)) is x
    expected = x.reshape(3, 2, 2, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(pooled_to(x, (2, 3)), expected)


# ---- kinds ----

# Kernels as (out, in, size): 4 channels of the student, 6 of the teacher.
KERNELS = {
    "linear": [(6, 4, 1)],
    "hint": [(6, 4, 1)],
    "mlp": [(12, 4, 1), (12, 12, 3), (6, 12, 1)],
    "bottleneck": [(3, 4, 1), (3, 3, 3), (6, 3, 1)],
}


@pytest.mark.parametrize("kind", KERNELS)
def test_kinds_of_projectors(kind):
    projector = Projector(maps(4, 5), maps(6, 5), kind=kind).double()
    weights = weights_of(projector)
    assert [w.shape[:3] for w in weights] == KERNELS[kind]
    x = features(maps(4, 5)).double()
    found, _ = projector(x, features(maps(6, 5)))
    np.testing.assert_allclose(found.detach(), projected(x.numpy(), kind, weights), atol=1e-12)


def test_no_projector_leaves_both_sides():
    x, t = features(maps(4, 5)), features(maps(4, 5), seed=1)
    projector = Projector(maps(4, 5), maps(4, 5), kind="none")
    found, target = projector(x, t)
    assert found is x and target is t and not list(projector.parameters())


def test_no_projector_needs_as_many_channels():
    text = (
        "^without a projector both layers need as many channels; got 4 of the student's 's' and 6 "
        "of the teacher's 't'$"
    )
    with pytest.raises(ValueError, match=text):
        Projector(maps(4, 5, "s"), maps(6, 5, "t"), kind="none")


def test_the_kind_is_checked():
    text = r"a projector's kind must be one of \('linear', 'mlp', .*, 'none'\); got 'conv'"
    with pytest.raises(ValueError, match=text):
        Projector(maps(4, 5), maps(6, 5), kind="conv")


@pytest.mark.parametrize("n_tokens", [7, 8, 12, 20])
@pytest.mark.parametrize(
    ("kind", "teacher"), [("linear", maps(3, 2)), ("mlp", layer("tokens", 16, 3))]
)
def test_tokens_without_a_square_grid(kind, teacher, n_tokens):
    student = layer("tokens", n_tokens, 2, name="encoder.3")
    text = (
        "^layer 'encoder.3': tokens must form a square grid after dropping 0, 1, 2 or 5 of them; "
        f"got {n_tokens} tokens$"
    )
    with pytest.raises(ValueError, match=text):
        Projector(student, teacher, kind=kind)


@pytest.mark.parametrize("kind", ["linear", "pca"])
def test_other_kinds_are_refused_with_the_pair(kind):
    volume, flat = layer("other", 2, 3, 4, 4, name="conv"), layer("vector", 3, name="fc")
    text = (
        r"^pair \('fc', 'conv'\): layer 'conv' must give maps, tokens, sequences or vectors; got "
        r"'other' features of shape \(2, 3, 4, 4\) a sample$"
    )
    with pytest.raises(ValueError, match=text):
        make_projector(kind, meeting_of([(flat, volume)], features=[torch.zeros(2, 3)]), 0, 0)


# ---- seeds ----


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_drawn_from_the_generator_alone(kind):
    before = torch.get_rng_state()

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        projector = Projector(maps(4, 5), maps(4, 5), kind=kind, generator=generator)
        return [p for p in projector.parameters() if p.ndim == 4]

    one, again, other = drawn(3), drawn(3), drawn(4)
    assert len(one) == len(KERNELS.get(kind, ()))
    assert all(map(torch.equal, one, again)) and not any(map(torch.equal, one, other))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_weights_have_the_spread_of_fresh_convolutions(kind):
    projector = Projector(maps(256, 1), maps(512, 1), kind=kind)
    for module in projector.modules():
        if isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5  # uniform within 1 / sqrt(fan in)
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


# ---- principal components ----


def same_up_to_sign(found, expected):
    """Whether the columns of two tables are the same but for their signs."""
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, rtol=1e-8, atol=1e-8)


def with_scales(x, channels_axis):
    """Features whose principal components are far apart, with a mean."""
    scales = torch.arange(1.0, x.shape[channels_axis] + 1, dtype=torch.float64)
    shape = [1] * x.ndim
    shape[channels_axis] = -1
    return x.double() * scales.reshape(shape) + 2


@pytest.mark.parametrize(
    ("student", "teacher", "channel_axis", "rows"),
    [
        # The rows that the components are fitted on, and those of a target.
        (maps(3, 4), maps(6, 4), 1, lambda t: t.movedim(1, -1)),
        (layer("map", 3, 4, 4), layer("map_last", 4, 4, 6), -1, lambda t: t),
        (layer("tokens", 7, 3), layer("tokens", 7, 6), -1, lambda t: t),
        (layer("vector", 3), layer("vector", 6), -1, lambda t: t),
        # On a grid the class token takes no part.
        (maps(3, 4), layer("tokens", 17, 6), -1, lambda t: t[:, 1:]),
    ],
    ids=["maps", "map_last", "tokens", "vectors", "tokens on a grid"],
)
def test_principal_components_are_scikit_learns(student, teacher, channel_axis, rows):
    fitted = with_scales(features(teacher, n=40), channel_axis)
    fresh = with_scales(features(teacher, n=5, seed=1), channel_axis)
    x = features(student, n=5).double()
    found, target = PrincipalComponents(student, teacher, features=fitted)(x, fresh)
    pca = PCA(n_components=3, svd_solver="full").fit(rows(fitted).reshape(-1, 6).numpy())
    expected = pca.transform(rows(fresh).reshape(-1, 6).numpy())
    same_up_to_sign(target.movedim(1, -1).reshape(-1, 3).numpy(), expected)
    assert torch.equal(found, to_map(x, student.kind))  # the student's side stays as it is


def test_principal_components_meet_on_the_smaller_grid():
    student, teacher = maps(3, 4), maps(6, 8)
    fitted, fresh = features(teacher, n=10).double(), features(teacher, n=5, seed=1).double()
    projector = PrincipalComponents(student, teacher, features=fitted)
    _, target = projector(features(student, n=5).double(), fresh)
    _, whole = PrincipalComponents(maps(3, 8), teacher, features=fitted)(
        features(maps(3, 8), n=5).double(), fresh
    )
    torch.testing.assert_close(target, whole.reshape(5, 3, 4, 2, 4, 2).mean((3, 5)))


def test_signs_of_principal_components_do_not_depend_on_the_library():
    fitted = features(layer("vector", 6), n=40)
    one = PrincipalComponents(layer("vector", 4), layer("vector", 6), features=fitted).components
    for component in one.T:
        assert component[component.abs().argmax()] > 0
    torch.testing.assert_close(one.T @ one, torch.eye(4).double())


def test_as_many_channels_are_only_turned():
    fitted = features(layer("vector", 6), n=40).double()
    pair = layer("vector", 6), layer("vector", 6)
    _, target = PrincipalComponents(*pair, features=fitted)(fitted, fitted)
    centred = fitted - fitted.mean(0)
    turned = target[..., 0, 0]
    torch.testing.assert_close(turned @ turned.T, centred @ centred.T)


def test_principal_components_are_kept_but_not_trained():
    projector = PrincipalComponents(
        layer("vector", 3), layer("vector", 6), features=features(layer("vector", 6), n=40)
    )
    assert set(projector.state_dict()) == {"mean", "components"}
    assert not list(projector.parameters())
    x = features(layer("vector", 6)).float()
    assert projector(features(layer("vector", 3)), x)[1].dtype == torch.float32


def test_principal_components_are_of_the_teacher_layer_that_is_meant():
    pairs = [(layer("vector", 5), layer("vector", 3)), (layer("vector", 6), layer("vector", 4))]
    fitted = [features(teacher, n=40) + i for i, (teacher, _) in enumerate(pairs)]
    projector = make_projector("pca", meeting_of(pairs, features=fitted), 1, 0)
    torch.testing.assert_close(projector.mean, fitted[1].double().mean(0))
    assert projector.components.shape == (6, 3)


def test_principal_components_need_enough_channels_of_the_teacher():
    pair = maps(3, 4, "blocks.2"), maps(6, 4, "layer3")
    text = (
        r"^pair \('blocks.2', 'layer3'\): principal components need at most as many student "
        "channels as teacher channels; got 6 of the student's 'layer3' and 3 of the teacher's "
        "'blocks.2'$"
    )
    with pytest.raises(ValueError, match=text):
        make_projector("pca", meeting_of([pair], features=[features(pair[0])]), 0, 0)
