"""The Gram matrix and its readings, against direct computation in float64."""

import numpy as np
import pytest
import torch
from oracle import clusters

from geomkd import knowledge_quality
from geomkd.common.checks import as_classes
from geomkd.geometry.columns import column_slices
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import COLUMNS, inverse


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def sample(request):
    """Three blocks, classes that straddle them, two slices of columns, unsorted rows."""
    x, _ = clusters(1200, COLUMNS + 50, 7, relu=True)
    y = np.random.default_rng(0).choice(7, size=1200, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.04, 0.01])
    x, y = torch.from_numpy(x).to(request.param), torch.from_numpy(y)
    gram = ClassGram.of(x, y)
    return gram, x.double()[gram.order], y[gram.order]


def close(got, expected, tolerance=1e-6):
    """Within a share of the largest value."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_rows_are_sorted_by_class(sample):
    gram, _, labels = sample
    assert torch.equal(labels, labels.sort().values)
    assert gram.spans == [(int((labels < a).sum()), int((labels <= a).sum())) for a in range(7)]


def test_norms(sample):
    gram, x, labels = sample
    centred = x - x.mean(dim=0)
    means = torch.stack([x[labels == a].mean(dim=0) for a in range(7)])
    close(gram.raw_sq, x.square().sum(dim=1), 1e-13)
    close(gram.centred_sq, centred.square().sum(dim=1), 1e-12)
    close(gram.residual_sq, (x - means[labels]).square().sum(dim=1), 1e-6)
    assert gram.dim == x.shape[1]
    assert not gram.zero_rows.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_equal_samples_of_a_class_leave_exactly_zero(dtype):
    """Their sums are exact in float64, in any order; those of float64 features need not be."""
    y = torch.arange(10) // 7
    gram = ClassGram.of(torch.tensor([[0.1, 0.7], [1 / 3, 1e-3]])[y].to(dtype), y)
    assert gram.residual_sq.eq(0).all() and gram.upper.eq(0).all()


@pytest.mark.parametrize("raw", [False, True])
def test_class_dots(sample, raw):
    gram, x, labels = sample
    x = x if raw else x - x.mean(dim=0)
    for a in range(7):
        close(gram.class_dots(a, raw=raw), x[labels == a] @ x[labels == a].T)


@pytest.mark.parametrize("raw", [False, True])
def test_blocks_cover_the_upper_triangle_once(sample, raw):
    gram, x, _ = sample
    x = x if raw else x - x.mean(dim=0)
    whole = x @ x.T
    seen = torch.zeros(gram.n, gram.n)
    for rows, cols, dots in gram.blocks(raw=raw):
        assert dots.dtype is torch.float64
        close(dots, whole[rows.rows, cols.rows])
        seen[rows.rows, cols.rows] += 1
        dots.zero_()  # a block belongs to who reads it
    assert torch.equal(seen.triu(), torch.ones_like(seen).triu())
    assert seen.max() == 1


def test_reading_changes_nothing(sample):
    gram, _, _ = sample
    before = gram.upper.clone()
    first = gram.nearest_other()
    for a in range(7):
        gram.class_dots(a, raw=True).zero_()
        gram.class_residual_gram(a).zero_()
    assert torch.equal(gram.upper, before)
    assert all(map(torch.equal, gram.nearest_other(), first))


def test_class_residual_gram(sample):
    gram, x, labels = sample
    for a in range(7):
        own = x[labels == a] - x[labels == a].mean(dim=0)
        square = gram.class_residual_gram(a)
        close(square, own @ own.T)


def test_forms(sample):
    gram, x, _ = sample
    weights = torch.rand(gram.n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(x, dim=1)
    expected = torch.einsum("ir,ij,jr->r", weights, (unit @ unit.T).abs(), weights)
    close(gram.abs_cosine_form(weights), expected)
    centred = x - x.mean(dim=0)
    close(gram.dot_times(weights), centred @ (centred.T @ weights))


def test_nearest_other(sample):
    gram, x, labels = sample
    distance = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist").square()
    distance[labels[:, None] == labels] = torch.inf
    for k in (1, 2, 5, 600):
        value, at = gram.nearest_other(k)
        expected = distance.topk(k, dim=1, largest=False).values
        close(value, expected)
        close(distance.gather(1, at), expected)


def test_more_neighbours_than_other_samples():
    x, _ = clusters(40, 6)
    gram = ClassGram.of(torch.from_numpy(x), torch.tensor([0] * 35 + [1] * 5))
    value, _ = gram.nearest_other(8)
    assert value.isfinite().sum(dim=1).tolist() == [5] * 35 + [8] * 5


def test_refine():
    """Distances that x^2 + y^2 - 2xy cannot give: a common offset, twins 1e-3 apart."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((700, 64)) + 100
    twin = base + 1e-3 * rng.standard_normal((700, 64))
    x = torch.from_numpy(np.concatenate([base, twin]).astype(np.float32))
    gram = ClassGram.of(x, torch.tensor([0, 1]).repeat_interleave(700))
    expected = (x[:700].double() - x[700:].double()).square().sum(dim=1).repeat(2)
    value, at = gram.nearest_other(3)
    assert (value[:, 0] / expected - 1).abs().max() > 0.01
    rows = gram.unresolved(value[:, 0], at[:, 0], per_class=False)
    assert torch.equal(rows, torch.arange(1400))
    torch.testing.assert_close(gram.refine(rows), expected, rtol=1e-12, atol=0)
    some = torch.tensor([1399, 2, 700])
    torch.testing.assert_close(gram.refine(some), expected[some], rtol=1e-12, atol=0)


def test_only_rows_that_may_hold_the_least_distance_of_their_class():
    """One pair of twins nearer than all the others, which products cannot give either."""
    rng = np.random.default_rng(0)
    base, step = rng.standard_normal((40, 64)), rng.standard_normal((40, 64)) / 16
    step[0] *= 1e-3
    x = torch.from_numpy(np.concatenate([base, base + step]).astype(np.float32))
    gram = ClassGram.of(x, torch.arange(80) // 40)
    sq, at = (found[:, 0] for found in gram.nearest_other())
    assert len(gram.unresolved(sq, at, per_class=False)) == 80
    assert gram.unresolved(sq, at, per_class=True).tolist() == [0, 40]


def test_ordinary_features_are_resolved(sample):
    gram, _, _ = sample
    value, at = gram.nearest_other()
    for per_class in (False, True):
        assert len(gram.unresolved(value[:, 0], at[:, 0], per_class=per_class)) == 0


def test_near_rows_are_exact_wherever_they_are_read():
    x, y = clusters(1100, 30, 5, sep=3.0)
    small = [0, 511, 512, 1000]
    x[small] *= np.float32(1e-5)
    x[700] = x.mean(axis=0) + np.float32(1e-4)
    gram = ClassGram.of(torch.from_numpy(x), torch.from_numpy(y))
    x = torch.from_numpy(x).double()[gram.order]
    for raw in (True, False):
        rows = x if raw else x - x.mean(dim=0)
        unit = torch.nn.functional.normalize(rows, dim=1)
        inverse_norm = inverse((gram.raw_sq if raw else gram.centred_sq).sqrt())
        for p, q, dots in gram.blocks(raw=raw):
            cosine = dots * inverse_norm[p.rows, None] * inverse_norm[q.rows]
            torch.testing.assert_close(cosine, unit[p.rows] @ unit[q.rows].T, rtol=0, atol=1e-5)
        for a, (s, e) in enumerate(gram.spans):
            cosine = gram.class_dots(a, raw=raw) * inverse_norm[s:e, None] * inverse_norm[s:e]
            torch.testing.assert_close(cosine, unit[s:e] @ unit[s:e].T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 7, 100, 5000])
def test_slices_of_any_width(width):
    x, y = clusters(150, 333, 5, relu=True)
    x, classes = torch.from_numpy(x), as_classes(y)
    whole = ClassGram.of(x, torch.from_numpy(y))
    sliced = ClassGram.from_columns(lambda: x.split(width, dim=1), classes, torch.float32)
    assert sliced.dim == whole.dim == 333
    for name in ("residual_sq", "centred_sq", "raw_sq"):
        close(getattr(sliced, name), getattr(whole, name), 1e-6)
    for a in range(5):
        close(sliced.class_dots(a, raw=True), whole.class_dots(a, raw=True))


def test_a_scale_that_the_columns_carry():
    x, y = clusters(60, 20, 3)
    x, classes = torch.from_numpy(x), as_classes(y)
    gram = ClassGram.from_columns(lambda: column_slices(x, 0.25), classes, torch.float32, 0.25)
    assert gram.scale == 0.25
    far = ClassGram.from_columns(lambda: column_slices(x, 2.0**40), classes, torch.float32, 2.0**40)
    near = ClassGram.of(x, torch.from_numpy(y))
    close(far.raw_sq / far.scale**2, near.raw_sq)
    close(gram.raw_sq / gram.scale**2, near.raw_sq)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_in_a_later_slice(bad):
    x, y = clusters(30, 40, 3)
    x[[4, 7], 35] = bad
    pieces = torch.from_numpy(x).split(10, dim=1)
    message = r"^features must be finite; got NaN or Inf in 2 of 30 rows, first in row 4$"
    with pytest.raises(ValueError, match=message):
        ClassGram.from_columns(lambda: pieces, as_classes(y), torch.float32)


@pytest.mark.parametrize("shrunk", [1e-5, 1e-3])
def test_more_rows_near_the_origin_than_are_measured_one_by_one(shrunk):
    """Half of the samples, as of gates that are nearly shut: float32 gives what float64 gives."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(800) % 2
    x = torch.randn(2, 64, generator=generator)[y] + 0.3 * torch.randn(800, 64, generator=generator)
    x[torch.randperm(800, generator=generator)[:400]] *= shrunk
    for definition in ("published", "robust"):
        found = knowledge_quality(x, y, definition=definition)
        expected = knowledge_quality(x.double(), y, definition=definition)
        for name in ("separation", "information", "efficiency"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4)
