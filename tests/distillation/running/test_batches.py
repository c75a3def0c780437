"""Data of every form, in an order of its own."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from small import CPU, PAIRS, blobs, mlp, run_mlp, same, state
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from geomkd.common.distributed import World
from geomkd.distillation import distill
from geomkd.distillation.running.batches import Batches
from geomkd.distillation.running.fingerprints import data_fingerprint
from geomkd.distillation.running.order import Order

# ---- data ----


def test_tensors_a_data_set_and_a_loader_give_the_same_student():
    x, y = blobs()
    data_set = TensorDataset(x, y)
    states = [
        state(run_mlp(train).student)
        for train in ((x, y), data_set, DataLoader(data_set, batch_size=3), (x.numpy(), y.numpy()))
    ]
    assert all(same(states[0], other) for other in states[1:])


def test_a_loaders_workers_and_collate_function_are_used():
    x, y = blobs()

    def doubled(items):
        x, y = torch.utils.data.default_collate(items)
        return 2 * x, y

    loader = DataLoader(TensorDataset(x, y), num_workers=1, collate_fn=doubled)
    assert same(
        state(run_mlp(loader, epochs=1).student), state(run_mlp((2 * x, y), epochs=1).student)
    )


class Dicts(Dataset):
    def __init__(self, more=()):
        self.x, self.y = blobs()
        self.more = dict(more)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input": self.x[i], "label": self.y[i], **self.more}


def test_batches_that_are_mappings():
    expected = state(run_mlp().student)
    assert same(expected, state(run_mlp(Dicts(), label_key="label").student))
    assert same(expected, state(run_mlp(Dicts()).student))
    keys = {"label_key": "label", "input_key": "input"}
    assert same(expected, state(run_mlp(Dicts({"other": 1}), **keys).student))

    def forward(model, batch):
        return model(batch["input"])

    more = Dicts({"other": 1})
    assert same(expected, state(run_mlp(more, label_key="label", forward=forward).student))


def one(data, order, **options):
    return Batches(data, order, device=CPU, **options)


def labels_of(batches, epoch=1, start=0):
    return [
        [y for batch in step for y in batch.labels.tolist()] for step in batches.steps(epoch, start)
    ]


def flat(lists):
    return list(chain.from_iterable(lists))


def numbered(n):
    return torch.arange(n)[:, None].float(), torch.arange(n)


def order_of(batch_size, **options):
    settings = {"seed": 0, "world": World(0, 1)} | options
    return lambda n: Order(n, batch_size, **settings)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 8, [3]), (3, 1, [1, 1, 1]), (8, 4, [4, 4])],
)
def test_a_last_batch_of_one_is_left_out_of_training_only(n, batch_size, sizes):
    batches = one(numbered(n), order_of(batch_size))
    assert [len(y) for y in labels_of(batches)] == sizes
    assert len(batches.order) == len(sizes) and batches.order.n_samples == sum(sizes)
    assert [batches.order.size_of_step(i) for i in range(1, len(sizes) + 1)] == sizes
    val = one(numbered(n), order_of(batch_size, shuffle=False))
    assert flat(labels_of(val)) == list(range(n))


def test_every_epoch_has_an_order_of_its_own():
    def epochs(seed):
        batches = one(numbered(10), order_of(4, seed=seed))
        return [flat(labels_of(batches, epoch)) for epoch in (1, 2)]

    first, second = epochs(0)
    assert first != second and sorted(first) == sorted(second) == list(range(10))
    assert epochs(0) == [first, second] and epochs(1) != [first, second]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_processes_share_the_batches_of_one_order(size, parts):
    whole = labels_of(one(numbered(26), order_of(12)))
    shares = [
        labels_of(one(numbered(26), order_of(12, world=World(rank, size), parts=parts)))
        for rank in range(size)
    ]
    assert [sorted(flat(step)) for step in zip(*shares, strict=True)] == [
        sorted(step) for step in whole[: len(shares[0])]
    ]
    assert shares[1][0] == whole[0][1::size]
    # 26 = 12 + 12 + 2: two samples are too few for two or three processes.
    assert len(whole) == 3 and {len(share) for share in shares} == {2}


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_shares_weigh_every_sample_alike(size, parts):
    batches = [
        one(numbered(23), order_of(16, world=World(rank, size), parts=parts))
        for rank in range(size)
    ]
    for steps in zip(*(b.steps(1) for b in batches), strict=True):
        n = sum(len(batch.index) for step in steps for batch in step)
        for step in steps:
            assert len(step) == len(steps[0])  # as many backward passes everywhere
            for batch in step:
                assert batch.share / size == pytest.approx(len(batch.index) / n)


def test_full_batches_leave_a_short_one_out():
    batches = one(numbered(19), order_of(8, full=True))
    assert [len(y) for y in labels_of(batches)] == [8, 8] and batches.order.n_samples == 16


class Drawing(Dataset):
    """Items that are what three global generators give."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()]), i  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_of_a_data_set_follow_seed_epoch_and_batch(workers):
    def inputs(epoch, start=0, seed=0, workers=workers):
        batches = one(DataLoader(Drawing(), num_workers=workers), order_of(4, seed=seed))
        return torch.cat([step[0].inputs for step in batches.steps(epoch, start)])

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = inputs(1)
    assert len(first.flatten().unique()) == 36
    assert torch.equal(first, inputs(1, workers=0))
    assert torch.equal(first[4:], inputs(1, start=1))
    assert not torch.equal(first, inputs(2)) and not torch.equal(first, inputs(1, seed=1))
    batches = one(Drawing(), order_of(4))
    assert torch.equal(batches.of([3], epoch=1), batches.of([3], epoch=1))
    assert not torch.equal(batches.of([3], epoch=1), batches.of([3], epoch=2))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_index_says_which_samples_a_batch_has():
    x, y = numbered(10)
    for data in ((x, y), TensorDataset(x, y)):
        for step in one(data, order_of(4, parts=2)).steps(1):
            for batch in step:
                assert batch.index == batch.labels.tolist() == batch.inputs[:, 0].int().tolist()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


NO_DATA = (
    "train: data must be a pair of tensors, a map-style Dataset or a DataLoader over one; got {}$"
)
NO_PAIR = r"train: data must be a pair \(inputs, labels\) of tensors; got \({}\)"


@pytest.mark.parametrize(
    ("train", "error", "text"),
    [
        (blobs()[0], TypeError, NO_DATA.format("Tensor")),
        (Stream(), TypeError, NO_DATA.format("Stream")),
        (DataLoader(Stream()), TypeError, NO_DATA.format("DataLoader of Stream")),
        (None, TypeError, NO_DATA.format("NoneType")),
        ([blobs()], TypeError, NO_DATA.format("list")),
        ((*blobs(), 1), TypeError, NO_PAIR.format("Tensor, Tensor, int")),
        (([[0.0]], [0]), TypeError, NO_PAIR.format("list, list")),
        (
            (torch.zeros(4), torch.arange(4)),
            ValueError,
            r"train: inputs must be \(n, ...\), ",
        ),
        ((torch.zeros(4, 6), torch.zeros(4)), TypeError, "train: 1-d labels must be integers"),
        (
            (torch.zeros(4, 6), torch.zeros(5, dtype=torch.long)),
            ValueError,
            "train: labels must be as many as the features, n = 4; got 5",
        ),
        (
            (torch.zeros(1, 6), torch.zeros(1, dtype=torch.long)),
            ValueError,
            "number of samples in train must be at least 2; got 1",
        ),
        (
            (torch.zeros(4, 6), torch.tensor([0, 1, 2, 3])),
            ValueError,
            r"train: labels must be 0 ... 2 for the student's 3 logits; got 0 ... 3",
        ),
        (
            (torch.zeros(4, 6), torch.tensor([0, 1, 2, -1])),
            ValueError,
            r"train: labels must be 0 ... 2 .*; got -1 ... 2",
        ),
        (
            TensorDataset(torch.zeros(4, 6)),
            ValueError,
            r"train: a batch must be \(inputs, labels\); got 1 item",
        ),
        (
            DataLoader(Dicts(), batch_size=None),
            TypeError,
            NO_DATA.format("DataLoader of Dicts with batch_size=None"),
        ),
    ],
)
def test_training_data_is_checked_before_training(train, error, text):
    student = mlp()
    before = state(student)
    with pytest.raises(error, match=text):
        distill(student, mlp((6, 32, 32, 3)), train, pairs=PAIRS, progress=False)
    assert same(before, student.state_dict())


def test_validation_data_is_checked_before_training():
    student = mlp()
    before = state(student)
    with pytest.raises(ValueError, match=r"val: labels must be 0 ... 2"):
        run_mlp(student=student, val=(torch.zeros(4, 6), torch.tensor([0, 1, 2, 3])))
    assert same(before, student.state_dict())


def test_labels_that_a_data_set_keeps_are_checked_before_training():
    data_set = Dicts()
    data_set.targets = [0] * (len(data_set) - 1) + [7]
    with pytest.raises(ValueError, match=r"got 0 ... 7"):
        run_mlp(data_set)
    x, y = blobs()
    with pytest.raises(ValueError, match=r"train: labels must be 0 ... 2 .*; got 1 ... 3"):
        run_mlp(TensorDataset(x, y + 1))


def test_labels_that_come_later_are_checked_as_they_come():
    later = Dicts()
    later.y = later.y + 1
    with pytest.raises(ValueError, match=r"train: labels must be 0 ... 2 .*; got 1 ... 3"):
        run_mlp(later)


# ---- labels that are probabilities ----


def soft(y, n_classes=3, keep=0.8):
    return keep * torch.eye(n_classes)[y] + (1 - keep) / n_classes


@pytest.mark.parametrize("objective", ["ce", "features"])
def test_probabilities_reach_the_cross_entropy_as_they_are(objective):
    x, y = blobs()
    options = {"objective": objective, "epochs": 1, "batch_size": len(x), "lr": 1e-12}
    with torch.no_grad():
        logits = mlp()(x)
    expected = -(soft(y) * logits.log_softmax(1)).sum(1).mean().item()
    for train in ((x, soft(y)), (x, soft(y).double().numpy()), TensorDataset(x, soft(y).half())):
        row = run_mlp(train, student=mlp(), val=(x, soft(y)), **options).history.iloc[0]
        assert row["cross_entropy"] == pytest.approx(expected, rel=1e-3)
        right = (logits.argmax(1) == y).float().mean().item()
        assert row["train_accuracy"] == pytest.approx(right) == row["val_accuracy"]


def test_one_hot_rows_train_as_integers_do():
    x, y = blobs()
    first = state(run_mlp((x, y), epochs=2).student)
    for rows in (torch.eye(3)[y], torch.eye(3, dtype=torch.bool)[y]):
        other = run_mlp((x, rows), epochs=2).student.state_dict()
        assert all(torch.allclose(first[name], other[name], atol=1e-5) for name in first)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (lambda y: soft(y, 4), "train: rows of labels must be as long as the student's 3 logits"),
        (lambda y: torch.ones(len(y), 3), "train: labels must be .*got 3 ones"),
        (lambda y: torch.randn(len(y), 3), "train: labels must be .*got scores"),
        (lambda y: torch.where(y == 0, -100, y), "train: labels must be classes; got -100"),
    ],
)
@pytest.mark.parametrize("form", [lambda x, y: (x, y), TensorDataset])
def test_rows_that_are_no_probabilities_are_refused(rows, text, form):
    x, y = blobs()
    with pytest.raises(ValueError, match=text):
        run_mlp(form(x, rows(y)))


# ---- samplers ----


def test_a_subset_sampler_trains_on_its_samples():
    x, y = blobs()
    far = TensorDataset(torch.cat([x, torch.full_like(x, 1e6)]), torch.cat([y, y]))
    loader = DataLoader(far, sampler=SubsetRandomSampler(torch.randperm(len(x)).tolist()))
    first = state(run_mlp((x, y)).student)
    for train in (loader, Subset(far, range(len(x)))):
        assert same(first, state(run_mlp(train, val=loader).student))
    with pytest.raises(ValueError, match=r"train: .*got WeightedRandomSampler"):
        run_mlp(DataLoader(far, sampler=WeightedRandomSampler([1.0] * len(far), 9)))


def test_fingerprints_tell_samplers_apart():
    data = TensorDataset(torch.zeros(100, 6), torch.zeros(100, dtype=torch.long))

    def of(rows):
        loader = DataLoader(data, sampler=SubsetRandomSampler(rows))
        return data_fingerprint(one(loader, order_of(4)))

    rows = list(range(40))
    assert of(rows) == of(rows[::-1])
    assert of(rows) != of([*rows[:20], *range(21, 41)])
