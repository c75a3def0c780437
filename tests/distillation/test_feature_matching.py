"""Combinations of layers and the attention between them, against plain numpy."""

import numpy as np
import pytest
import torch
from formulas import (
    PAIRS,
    attention,
    layer,
    maps,
    meeting_of,
    mse,
    on_one_grid,
    projected,
    weights_of,
)
from torch import nn

from geomkd.distillation.feature_matching import LayerAttention, Matching
from geomkd.distillation.projectors import linear_projectors


def random_features(layers, n=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, *each.shape)) for each in layers]


def both_sides(pairs):
    """Features of the student's layers, and of the teacher's."""
    theirs, ours = zip(*pairs, strict=True)
    return random_features(ours), random_features(theirs, seed=1)


def tensors(arrays):
    return [torch.tensor(x) for x in arrays]


# One teacher layer meets two student layers, one student layer two teacher layers.
SHARED = [
    (maps(6, 4, "t0"), maps(3, 4, "s0")),
    (maps(6, 4, "t0"), maps(5, 4, "s1")),
    (maps(7, 4, "t1"), maps(5, 4, "s1")),
]


def shared_features():
    t0, t1 = random_features([SHARED[0][0], SHARED[2][0]])
    s0, s1 = random_features([SHARED[0][1], SHARED[1][1]], seed=1)
    return [s0, s1, s1], [t0, t0, t1]


@pytest.mark.parametrize(
    ("pairing", "combinations"),
    [
        ("one_to_one", [(0, 0), (1, 1), (2, 2)]),
        # Every layer once, under its first place; student layer by student layer.
        ("all", [(0, 0), (2, 0), (0, 1), (2, 1)]),
        ("attention", [(0, 0), (2, 0), (0, 1), (2, 1)]),
    ],
)
def test_layers_that_occur_twice_are_combined_once(pairing, combinations):
    matching = Matching(meeting_of(SHARED), pairing=pairing, projector="linear").double()
    assert matching.combinations == combinations
    s, t = shared_features()
    shapes = [(t[i].shape[1], s[j].shape[1], 1, 1) for i, j in combinations]
    assert [w.shape for w in weights_of(matching)] == shapes
    errors = np.array(
        [
            ((projected(s[j], "linear", [w]) - t[i]) ** 2).mean((1, 2, 3))
            for (i, j), w in zip(combinations, weights_of(matching), strict=True)
        ]
    )
    if pairing == "attention":
        alpha = attention([s[0], s[1]], [t[0], t[2]], matching.attention)
        expected = (alpha * errors.T.reshape(8, 2, 2)).sum(2).mean()
    else:
        expected = errors.mean()
        assert matching.attention is None
    found = matching(tensors(s), tensors(t)).item()
    assert found == pytest.approx(expected, rel=1e-10)


def test_attention_is_the_softmax_over_teacher_layers():
    s, t = both_sides(PAIRS)
    module = LayerAttention(2, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    weights = module(tensors(s[:2]), tensors(t))
    assert weights.shape == (8, 2, 3)
    np.testing.assert_allclose(weights.detach(), attention(s[:2], t, module), rtol=1e-10)
    np.testing.assert_allclose(weights.sum(2).detach(), 1, rtol=1e-12)


@pytest.mark.parametrize(("batch_size", "width"), [(8, 2), (13, 3), (2, 1)])
def test_networks_of_the_attention_are_as_published(batch_size, width):
    # B -> 2 (B // 4) -> B // 4, a network of its own for every layer.
    module = LayerAttention(2, 3, batch_size)
    assert (len(module.queries), len(module.keys)) == (2, 3)
    for network in [*module.queries, *module.keys]:
        first, between, second = network
        assert isinstance(between, nn.ReLU)
        assert first.weight.shape == (2 * width, batch_size) and first.bias is not None
        assert second.weight.shape == (width, 2 * width) and second.bias is not None


def test_attention_refuses_another_batch_size():
    module = LayerAttention(1, 1, 8)
    text = "attention was made for batches of 8 samples; got 5"
    with pytest.raises(ValueError, match=text):
        module([torch.zeros(5, 4)], [torch.zeros(5, 3)])


def test_attention_widens_half_precision():
    x = torch.full((4, 3), 300.0, dtype=torch.float16)  # its square overflows in float16
    weights = LayerAttention(1, 2, 4)([x], [x, -x])
    assert weights.dtype == torch.float32 and weights.isfinite().all()


def test_tokens_and_maps_are_combined_too():
    pairs = [
        (layer("tokens", 5, 6, name="t0"), maps(4, 2, "s0")),
        (maps(3, 2, "t1"), layer("tokens", 5, 4, name="s1")),
    ]
    matching = Matching(meeting_of(pairs), pairing="all", projector="linear").double()
    s, t = both_sides(pairs)

    def as_map(tokens):
        return tokens.transpose(0, 2, 1)[..., None]

    def as_grid(tokens):
        return as_map(tokens[:, 1:]).reshape(8, -1, 2, 2)

    met = [
        (s[0], as_grid(t[0])),
        (s[0], t[1]),
        # Tokens that are the same number on both sides stay tokens, the class token with them.
        (as_map(s[1]), as_map(t[0])),
        (as_grid(s[1]), t[1]),
    ]
    errors = [
        mse(projected(ours, "linear", [weight]), theirs)
        for (ours, theirs), weight in zip(met, weights_of(matching), strict=True)
    ]
    found = matching(tensors(s), tensors(t)).item()
    assert found == pytest.approx(np.mean(errors), rel=1e-10)


def test_distance_and_normalization_are_handed_on():
    matching = Matching(meeting_of(PAIRS), pairing="one_to_one", projector="linear").double()
    s, t = map(tensors, both_sides(PAIRS))
    plain = matching(s, t).item()
    others = {
        matching(s, t, distance=distance, normalize=normalize).item()
        for distance, normalize in (("huber", "none"), ("cosine", "none"), ("mse", "channel"))
    }
    assert len(others | {plain}) == 4


def test_what_cannot_meet_names_the_combination():
    # The pairs fit; combined, tokens without a grid meet a map.
    pairs = [
        (layer("tokens", 7, 6, name="t0"), layer("tokens", 7, 4, name="s0")),
        (maps(3, 2, "t1"), maps(4, 2, "s1")),
    ]
    Matching(meeting_of(pairs), pairing="one_to_one", projector="linear")
    text = r"pair \('t1', 's0'\): layer 's0': tokens must form a square grid .*; got 7 tokens"
    with pytest.raises(ValueError, match=text):
        Matching(meeting_of(pairs), pairing="all", projector="linear")


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_weights_are_drawn_from_the_generator_alone(projector):
    before = torch.get_rng_state()

    def drawn(seed):
        matching = Matching(meeting_of(PAIRS, seed=seed), pairing="attention", projector=projector)
        return [p for p in matching.parameters() if p.ndim != 1 or p.std() > 0]

    one, again, other = drawn(3), drawn(3), drawn(4)
    assert len(one) == {"linear": 9, "mlp": 27}[projector] + 6 * 4
    assert all(map(torch.equal, one, again)) and not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[1])  # each takes up where the one before left off
    assert torch.equal(torch.get_rng_state(), before)


def test_a_linear_projector_a_pair_for_an_objective_that_makes_none():
    s, t = both_sides(PAIRS)
    projectors = linear_projectors(meeting_of(PAIRS)).double()
    for projector, weight, x, y in zip(projectors, weights_of(projectors), s, t, strict=True):
        ours, theirs = projector(torch.tensor(x), torch.tensor(y))
        small_x, small_y = on_one_grid(x, y)
        np.testing.assert_allclose(ours.detach(), projected(small_x, "linear", [weight]))
        np.testing.assert_allclose(theirs, small_y)
