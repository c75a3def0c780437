"""similarity_matrix: how alike the layers of two models, or of one, see the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geomkd.common.checks import as_features, check_choice, check_finite, check_int, check_names
from geomkd.common.progress import bar_of
from geomkd.common.randomness import all_seeded, seed_of
from geomkd.data.sample import Sample, read_as_given
from geomkd.data.sources import to_device
from geomkd.geometry.precision import exact_arithmetic, scale_of
from geomkd.geometry.principal import principal
from geomkd.measures import similarity as alike
from geomkd.network.forward import Forward, evaluating, on_device, unwrap
from geomkd.network.hooks import features_of
from geomkd.network.layers import Layer, survey
from geomkd.network.masks import check_class_token, mask_of, masks_in, warn_of_padding
from geomkd.network.pooling import check_pool, pooled
from geomkd.scoring.arguments import example_of

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("cka", "procrustes")
FEWEST = 4  # samples that the unbiased HSIC needs

Features = Mapping[str, Any]


def similarity_matrix(
    a: nn.Module | Features,
    b: nn.Module | Features | None = None,
    data: Any = None,
    *,
    layers_a: Sequence[str] | None = None,
    layers_b: Sequence[str] | None = None,
    measure: str = "cka",
    batch_size: int = 256,
    samples: int = 5000,
    seed: int = 0,
    pool: str = "flatten",
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    input_key: str | None = None,
    label_key: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare every layer of one model with every layer of another on the same samples.

    Parameters
    ----------
    a, b : torch.nn.Module, or mapping of str to Tensor or ndarray, shape (n, ...)
        Two models, run in evaluation mode and left as they were, or features by layer's name of
        the same n samples in the same order. Without ``b``, ``a`` is compared with itself.
    data : pair of tensors, map-style Dataset, DataLoader, or iterable of batches
        What models are run on, as in `score_layers`; labels only balance the sample.
    layers_a, layers_b : sequence of str, optional
        Layers to compare, in this order; by default what `candidate_layers` lists, or all of a
        mapping. Without ``b``, ``layers_b`` is ``layers_a`` unless given.
    measure : {"cka", "procrustes"}
        Debiased CKA, or Procrustes distance (0 for equal layers); this for mappings alone.
    batch_size : int
        Most samples of a batch, at least 4; of models only.
    samples : int
        Most samples in all, equally many of every class; of models only.
    seed : int
        Seeds the sample and its order.
    pool : {"flatten", "mean", "max", "cls", "last", "published"}
        What is done to maps, tokens and sequences first, of models only, as in `score_layers`.
    device : torch.device, optional
        Where to run the models; by default each where it is.
    forward : callable, optional
        ``forward(model, inputs)`` for models that are not simply called; for both.
    input_key, label_key : str, optional
        Keys of inputs and labels in batches that are mappings.
    progress : bool
        Show a bar.

    Returns
    -------
    DataFrame
        Rows the layers of ``a``, columns those of ``b``. ``attrs`` tells how it was made: measure,
        n (samples used), batch_size (of each batch), pool, seed.

    Raises
    ------
    TypeError, ValueError
        A model against a mapping, models without data, mappings with it; what is wrong with
        layers, data, features or an option.

    Notes
    -----
    Mappings: ``cka`` or ``procrustes_distance`` of all n samples.

    Models: one pass of both over a shuffled sample; of a batch, only the Gram matrix of each layer
    is kept. CKA is the ratio of the averages over batches of the unbiased HSIC (Nguyen et al.). The
    sample is split into the fewest batches not above ``batch_size``, all of one size; what remains,
    fewer samples than there are batches, is left out. **The value depends on** ``batch_size``: the
    averages estimate the same HSIC whatever it is, but the fewer pairs of samples meet in a batch
    the more they scatter. With one batch of all samples it is ``cka`` of the whole.

    References
    ----------
    Nguyen, Raghu, Kornblith, Do wide and deep networks learn the same things?, ICLR 2021.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd.scoring.similarity_matrix import similarity_matrix
    >>> _ = torch.manual_seed(0)
    >>> layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    >>> model = nn.Sequential(*layers)
    >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
    >>> frame = similarity_matrix(model, None, (x, y), batch_size=30, progress=False)
    >>> frame.shape, frame.attrs["n"], bool(frame.loc["1", "1"].round(6) == 1)
    ((2, 2), 60, True)
    """
    check_choice(measure, "measure", MEASURES)
    check_pool(pool)
    batch_size = check_int(batch_size, "batch_size", least=FEWEST)
    seed = check_int(seed, "seed", least=0)
    if b is None:
        b, layers_b = a, layers_a if layers_b is None else layers_b
    kinds = [_kind(model, name) for model, name in ((a, "a"), (b, "b"))]
    if kinds[0] != kinds[1]:
        raise TypeError(f"a and b must both be models or both mappings; got {' and '.join(kinds)}")
    made = {"measure": measure, "seed": seed, "pool": pool}
    if kinds[0] == "mapping":
        if data is not None or pool != "flatten":
            raise ValueError("mappings hold features: data= and pool= are for models")
        return _of_mappings(a, b, layers_a, layers_b, made)
    if data is None:
        raise ValueError("models need data= to be run on")
    if measure != "cka":
        raise ValueError(
            f"measure={measure!r} needs whole features: give mappings of layer name to features; "
            "models are compared batch by batch, which only 'cka' can be"
        )
    keys = {"input_key": input_key, "label_key": label_key}

    def compare(believe: bool) -> pd.DataFrame:
        sample = Sample(data, samples, seed=seed, believe=believe, **keys)
        with ExitStack() as stack:
            sides = []
            for model, layers, of in ((a, layers_a, "layers_a"), (b, layers_b, "layers_b")):
                stack.enter_context(evaluating(model))
                place = stack.enter_context(on_device(model, device))
                names = None if layers is None else check_names(layers, of)
                example, more = example_of(sample, place), sample.batches(batch_size)
                chosen = survey(model, example, names, forward=forward).layers
                if pool == "cls":
                    check_class_token(model, chosen, example, forward)
                warn_of_padding(model, chosen, example, more, stacklevel=4)
                by_name = {layer.name: layer for layer in chosen}
                sides.append(_Side(model, by_name, place, pool, forward))
            return _streamed(*sides, sample, batch_size, progress, made)

    return read_as_given(compare, stacklevel=3)


def _kind(value: Any, name: str) -> str:
    if not isinstance(value, Mapping | nn.Module):
        raise TypeError(
            f"{name} must be a torch.nn.Module or a mapping of layer names to features; "
            f"got {type(value).__name__}"
        )
    return "mapping" if isinstance(value, Mapping) else "model"


def _frame(values: Tensor, rows: Sequence[str], columns: Sequence[str], made: dict) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(values.cpu().numpy(), index=list(rows), columns=list(columns))
    frame.attrs.update(made)
    return frame


# ---- features that are there ---------------------------------------------------------------------


def _of_mappings(
    a: Features, b: Features, layers_a: Any, layers_b: Any, made: dict
) -> pd.DataFrame:
    left = _features(a, layers_a, "a")
    same = b is a and (layers_b is None or list(layers_b) == list(left))
    right = left if same else _features(b, layers_b, "b")
    both = [*left.values(), *right.values()]
    sizes, places = {len(x) for x in both}, {x.device for x in both}
    of_cka = made["measure"] == "cka"
    least = FEWEST if of_cka else 2
    if len(sizes) > 1 or min(sizes, default=0) < least:
        raise ValueError(
            f"all layers must hold the same n >= {least} samples; got n = {sorted(sizes)}"
        )
    if len(places) > 1:
        raise ValueError(f"all layers must be on one device; got {sorted(map(str, places))}")
    with exact_arithmetic(both[0].device):
        xs = list(left.values())
        ys = xs if same else list(right.values())
        values = alike.products_of(xs, ys, True).ratio() if of_cka else _distances(xs, ys)
    return _frame(values, left, right, {**made, "n": len(xs[0]), "batch_size": len(xs[0])})


def _features(features: Features, layers: Any, of: str) -> dict[str, Tensor]:
    names = list(features) if layers is None else check_names(layers, f"layers_{of}")
    missing = [name for name in names if name not in features]
    if missing:
        raise ValueError(f"{of} has no layers {missing}; it has {list(features)}")
    held = {}
    for name in names:
        held[name] = as_features(features[name], f"{of}[{name!r}]")
        check_finite(held[name], f"{of}[{name!r}]")
    return held


def _distances(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    left = [principal(x) for x in xs]
    right = left if ys is xs else [principal(y) for y in ys]
    return torch.stack([torch.stack([alike.procrustes_from(p, q) for q in right]) for p in left])


# ---- features that are streamed ------------------------------------------------------------------


@dataclass
class _Side:
    """One of the models, and what it needs to turn a batch into Gram matrices."""

    model: nn.Module
    layers: dict[str, Layer]
    device: torch.device
    pool: str
    forward: Forward | None
    scales: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def grams(
        self, batch: Any, names: Sequence[str], size: int, seed: int
    ) -> dict[str, alike.Triangle]:
        """Triangles of the Gram matrices of some layers, each made as soon as the layer has run."""

        def take(name: str, tensor: Tensor) -> alike.Triangle:
            try:
                layer = self.layers[name]
                x = pooled(tensor.detach(), layer.kind, self.pool, mask_of(layer, mask, tensor))
                check_finite(x := as_features(x))
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            with exact_arithmetic(x.device):
                # One scale for all batches, as their products are added.
                scale, dim = self.scales.setdefault(name, (scale_of(x), x.shape[1]))
                if tuple(x.shape) != (size, dim):
                    raise ValueError(
                        f"layer {name!r}: expected features of {size} samples, {dim} each as in "
                        f"the first batch; got {tuple(tensor.shape)} (inputs of one shape are "
                        "needed; where only the number of tokens differs, pool='mean' helps)"
                    )
                return alike.triangle_of(x, scale)

        inputs = to_device(batch, self.device)
        mask = masks_in(inputs)
        with all_seeded(seed, self.device):
            return features_of(self.model, inputs, names, forward=self.forward, take=take)


def _streamed(
    a: _Side, b: _Side, sample: Sample, batch_size: int, progress: bool, made: dict
) -> pd.DataFrame:
    """CKA from the products of Gram matrices, summed over batches of one size."""
    n = len(sample)
    count = min(math.ceil(n / batch_size), n // FEWEST)
    size = n // count
    # The sample is in the order of the data, often by class; a batch has to be a sample of all.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(made["seed"]))
    sample = sample.taken(order[: count * size])
    rows, columns = list(a.layers), list(b.layers)
    one_model = unwrap(a.model) is unwrap(b.model)  # is run once, for the layers of both
    if one_model:
        a.layers = b.layers = {**b.layers, **a.layers}
    total = None
    with bar_of(count * size, "similarity_matrix", show=progress, unit=" samples") as bar:
        for number, batch in enumerate(sample.batches(size)):
            options = size, seed_of(made["seed"], number)
            of_a = a.grams(batch, list(a.layers), *options)
            of_b = of_a if one_model else b.grams(batch, columns, *options)
            xs = [of_a[name] for name in rows]
            ys = xs if one_model and rows == columns else [of_b[name] for name in columns]
            with exact_arithmetic(a.device):
                moved = ys if ys is xs else [_to(xs[0], t) for t in ys]
                found = alike.triangle_products(xs, moved)
            total = found if total is None else total.plus(found)
            bar.update(size)
    return _frame(total.ratio(), rows, columns, {**made, "n": count * size, "batch_size": size})


def _to(other: alike.Triangle, t: alike.Triangle) -> alike.Triangle:
    """Move a triangle to the device of another."""
    place = other.sq.device
    return alike.Triangle([rows.to(place) for rows in t.rows], t.sq.to(place), t.floor.to(place))
