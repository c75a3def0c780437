"""Nothing is built on another device than the features'.

Fake tensors claim to be on an accelerator that need not exist; any mixing of devices raises.
"""

from functools import partial

import pytest
import torch
from oracle import DEFINITIONS, clusters, values_of
from small import CPU
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geomkd import efficiency, information, knowledge_quality, measures, separation
from geomkd.common.checks import Classes, as_features, sums_device
from geomkd.geometry.class_sums import ClassSums
from geomkd.geometry.columns import column_slices, residual_gram
from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.neighbours import Neighbours, Rows, nearest_of, smallest, unsure
from geomkd.geometry.principal import Principal
from geomkd.geometry.row_blocks import (
    NearestRows,
    full_rows,
    sums_over_classes,
    sums_over_labels,
    walk,
)
from geomkd.measures import (
    collapse,
    dimension,
    quality,
    separability,
    similarity,
    spectrum,
    transfer,
)
from geomkd.measures.quality_statistics import STATISTICS, spectra_of_larger
from geomkd.network.layers import Layer
from geomkd.scoring.feature_reader import Reader
from geomkd.scoring.plan import Stored

SIZES = [700, 300, 2]  # three blocks
both = pytest.mark.parametrize("definition", DEFINITIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)


def fake_gram(device, dtype=torch.float32):
    n = sum(SIZES)
    classes = Classes(torch.zeros(n, dtype=torch.int64, device=device), SIZES, [0, 1, 2])
    x = torch.empty(n, 1300, dtype=dtype, device=device)
    columns = partial(column_slices, x, 0.5)
    single = torch.float64 if dtype is torch.float64 else torch.float32
    return ClassGram(ClassSums.over(columns, classes, single), columns, 0.5)


def fake_draws(kind, device):
    return Draws.all_of(SIZES, device) if kind == "whole" else Draws.halves(SIZES, 3, 0, device)


def test_mixing_is_noticed(elsewhere):
    with pytest.raises(RuntimeError, match=r"found at least two devices|different devices"):
        torch.empty(3, device=elsewhere) + torch.empty(3)


@dtypes
def test_gram(elsewhere, dtype):
    gram = fake_gram(elsewhere, dtype)
    weights = torch.empty(gram.n, 4, dtype=torch.float64, device=elsewhere)
    results = [
        gram.upper,
        gram.raw_sq,
        gram.centred_sq,
        gram.residual_sq,
        gram.zero_rows,
        gram.class_dots(0),
        gram.class_dots(1, raw=True),
        gram.class_residual_gram(0),
        gram.abs_cosine_form(weights),
        gram.dot_times(weights),
        *gram.nearest_other(1),
        *gram.nearest_other(5),
    ]
    assert {t.device for t in results} == {elsewhere}


@dtypes
def test_measuring_again(elsewhere, dtype):
    gram = fake_gram(elsewhere, dtype)
    rows = torch.empty(1100, dtype=torch.int64, device=elsewhere)
    assert gram.refine(rows).device == elsewhere
    assert gram.measure(rows, rows[:, None].expand(-1, 3)).device == elsewhere
    near = Neighbours(*(t[:, :3] for t in gram.nearest_other(5)))
    assert {t.device for t in unsure(gram, near)} == {elsewhere}
    square = residual_gram(gram.columns, gram.n, gram.dtype, gram.device)
    assert square.device == elsewhere


@both
@pytest.mark.parametrize("kind", ["whole", "halves"])
@dtypes
def test_quality(elsewhere, dtype, kind, definition):
    gram = fake_gram(elsewhere, dtype)
    draws = fake_draws(kind, elsewhere)
    nearest = torch.empty(gram.n, draws.taken.shape[1], dtype=torch.float64, device=elsewhere)
    statistics = STATISTICS[definition](gram, draws)
    statistics.nearest = nearest  # the search reads data, and so does that of the least
    if definition == "published":
        statistics.margins = torch.empty(draws.taken.shape, dtype=torch.float64, device=elsewhere)
    parts = quality.quality_from(statistics, 5000.0)
    assert {part.device for part in parts.values()} == {elsewhere}
    assert {part.shape for part in parts.values()} == {nearest[0].shape}
    assert {part.dtype for part in parts.values()} == {torch.float64}


@both
@pytest.mark.parametrize("kind", ["whole", "halves"])
def test_spectra_of_other_samples(elsewhere, kind, definition):
    gram = fake_gram(elsewhere)
    draws = fake_draws(kind, elsewhere)
    squares = [torch.empty(m, m, dtype=torch.float64, device=elsewhere) for m in (900, 500, 40)]
    spectra = spectra_of_larger(gram, squares, draws, seed=0)
    shape = gram.n, draws.taken.shape[1]
    statistics = STATISTICS[definition](gram, draws, spectra=spectra)
    statistics.nearest = torch.empty(shape, dtype=torch.float64, device=elsewhere)
    statistics.margins = torch.empty(draws.taken.shape, dtype=torch.float64, device=elsewhere)
    parts = quality.quality_from(statistics, 5000.0)
    assert {part.device for part in parts.values()} == {elsewhere}


# ---- cores of the other measures -----------------------------------------------------------------


def same_device(results, device, dtype=torch.float64):
    assert {t.device for t in results} == {device}
    assert {t.dtype for t in results} == {dtype}


@dtypes
def test_rows_of_a_gram(elsewhere, dtype):
    gram = fake_gram(elsewhere, dtype)
    for rows, dots, distance in full_rows(gram, 300):
        assert dots.shape == distance.shape == (rows.stop - rows.start, gram.n)
        same_device([dots, distance], elsewhere)
    among = torch.ones(gram.n, dtype=torch.bool, device=elsewhere)
    for reader in (NearestRows(gram, 5), NearestRows(gram, 50, among)):
        walk(gram, [reader])
        assert reader.sq.device == reader.at.device == elsewhere
    same_device([gram.between_sq], elsewhere)


@dtypes
def test_search(elsewhere, dtype):
    """Up to the rows that are measured again, whose number is data."""
    rows = Rows.__new__(Rows)  # the constructor reads the largest value
    rows.given = torch.empty(3000, 40, dtype=dtype, device=elsewhere)
    rows.n, rows.scale = 3000, 0.5
    single = torch.float64 if dtype is torch.float64 else torch.float32
    rows.centre = torch.empty(40, dtype=single, device=elsewhere)
    rows.centred_sq = torch.empty(3000, dtype=torch.float64, device=elsewhere)
    sq, at = nearest_of(rows.triangle(), 3000, 5, rows.centre)
    same_device([sq], elsewhere, single)
    assert {t.device for t in (*smallest(sq, 3), at)} == {elsewhere}
    few = at[:100, 0]
    same_device([rows.measure(few, at[:100]), rows.exact_rows(few)], elsewhere)


def test_dimensions(elsewhere):
    values = torch.empty(500, dtype=torch.float64, device=elsewhere)
    results = [
        dimension.two_nn_from(values),
        dimension.two_nn_from(values, discard=0.0),
        dimension.two_nn_from(values, method="mle"),
        dimension.mle_dimension_from(values, 20),
        dimension.mle_dimension_from(values, 20, average="arithmetic"),
    ]
    same_device(results, elsewhere)
    assert {t.shape for t in results} == {()}
    local = dimension.mle_dimension_from(values, 20, pointwise=True)
    assert (local.shape, local.device) == ((500,), elsewhere)


@pytest.mark.parametrize("kind", ["whole", "halves"])
def test_separability(elsewhere, kind):
    gram, draws = fake_gram(elsewhere), fake_draws(kind, elsewhere)
    queries = draws.member.shape[1]
    own = gram.class_of.unsqueeze(1)
    member = draws.member.double()
    for sums in (
        sums_over_classes(gram, member),
        sums_over_labels(own.expand(member.shape), member, 3),
    ):
        silhouettes = separability.Silhouettes(own, member, 3, sums)
        means = separability.NearestMeans(gram, draws.member, draws.member)
        walk(gram, [silhouettes, means], sums=3 * queries)
        results = [silhouettes.found(), means.found()]
        same_device([*results, collapse.fisher_ratio_from(gram, draws)], elsewhere)
        assert {t.shape for t in results} == {(queries,)}
    at = torch.empty(gram.n, 20, dtype=torch.int64, device=elsewhere)
    near = Neighbours(at.double(), at)
    same_device([separability.drawn_knn_accuracy(gram, near, draws.member)], elsewhere)


def test_scores_of_labels(elsewhere):
    """What a null asks for: a score of the sorted rows' class indices."""
    gram = fake_gram(elsewhere)
    index = gram.class_of.clone()
    scores = [
        separability.silhouette_score(gram),
        collapse.fisher_score(gram),
        separability.nearest_mean_score(gram, 0.3, 0),
    ]
    same_device([score(index) for score in scores], elsewhere)


@pytest.mark.parametrize("rank", [0, 1, 50])
def test_cores_of_principal_coordinates(elsewhere, rank):
    own = {"dtype": torch.float64, "device": elsewhere}
    found = Principal(torch.empty(60, rank, **own), torch.empty(rank, **own), 90)
    index, s = torch.empty(60, dtype=torch.int64, device=elsewhere), found.sq_singular
    results = [
        spectrum.pca_dimension_from(s, 60, 90, 0.9),
        spectrum.participation_ratio_from(s),
        spectrum.debiased_participation_ratio_from(found),
        spectrum.effective_rank_from(s, "singular"),
        spectrum.power_law_alpha_from(s, spectrum.FIT),
        spectrum.isotropy_from(s, 60, 90),
        transfer.logme_from(found, index, 4),
        transfer.h_score_from(found, index, 4),
        transfer.gbc_from(found, index, 4),
        *collapse.neural_collapse_from(found, index, 4),
        similarity.procrustes_from(found, found),
    ]
    same_device(results, elsewhere)
    assert {t.shape for t in results} == {()}


@dtypes
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("width", [30, 900])
def test_similarity(elsewhere, width, debiased, dtype):
    """By the narrow side, and by triangles of Gram matrices."""
    x, y = (torch.empty(600, d, dtype=dtype, device=elsewhere) for d in (width, 20))
    found = similarity.products_of([x, y], [y], debiased)
    same_device([*found, found.ratio()], elsewhere)
    assert found.ratio().shape == (2, 1)
    gram = torch.empty(3, 60, 60, dtype=torch.float32, device=elsewhere)
    dense = similarity.cka_from(gram, gram, debiased=debiased)
    same_device([dense], elsewhere)
    assert dense.shape == (3,)


# ---- a device without float64 ----


class WithoutFloat64(TorchDispatchMode):
    """No tensor of float64 can be on the device that tensors claim to be on, as on Apple's MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            double = isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float64
            if double and tensor.device != CPU:
                raise TypeError("Cannot convert a Tensor to float64 dtype on this device")
        return found


@pytest.fixture
def without_float64(elsewhere):
    with WithoutFloat64():
        yield elsewhere


def test_sums_are_on_the_cpu_where_a_device_has_no_float64(without_float64):
    x = torch.empty(60, 5, 2, device=without_float64)
    with pytest.raises(TypeError, match="float64"):
        x.double()
    assert as_features(x).device == sums_device(without_float64) == CPU
    gram = fake_gram(as_features(x).device)
    draws = fake_draws("whole", gram.device)
    statistics = STATISTICS["robust"](gram, draws)
    statistics.nearest = torch.empty(gram.n, 1, dtype=torch.float64)
    parts = quality.quality_from(statistics, 5000.0)
    same_device(parts.values(), CPU)


def test_features_of_such_a_device_are_held_on_the_cpu(without_float64):
    """The model runs there, every other step of scoring where the features are held."""
    model = nn.Sequential(nn.Linear(6, 8, device=without_float64), nn.ReLU())
    layer = Layer("1", "vector", (8,), dtype=torch.float32, device=without_float64)
    stored = Stored.of(layer, "flatten")
    assert (stored.device, stored.dtype) == (CPU, torch.float32)

    class Inputs:
        seed = 0

        def __len__(self):
            return 4

        def batches(self, batch_size, of_class):
            return [torch.empty(2, 6), torch.empty(2, 6)]

    held = Reader(model, Inputs(), None, "flatten", without_float64).read([stored], 2)
    assert (held["1"].device, held["1"].shape) == (CPU, (4, 8))


# ---- for real ------------------------------------------------------------------------------------

ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
needs_accelerator = pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")


@pytest.mark.gpu
@needs_accelerator
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_accelerator_gives_the_same(dtype, definition):
    x, y = (torch.from_numpy(t) for t in clusters(1200, 300, 5, relu=True))
    x = x.to(dtype)
    expected = values_of(knowledge_quality(x, y, definition=definition))
    x, y = x.to(ACCELERATOR), y.to(ACCELERATOR)
    got = values_of(knowledge_quality(x, y, definition=definition))
    assert got == pytest.approx(expected, rel=1e-5)
    for function in (separation, information, efficiency):
        value = function(x, y, definition=definition)
        assert value.device == x.device
        assert value.item() == pytest.approx(expected[function.__name__], rel=1e-5)


@pytest.mark.gpu
@needs_accelerator
@both
def test_accelerator_measures_again(definition):
    """Twins across classes, small rows, tiny features: the steps whose size depends on data."""
    x, y = (torch.from_numpy(t) for t in clusters(300, 40, 3, relu=True, sep=2.0))
    x[1::3] = x[0::3] + 1e-4
    x[[6, 7]] *= 1e-5
    for scale in (1.0, 2.0**-100):
        expected = values_of(knowledge_quality(x * scale, y, definition=definition))
        features = (x * scale).to(ACCELERATOR)
        got = values_of(knowledge_quality(features, y.to(ACCELERATOR), definition=definition))
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
@needs_accelerator
def test_labels_elsewhere():
    x, y = (torch.from_numpy(t) for t in clusters())
    with pytest.raises(ValueError, match=r"labels must be on the features' device, .*; got cpu$"):
        knowledge_quality(x.to(ACCELERATOR), y)


RESULTS = {"KnowledgeQuality", "NeuralCollapse", "WithNull", "knowledge_quality"}
LABELLED = {
    "efficiency",
    "fisher_ratio",
    "gbc",
    "h_score",
    "information",
    "knn_accuracy",
    "linear_probe",
    "logme",
    "nearest_class_mean",
    "neural_collapse",
    "separation",
    "silhouette",
}


def tensors_of(name, x, y):
    measure = getattr(measures, name)
    if name in ("cka", "procrustes_distance"):
        return [measure(x, x[:, :30].relu())]
    found = measure(x, y) if name in LABELLED else measure(x)
    return [found] if isinstance(found, torch.Tensor) else list(found)[:3]


@pytest.mark.gpu
@needs_accelerator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(set(measures.__all__) - RESULTS))
def test_accelerator_gives_the_same_of_every_measure(name, dtype):
    x, y = (torch.from_numpy(t) for t in clusters(700, 60, 5, sep=0.4))
    x = x.to(dtype)
    expected = [t.item() for t in tensors_of(name, x, y)]
    found = tensors_of(name, x.to(ACCELERATOR), y.to(ACCELERATOR))
    assert {t.device.type for t in found} == {ACCELERATOR.type}
    assert [t.item() for t in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
@needs_accelerator
@pytest.mark.parametrize("name", ["fisher_ratio", "knn_accuracy", "nearest_class_mean", "logme"])
def test_accelerator_draws_the_same_null(name):
    x, y = (torch.from_numpy(t) for t in clusters(200, 20, 4, sep=0.4))
    measure = getattr(measures, name)
    expected = [t.item() for t in measure(x, y, null=19)]
    found = measure(x.to(ACCELERATOR), y.to(ACCELERATOR), null=19)
    assert [t.item() for t in found] == pytest.approx(expected, rel=1e-5)
