"""Nothing is built on another device than the features'.

Fake tensors claim to be on an accelerator that need not exist; any mixing of devices raises.
"""

import pytest
import torch
from oracle import DEFINITIONS, clusters, values_of
from torch._subclasses import FakeTensorMode

from geomkd import efficiency, information, knowledge_quality, separation, statistics
from geomkd.arithmetic import exact_arithmetic
from geomkd.checks import Classes
from geomkd.draws import Draws
from geomkd.gram import ClassGram, column_slices, residual_gram
from geomkd.measures import quality

SIZES = [700, 300, 2]  # three blocks
both = pytest.mark.parametrize("definition", DEFINITIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)


@pytest.fixture
def elsewhere():
    """A device that no tensor is on by default."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield torch.device("cuda", 0)


def fake_gram(device, dtype=torch.float32):
    n = sum(SIZES)
    classes = Classes(torch.zeros(n, dtype=torch.int64, device=device), SIZES, [0, 1, 2])
    gram = ClassGram(classes, torch.float64 if dtype is torch.float64 else torch.float32, 0.5)
    with exact_arithmetic(device):
        for piece in column_slices(torch.empty(n, 1300, dtype=dtype, device=device), 0.5):
            gram.add(piece)
        gram.finish()
    return gram


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
        gram.largest,
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
    x = torch.empty(gram.n, 1300, dtype=dtype, device=elsewhere)
    gram.columns = lambda: column_slices(x, 0.5)
    rows = torch.empty(1100, dtype=torch.int64, device=elsewhere)
    assert gram.refine(rows).device == elsewhere
    assert gram.measure(rows, rows[:, None].expand(-1, 3)).device == elsewhere
    square = residual_gram(gram.columns, gram.n, gram.dtype, gram.device)
    assert square.device == elsewhere


@both
@pytest.mark.parametrize("kind", ["whole", "halves"])
@dtypes
def test_quality(elsewhere, dtype, kind, definition):
    gram = fake_gram(elsewhere, dtype)
    draws = fake_draws(kind, elsewhere)
    nearest = torch.empty(gram.n, len(draws.of_class[0]), dtype=torch.float64, device=elsewhere)
    parts = quality.quality_from(gram, draws, 5000.0, definition, nearest=nearest)
    assert {part.device for part in parts.values()} == {elsewhere}
    assert {part.shape for part in parts.values()} == {nearest[0].shape}
    assert {part.dtype for part in parts.values()} == {torch.float64}


@both
@pytest.mark.parametrize("kind", ["whole", "halves"])
def test_spectra_of_other_samples(elsewhere, kind, definition):
    gram = fake_gram(elsewhere)
    draws = fake_draws(kind, elsewhere)
    larger = [900, 500, 40]
    of_entropy = (
        Draws.all_of(larger, elsewhere)
        if kind == "whole"
        else Draws.halves(larger, 3, 0, elsewhere)
    )
    spectra = [
        statistics.spectrum_of(
            torch.empty(m, m, dtype=torch.float64, device=elsewhere),
            of_entropy,
            a,
            gram.dim,
            statistics.variance_floor(gram, a),
        )
        for a, m in enumerate(larger)
    ]
    nearest = torch.empty(gram.n, len(draws.of_class[0]), dtype=torch.float64, device=elsewhere)
    parts = quality.quality_from(gram, draws, 5000.0, definition, nearest=nearest, spectra=spectra)
    assert {part.device for part in parts.values()} == {elsewhere}


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
