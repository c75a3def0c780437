"""Work too small to be shared runs on one thread, and the caller's number stays."""

import math

import pytest
import torch
from small import run_mlp
from torch import nn

from geomkd import score_layers
from geomkd.distillation import loop
from geomkd.network.forward import multiplications
from geomkd.scoring import layer_measures
from geomkd.scoring import score_layers as scoring


@pytest.fixture(autouse=True)
def three():
    """A number of threads that is nobody's default."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.parametrize(("most", "threads"), [(5e8, 1), (0, 3)])
def test_of_training(monkeypatch, most, threads):
    monkeypatch.setattr(loop, "SMALL_STEP", most)
    seen = []
    run_mlp(epochs=1, callbacks=[lambda row: seen.append(torch.get_num_threads())])
    assert seen == [threads]


@pytest.mark.parametrize(
    ("run", "sample", "forward", "measured"), [(2e10, 0, 1, 1), (0, 2048, 3, 1), (0, 0, 3, 3)]
)
def test_of_scoring(monkeypatch, run, sample, forward, measured):
    """`sample` decides on what is read off Gram matrices, `run` on all."""
    monkeypatch.setattr(scoring, "SMALL_RUN", run)
    monkeypatch.setattr(layer_measures, "SMALL", sample)
    seen = {"forward": [], "measure": []}

    class Seen(nn.Module):
        def forward(self, x):
            if len(x) > 16:  # not the example
                seen["forward"].append(torch.get_num_threads())
            return x

    original = layer_measures.LayerMeasures._of_quality

    def watched(self, *given):
        seen["measure"].append(torch.get_num_threads())
        return original(self, *given)

    monkeypatch.setattr(layer_measures.LayerMeasures, "_of_quality", watched)
    model = nn.Sequential(Seen(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    score_layers(model, (torch.randn(90, 8), torch.arange(90) % 3), subsamples=0, progress=False)
    assert set(seen["forward"]) == {forward}
    assert set(seen["measure"]) == {measured}


def test_multiplications_of_a_sample():
    """By hand; an embedding looks up, and is counted as if it multiplied once a number."""
    network = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5))
    x = torch.randn(7, 4, 5, 5)
    assert multiplications(network, x) == 6 * 3 * 3 * (2 * 3 * 3) + 54 * 5
    assert not any(module._forward_hooks for module in network.modules())
    assert multiplications(network, torch.randn(7, 3)) == math.inf
    assert multiplications(nn.DataParallel(network), x, lambda model, x: model(2 * x)) == 1242
