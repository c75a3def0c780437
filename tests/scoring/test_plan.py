"""What is known of the layers before the first batch is read, from one forward pass."""

import pytest
import torch
from torch import nn

from geomkd import score_layers
from geomkd.common.randomness import seeded
from geomkd.network.hooks import features_of
from geomkd.network.layers import describe_layers
from geomkd.network.pooling import POOLS, pooled
from geomkd.scoring.plan import Stored


@pytest.mark.parametrize("layers", [None, ["3", "1", "0", "4"]])
def test_one_forward_pass_tells_all_layers(layers):
    with seeded(0):
        model, x = nn.Sequential(*(nn.Sigmoid(), nn.Linear(8, 8)) * 3), torch.randn(40, 8)
    passes = []

    def forward(model, batch):
        passes.append(len(batch))
        return model(batch)

    options = {"pool": "mean", "subsamples": 0, "progress": False}
    score_layers(model, (x, torch.arange(40) % 4), layers, forward=forward, **options)
    assert passes == [2, 40]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_width_and_type_are_known_before_the_features(pool, dtype):
    model = nn.Sequential(nn.Identity(), nn.Flatten(2), nn.Flatten())
    x = torch.ones(2, 5, 256, 256, dtype=dtype)  # above 262,144 values
    layers = describe_layers(model, ["0", "1", "2"], x)
    assert [layer.kind for layer in layers] == ["map", "tokens", "vector"]
    for layer in layers:
        if pool in ("cls", "last") and layer.kind == "map":
            with pytest.raises(ValueError, match=f"layer '0': pool='{pool}' does not fit"):
                Stored.of(layer, pool)
            continue
        features = features_of(model, x, [layer.name])[layer.name]
        expected, stored = pooled(features, layer.kind, pool), Stored.of(layer, pool)
        assert (stored.layer, stored.dim) == (layer, expected.shape[1])
        assert (stored.dtype, stored.device) == (expected.dtype, expected.device)
