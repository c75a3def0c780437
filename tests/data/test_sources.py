"""Sources: which form data has, and what is taken out of a batch or a data set."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from geomkd.data.sample import Sample
from geomkd.data.sources import (
    Items,
    Stream,
    Tensors,
    can_be_read_again,
    collated,
    inputs_of,
    item_of,
    labels_kept_by,
    source_of,
    split,
    to_device,
    unpack,
)

N, CLASSES = 60, 3
X = torch.arange(N * 2.0).reshape(N, 2)
Y = torch.arange(N) % CLASSES


class WithTargets(Dataset):
    def __init__(self, kept):
        self.targets = kept

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Endless(IterableDataset):
    """Has what a map-style data set has, and is none."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i]

    def __iter__(self):
        yield from zip(X, Y, strict=True)


class PairOfTensors(Dataset, tuple):
    """A data set that is a tuple too."""

    def __getitem__(self, i):
        return X[i], int(Y[i])


def worker(number):
    pass


LOADER = DataLoader(
    WithTargets(Y), batch_size=7, num_workers=1, worker_init_fn=worker, collate_fn=list
)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ((X, Y), Tensors),
        ([X.numpy(), Y.numpy()], Tensors),
        (TensorDataset(X, Y), Items),
        (PairOfTensors((X, Y)), Items),
        (Subset(WithTargets(None), range(9)), Items),
        (LOADER, Items),
        ([(X, Y)], Stream),
        (zip(X, Y, strict=True), Stream),
        (Endless(), Stream),
        (DataLoader(Endless()), Stream),
        (DataLoader(WithTargets(Y), batch_size=None), Stream),
    ],
)
def test_form_of_data(data, kind):
    assert type(source_of(data)) is kind
    assert can_be_read_again(data) == (kind is not Stream)
    if kind is Stream:
        with pytest.raises(TypeError, match="map-style Dataset or a DataLoader over one; got "):
            source_of(data, streams=False)
    else:
        assert type(source_of(data, streams=False)) is kind


def test_a_loader_lends_its_workers_and_its_collate_function():
    source = source_of(LOADER)
    assert source.dataset is LOADER.dataset and source.collate is list
    loader = source.loader(3, batch_size=5)
    assert loader.dataset is LOADER.dataset and loader.collate_fn is list
    assert (loader.num_workers, loader.worker_init_fn) == (1, worker)
    assert loader.batch_size == 5 and loader.generator.initial_seed() == 3
    plain = source_of(LOADER.dataset).loader(3)
    assert (plain.num_workers, plain.worker_init_fn) == (0, None)
    assert plain.collate_fn is collated


def test_inputs_alone_where_labels_do_not_matter():
    for data in (X, X.numpy(), (X, Y.float())):
        assert torch.equal(torch.as_tensor(source_of(data, labelled=False).inputs), X)
    with pytest.raises(TypeError, match="got Tensor"):
        source_of(X)
    with pytest.raises(ValueError, match=r"of one length .* got 60 and 9"):
        source_of((X, Y[:9]), labelled=False)
    assert [y for _, y in source_of([(X[:3], Y[:3])], labelled=False)] == [[0] * 3]


def test_labels_are_known_or_read():
    assert torch.equal(source_of((X, Y)).known_labels(), Y)
    assert torch.equal(source_of(WithTargets(Y)).known_labels(), Y)
    unknown = source_of(WithTargets(None))
    assert unknown.known_labels() is None
    assert torch.equal(unknown.labels(), Y)


@pytest.mark.parametrize(
    "kept",
    [
        None,
        [str(y) for y in Y.tolist()],
        Y[:-1],
        Y.float(),
        torch.eye(CLASSES)[Y],
        [[1], [2, 3]],
        [{"boxes": 1}] * N,
        [],
        "targets",
    ],
)
def test_labels_that_are_not_surely_the_given_ones_are_not_used(kept):
    data = WithTargets(kept)
    assert labels_kept_by(data) is None
    assert Sample(data, 12, seed=0).classes.sizes == [4, 4, 4]
    assert labels_kept_by(Subset(data, [0, 1])) is None
    assert labels_kept_by(ConcatDataset([WithTargets(Y), data])) is None


def test_target_transform_makes_kept_labels_unsure():
    data = WithTargets(Y + 7)
    data.target_transform = lambda y: y - 7
    assert labels_kept_by(data) is None
    assert Sample(data, 12, seed=0).classes.names == [0, 1, 2]


def test_labels_of_a_subset_are_the_subsets():
    rows = [5, 3, 9, 0]
    assert labels_kept_by(Subset(WithTargets(Y), rows)).tolist() == Y[rows].tolist()
    nested = Subset(Subset(WithTargets(Y), rows), range(2))
    assert labels_kept_by(nested).tolist() == Y[[5, 3]].tolist()


# ---- samplers ----


class Reversed(SequentialSampler):
    pass


ROWS = [40, 3, 17, 8, 29, 5, 0, 13]
SAMPLERS = {
    "subset": (SubsetRandomSampler(ROWS), sorted(ROWS)),
    "subset of a tensor": (SubsetRandomSampler(torch.tensor(ROWS)), sorted(ROWS)),
    "sequential": (SequentialSampler(Y), list(range(N))),
    "sequential over fewer": (SequentialSampler(range(9)), list(range(9))),
    "random": (RandomSampler(Y), list(range(N))),
    "random over fewer": (RandomSampler(range(9), num_samples=9), list(range(9))),
}
REFUSED = {
    "weighted": (WeightedRandomSampler([1.0] * N, N), "WeightedRandomSampler"),
    "replaced": (RandomSampler(Y, replacement=True), "RandomSampler with replacement= or num_"),
    "some": (RandomSampler(Y, num_samples=9), "RandomSampler with replacement= or num_samples="),
    "distributed": (DistributedSampler(Y, num_replicas=2, rank=0), "DistributedSampler"),
    "own class": (Reversed(Y), "Reversed"),
    "list": (ROWS, "list"),
}


def loaders(sampler):
    """The two ways to hand a sampler over."""
    data = WithTargets(Y)
    yield DataLoader(data, batch_size=4, sampler=sampler, drop_last=True)
    yield DataLoader(data, batch_sampler=BatchSampler(sampler, 7, drop_last=False))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_says_which_samples_count(name):
    sampler, rows = SAMPLERS[name]
    for loader in loaders(sampler):
        source = source_of(loader)
        assert source.total == len(rows)
        assert torch.equal(source.labels(), Y[rows])
        read = torch.cat(list(source.read(torch.arange(len(rows)), 3, 0)))
        assert torch.equal(read, X[rows])
        sample = Sample(loader, 6, seed=0)
        assert sample.total == len(rows)
        assert torch.equal(Y[rows][sample.indices], sample.classes.index)


def test_a_sampler_of_a_subset_counts_within_it():
    data = Subset(WithTargets(Y), range(10, 40))
    source = source_of(DataLoader(data, sampler=SubsetRandomSampler([20, 1, 2])))
    assert torch.equal(source.labels(), Y[[11, 12, 30]])
    assert torch.equal(next(source.read(torch.arange(3), 3, 0)), X[[11, 12, 30]])


@pytest.mark.parametrize("name", REFUSED)
def test_other_samplers_are_refused_by_name(name):
    sampler, shown = REFUSED[name]
    words = f"SubsetRandomSampler; got {shown}.*: give the data set, or a Subset of what counts"
    for loader in loaders(sampler):
        with pytest.raises(ValueError, match=words):
            source_of(loader)


@pytest.mark.parametrize("own", [[[0, 1], [2, 3]], BatchSampler])
def test_other_batch_samplers_are_refused_by_name(own):
    kind = list
    if own is BatchSampler:
        kind = type("ByClass", (BatchSampler,), {})
        own = kind(SequentialSampler(Y), 4, drop_last=False)
    with pytest.raises(ValueError, match=f"got {kind.__name__}: give the data set"):
        source_of(DataLoader(WithTargets(Y), batch_sampler=own))


# ---- batches -------------------------------------------------------------------------------------


def test_split_checks_the_labels():
    inputs, labels = split([X, Y.tolist()], (None, None))
    assert inputs is X and torch.equal(labels, Y)
    assert split({"x": X, "y": np.eye(3)[Y]}, ("x", "y"))[1].tolist() == Y.tolist()
    with pytest.raises(TypeError, match="1-d labels must be integers; got float32"):
        split((X, Y.float()), (None, None))
    with pytest.raises(ValueError, match=r"must give batches; got one sample \(use a DataLoader"):
        split((X[0], 3), (None, None))
    tags = default_collate([(X[0], [0, 1, 0]), (X[1], [1, 0, 0])])  # turned round: three pairs
    with pytest.raises(ValueError, match="must be tensors; got a list of tensors a batch"):
        split(tags, (None, None))
    with pytest.raises(ValueError, match="2 ones"):
        split((X[:2], [[1, 1, 0], [0, 1, 0]]), (None, None))


def test_inputs_of_batches_without_labels():
    assert inputs_of(X, None, None) is X
    assert inputs_of([X], None, None) is X
    assert inputs_of((X, Y), None, None) is X
    batch = {"x": X, "mask": Y}
    assert inputs_of(batch, None, None) is batch
    assert inputs_of(batch, "x", None) is X
    with pytest.raises(ValueError, match="label_key must be one of"):
        inputs_of(batch, "x", "label")


def test_item_of_is_a_copy():
    item = item_of({"x": X, "pair": (Y.numpy(), ["a"] * N), "names": ["b"] * N}, 4)
    assert item["x"].tolist() == X[4].tolist() and item["x"].data_ptr() != X[4].data_ptr()
    assert item["pair"] == (1, "a") and item["names"] == "b"
    assert isinstance(item["pair"][0], torch.Tensor)


def test_unpack():
    assert unpack(("x", "y"), None, None) == ("x", "y")
    assert unpack(["x", "m", "y"], None, None) == (("x", "m"), "y")
    assert unpack({"x": 1, "m": 2, "label": 3}, None, None) == ({"x": 1, "m": 2}, 3)
    assert unpack({"x": 1, "m": 2, "label": 3}, "x", "m") == (1, 2)


def test_to_device_keeps_structure():
    Pair = namedtuple("Pair", "x rest")
    value = Pair(torch.ones(2), {"a": [torch.ones(1), "text"], "b": (None,)})
    moved = to_device(value, torch.device("meta"))
    assert isinstance(moved, Pair) and moved.x.is_meta and moved.rest["a"][0].is_meta
    assert moved.rest["a"][1] == "text" and moved.rest["b"] == (None,)


@pytest.mark.parametrize("n_labels", [2, 8])
def test_batches_of_an_iterable_have_as_many_labels_as_inputs(n_labels):
    source = source_of(iter([(torch.zeros(4, 3), torch.arange(n_labels))]))
    text = rf"^a batch has as many labels as inputs; got {n_labels} and \[\(4, 3\)\]$"
    with pytest.raises(ValueError, match=text):
        list(source)
