"""score_layers: from a model and data to one row of scores a layer, within a bound of memory."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from geomkd.common.checks import about, check_dataset_size, check_definition, check_int, check_names
from geomkd.common.progress import Bar, bar_of
from geomkd.data.sample import Sample, read_as_given
from geomkd.geometry.columns import Columns, column_slices, residual_gram
from geomkd.geometry.draws import SampleDraws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import one_thread, scale_of
from geomkd.geometry.principal import SubsetGram
from geomkd.measures.null import check_null
from geomkd.measures.table import named
from geomkd.network.forward import Forward, counting, evaluating, on_device, tensors_in, unwrap
from geomkd.network.layers import survey
from geomkd.network.masks import check_class_token, warn_of_padding
from geomkd.scoring.arguments import example_of, label_options, predicted, sampling_of, warn_of_few
from geomkd.scoring.feature_reader import Reader
from geomkd.scoring.layer_measures import LayerMeasures, check_sweep
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.plan import BATCH, Stored, parse_bytes, plan_of
from geomkd.scoring.processes import Share, together
from geomkd.scoring.rows import Row, scores_of
from geomkd.scoring.settings import Settings

SMALL_RUN = 2e10  # multiplications, about a second: beside a busy process, threads waited for many


def score_layers(
    model: nn.Module,
    data: Any,
    layers: Sequence[str] | None = None,
    *,
    granularity: str = "blocks",
    measures: Sequence[str | Callable[[Tensor, Tensor], Any]] = ("knowledge_quality",),
    samples: int = 5000,
    entropy_per_class: int | None = None,
    dataset_size: float | None = None,
    pool: str | None = None,
    center: bool = True,
    definition: str = "published",
    protocol: str | None = None,
    labels: Any = None,
    subsamples: int = 50,
    sweep: Sequence[int] = (),
    null: int = 0,
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
        mapping, and so may all of the data be; a list of samples is a Dataset. An iterable is read
        once and its sampled inputs are kept; beyond 100 * ``samples`` samples it is taken for
        endless, an error. Of a DataLoader what its sampler gives counts, if that is each sample, or
        each of a subset, once; other samplers are refused.
    layers : sequence of str, optional
        Names of modules, or patterns such as ``"encoder.layer.*"``, matched part by part; by
        default what `candidate_layers` lists.
    granularity : {"blocks", "stages"}
        Of the layers by default, as in `candidate_layers`.
    measures : sequence of str and callable
        "knowledge_quality", other names or functions of `geomkd.measures`; "cka_to_last", `cka`
        with the head's input or else the last layer; and functions of ((n, d) features, (n,)
        labels) that return a number, under their own names.
    samples : int
        Most samples in all, equally many of every class; fewer where a class has fewer.
    entropy_per_class : int, optional
        Samples of every class for the entropy alone, streamed class by class (500 in the paper's
        analysis); by default the sample itself serves.
    dataset_size : number, optional
        N in the published efficiency; the length of the data by default.
    pool : {"flatten", "mean", "max", "cls", "last", "published"}, optional
        What is done to maps, tokens and sequences first; see `geomkd.network.pooling.pooled`. By
        default "flatten". What an ``attention_mask`` among the inputs marks as padding counts
        nowhere (of a decoder, its ``decoder_attention_mask``: without one, all its tokens count);
        "flatten" needs as many tokens in all samples. "cls" is refused where a model shows
        that no class token is in front, see `geomkd.network.masks.check_class_token`.
    center : bool
        Whether pca_dimension, spectral_entropy, effective_rank and power_law_alpha are of the
        features about their mean; all others are as their own pages say.
    definition : {"published", "robust"}
        Definition of knowledge quality.
    protocol : {"paper"}, optional
        All of the published sampling: ``samples=5000``, ``entropy_per_class=500``,
        ``pool="published"``, ``definition="published"``. Without it the default is none of the
        entropy's own samples and no pooling, and Q is not the paper's.
    labels : Tensor or ndarray, shape (N,), or {"predicted", "none"}, optional
        Labels in place of the data's own, in its order; the model's own largest output for all of
        the data, read once more for it (classes of a single sample are left out); or none, for
        measures that need none. With any of these the data need have no labels: a tensor of inputs
        will do.
    subsamples : int
        Class-stratified half-samples behind rank sets and spreads; 0 turns them off.
    sweep : sequence of int
        Sizes of smaller samples, each within the next, whose scores are kept beside: whether the
        order of the layers has settled. See `LayerScores.settling`.
    null : int
        Permutations of the labels that supervised measures are held against; adds the columns
        ``<score>_null_mean``, ``_null_95`` (NaN below 19), ``_excess`` and ``_p_value``, see
        `geomkd.measures.WithNull`. Knowledge quality costs as much again for each of them.
    seed : int
        Seeds the sample, the half-samples, splits and permutations.
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
        A class of fewer than 25 samples, where a measure needs classes (by default 1,000 classes
        have five each). Feature rows of a layer that have no direction or equal another, once a
        layer with their number. A data set's ``.targets`` or ``.labels`` that are not what its
        items give; those count. Padding that no mask tells from tokens.

    Notes
    -----
    Layers are taken in groups that fit ``memory``, a forward pass each, ended after the group's
    last layer. A layer that does not fit by itself is taken in slices of its features.

    Neighbours and distances are those of the whole sample. Spectra, transfer scores, the probe,
    neural_collapse and cka_to_last are of a subset of it, the same at most 1,000 samples of every
    layer (``subset`` in the settings), whose Gram matrices stay with the scores; their half-samples
    and smaller samples are drawn within it.

    Before each batch torch, NumPy and ``random`` are seeded. A model that draws from them even in
    evaluation mode (a masked autoencoder) is run in batches of 16 samples, so that ``seed`` gives
    one result in any ``memory``.

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
    >>> layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    >>> model = nn.Sequential(*layers)
    >>> x, y = torch.randn(90, 8), torch.arange(90) % 3
    >>> scores = score_layers(model, (x, y), subsamples=0, progress=False)
    >>> list(scores.to_frame()["layer"])
    ['1', '3']
    """
    wanted = named(measures)
    check_definition(definition), unwrap(model)
    seed = check_int(seed, "seed", least=0)
    subsamples = check_int(subsamples, "subsamples", least=0)
    null = check_null(null, stacklevel=3)
    if not isinstance(center, bool):
        raise TypeError(f"center must be True or False; got {center!r}")
    entropy_per_class, pool = sampling_of(
        protocol, entropy_per_class, pool, samples, definition, beside=(null, sweep)
    )
    names = None if layers is None else check_names(layers, "layers")
    budget = parse_bytes(memory)
    keys = {"input_key": input_key, "label_key": label_key}

    def act(share: Share, believe: bool) -> None:
        with evaluating(model), on_device(model, device) as place:
            known = label_options(
                labels, wanted, lambda: predicted(model, data, place, forward, seed, **keys)
            )
            options = {"seed": seed, "entropy_per_class": entropy_per_class, "believe": believe}
            sample = Sample(data, samples, **options, **known, **keys)
            n, sizes, index = len(sample), sample.classes.sizes, sample.classes.index
            size = max(sample.total, n) if dataset_size is None else dataset_size
            size = check_dataset_size(size, n)
            smaller = check_sweep(sweep, n, len(sizes))
            draws = SampleDraws(index, sizes, subsamples, seed, smaller)
            given = torch.tensor(sample.classes.names)[index]
            scored = LayerMeasures(wanted, draws, given, definition, size, null, center)
            own = labels if isinstance(labels, str) else "own" if labels is None else "given"
            made = {"model": type(unwrap(model)).__name__, "measures": tuple(wanted), "labels": own}
            made |= {"definition": definition, "pool": pool, "center": center, "samples": n}
            made |= {"samples_per_class": (min(sizes), max(sizes)), "classes": len(sizes)}
            made |= {"subset": len(draws.rows), "class_labels": tuple(sample.classes.names)}
            made["subset_classes"] = tuple(index[draws.rows].tolist())
            most = None if entropy_per_class is None else int(entropy_per_class)
            made |= {"entropy_per_class": most, "dataset_size": size, "subsamples": subsamples}
            made |= {"sweep": tuple(smaller), "null": null, "seed": seed, "protocol": protocol}
            share.settings = Settings(**made)
            example, more = example_of(sample, place), sample.batches(BATCH)
            with one_thread(), counting(model) as counts:
                found = survey(model, example, names, granularity=granularity, forward=forward)
            chosen = sorted(found.layers, key=lambda layer: layer.order)
            if pool == "cls":
                check_class_token(model, chosen, example, forward)
            with told_of("", stacklevel=8) as notes:
                mask = warn_of_padding(model, chosen, example, more, stacklevel=6)
            share.settings = replace(share.settings, notes=tuple(notes))
            stored = [Stored.of(layer, pool, mask) for layer in chosen]
            more = scored.bytes(max(s.dim for s in stored), len(stored))
            options = {"halves": subsamples > 0, "draws": found.draws, "more": more}
            share.take(plan_of(stored, sample, budget, found.sample_bytes, **options), sample)
            each = sum(counts) / len(next(tensors_in(example))) + n / 2 * sum(s.dim for s in stored)
            with one_thread(n * each < SMALL_RUN):
                _Job(Reader(model, sample, forward, pool, place), share, scored).run(progress)

    # Every pass reads the same items: where labels differ, no layer has been scored yet.
    found = together(lambda share: read_as_given(partial(act, share), stacklevel=5))
    warn_of_few(found[1], samples, stacklevel=3)  # not before: labels may have been others
    return scores_of(*found)


@dataclass
class _Job:
    """One process's run over its groups of layers."""

    reader: Reader
    share: Share
    measures: LayerMeasures
    bar: Bar | None = None

    def run(self, progress: bool) -> None:
        """Add the rows of the layers to the share's, one after the other."""
        with self._bar(progress) as self.bar:
            for group in self.share.plan.groups:
                self.bar.set_description(f"reading {group[0].layer.name}", refresh=False)
                squares = self._entropy_grams(group)
                for stored, *features in self._columns(group):
                    self.bar.set_description(f"scoring {stored.layer.name}", refresh=False)
                    row = self._row(stored, *features, squares[stored.layer.name])
                    self.share.rows.append(row)
                    del features  # they hold the layer's

    def _bar(self, progress: bool) -> Bar:
        """Bar of the multiplications, roughly, of all forward passes and of all layers' scores."""
        sample, plan = self.reader.sample, self.share.plan
        layers = [s for group in plan.groups for s in group]
        last = ("map_last", "tokens")  # where channels are; a weight is used at each position
        uses = [s.layer.dim // s.layer.shape[-(s.layer.kind in last)] for s in layers]
        parameters = sum(p.numel() for p in self.reader.model.parameters())
        each = 1 + round(parameters * geometric_mean(uses or [1]))
        self.reader.seen = lambda count: self.bar.update(count * each)
        total = plan.passes * (len(sample) + sum(sample.entropy_sizes)) * each
        total += sum(self.measures.work(s.dim) for s in layers)
        form = "{l_bar}{bar}| [{elapsed}<{remaining}]"
        return bar_of(total, "score_layers", show=progress, bar_format=form)

    def _row(
        self,
        stored: Stored,
        columns: Columns,
        scale: float,
        features: Tensor | None,
        squares: list[Tensor],
    ) -> Row:
        draws = self.measures.draws.to(stored.device)
        classes = self.reader.sample.classes._replace(index=draws.index)
        subset, work, move = SubsetGram(draws.rows, scale), self.measures.work, self.bar.update
        subset.seen = lambda width: move(work(width, more=False))
        with about(f"layer {stored.layer.name!r}"):
            read = subset.watching(columns)
            gram = ClassGram.from_columns(read, classes, stored.gram_dtype, scale)
            with told_of(f"layer {stored.layer.name!r}: ", stacklevel=10) as notes:
                scored = self.measures.of(gram, subset, features, squares)
            move(work(0))
            return Row(stored, *scored, subset.packed(), tuple(notes))

    def _entropy_grams(self, group: list[Stored]) -> dict[str, list[Tensor]]:
        """Gram matrix of every class's larger sample, where one was asked for."""
        squares: dict[str, list[Tensor]] = {s.layer.name: [] for s in group}
        for a in range(len(self.reader.sample.classes.sizes)):
            m = self.reader.sample.entropy_size(a)
            if m is not None:
                for s, columns, scale, _ in self._columns(group, a):
                    square = residual_gram(columns, m, s.gram_dtype, s.device)
                    squares[s.layer.name].append(square.div_(scale**2))
                    del columns
        return squares

    def _columns(
        self, group: list[Stored], a: int | None = None
    ) -> Iterator[tuple[Stored, Columns, float, Tensor | None]]:
        """Yield each layer, its features by columns, their scale, and themselves if at hand."""
        if group[0].layer.name in self.share.sliced:  # alone in its group
            yield group[0], lambda: self._sliced(group[0], a), 1.0, None
            return
        held = self.reader.read(group, self.share.plan.batch_size, a)
        for s in group:
            features = held.pop(s.layer.name)
            scale = float(scale_of(features))
            yield s, partial(column_slices, features, scale), scale, features

    def _sliced(self, s: Stored, a: int | None) -> Iterator[Tensor]:
        plan = self.share.plan
        for start in range(0, s.dim, plan.width):
            part = slice(start, start + plan.width)
            held = self.reader.read([s], plan.batch_size, a, part)
            yield from column_slices(held.pop(s.layer.name))


@contextmanager
def told_of(whose: str, stacklevel: int) -> Iterator[list[str]]:
    """Say in every warning whose it is; give it to the caller of `score_layers`, and its words."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for warning in caught:
        notes.append(f"{whose}{warning.message}")
        warnings.warn(notes[-1], warning.category, stacklevel=stacklevel)
