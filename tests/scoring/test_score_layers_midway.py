"""What score_layers leaves behind, and what goes wrong midway."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from oracle import TERMS
from teachers import (
    CLASSES,
    WIDTHS,
    Widen,
    Y,
    assert_as_measured,
    images,
    least_of,
    resnet18,
    rows_of,
    score,
    sequential,
    vectors,
    wide,
)
from torch import nn

from geomkd import score_layers

# ---- the model is left as it was -----------------------------------------------------------------


def hooks_of(model):
    return [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]


def stop(model, batch):
    model(batch)
    raise KeyboardInterrupt


def fail(model, batch):
    model(batch)
    raise RuntimeError("no more")


@pytest.mark.parametrize("how", ["done", "error", "Ctrl-C", "NaN"])
def test_model_is_left_as_it_was(how):
    model = resnet18().train()
    model.layer2.eval()
    model.layer3.requires_grad_(False)
    handle = model.layer1.register_forward_hook(lambda *_: None)
    flags = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    state = deepcopy(model.state_dict())
    hooks = hooks_of(model)
    x = images(16)
    if how == "done":
        score(model, (x, Y[:16]))
    elif how == "NaN":
        x[3] = float("nan")
        with pytest.raises(ValueError, match="layer 'relu': features must be finite"):
            score(model, (x, Y[:16]))
    else:
        forward, error = {"error": (fail, RuntimeError), "Ctrl-C": (stop, KeyboardInterrupt)}[how]
        with pytest.raises(error):
            score(model, (x, Y[:16]), forward=forward)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert hooks_of(model) == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.is_grad_enabled()
    handle.remove()


# ---- what goes wrong midway ----------------------------------------------------------------------


def interrupted(model, data, plans, after, **options):
    """Scores where Ctrl-C comes once more than ``after`` samples were read by the plan."""
    made, rows = len(plans), 0

    def forward(model, batch):
        nonlocal rows
        rows += len(batch) * (len(plans) > made)
        if rows > after:
            raise KeyboardInterrupt
        return model(batch)

    return score(model, data, forward=forward, **options)


def test_ctrl_c_midway_gives_what_is_done(plans):
    model, n = wide(*WIDTHS), 200
    data = (vectors(n), torch.arange(n) % CLASSES)
    options = {"memory": f"{least_of(model, data, subsamples=2) + 3}MB", "subsamples": 2}
    whole = score(model, data, **options)
    plan = plans[-1]
    done = len(plan.groups[0])
    assert len(plan.groups) > 2 and done == 2
    part = interrupted(model, data, plans, n, **options)
    assert part.settings["partial"] is True and whole.settings["partial"] is False
    assert list(rows_of(part).index) == list(rows_of(whole).index)[:done]
    assert list(rows_of(part)["quality"]) == list(rows_of(whole)["quality"])[:done]
    assert part.draws["quality"].shape == (done, 2)
    assert "partial" in repr(part) and "partial" not in repr(whole)


def test_ctrl_c_before_any_layer_is_raised(plans):
    with pytest.raises(KeyboardInterrupt):
        interrupted(sequential(), (vectors(), Y), plans, 0)
    assert len(plans) == 1


class Spoiled(nn.Module):
    """Sigmoid features, then rows that are ``value`` where the input's first feature is large."""

    def __init__(self, value, width):
        super().__init__()
        self.widen, self.act, self.spoil, self.value = Widen(8, width), nn.Sigmoid(), Spoil(), value

    def forward(self, x):
        return self.spoil(self.act(self.widen(x)), x[:, :1] > 9, self.value)


class Spoil(nn.Module):
    def forward(self, x, where, value):
        return x.masked_fill(where, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("memory", ["2GB", "small"])
def test_features_that_are_not_finite_name_the_layer(value, memory, plans):
    model, x = Spoiled(value, width=10_000), vectors()
    x[[40, 7, 12], 0] = 10
    options = {"layers": ["act", "spoil"]}
    if memory == "small":
        memory = f"{least_of(model, (x, Y), **options)}MB"
    text = "layer 'spoil': features must be finite; got NaN or Inf in 3 of 60 rows, first in row 7"
    with pytest.raises(ValueError, match=text):
        score(model, (x, Y), memory=memory, **options)
    assert (plans[-1].width < 10_000) == (memory != "2GB")


@pytest.mark.parametrize("subsamples", [0, 3])
def test_zero_rows_warn_once_a_layer(subsamples):
    x = vectors(100)
    x[[40, 7, 12], 0] = 10
    model = nn.ModuleDict({"one": Spoiled(0.0, 16), "two": Spoiled(0.0, 12)})
    layers = [f"{part}.{name}" for part in ("one", "two") for name in ("act", "spoil")]
    with pytest.warns(UserWarning, match="feature rows are zero") as caught:
        scores = score_layers(
            model,
            (x, torch.arange(100) % CLASSES),
            layers=layers,
            subsamples=subsamples,
            progress=False,
            forward=lambda model, batch: [part(batch) for part in model.values()],
        )
    assert [str(warning.message) for warning in caught] == [
        f"layer '{part}.spoil': 3 of 100 feature rows are zero: their cosines are taken as 0"
        for part in ("one", "two")
    ]
    assert caught[0].filename == __file__
    assert np.isfinite(scores.to_frame()["quality"]).all()


def test_robust_definition_warns_of_rows_at_the_mean():
    text = (
        "layer 'act': 100 of 100 feature rows equal the mean of all rows: "
        "their cosines are taken as 0"
    )
    data = vectors(100), torch.arange(100) % CLASSES
    with pytest.warns(UserWarning) as caught:
        rows = rows_of(score(Equal(), data, layers=["act"], definition="robust"))
    assert [str(warning.message) for warning in caught] == [text]
    assert rows.loc["act", "quality"] == 0


def test_robust_definition_gives_zero_rows_a_direction():
    x = vectors()
    x[[40, 7, 12]] = 0  # warnings are errors in these tests
    scores = score(nn.Sequential(nn.Identity()), (x, Y), layers=["0"], definition="robust")
    assert_as_measured(scores, {"0": x}, Y, definition="robust")


class Equal(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.Sigmoid()

    def forward(self, x):
        return self.act(0 * x)


def test_tokens_of_another_length_are_named():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.act = nn.Embedding(9, 6), nn.ReLU()

        def forward(self, ids):
            return self.act(self.embed(ids))

    ids = torch.arange(9).repeat(40)
    batches = [(ids[: 16 * length].view(16, length), Y[:16]) for length in (3, 3, 5)]
    text = r"layer 'act': expected \d+ features of each of 48 samples .* pool='mean' helps"
    with pytest.raises(ValueError, match=text):
        score(Tokens(), batches, layers=["act"])
    assert score(Tokens(), batches, layers=["act"], pool="mean").to_frame()["dim"][0] == 6


def test_features_too_small_or_large_for_float32_squares():
    model, x = sequential(depth=1), vectors()
    options = {"layers": ["1"], "entropy_per_class": 10}
    plain = rows_of(score(model, (x, Y), **options))
    for factor in (1e-25, 1e25):
        scaled = deepcopy(model)
        with torch.no_grad():
            scaled[0].weight *= factor
            scaled[0].bias *= factor
        rows = rows_of(score(scaled, (x, Y), **options))
        np.testing.assert_allclose(rows[list(TERMS)], plain[list(TERMS)], rtol=1e-5)
