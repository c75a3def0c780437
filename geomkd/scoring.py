"""score_layers: from a model and data to one row of scores a layer, within a bound of memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from geomkd.checks import check_dataset_size, check_definition, check_int
from geomkd.draws import Draws
from geomkd.gram import ClassGram, Columns, column_slices, residual_gram
from geomkd.layers import Layer, candidate_layers, describe_layers
from geomkd.measures.quality import quality_from
from geomkd.memory import Stored, forward_bytes, parse_bytes, plan_of
from geomkd.models import Forward, evaluating, unwrap
from geomkd.pooling import check_pool
from geomkd.reading import Reader
from geomkd.sampling import Sample, to_device
from geomkd.scores import TERMS, LayerScores
from geomkd.sharing import Row, Share
from geomkd.statistics import about_the_mean, spectrum_of, variance_floor

EXAMPLES = 2  # samples of the batch that tells the layers


def score_layers(
    model: nn.Module,
    data: Any,
    layers: Sequence[str] | None = None,
    *,
    measures: Sequence[str] = ("knowledge_quality",),
    samples: int = 5000,
    entropy_per_class: int | None = None,
    dataset_size: float | None = None,
    pool: str = "flatten",
    definition: str = "published",
    labels: Any = None,
    subsamples: int = 50,
    seed: int = 0,
    device: torch.device | str | None = None,
    memory: str | int = "2GB",
    forward: Forward | None = None,
    input_key: str | None = None,
    label_key: str | None = None,
    progress: bool = True,
) -> LayerScores:
    """Score the layers of a model by the knowledge that their features hold.

    Parameters
    ----------
    model : torch.nn.Module
        The teacher; run in evaluation mode without gradients and left as it was.
    data : pair of tensors, map-style Dataset, DataLoader, or iterable of batches
        Images (or whatever the model takes) and labels. A batch is (inputs..., labels) or a
        mapping. An iterable is read once and its sampled inputs are kept.
    layers : sequence of str, optional
        Names of modules; by default what `candidate_layers` lists.
    measures : sequence of str
        What to compute; so far ``("knowledge_quality",)``.
    samples : int
        Most samples in all, equally many of every class; fewer where a class has fewer.
    entropy_per_class : int, optional
        Samples of every class for the entropy alone, streamed class by class (500 in the paper's
        analysis); by default the sample itself serves.
    dataset_size : number, optional
        N in the published efficiency; the length of the data by default.
    pool : {"flatten", "mean", "max", "cls", "published"}
        What is done to maps and tokens first; see `geomkd.pooling.pooled`.
    definition : {"published", "robust"}
        Definition of knowledge quality.
    labels : Tensor or ndarray, shape (N,), optional
        Labels in place of the data's own.
    subsamples : int
        Class-stratified half-samples behind rank sets and spreads; 0 turns them off.
    seed : int
        Seeds the sample and the half-samples.
    device : torch.device, optional
        Where to run; the model's own by default. The model is moved back afterwards.
    memory : str or int
        Bound of the growth of the process's memory, in bytes or as "2GB", "512MiB".
    forward : callable, optional
        ``forward(model, inputs)`` for models that are not simply called.
    input_key, label_key : str, optional
        Keys of inputs and labels in batches that are mappings ("labels" or "label", and everything
        else, by default).
    progress : bool
        Show a bar.

    Returns
    -------
    LayerScores
        One row a layer. After Ctrl-C the layers that were done, marked partial.

    Raises
    ------
    TypeError, ValueError
        What is wrong with the model, data, labels or an option; a layer's features are not finite;
        ``memory`` is too small (the message says what the least is).

    Warns
    -----
    UserWarning
        Feature rows of a layer that have no direction, once a layer with their number.

    Notes
    -----
    Layers are taken in groups that fit ``memory``, a forward pass each, ended after the group's
    last layer. A layer that does not fit by itself is taken in slices of its features.

    Under torchrun, or in a process group of the caller's, every process makes the same call, with
    a model of the same weights. The layers are shared out, ``memory`` bounds each process, and all
    return the scores of all layers: bit for bit those of one process with as many threads. What
    one process raises, all raise.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd import score_layers
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
    >>> scores = score_layers(model, (x, y), subsamples=0, progress=False)
    >>> list(scores.to_frame()["layer"])
    ['1', '2.input', '3']
    """
    if list(measures) != ["knowledge_quality"]:
        raise ValueError(f"measures must be ('knowledge_quality',); got {measures!r}")
    check_definition(definition), check_pool(pool), unwrap(model)
    seed = check_int(seed, "seed", least=0)
    subsamples = check_int(subsamples, "subsamples", least=0)
    budget = parse_bytes(memory)
    options = {"seed": seed, "labels": labels, "input_key": input_key, "label_key": label_key}
    with Share() as share:
        sample = Sample(data, samples, entropy_per_class=entropy_per_class, **options)
        size = check_dataset_size(
            max(sample.total, len(sample)) if dataset_size is None else dataset_size, len(sample)
        )
        share.settings = {
            "model": type(unwrap(model)).__name__,
            "definition": definition,
            "pool": pool,
            "samples": len(sample),
            "samples_per_class": [min(sample.classes.sizes), max(sample.classes.sizes)],
            "classes": len(sample.classes.sizes),
            "entropy_per_class": None if entropy_per_class is None else int(entropy_per_class),
            "dataset_size": size,
            "subsamples": subsamples,
            "seed": seed,
        }
        with evaluating(model), _on(model, device) as place:
            example = to_device(next(sample.batches(EXAMPLES)), place)
            if layers is None:
                chosen = candidate_layers(model, example, forward=forward)
            else:
                chosen = _described(model, layers, example, forward)
            reader = Reader(model, sample, forward, pool, place)
            stored = [reader.stored(layer, example) for layer in chosen]
            per_sample = forward_bytes(model, example, forward)
            plan = plan_of(stored, sample, budget, per_sample, halves=subsamples > 0)
            share.take(plan, sample)
            _Job(reader, share, size, definition, subsamples, seed).run(progress)
    return LayerScores.of(share.rows, share.settings)


def _described(
    model: nn.Module, names: Sequence[str], example: Any, forward: Forward | None
) -> list[Layer]:
    """Describe layers chosen by hand, in order of execution; role "head" after the head's input."""
    names = names if isinstance(names, str) else list(names)
    chosen = describe_layers(model, names, example, forward=forward)
    if not chosen or len(set(names)) < len(names):
        raise ValueError(f"layers must be names of layers, none of them twice; got {names}")
    try:
        offered = candidate_layers(model, example, forward=forward)
    except ValueError:  # neither a block nor an activation tells where the head begins
        offered = []
    head = next((layer.order for layer in offered if layer.role == "head_input"), float("inf"))
    return [
        replace(layer, role="head") if layer.role == "named" and layer.order > head else layer
        for layer in sorted(chosen, key=lambda layer: layer.order)
    ]


@dataclass
class _Job:
    """One process's run over its groups of layers."""

    reader: Reader
    share: Share
    dataset_size: float
    definition: str
    subsamples: int
    seed: int

    def run(self, progress: bool) -> None:
        """Add the rows of the layers to the share's, one after the other."""
        sample, plan = self.reader.sample, self.share.plan
        entropy = sum(sample.entropy_size(a) or 0 for a in range(len(sample.classes.sizes)))
        total = plan.passes * (len(sample) + entropy)
        hidden = not (progress and self.share.world.is_first)
        with tqdm(total=total, unit=" samples", disable=hidden, leave=False) as bar:
            self.reader.seen = bar.update
            for group in plan.groups:
                bar.set_description(group[0].layer.name)
                squares = self._entropy_grams(group)
                for stored, columns, scale in self._columns(group):
                    row = self._row(stored, columns, scale, squares[stored.layer.name])
                    self.share.rows.append(row)
                    del columns  # they hold the layer's features

    def _row(self, stored: Stored, columns: Columns, scale: float, squares: list[Tensor]) -> Row:
        classes = self.reader.sample.classes
        classes = classes._replace(index=classes.index.to(stored.device))
        try:
            gram = ClassGram.from_columns(columns, classes, stored.gram_dtype, scale)
        except ValueError as error:
            raise ValueError(f"layer {stored.layer.name!r}: {error}") from None
        return stored, *self._scores(stored, gram, squares)

    def _entropy_grams(self, group: list[Stored]) -> dict[str, list[Tensor]]:
        """Gram matrix of every class's larger sample, where one was asked for."""
        squares: dict[str, list[Tensor]] = {s.layer.name: [] for s in group}
        for a in range(len(self.reader.sample.classes.sizes)):
            m = self.reader.sample.entropy_size(a)
            if m is not None:
                for s, columns, scale in self._columns(group, a):
                    square = residual_gram(columns, m, s.gram_dtype, s.device)
                    squares[s.layer.name].append(square.div_(scale**2))
                    del columns
        return squares

    def _columns(
        self, group: list[Stored], a: int | None = None
    ) -> Iterator[tuple[Stored, Columns, float]]:
        """Yield each layer, its features by columns and their scale, of the sample or a class."""
        if group[0].layer.name in self.share.sliced:  # alone in its group
            yield group[0], lambda: self._sliced(group[0], a), 1.0
            return
        held = self.reader.read(group, self.share.plan.batch_size, a)
        for s in group:
            scale = _scale_of(held[s.layer.name])
            yield s, partial(column_slices, held.pop(s.layer.name), scale), scale

    def _sliced(self, s: Stored, a: int | None) -> Iterator[Tensor]:
        plan = self.share.plan
        for start in range(0, s.dim, plan.width):
            part = slice(start, start + plan.width)
            held = self.reader.read([s], plan.batch_size, a, part)
            yield from column_slices(held.pop(s.layer.name))

    def _scores(
        self, stored: Stored, gram: ClassGram, squares: list[Tensor]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        count, what = int(gram.zero_rows.sum()), "are zero"
        if self.definition == "robust":
            about = about_the_mean(gram, Draws.all_of(gram.classes.sizes, gram.device))
            count, what = int((about.inverse_norm == 0).sum()), "equal the mean of all rows"
        if count:
            warnings.warn(
                f"layer {stored.layer.name!r}: {count} of {gram.n} feature rows {what}: "
                "their cosines are taken as 0",
                stacklevel=5,
            )
        sizes = [len(square) for square in squares] or gram.classes.sizes

        def floor(a: int) -> Tensor:  # the larger samples' Gram matrices are not scaled
            return variance_floor(gram, a) / gram.scale**2

        def values(kind: str) -> dict[str, Tensor]:
            draws, of_entropy = (
                self._draws(kind, m, gram.device) for m in (gram.classes.sizes, sizes)
            )
            spectra = [
                spectrum_of(square, of_entropy, a, gram.dim, floor(a), gram.dtype)
                for a, square in enumerate(squares)
            ]
            return quality_from(
                gram, draws, self.dataset_size, self.definition, spectra=spectra or None
            )

        row = {name: value.item() for name, value in values("whole").items()}
        if not self.subsamples:
            return row, {name: [] for name in TERMS}
        drawn = values("halves")
        return row, {name: drawn[name].tolist() for name in TERMS}

    def _draws(self, kind: str, sizes: list[int], device: torch.device) -> Draws:
        if kind == "whole":
            return Draws.all_of(sizes, device)
        return Draws.halves(sizes, self.subsamples, self.seed, device)


def _scale_of(features: Tensor) -> float:
    """Power of two that brings features whose squares would leave float32 near 1; else 1."""
    low, high = torch.aminmax(features)
    top = max(-float(low), float(high))
    if not 0 < top < math.inf or 2.0**-20 < top < 2.0**20:
        return 1.0
    return 2.0 ** -max(-120, min(120, math.frexp(top)[1]))


class _on:
    """A model on a device for a while."""

    def __init__(self, model: nn.Module, device: torch.device | str | None) -> None:
        self.model = model
        first = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))
        self.own, self.device = first.device, first.device if device is None else device

    def __enter__(self) -> torch.device:
        self.device = torch.device(self.device)
        if self.device != self.own:
            self.model.to(self.device)
        return self.device

    def __exit__(self, *_: object) -> None:
        if self.device != self.own:
            self.model.to(self.own)
