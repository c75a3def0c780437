"""Reader: passes over the sample, and the features that they leave."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.common.checks import about
from geomkd.common.randomness import all_seeded, seed_of
from geomkd.data.sample import Sample
from geomkd.data.sources import to_device
from geomkd.network.forward import Forward
from geomkd.network.hooks import features_of
from geomkd.network.masks import mask_of, masks_in
from geomkd.network.pooling import pooled
from geomkd.scoring.plan import Stored


@dataclass
class Reader:
    """Forward passes over the sample, and what of the layers' features to keep of each."""

    model: nn.Module  # in evaluation mode and on ``device``
    sample: Sample
    forward: Forward | None  # runs the model in place of a plain call
    pool: str  # what is done to maps and tokens, but padding; see `geomkd.network.pooling.pooled`
    device: torch.device  # where batches are sent
    seen: Callable[[int], Any] = lambda count: None  # told the number of samples of every batch

    def read(
        self,
        group: list[Stored],
        batch_size: int,
        of_class: int | None = None,
        columns: slice = slice(None),
    ) -> dict[str, Tensor]:
        """Features of the group's layers, (n, d), or some columns of them."""
        n = len(self.sample) if of_class is None else self.sample.entropy_size(of_class)
        held = {
            s.layer.name: torch.empty(n, len(range(s.dim)[columns]), dtype=s.dtype, device=s.device)
            for s in group
        }
        layers = {s.layer.name: s for s in group}
        row = 0

        def keep(name: str, tensor: Tensor) -> int:
            layer = layers[name].layer
            with about(f"layer {name!r}"):
                x = pooled(tensor.detach(), layer.kind, self.pool, mask_of(layer, mask, tensor))
            if x.shape[1] != layers[name].dim or row + len(x) > n:
                raise ValueError(
                    f"layer {name!r}: expected {layers[name].dim} features of each of {n} samples "
                    f"as in the first batch; got {tuple(tensor.shape)} at sample {row} "
                    "(where only the number of tokens differs, pool='mean' helps)"
                )
            held[name][row : row + len(x)] = x[:, columns]
            return len(x)

        for number, batch in enumerate(self.sample.batches(batch_size, of_class=of_class)):
            inputs = to_device(batch, self.device)
            mask = masks_in(inputs)
            with all_seeded(seed_of(self.sample.seed, number), self.device):  # as in any other pass
                counts = features_of(self.model, inputs, held, forward=self.forward, take=keep)
            row += next(iter(counts.values()))
            self.seen(next(iter(counts.values())))
        if row != n:
            raise ValueError(f"the batches must hold the {n} samples asked for; got {row}")
        return held
