"""The sample: every form of data, balance, seeds, and what every pass sees."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from geomkd.data.sample import ENDLESS, Sample, read_as_given

N, CLASSES = 60, 3
X = torch.arange(N * 2.0).reshape(N, 2)  # X[i, 0] == 2 i says which sample a row is
Y = torch.arange(N) % CLASSES


class Items(Dataset):
    """Samples one by one, labels of any type, without a list of them."""

    def __init__(self, x=X, y=Y, label=int):
        self.x, self.y, self.label, self.read = x, y, label, []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        self.read.append(i)
        return self.x[i], self.label(self.y[i])


class WithTargets(Items):
    def __init__(self, kept, name="targets", **options):
        super().__init__(**options)
        setattr(self, name, kept)


class Noisy(Items):
    """A transform that draws from global states: torch's, as torchvision's do, and two others."""

    def __getitem__(self, i):
        draws = np.random.rand() + random.random()  # noqa: NPY002
        return self.x[i] + torch.rand(2) + draws, int(self.y[i])


class Dicts(Items):
    def __init__(self, label_key="labels", **options):
        super().__init__(**options)
        self.label_key = label_key

    def __getitem__(self, i):
        return {"x": self.x[i], "mask": torch.ones(2), self.label_key: int(self.y[i])}


class Stream(IterableDataset):
    """Samples one by one in order; a length that must not make it a map-style data set."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return N

    def __iter__(self):
        self.passes += 1
        yield from zip(X, Y.tolist(), strict=True)


def doubled(items):
    x, y = default_collate(items)
    return 2 * x, y


def batches(size=7, x=X, y=Y):
    return list(zip(x.split(size), y.split(size), strict=True))


def rows_of(sample, batch_size=8, **options):
    return torch.cat([batch[:, 0] for batch in sample.batches(batch_size, **options)]) / 2


MAP_STYLE = {
    "tensors": lambda: (X, Y),
    "list pair": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "mixed": lambda: (X, Y.numpy().astype(np.uint8)),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Python ints": lambda: Items(label=int),
    "NumPy ints": lambda: Items(label=lambda y: np.int32(y.item())),
    "0-d tensors": lambda: Items(label=lambda y: y),
    "one-hot items": lambda: Items(label=lambda y: torch.eye(CLASSES)[y]),
    "targets list": lambda: WithTargets(Y.tolist()),
    "targets list of tensors": lambda: WithTargets(list(Y)),
    "targets tuple": lambda: WithTargets(tuple(Y.tolist())),
    "labels array": lambda: WithTargets(Y.numpy(), "labels"),
    "targets tensor": lambda: WithTargets(Y),
    "Subset": lambda: Subset(WithTargets(Y.tolist()), range(N)),
    "Subset without targets": lambda: Subset(Items(), list(range(N))),
    "ConcatDataset": lambda: ConcatDataset(
        [
            Subset(WithTargets(Y), torch.arange(20)),
            Subset(WithTargets(Y.numpy(), "labels"), np.arange(20, N)),
        ]
    ),
    "ConcatDataset without targets": lambda: ConcatDataset(
        [Subset(Items(), range(20)), Subset(WithTargets(Y), range(20, N))]
    ),
    "DataLoader": lambda: DataLoader(Items(), batch_size=7, shuffle=True, drop_last=True),
    "dict items": lambda: Dicts(),
}


@pytest.mark.parametrize("form", MAP_STYLE)
def test_every_map_style_form_gives_the_same_sample(form):
    keys = {"input_key": "x"} if form == "dict items" else {}
    sample = Sample(MAP_STYLE[form](), 12, seed=3, **keys)
    expected = Sample((X, Y), 12, seed=3)
    assert sample.total == N and len(sample) == 12
    assert sample.kept_bytes == 0
    assert torch.equal(sample.indices, expected.indices)
    assert sample.classes.sizes == [4, 4, 4] and sample.classes.names == [0, 1, 2]
    assert torch.equal(sample.classes.index, Y[sample.indices])
    assert torch.equal(rows_of(sample), sample.indices.float())


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_gives_its_collate_function_and_workers(workers):
    loader = DataLoader(Items(), batch_size=5, collate_fn=doubled, num_workers=workers)
    sample = Sample(loader, 12, seed=0)
    for _ in range(2):
        read = list(sample.batches(5))
        assert [len(batch) for batch in read] == [5, 5, 2]
        assert torch.equal(torch.cat(read), 2 * X[sample.indices])


ITERABLE = {
    "list": lambda: batches(),
    "generator": lambda: (batch for batch in batches()),
    "arrays": lambda: [(x.numpy(), y.numpy()) for x, y in batches()],
    "labels as lists": lambda: [(x, y.tolist()) for x, y in batches()],
    "labels as lists of tensors": lambda: [(x, list(y)) for x, y in batches()],
    "lists": lambda: [[x, y] for x, y in batches()],
    "loader of an IterableDataset": lambda: DataLoader(Stream(), batch_size=9),
    "loader without batches": lambda: DataLoader(batches(), batch_size=None),
}


@pytest.mark.parametrize("form", ITERABLE)
def test_every_iterable_gives_a_balanced_sample(form):
    sample = Sample(ITERABLE[form](), 12, seed=3)
    rows = rows_of(sample)
    assert sample.total == N and len(sample) == 12
    assert sample.classes.sizes == [4, 4, 4]
    assert torch.equal(Y[rows.long()], sample.classes.index)
    assert rows.unique().tolist() == rows.tolist()  # none twice, in the order of the data
    assert sample.kept_bytes == 12 * X[0].nbytes
    assert torch.equal(rows_of(sample), rows)


def test_iterable_is_read_exactly_once():
    stream = Stream()
    sample = Sample(DataLoader(stream, batch_size=9), 12, seed=0, entropy_per_class=6)
    for _ in range(3):
        rows_of(sample)
        rows_of(sample, of_class=1)
    assert stream.passes == 1


def endless(batch):
    while True:
        yield batch


@pytest.mark.parametrize("rows", [7, 1, 0])
def test_an_endless_iterable_is_given_up(rows):
    with pytest.raises(ValueError, match=f"more than {ENDLESS} x samples = 1200 .*islice"):
        Sample(endless((X[:rows], Y[:rows])), 12, seed=0)
    with pytest.raises(ValueError, match="does not end"):
        Sample(endless(X[:rows]), 12, seed=0, labelled=False)


def test_a_long_iterable_is_read_to_its_end():
    data = [(X, Y)] * (ENDLESS * 12 // N)
    assert Sample(data, 12, seed=0).total == ENDLESS * 12


def test_choice_from_an_iterable_is_uniform():
    counts = torch.zeros(N)
    for seed in range(300):
        counts[rows_of(Sample(batches(), 12, seed=seed)).long()] += 1
    # Each of 20 samples of a class is taken with probability 1/5: 60 +- 7 times of 300.
    assert counts.min() > 30 and counts.max() < 90
    halves = counts.reshape(2, -1).sum(dim=1)
    assert abs(halves[0] - halves[1]) < 300


def test_iterable_sorted_by_class_keeps_no_more_than_the_sample():
    order = Y.argsort(stable=True)
    sample = Sample(batches(x=X[order], y=Y[order]), 12, seed=0)
    assert sample.classes.sizes == [4, 4, 4]
    assert sample.kept_bytes == 12 * X[0].nbytes


@pytest.mark.parametrize("form", [*MAP_STYLE, *ITERABLE])
def test_seed_decides_the_sample(form):
    keys = {"input_key": "x"} if form == "dict items" else {}
    make = (MAP_STYLE | ITERABLE)[form]
    first, again, other = (
        rows_of(Sample(make(), 12, seed=seed, **keys)).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_unequal_classes_give_what_they_have():
    y = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    for data in ((X, y), batches(y=y)):
        sample = Sample(data, 30, seed=0)
        assert sample.classes.sizes == [10, 10, 5]
        assert len(sample) == 25


def test_samples_that_do_not_divide_are_rounded_down():
    assert Sample((X, Y), 14, seed=0).classes.sizes == [4, 4, 4]


def test_more_samples_than_there_are_takes_all():
    assert rows_of(Sample((X, Y), 5000, seed=0)).tolist() == list(range(N))


@pytest.mark.parametrize("make", [lambda: (X, Y), batches, Items])
@pytest.mark.parametrize("most", [2, 10, 500])
def test_entropy_sample_is_nested(make, most):
    sample = Sample(make(), 12, seed=0, entropy_per_class=most)
    own = set(rows_of(sample).tolist())
    for a in range(CLASSES):
        rows = rows_of(sample, of_class=a).tolist()
        assert len(rows) == sample.entropy_size(a) == min(most, 20)
        assert all(row % CLASSES == a for row in rows)
        mine = {row for row in own if row % CLASSES == a}
        assert mine <= set(rows) if most >= 4 else set(rows) <= mine
    assert Sample(make(), 12, seed=0).entropy_size(0) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pass_sees_the_same_images(workers):
    data = DataLoader(Noisy(), batch_size=4, num_workers=workers)
    sample = Sample(data, 12, seed=5, entropy_per_class=6)
    first = torch.cat(list(sample.batches(4)))
    assert torch.equal(torch.cat(list(sample.batches(4))), first)
    assert len((first - X[sample.indices]).unique()) == first.numel()
    of_class = torch.cat(list(sample.batches(4, of_class=1)))
    assert torch.equal(torch.cat(list(sample.batches(4, of_class=1))), of_class)
    if not workers:  # workers share the batches out, so that their draws depend on the batch size
        assert torch.equal(torch.cat(list(sample.batches(5))), first)
    other = torch.cat(list(Sample(data, 12, seed=6).batches(4)))
    assert not torch.equal(other, first)


def test_draws_between_batches_do_not_reach_the_transform():
    sample = Sample(Noisy(), 12, seed=5)
    first = torch.cat(list(sample.batches(4)))
    again = []
    for batch in sample.batches(4):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        again.append(batch)
    assert torch.equal(torch.cat(again), first)


def test_global_random_states_are_untouched():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.rand(3).tolist()  # noqa: NPY002

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = states()
    np.random.seed(1)  # noqa: NPY002
    for data in (Noisy(), DataLoader(Noisy(), num_workers=1), batches(), (X, Y)):
        sample = Sample(data, 12, seed=0, entropy_per_class=5)
        list(sample.batches(4))
        list(sample.batches(4, of_class=0))
        next(sample.batches(4))  # a pass that is given up
    assert states() == before


def test_labels_in_place_of_the_datas_own():
    other = Y.roll(1) + 5
    data = Items()
    sample = Sample(data, 12, seed=0, labels=other)
    assert sample.classes.names == [5, 6, 7]
    assert data.read == []
    assert torch.equal(other[sample.indices], sample.classes.index + 5)
    one_hot = Sample((X, Y), 12, seed=0, labels=torch.eye(CLASSES)[Y].numpy())
    assert torch.equal(one_hot.indices, Sample((X, Y), 12, seed=0).indices)


def test_labels_that_are_kept_are_not_read_one_by_one():
    data = WithTargets(Y.tolist())
    Sample(Subset(data, range(30)), 12, seed=0)
    assert data.read == []
    data = Items()
    Sample(data, 12, seed=0)
    assert data.read == list(range(N))


# ---- labels that a data set keeps ----


class Kept(Items):
    """Keeps labels that are those of its items, but for some samples."""

    def __init__(self, wrong=(), name="targets", **options):
        super().__init__(**options)
        kept = self.y.clone()
        kept[list(wrong)] = (kept[list(wrong)] + 1) % CLASSES
        setattr(self, name, kept)


def classes_of(data, **options):
    """Class and samples as items give them, in a sample that has been read."""

    def act(believe):
        sample = Sample(data, 12, seed=3, believe=believe, **options)
        rows = rows_of(sample)
        for a in range(CLASSES):
            list(sample.batches(4, of_class=a) if options.get("entropy_per_class") else ())
        return sample, rows

    return read_as_given(act, stacklevel=2)


WRONG = {
    "targets": lambda: Kept(range(N)),
    "labels": lambda: Kept(range(N), "labels"),
    "Subset": lambda: Subset(Kept(range(N)), range(N)),
    "ConcatDataset": lambda: ConcatDataset(
        [Kept(range(20), y=Y[:20], x=X[:20]), Kept(x=X[20:], y=Y[20:])]
    ),
    "DataLoader": lambda: DataLoader(Kept(range(N)), batch_size=7, num_workers=1),
    "sampler": lambda: DataLoader(Kept(range(N)), sampler=SubsetRandomSampler(range(N))),
    "one-hot items": lambda: Kept(range(N), label=lambda y: torch.eye(CLASSES)[y]),
}


@pytest.mark.parametrize("form", WRONG)
def test_labels_that_items_give_count(form):
    with pytest.warns(UserWarning, match=r"sample \d+ of the data set has label \d") as caught:
        sample, rows = classes_of(WRONG[form]())
    assert len(caught) == 1
    expected = Sample((X, Y), 12, seed=3)
    assert torch.equal(sample.indices, expected.indices)
    assert torch.equal(sample.classes.index, expected.classes.index)
    assert torch.equal(rows, sample.indices.float())


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_single_item_tells(place):
    wrong = int(Sample((X, Y), 12, seed=3).indices[place])
    y = Y.clone()
    y[wrong] = (y[wrong] + 1) % CLASSES  # chosen by the kept labels, which are of Y
    data = WithTargets(Y, y=y)
    words = (
        rf"sample {wrong} of .* has label {y[wrong]}, but its .targets or .labels say {Y[wrong]}"
    )
    with pytest.warns(UserWarning, match=words):
        sample, _ = classes_of(data)
    assert torch.equal(sample.classes.index, y[sample.indices])


def test_items_of_the_entropy_are_held_against_their_labels_too():
    own, more = Sample((X, Y), 12, seed=3), Sample((X, Y), 12, seed=3, entropy_per_class=20)
    rest = [i for i in range(N) if i not in own.indices.tolist()]
    assert more.entropy_size(0) == 20
    with pytest.warns(UserWarning, match=f"sample {rest[0]} of"):
        sample, _ = classes_of(Kept(rest[:1]), entropy_per_class=20)
    assert torch.equal(sample.classes.index, Y[sample.indices])


def test_kept_labels_that_are_right_or_have_nothing_beside_them_are_used():
    class Bare(WithTargets):
        def __getitem__(self, i):
            return super().__getitem__(i)[0]

    for data in (WithTargets(Y), Bare(Y), Dicts(), TensorDataset(X, Y)):
        keys = {"input_key": "x"} if isinstance(data, Dicts) else {}
        sample, _ = classes_of(data, **keys)
        assert torch.equal(sample.indices, Sample((X, Y), 12, seed=3).indices)


@pytest.mark.parametrize("kept", [torch.arange(N), torch.zeros(N).long(), torch.full((N,), -100)])
def test_kept_labels_that_would_not_do_are_held_against_the_items_first(kept):
    with pytest.warns(UserWarning, match="sample [013] of"):
        sample, _ = classes_of(WithTargets(kept))
    assert torch.equal(sample.classes.index, Y[sample.indices])
    data = WithTargets(kept, y=kept)
    with pytest.raises(ValueError, match=r"at least 2|got -100"):
        classes_of(data)


def test_items_whose_labels_are_no_classes_are_refused():
    tags = WithTargets(Y, label=lambda y: torch.tensor([1, 1, 0]))
    with pytest.raises(ValueError, match="got 2 ones"):
        classes_of(tags)
    sample = Sample(tags, 12, seed=3, labels=Y)  # given ones are not held against the items
    assert len(rows_of(sample)) == 12


# ---- batches -------------------------------------------------------------------------------------


def test_dict_items_with_default_keys():
    sample = Sample(Dicts(), 12, seed=0)
    batch = next(sample.batches(5))
    assert list(batch) == ["x", "mask"]
    assert torch.equal(batch["x"], X[sample.indices[:5]])
    sample = Sample(Dicts("label"), 12, seed=0)
    assert list(next(sample.batches(5))) == ["x", "mask"]


def test_dict_items_with_given_keys():
    sample = Sample(Dicts("fine"), 12, seed=0, input_key="x", label_key="fine")
    assert torch.equal(next(sample.batches(5)), X[sample.indices[:5]])


def test_dict_batches_of_an_iterable():
    data = [{"x": x, "name": ["a"] * len(y), "labels": y} for x, y in batches()]
    sample = Sample(data, 12, seed=0)
    batch = next(sample.batches(5))
    assert batch["x"].shape == (5, 2) and batch["name"] == ["a"] * 5
    assert sample.kept_bytes == 12 * X[0].nbytes
    sample = Sample(data, 12, seed=0, input_key="x")
    assert torch.equal(Y[rows_of(sample).long()], sample.classes.index)


def test_tuples_of_three():
    mask = torch.ones(N, 2)
    for data in (
        TensorDataset(X, mask, Y),
        [(x, torch.ones(len(y), 2), y) for x, y in batches()],
        [((x, torch.ones(len(y), 2)), y) for x, y in batches()],
    ):
        sample = Sample(data, 12, seed=0)
        x, ones = next(sample.batches(5))
        assert torch.equal(Y[(x[:, 0] / 2).long()], sample.classes.index[:5])
        assert torch.equal(ones, mask[:5])


def test_ragged_tokens_of_an_iterable_are_not_stacked():
    tokens = [(torch.full((4, length), length), torch.arange(4) % 2) for length in (3, 3, 5, 3)]
    sample = Sample(tokens, 16, seed=0)
    shapes = [tuple(batch.shape) for batch in sample.batches(5)]
    assert shapes == [(5, 3), (3, 3), (4, 5), (4, 3)]
    dicts = [{"ids": x, "labels": y} for x, y in tokens]
    assert [len(b["ids"]) for b in Sample(dicts, 16, seed=0).batches(5)] == [5, 3, 4, 4]


def test_one_hot_labels():
    scores = torch.eye(CLASSES)[Y]
    expected = Sample((X, Y), 12, seed=0).indices
    assert torch.equal(Sample((X, scores), 12, seed=0).indices, expected)
    assert Sample(batches(y=scores), 12, seed=0).classes.sizes == [4, 4, 4]


def test_labels_keep_their_names():
    y = torch.tensor([-5, 10**9, 3])[Y]
    assert Sample((X, y), 12, seed=0).classes.names == [-5, 3, 10**9]


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda y: (X, y), lambda y: batches(y=y), lambda y: Items(y=y)])
def test_class_of_one_sample_is_named(make):
    y = Y.clone()
    y[7] = 42
    with pytest.raises(
        ValueError, match=r"every class needs at least 2 samples; got 1 of class 42"
    ):
        Sample(make(y), 16, seed=0)


def test_one_class():
    with pytest.raises(
        ValueError, match=r"at least 2 classes are needed; the labels hold 1: \[0\]"
    ):
        Sample((X, torch.zeros(N, dtype=torch.long)), 12, seed=0)


def test_samples_too_small():
    with pytest.raises(
        ValueError, match="samples must be at least 2 for each of the 3 classes; got 5"
    ):
        Sample((X, Y), 5, seed=0)
    with pytest.raises(
        ValueError, match="samples must be at least 2 for each of the 3 classes; got 5"
    ):
        Sample(batches(), 5, seed=0)
    with pytest.raises(ValueError, match="samples must be at least 4; got 3"):
        Sample((X, Y), 3, seed=0)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"samples": 12.0}, TypeError, "samples must be an integer; got float 12.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"seed": "a"}, TypeError, "seed must be an integer; got str 'a'"),
        ({"entropy_per_class": 1}, ValueError, "entropy_per_class must be at least 2; got 1"),
        ({"labels": Y[:9]}, ValueError, "labels must be as many as the features, n = 60; got 9"),
        ({"labels": Y.tolist()}, TypeError, "labels must be a torch.Tensor or a numpy.ndarray"),
    ],
)
def test_option_errors(options, error, text):
    with pytest.raises(error, match=text):
        Sample((X, Y), **({"samples": 12, "seed": 0} | options))


NO_DATA = (
    "data must be a pair of tensors, a map-style Dataset, a DataLoader or an iterable of batches; "
    "got {}"
)
NO_PAIR = r"data must be a pair \(inputs, labels\) of tensors; got \({}\)"


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (X, TypeError, NO_DATA.format("Tensor")),
        ({"x": X, "y": Y}, ValueError, r"label_key must be one of .*\['x', 'y'\]; got None"),
        ("data", TypeError, NO_DATA.format("str")),
        (5, TypeError, NO_DATA.format("int")),
        ((X, Y.tolist()), TypeError, NO_PAIR.format("Tensor, list")),
        ((X, X, Y), TypeError, NO_PAIR.format("Tensor, Tensor, Tensor")),
        ((X,), TypeError, NO_PAIR.format("Tensor")),
        ((), TypeError, NO_PAIR.format("")),
        ([], TypeError, NO_PAIR.format("")),
        ((torch.tensor(1.0), Y), ValueError, r"inputs must be \(n, ...\); got shape \(\)"),
        ((X[:0], Y[:0]), ValueError, r"inputs must be \(n, ...\); got shape \(0, 2\)"),
        ((X, Y[:9]), ValueError, "labels must be as many as the features, n = 60; got 9"),
        ((X, Y.float()), TypeError, "1-d labels must be integers; got float32"),
        (Subset(Items(), []), ValueError, "the data set is empty"),
        (iter([]), ValueError, "the data holds no batch"),
        (iter([(X[0], 0)]), ValueError, r"must give batches; got one sample \(use a DataLoader\)"),
        (Stream(), ValueError, r"must give batches; got one sample \(use a DataLoader\)"),
        ([X, X, Y], TypeError, NO_PAIR.format("Tensor, Tensor, Tensor")),
        (iter([X]), TypeError, r"a batch must be \(inputs, labels\) or a mapping; got Tensor"),
        (iter([(X,)]), ValueError, r"a batch must be \(inputs, labels\); got 1 item"),
        (
            Items(label=str),
            TypeError,
            "labels must hold numbers torch knows; got a NumPy array of dtype <U",
        ),
        (
            [(X[:2], ["a", "b"])],
            TypeError,
            "labels must hold numbers torch knows; got a NumPy array of dtype <U1",
        ),
    ],
)
def test_data_errors(data, error, text):
    with pytest.raises(error, match=text):
        Sample(data, 12, seed=0)


def test_labels_of_an_iterable_cannot_be_given():
    with pytest.raises(ValueError, match="labels= needs data of known length"):
        Sample(batches(), 12, seed=0, labels=Y)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (
            {"label_key": "y"},
            r"label_key must be one of the batch's keys \['mask', 'target', 'x'\]; got 'y'",
        ),
        ({"input_key": "x"}, r"label_key must be one of the batch's keys \[.*\]; got None"),
        ({"input_key": "z", "label_key": "target"}, r"input_key must be one of .*; got 'z'"),
    ],
)
def test_missing_keys(keys, text):
    with pytest.raises(ValueError, match=text):
        Sample(Dicts("target"), 12, seed=0, **keys)


def test_collate_function_that_drops_samples():
    loader = DataLoader(Items(), collate_fn=lambda items: default_collate(items[1:] or items))
    with pytest.raises(ValueError, match="labels must be as many as the features, n = 60; got 59"):
        Sample(loader, 12, seed=0)
