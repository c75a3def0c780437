"""How well the classes of a layer's features stand apart, without training anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geomkd.common.checks import check_int, check_number
from geomkd.geometry.draws import SampleDraws, held_out
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import Neighbours
from geomkd.geometry.precision import exact_arithmetic
from geomkd.geometry.row_blocks import nearest_rows, sums_over_classes, sums_over_labels, walk
from geomkd.measures.measure import Measure
from geomkd.measures.null import WithNull, against_null

K = 15  # neighbours that vote
TEST_SHARE = 0.3  # held out by nearest_class_mean

Score = Callable[[Tensor], Tensor]  # (n,) class indices -> 0-d
Sums = Callable[[Tensor], Tensor]  # (b, n) values -> (b, C, Q) sums over each class


def knn_accuracy(
    features: Any, labels: Any, *, k: int = K, null: int = 0, seed: int = 0
) -> Tensor | WithNull:
    """Leave-one-out accuracy of the vote of the k nearest neighbours.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` and errors as in
    `geomkd.knowledge_quality`.

    Parameters
    ----------
    k : int
        Neighbours that vote, 1 <= k < n; at most n // C - 1 do, the mates that a row has in a class
        of average size. A tie goes to the class of the lowest label.

    Returns
    -------
    Tensor, shape (), or WithNull
        Between 0 and 1, float64, on the features' device.

    Notes
    -----
    Euclidean distance. With more voters than a row has mates, strangers outvote them: of 1,000 far
    apart classes of 5 samples, 15 neighbours got 0.003 right. Hence the cap, in half-samples too.
    Duplicates are not dropped: where they are split over training and deployment the score says too
    much. Chance is near 1 / C.

    Cost: n^2 d multiplications, memory n^2 numbers.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures import knn_accuracy
    >>> labels = torch.arange(60) % 3
    >>> knn_accuracy(torch.eye(3)[labels], labels, k=5)
    tensor(1., dtype=torch.float64)
    """
    gram = ClassGram.of(features, labels)
    k = check_int(k, "k", least=1)
    if k >= gram.n:
        raise ValueError(f"k must be less than n = {gram.n}; got {k}")
    with exact_arithmetic(gram.device):
        return against_null(knn_score(gram, k), gram.class_of, null, seed)


def knn_score(gram: ClassGram, k: int = K) -> Score:
    """`knn_accuracy` as a function of the class indices of a Gram matrix's rows."""
    near, everyone = nearest_rows(gram, k), torch.ones_like(gram.class_of, dtype=torch.bool)
    return lambda index: _knn(near, everyone, index, gram.n_classes, k)


def drawn_knn_accuracy(gram: ClassGram, near: Neighbours, member: Tensor) -> Tensor:
    """`knn_accuracy` of each draw, (R,)."""
    given = (gram.class_of, gram.n_classes, K)
    return torch.stack([_knn(near, drawn, *given) for drawn in member.T])


def _knn(near: Neighbours, drawn: Tensor, index: Tensor, n_classes: int, k: int) -> Tensor:
    """Accuracy within the drawn rows of the vote of each one's first neighbours among them."""
    voters = (drawn.sum() // n_classes - 1).clamp(min=1, max=k)
    valid = drawn[near.index] & near.sq_distance.isfinite()
    voting = valid & (valid.cumsum(dim=1) <= voters)
    votes = torch.zeros(len(index), n_classes, dtype=torch.float32, device=index.device)
    votes.scatter_add_(1, index[near.index], voting.to(votes.dtype))
    return ((votes.argmax(dim=1) == index) & drawn).sum() / drawn.sum().double()


def silhouette(features: Any, labels: Any, *, null: int = 0, seed: int = 0) -> Tensor | WithNull:
    """Mean silhouette of the classes.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` and errors as in
    `geomkd.knowledge_quality`.

    Returns
    -------
    Tensor, shape (), or WithNull
        Between -1 and 1, float64, on the features' device.

    Notes
    -----
    Mean over rows of (b - a) / max(a, b): a the mean distance to the other rows of its class, b the
    least mean distance to another class; 0 where both are 0. Distances even out as dimension grows,
    and the score shrinks with them: a low value of a wide layer need not mean mixed classes.

    Cost: n^2 d multiplications, memory n^2 numbers; C n^2 more a permutation.

    References
    ----------
    Rousseeuw. Silhouettes. Journal of Computational and Applied Mathematics 20, 1987.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures import silhouette
    >>> silhouette(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1]))
    tensor(1., dtype=torch.float64)
    """
    gram = ClassGram.of(features, labels)
    with exact_arithmetic(gram.device):
        return against_null(silhouette_score(gram), gram.class_of, null, seed)


def silhouette_score(gram: ClassGram) -> Score:
    """`silhouette` as a function of the class indices of a Gram matrix's rows."""
    every = torch.ones(gram.n, 1, dtype=torch.float64, device=gram.device)

    def score(index: Tensor) -> Tensor:
        own = index.unsqueeze(1)
        sums = sums_over_labels(own, every, gram.n_classes)
        reader = Silhouettes(own, every, gram.n_classes, sums)
        walk(gram, [reader], sums=gram.n_classes)
        return reader.found()[0]

    return score


def drawn_silhouettes(gram: ClassGram, draws: SampleDraws) -> Silhouettes:
    """Reader for `silhouette` of each draw."""
    member = draws.member.double()
    sums = sums_over_classes(gram, member)
    return Silhouettes(gram.class_of.unsqueeze(1), member, gram.n_classes, sums)


class Silhouettes:
    """Reader of rows that gathers silhouettes of Q labelled subsets of them.

    ``own``, (n, Q) or (n, 1), is the class of each row, ``member``, (n, Q), 1.0 where it is in a
    subset, else 0.0.
    """

    def __init__(self, own: Tensor, member: Tensor, n_classes: int, sums: Sums) -> None:
        self.own, self.member, self.sums = own.expand(member.shape), member, sums
        zeros = torch.zeros(n_classes, member.shape[1], dtype=member.dtype, device=member.device)
        self.counts = zeros.scatter_add(0, self.own, member)
        self.values = torch.zeros_like(member)

    def __call__(self, rows: slice, dots: Tensor, sq_distance: Tensor) -> None:
        """Gather these rows' silhouettes."""
        sums, own = self.sums(sq_distance.sqrt()), self.own[rows]
        mates = self.counts.gather(0, own) - 1
        within = sums.gather(1, own.unsqueeze(1)).squeeze(1) / mates.clamp(min=1)
        sums.div_(self.counts).masked_fill_(self.counts == 0, torch.inf)
        sums.scatter_(1, own.unsqueeze(1), torch.inf)
        other = sums.amin(dim=1)
        larger = torch.maximum(within, other)
        value = torch.where((larger > 0) & (mates > 0), (other - within) / larger, 0.0)
        self.values[rows] = value * self.member[rows]

    def found(self) -> Tensor:
        """Mean silhouette of each subset, (Q,)."""
        return self.values.sum(dim=0) / self.member.sum(dim=0)


def nearest_class_mean(
    features: Any, labels: Any, *, test_share: float = TEST_SHARE, null: int = 0, seed: int = 0
) -> Tensor | WithNull:
    """Held-out accuracy of the nearest class mean.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` (of the split too) and
    errors as in `geomkd.knowledge_quality`.

    Parameters
    ----------
    test_share : float
        Share of every class that is held out, 0 < test_share < 1.

    Returns
    -------
    Tensor, shape (), or WithNull
        Between 0 and 1, float64, on the features' device.

    Notes
    -----
    Share of held-out rows x with argmin_c abs(x - mu_c) their class, mu_c the mean of the class's
    other rows. On the rows that the means were taken of, pure noise (n = 500, d = 512, 10 classes)
    scores above 90 %: hence the split. Chance is near 1 / C.

    Cost: n^2 d multiplications, memory n^2 numbers; C n^2 more a permutation.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures import nearest_class_mean
    >>> labels = torch.arange(60) % 3
    >>> nearest_class_mean(torch.eye(3)[labels], labels)
    tensor(1., dtype=torch.float64)
    """
    share = check_number(test_share, "test_share", above=0, below=1)
    gram = ClassGram.of(features, labels)
    with exact_arithmetic(gram.device):
        return against_null(nearest_mean_score(gram, share, seed), gram.class_of, null, seed)


def nearest_mean_score(gram: ClassGram, share: float = TEST_SHARE, seed: int = 0) -> Score:
    """`nearest_class_mean` as a function of the class indices of a Gram matrix's rows."""
    back, names = torch.argsort(gram.order), torch.arange(gram.n_classes, device=gram.device)

    def score(index: Tensor) -> Tensor:
        train, test = held_out(index[back], gram.n_classes, share, seed)  # as the rows came
        train, test = train[gram.order].double(), test[gram.order]
        hot = (index.unsqueeze(1) == names) * train.unsqueeze(1)
        means = hot / hot.sum(dim=0)
        cross = gram.dot_times(means)
        mean_sq = (means * cross).sum(dim=0)
        hits = (mean_sq - 2 * cross).argmin(dim=1) == index
        return (hits & test).sum() / test.sum().double()

    return score


def drawn_nearest_means(gram: ClassGram, draws: SampleDraws) -> NearestMeans:
    """Reader for `nearest_class_mean` of each draw, split as the public function splits it."""
    train, test = torch.zeros_like(draws.member), torch.zeros_like(draws.member)
    for q, member in enumerate(draws.member.T):
        rows = draws.rows_of(member)
        masks = held_out(draws.index[rows], draws.n_classes, TEST_SHARE, draws.seed)
        for table, mask in zip((train, test), masks, strict=True):
            whole = torch.zeros(draws.n, dtype=torch.bool, device=member.device)
            whole[rows[mask]] = True
            table[:, q] = whole[draws.order]
    return NearestMeans(gram, train, test)


class NearestMeans:
    """Reader of rows that tells which are nearest to their own class's mean, in Q splits.

    ``train`` and ``test``, (n, Q), tell of which rows means are taken, and which are judged.
    """

    def __init__(self, gram: ClassGram, train: Tensor, test: Tensor) -> None:
        self.gram, self.test = gram, test
        counts = torch.stack([train[s:e].sum(dim=0) for s, e in gram.spans])  # (C, Q)
        weights = train.double() / counts[gram.class_of]
        mean_sq = []
        for a, (s, e) in enumerate(gram.spans):
            mean_sq.append((weights[s:e] * (gram.class_dots(a) @ weights[s:e])).sum(dim=0))
        self.mean_sq, self.sums = torch.stack(mean_sq), sums_over_classes(gram, weights)
        self.hits = torch.zeros_like(test)

    def __call__(self, rows: slice, dots: Tensor, sq_distance: Tensor) -> None:
        """Judge these rows."""
        nearest = self.sums(dots).mul_(-2).add_(self.mean_sq).argmin(dim=1)
        self.hits[rows] = nearest == self.gram.class_of[rows, None]

    def found(self) -> Tensor:
        """Held-out accuracy of each split, (Q,)."""
        return (self.hits & self.test).sum(dim=0) / self.test.sum(dim=0).double()


_SPLIT = {"supervised": True, "seeded": True, "score": nearest_mean_score}
ROWS = (
    Measure("knn_accuracy", "neighbours", drawn_knn_accuracy, supervised=True, score=knn_score),
    Measure("silhouette", "rows", drawn_silhouettes, supervised=True, score=silhouette_score),
    Measure("nearest_class_mean", "rows", drawn_nearest_means, **_SPLIT),
)
