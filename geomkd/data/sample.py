"""A class-balanced, seeded sample of a data set, read as often as the layers need it."""

import copy
import warnings
from bisect import insort
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from geomkd.common.checks import Classes, as_classes, as_labels, check_int
from geomkd.common.randomness import generator_options, nested
from geomkd.data.sources import Items, LabelsDiffer, Stream, item_of, source_of
from geomkd.network.forward import tensors_in

Found = TypeVar("Found")
ENDLESS = 100  # times ``samples``: where an iterable has given so many, it is taken for endless


class Sample:
    """At most ``samples`` samples of a data set, equally many of every class where it has them.

    Parameters
    ----------
    data : pair of tensors, map-style Dataset, DataLoader, or iterable of batches
        Inputs and labels; a batch is (inputs..., labels) or a mapping. An iterable is given up
        where it goes on beyond ``ENDLESS * samples`` samples.
    samples : int
        Most samples in all: ``samples // C`` of each of C classes.
    seed : int
        Seeds the choice, and whatever a data set's transforms draw from torch, NumPy or ``random``,
        so that every pass sees the same inputs.
    entropy_per_class : int, optional
        Most samples of a class in ``batches(of_class=)``, which begin with those in the sample.
    labels : Tensor or ndarray, shape (N,), optional
        Labels to use in place of the data's own, which need have none.
    labelled, believe, lonely : bool
        False for a uniform sample, all of one class, of data that need have no labels; not to
        choose it by labels that a data set keeps (see `read_as_given`); to leave out a class of a
        single sample, which else is an error.
    input_key, label_key : str, optional
        Where inputs and labels are in batches that are mappings. Without ``label_key`` "labels" or
        "label"; without ``input_key`` everything but the labels is the input.

    Attributes
    ----------
    classes : Classes
        Class index, sizes and names of the sample, in the order in which `batches` reads it.
    total, kept_bytes : int
        Samples in the data; memory that holds sampled inputs, where they can be read only once.
    """

    def __init__(
        self,
        data: Any,
        samples: int,
        *,
        seed: int,
        entropy_per_class: int | None = None,
        labels: Any = None,
        labelled: bool = True,
        believe: bool = True,
        lonely: bool = True,
        input_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        self.seed = check_int(seed, "seed", least=0)
        samples = check_int(samples, "samples", least=4)
        if entropy_per_class is not None:
            check_int(entropy_per_class, "entropy_per_class", least=2)
        own = labelled and labels is None
        source = source_of(data, (input_key, label_key), labelled=own)
        if isinstance(source, Stream):
            if labels is not None:
                raise ValueError("labels= needs data of known length; an iterable has its own")
            source = _kept(source, samples, entropy_per_class or 0, seed)
        self._source, self.total, self.kept_bytes = source, source.total, source.kept_bytes
        if not labelled:
            known = torch.zeros(self.total, dtype=torch.int64)
        else:
            known = source.labels(believe=believe) if own else as_labels(labels, self.total)
        try:
            self._choose(known.cpu(), samples, entropy_per_class, labelled, lonely)
        except ValueError:  # of labels that are kept, but may not be those of the items
            if own and isinstance(source, Items):
                source.check_believed(seed)
            raise

    def _choose(
        self, known: Tensor, samples: int, per_class: int | None, labelled: bool, lonely: bool
    ) -> None:
        _, index, counts = known.unique(return_inverse=True, return_counts=True)
        shuffled = nested(index, counts.tolist(), self.seed)  # the indices of every class
        chosen = [rows for rows in shuffled if lonely or len(rows) > 1]
        if not chosen:
            raise ValueError(f"every class holds a single sample; got {self.total} samples")
        share = samples // len(chosen)
        if share < 2:
            raise ValueError(
                f"samples must be at least 2 for each of the {len(chosen)} classes; got {samples}"
            )
        self.indices = torch.cat([rows[:share] for rows in chosen]).sort().values
        known = known[self.indices]
        self.classes = as_classes(known) if labelled else Classes(known, [len(known)], [0])
        self._of_class = None
        if per_class is not None:
            self._of_class = [rows[:per_class].sort().values for rows in chosen]

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, batch_size: int, *, of_class: int | None = None) -> Iterator[Any]:
        """Yield inputs of the sample, or of the larger sample of one class, in their order."""
        indices = self.indices if of_class is None else self._of_class[of_class]
        yield from self._source.read(indices, batch_size, self.seed)

    def taken(self, places: Tensor) -> Self:
        """Return some of the samples, in the order of their places."""
        other, index = copy.copy(self), self.classes.index[places]
        sizes = index.bincount(minlength=len(self.classes.sizes)).tolist()
        other.indices = self.indices[places]
        other.classes = self.classes._replace(index=index, sizes=sizes)
        return other

    @property
    def entropy_sizes(self) -> list[int]:
        """Samples of every class for its entropy; 0 where the sample itself serves."""
        return [self.entropy_size(a) or 0 for a in range(len(self.classes.sizes))]

    def entropy_size(self, a: int) -> int | None:
        """Count class ``a``'s samples for its entropy; None where the sample itself serves."""
        return None if self._of_class is None else len(self._of_class[a])


def read_as_given(act: Callable[[bool], Found], *, stacklevel: int) -> Found:
    """Act on a sample by the labels that are kept (``believe``); again where items give others."""
    try:
        return act(True)
    except LabelsDiffer as differ:
        warnings.warn(str(differ), stacklevel=stacklevel)
    return act(False)


class Kept:
    """Inputs that were kept while a stream was read."""

    def __init__(self, inputs: list[Any], labels: Tensor, total: int) -> None:
        self.inputs, self.targets, self.total = inputs, labels, total
        self.kept_bytes = sum(tensor.nbytes for item in inputs for tensor in tensors_in(item))

    def labels(self, *, believe: bool = True) -> Tensor:
        """Labels of the kept samples."""
        return self.targets

    def read(self, indices: Tensor, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield kept inputs; a batch ends early where the next sample has another shape."""
        waiting, waiting_shapes = [], None
        for item in (self.inputs[i] for i in indices.tolist()):
            # Token batches of an iterable may differ in length: such are not stacked.
            shapes = [tensor.shape for tensor in tensors_in(item)]
            if waiting and (len(waiting) == batch_size or shapes != waiting_shapes):
                yield default_collate(waiting)
                waiting = []
            waiting.append(item)
            waiting_shapes = shapes
        if waiting:
            yield default_collate(waiting)


def _kept(stream: Stream, samples: int, per_class: int, seed: int) -> Kept:
    """Read a stream; keep a uniform choice of every class, fewer as classes appear."""
    uniform = generator_options(seed) | {"dtype": torch.float64}
    held: dict[int, list[tuple[float, int, Any]]] = {}
    total = 0
    for number, (inputs, labels) in enumerate(stream):
        if max(total, number) > ENDLESS * samples:  # batches may be empty
            raise ValueError(
                f"the iterable has given more than {ENDLESS} x samples = {ENDLESS * samples} "
                "samples or batches and does not end: end it (itertools.islice), or raise samples="
            )
        for i, label in enumerate(labels):
            key = torch.rand((), **uniform).item()
            if label not in held:
                held[label] = []
                most = max(per_class, samples // len(held), 2)
                for rows in held.values():
                    del rows[most:]
            rows = held[label]
            if len(rows) < most or key < rows[-1][0]:
                insort(rows, (key, total, item_of(inputs, i)), key=itemgetter(0))
            del rows[most:]
            total += 1
    if not total:
        raise ValueError("the data holds no batch")
    rows = [(place, item, label) for label, rows in held.items() for _, place, item in rows]
    chosen = sorted(rows, key=itemgetter(0))
    return Kept([row[1] for row in chosen], torch.tensor([row[2] for row in chosen]), total)
