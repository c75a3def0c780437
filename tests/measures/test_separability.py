"""Separability against scikit-learn and plain numpy, and what noise scores."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import clusters
from sklearn.metrics import silhouette_samples, silhouette_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from geomkd.geometry.draws import Draws, held_out
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import Neighbours
from geomkd.geometry.row_blocks import sums_over_classes, sums_over_labels, walk
from geomkd.measures import fisher_ratio, knn_accuracy, nearest_class_mean, silhouette
from geomkd.measures.collapse import fisher_ratio_from, ratio
from geomkd.measures.separability import (
    NearestMeans,
    Silhouettes,
    drawn_knn_accuracy,
)

UNEQUAL = np.repeat([0, 1, 2, 3], [3, 31, 16, 70])
MEASURES = (fisher_ratio, knn_accuracy, nearest_class_mean, silhouette)
every = pytest.mark.parametrize("measure", MEASURES, ids=lambda f: f.__name__)


def sample(kind="unequal", d=10, *, sep=0.6, seed=0):
    """120 float64 rows in four classes, not sorted by class."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(UNEQUAL) if kind == "unequal" else np.arange(120) % 4
    return sep * rng.standard_normal((4, d))[y] + rng.standard_normal((120, d)), y


def value(measure, x, y, **options):
    found = measure(x, torch.as_tensor(y), **options)
    assert (found.shape, found.dtype) == ((), torch.float64)
    return found.item()


samples = pytest.mark.parametrize("kind", ["equal", "unequal"])


# ---- k nearest neighbours ------------------------------------------------------------------------


def leave_one_out(x, y, k):
    """Vote of the k nearest others, no more than a class has mates; the lowest of equals."""
    k = min(k, len(y) // (y.max() + 1) - 1)
    at = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(x).kneighbors(None)[1]
    votes = np.stack([(y[at] == a).sum(axis=1) for a in range(y.max() + 1)], axis=1)
    return (votes.argmax(axis=1) == y).mean()


@samples
@pytest.mark.parametrize("k", [1, 2, 15, 60, 119])
@pytest.mark.parametrize("d", [2, 10, 200])
def test_knn_accuracy(kind, k, d):
    x, y = sample(kind, d)
    assert value(knn_accuracy, x, y, k=k) == pytest.approx(leave_one_out(x, y, k))


def test_knn_accuracy_of_a_classifier():
    """scikit-learn's own vote, refitted without each row; 15 is the default."""
    x, y = sample(d=4)
    hits = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        model = KNeighborsClassifier(15, algorithm="kd_tree").fit(x[rest], y[rest])
        hits.append(model.predict(x[i : i + 1])[0] == y[i])
    assert value(knn_accuracy, x, y) == pytest.approx(np.mean(hits))


def test_knn_accuracy_counts_equal_rows_of_another_class():
    """Pairs of equal rows with unlike labels: the nearest is always wrong."""
    x = np.random.default_rng(0).standard_normal((40, 5)).repeat(2, axis=0)
    assert value(knn_accuracy, x, np.arange(80) % 2, k=1) == 0


def test_knn_accuracy_in_tight_groups():
    """Classes a thousandth of the groups' distance apart, in float32."""
    rng = np.random.default_rng(0)
    group, y = np.arange(240) % 3, np.arange(240) // 3 % 2
    x = 100 * rng.standard_normal((3, 20))[group] + 0.1 * rng.standard_normal((2, 20))[y]
    x = (x + 0.01 * rng.standard_normal((240, 20))).astype(np.float32)
    assert value(knn_accuracy, x, y) == 1


def test_votes():
    """Six rows of two classes, three mates at most; rows outside the draw do not vote."""
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    at = torch.tensor([[1, 3, 4], [3, 4, 0], [0, 3, 1], [4, 0, 1], [0, 1, 5], [2, 4, 3]])
    near = Neighbours(torch.ones(6, 3, dtype=torch.float64), at)
    drawn = torch.ones(6, 1, dtype=torch.bool)
    # Two voters, 6 // 2 - 1: 0 1, 1 1, 0 1, 1 0, 0 0, 0 1; of equal votes the lowest.
    gram = SimpleNamespace(class_of=index, n_classes=2)
    assert drawn_knn_accuracy(gram, near, drawn).tolist() == [2 / 6]
    near.sq_distance[5, 0] = torch.inf  # no neighbour: 1 1 are left
    assert drawn_knn_accuracy(gram, near, drawn).tolist() == [3 / 6]
    drawn[0] = False  # one voter, 5 // 2 - 1: -, 1, 1, 1, 0, 1, the first that is drawn
    assert drawn_knn_accuracy(gram, near, drawn).tolist() == [2 / 5]


@pytest.mark.parametrize("classes", [40, 100, 200])
def test_knn_accuracy_of_few_mates(classes):
    """Classes far apart are found whatever their number, by each row's own few mates."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % classes
    x = 5 * rng.standard_normal((classes, 64))[y] + 0.1 * rng.standard_normal((400, 64))
    assert value(knn_accuracy, x, y) == 1


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k must be at least 1; got 0"),
        (120, ValueError, "k must be less than n = 120; got 120"),
        (1.0, TypeError, "k must be an integer; got float 1.0"),
    ],
)
def test_number_of_neighbours(k, error, message):
    x, y = sample()
    with pytest.raises(error, match=message):
        knn_accuracy(x, torch.from_numpy(y), k=k)


# ---- silhouette ----------------------------------------------------------------------------------


@samples
@pytest.mark.parametrize("d", [1, 10, 300])
def test_silhouette(kind, d):
    x, y = sample(kind, d)
    assert value(silhouette, x, y) == pytest.approx(silhouette_score(x, y), rel=1e-9)
    single = value(silhouette, x.astype(np.float32), y)
    assert single == pytest.approx(silhouette_score(x.astype(np.float32), y), rel=1e-4, abs=1e-6)


def test_silhouette_of_many_rows():
    """More than a block, in float32."""
    x, y = clusters(1100, 20, 7, sep=0.5)
    assert value(silhouette, x, y) == pytest.approx(silhouette_score(x, y), rel=1e-5)


def test_silhouette_by_hand():
    x, y = np.array([[0.0], [1.0], [4.0], [6.0]]), np.array([0, 0, 1, 1])
    each = [1 - 1 / 5, 1 - 1 / 4, 1 - 2 / 3.5, 1 - 2 / 5.5]
    assert value(silhouette, x, y) == pytest.approx(np.mean(each))


def test_silhouettes_of_subsets():
    """Each column a subset of its own, with classes of one row and classes that are not there."""
    x, y = sample()
    gram = ClassGram.of(torch.from_numpy(x), torch.from_numpy(y))
    order, rng = gram.order.numpy(), np.random.default_rng(1)
    member = rng.random((120, 3)) < [0.7, 0.4, 1.0]
    rare = np.flatnonzero(y[order] == 0)
    member[rare[1:], 0], member[rare[0], 0] = False, True  # alone: 0, as in scikit-learn
    member[rare, 1] = True
    weights = torch.from_numpy(member).double()
    own = gram.class_of.unsqueeze(1)
    expected = [silhouette_samples(x[order][m], y[order][m]).mean() for m in member.T]
    for sums in (
        sums_over_classes(gram, weights),
        sums_over_labels(own.expand(-1, 3), weights, 4),
    ):
        reader = Silhouettes(own, weights, 4, sums)
        walk(gram, [reader])
        assert reader.found().tolist() == pytest.approx(expected, rel=1e-9)


def test_a_class_outside_a_subset_is_no_neighbour():
    x, y = sample()
    gram = ClassGram.of(torch.from_numpy(x), torch.from_numpy(y))
    weights = (gram.class_of != 2).double().unsqueeze(1)
    own = gram.class_of.unsqueeze(1)
    reader = Silhouettes(own, weights, 4, sums_over_classes(gram, weights))
    walk(gram, [reader])
    rest = y != 2
    assert reader.found().item() == pytest.approx(silhouette_score(x[rest], y[rest]), rel=1e-9)


def test_silhouette_of_collapsed_classes():
    y = np.arange(60) % 3
    assert value(silhouette, np.eye(3, dtype=np.float32)[y], y) == 1
    assert value(silhouette, np.ones((60, 4), dtype=np.float32), y) == 0


# ---- nearest class mean --------------------------------------------------------------------------


def judged(x, y, train, test):
    means = np.stack([x[train & (y == a)].mean(axis=0) for a in range(y.max() + 1)])
    distance = ((x[:, None] - means) ** 2).sum(axis=2)
    return (distance.argmin(axis=1) == y)[test].mean()


def split_of(y, share, seed):
    masks = held_out(torch.from_numpy(y), y.max() + 1, share, seed)
    return [mask.numpy() for mask in masks]


@samples
@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("d", [2, 10, 300])
def test_nearest_class_mean(kind, share, d):
    x, y = sample(kind, d, sep=0.3)
    for seed in (0, 5):
        expected = judged(x, y, *split_of(y, share, seed))
        assert value(nearest_class_mean, x, y, test_share=share, seed=seed) == expected
    default = judged(x, y, *split_of(y, 0.3, 0))
    assert value(nearest_class_mean, x, y) == default


def test_nearest_means_of_splits():
    x, y = sample()
    gram = ClassGram.of(torch.from_numpy(x), torch.from_numpy(y))
    splits = [split_of(y, share, seed) for share, seed in ((0.3, 0), (0.5, 1), (0.3, 2))]
    train, test = (
        torch.from_numpy(np.stack([masks[i] for masks in splits], axis=1))[gram.order]
        for i in (0, 1)
    )
    reader = NearestMeans(gram, train, test)
    walk(gram, [reader])
    expected = [judged(x, y, *masks) for masks in splits]
    assert reader.found().tolist() == pytest.approx(expected)


def test_nearest_class_mean_of_unequal_means():
    """The norm of the mean counts: the nearer of 0 and 10 to 4 is 0, by dot product it is 10."""
    x = np.array([[0.0], [0.0], [0.0], [4.0], [10.0], [10.0], [10.0], [10.0]])
    y = np.repeat([0, 1], 4)
    assert {value(nearest_class_mean, x, y, seed=seed) for seed in range(6)} == {1.0}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2])
def test_share_out_of_range(share):
    x, y = sample()
    with pytest.raises(ValueError, match=f"test_share must be between 0 and 1; got {share}"):
        nearest_class_mean(x, torch.from_numpy(y), test_share=share)


# ---- scatter -------------------------------------------------------------------------------------


def scatter(x, y):
    within = sum(((x[y == a] - x[y == a].mean(axis=0)) ** 2).sum() for a in np.unique(y))
    return ((x - x.mean(axis=0)) ** 2).sum() / within - 1


@samples
@pytest.mark.parametrize("d", [1, 10, 300])
def test_fisher_ratio(kind, d):
    x, y = sample(kind, d)
    assert value(fisher_ratio, x, y) == pytest.approx(scatter(x, y), rel=1e-10)
    single = value(fisher_ratio, x.astype(np.float32), y)
    assert single == pytest.approx(scatter(x.astype(np.float32).astype(float), y), rel=1e-6)


def test_fisher_ratio_of_draws():
    x, y = sample()
    gram = ClassGram.of(torch.from_numpy(x), torch.from_numpy(y))
    draws = Draws.halves(gram.classes.sizes, 4, 0, gram.device)
    rows = [gram.order.numpy()[m.numpy()] for m in draws.member.T]
    expected = [scatter(x[r], y[r]) for r in rows]
    assert fisher_ratio_from(gram, draws).tolist() == pytest.approx(expected, rel=1e-10)
    whole = fisher_ratio_from(gram, Draws.all_of(gram.classes.sizes, gram.device))
    assert whole.tolist() == pytest.approx([scatter(x, y)], rel=1e-10)


def test_ratio():
    """Of above, below and the squares about the origin: what is rounding of these counts as 0."""
    rows = [[3.0, 2, 9], [0, 0, 1], [1, 0, 1], [0, 4, 4], [-1e-20, 0, 1], [3e-30, 2e-30, 1]]
    parts = torch.tensor(rows, dtype=torch.float64).T
    assert ratio(*parts).tolist() == [1.5, 0, math.inf, 0, 0, 0]


def test_fisher_ratio_at_its_ends():
    y = np.arange(60) % 3
    assert value(fisher_ratio, np.eye(3)[y], y) == math.inf
    for constant in (1.0, 0.1, 1e6 / 3):
        assert value(fisher_ratio, np.full((60, 4), constant), y) == 0
    assert value(fisher_ratio, np.arange(60)[:, None] // 3 * 1.0, y) == 0  # all means equal


# ---- what noise scores ---------------------------------------------------------------------------


def test_fisher_ratio_of_noise():
    """(C - 1) / (n - C), of the labels given and of permuted ones."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((500, 512)), np.arange(500) % 10
    found = fisher_ratio(x, torch.from_numpy(y), null=19)
    floor = 9 / 490
    assert found.value.item() == pytest.approx(floor, rel=0.05)
    assert found.null_mean.item() == pytest.approx(floor, rel=0.03)
    assert abs(found.excess) < 0.05 * floor


def test_nearest_class_mean_of_noise():
    """On the rows that the means were taken of 92 %, on held-out rows chance."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((500, 512)), np.arange(500) % 10
    every_row = np.ones(500, dtype=bool)
    assert judged(x, y, every_row, every_row) == pytest.approx(0.92, abs=0.03)
    held = [value(nearest_class_mean, x, y, seed=seed) for seed in range(8)]
    assert np.mean(held) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 150 / 8))
    assert max(held) < 0.25


def test_knn_and_silhouette_of_noise():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((500, 64)), np.arange(500) % 10
    assert value(knn_accuracy, x, y) == pytest.approx(0.1, abs=0.06)
    assert -0.05 < value(silhouette, x, y) < 0


# ---- common to all -------------------------------------------------------------------------------


@every
def test_labels_as_scores_and_features_as_maps(measure):
    x, y = sample(d=12)
    expected = value(measure, x, y)
    assert value(measure, x, np.eye(4)[y]) == expected
    assert value(measure, x.reshape(120, 3, 2, 2), y) == expected


@every
@pytest.mark.parametrize("power", [-600, -100, 100, 600])
def test_extreme_scales(measure, power):
    x, y = sample()
    assert value(measure, np.ldexp(x, power), y) == pytest.approx(value(measure, x, y), rel=1e-9)


@every
def test_twins_across_classes(measure):
    x, y = sample(sep=2.0)
    x = np.concatenate([x, x[:40] + 1e-7])
    y = np.concatenate([y, (y[:40] + 1) % 4])
    expected = {
        fisher_ratio: scatter(x, y),
        knn_accuracy: leave_one_out(x, y, 15),
        nearest_class_mean: judged(x, y, *split_of(y, 0.3, 0)),
        silhouette: silhouette_score(x, y),
    }[measure]
    assert value(measure, x, y) == pytest.approx(expected, rel=1e-7)
