"""``geomkd layers``: what a network offers, before anything is scored."""

import argparse
from collections.abc import Callable
from typing import Any

from geomkd.cli.models import example_of, load_model
from geomkd.network.forward import modules_by_name
from geomkd.network.hooks import target_of
from geomkd.network.layers import survey


def listed(options: argparse.Namespace, say: Callable[[str], Any]) -> None:
    """Print the layers of a network; ``say`` takes each line of text."""
    import pandas as pd

    loaded = load_model(options.model, weights=options.weights, seed=options.seed)
    example = example_of(loaded, options.image_size)
    chosen = {"granularity": options.granularity}
    found = survey(loaded.model, example, options.layers, **chosen).layers
    modules = modules_by_name(loaded.model)
    rows = []
    for layer in found:
        module, is_input, _ = target_of(layer.name, modules)
        own = 0 if is_input else sum(p.numel() for p in module.parameters())
        shape = " x ".join(map(str, layer.shape))
        numbers = f"{layer.dim:,}", f"{own:,}"
        rows.append((layer.name, layer.role, layer.kind, shape, *numbers))
    columns = ["layer", "role", "kind", "shape", "dim", "parameters"]
    say(f"model: {loaded.story}\n")
    say(pd.DataFrame(rows, columns=columns).to_string(index=False))
    in_all = sum(p.numel() for p in loaded.model.parameters())
    blocks = sum(layer.role == "block" for layer in found)
    say(f"\n{len(found)} layers, {blocks} of them blocks; {in_all:,} parameters in all")
