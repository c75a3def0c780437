"""The public functions of knowledge quality: closed forms, what they return, what they leave."""

import math

import numpy as np
import pytest
import torch
from oracle import DEFINITIONS, TERMS, clusters, values_of

from geomkd import KnowledgeQuality, efficiency, information, knowledge_quality, separation
from geomkd.geometry.draws import Draws
from geomkd.geometry.gram import ClassGram
from geomkd.measures.quality import quality_from
from geomkd.measures.quality_statistics import Published, Spectrum

both = pytest.mark.parametrize("definition", DEFINITIONS)
FUNCTIONS = {"separation": separation, "information": information, "efficiency": efficiency}


# ---- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_orthogonal_one_hot_classes(classes):
    y = torch.arange(classes * 7) % classes
    q = knowledge_quality(torch.eye(classes)[y], y)
    assert q.details["mean_within_cosine"] == pytest.approx(1, abs=1e-15)
    assert q.details["mean_between_cosine"] == pytest.approx(0, abs=1e-15)
    assert q.details["class_entropy"] == 0
    assert q.details["class_dimension_95"] == 1
    assert q.details["nearest_other_class_distance"] == pytest.approx(math.sqrt(2))
    assert q.details["mean_norm"] == pytest.approx(1)
    assert (q.separation, q.information, q.quality) == (pytest.approx(1), 0, pytest.approx(1))
    factor = (7 * classes / math.pi) ** (1 / classes)
    assert q.efficiency == pytest.approx(2 * math.sqrt(2) * factor)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_orthogonal_one_hot_classes_robust(classes):
    """About their mean the classes are a simplex, of cosine -1 / (C - 1)."""
    y = torch.arange(classes * 7) % classes
    q = knowledge_quality(torch.eye(classes)[y], y, definition="robust")
    assert q.separation == pytest.approx(1 + 1 / (classes - 1))
    assert q.information == 0
    assert q.quality == q.separation
    assert q.details["rms_norm"] == pytest.approx(math.sqrt(1 - 1 / classes))
    assert q.efficiency == pytest.approx(2 * math.sqrt(2) / math.sqrt(1 - 1 / classes))


def test_antipodal_classes_are_one_to_the_published_definition():
    y = torch.arange(20) % 2
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])[y]
    assert knowledge_quality(x, y).separation == pytest.approx(0, abs=1e-15)
    assert knowledge_quality(x, y, definition="robust").separation == pytest.approx(2)


def test_a_class_on_two_orthogonal_axes():
    """Cosines 0 and 1, one direction of variance; every number by hand."""
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 3], [0, 0, 3]])
    q = knowledge_quality(x, torch.tensor([0, 0, 1, 1]), dataset_size=100)
    assert q.details["mean_within_cosine"] == pytest.approx((0.5 + 1) / 2)
    assert q.details["mean_between_cosine"] == 0
    assert q.details["min_within_cosine"] == pytest.approx(0.5)
    assert q.details["class_entropy"] == 0
    assert q.details["nearest_other_class_distance"] == pytest.approx(math.sqrt(10))
    assert q.details["mean_norm"] == 2
    assert q.details["size_factor"] == pytest.approx((100 / math.pi) ** (1 / 3))


def test_equal_spectrum():
    """Each class is +-e_k: d equal variances, entropy log d, of which K keeps all."""
    d = 6
    block = torch.cat([torch.eye(d), -torch.eye(d)])
    x = torch.cat([block + 10, block - 10])
    q = knowledge_quality(x, torch.arange(2).repeat_interleave(2 * d))
    assert q.details["class_entropy"] == pytest.approx(math.log(d))
    assert q.details["class_dimension_95"] == d
    robust = knowledge_quality(x, torch.arange(2).repeat_interleave(2 * d), definition="robust")
    assert robust.details["class_entropy"] == pytest.approx(1)


def test_only_the_first_terms_of_all_classes_together_are_kept():
    """Two classes of k_a = 1: K = 2 of the three terms 0.96, 0.02, 0.02 are kept."""
    shares = torch.tensor([0.96, 0.02, 0.02], dtype=torch.float64)
    block = torch.cat([torch.diag(shares.sqrt()), -torch.diag(shares.sqrt())])
    x = torch.cat([block + 10, block - 10])
    q = knowledge_quality(x, torch.arange(2).repeat_interleave(6))
    assert q.details["class_dimension_95"] == 1
    p = shares[:2] / shares[:2].sum()
    assert q.details["class_entropy"] == pytest.approx(float(-(p * p.log()).sum()))


def test_information_below_zero_is_taken_as_zero():
    """Rounding may leave cosines a hair above 1, which must not make Q a NaN."""
    y = torch.arange(8) % 2
    gram = ClassGram.of(torch.eye(2)[y], y)
    gram.raw_sq.mul_(1 - 1e-9)
    spectra = [Spectrum(torch.full((1, 2), 0.5, dtype=torch.float64), 4)] * 2
    draws = Draws.all_of([4, 4], gram.device)
    parts = quality_from(Published(gram, draws, spectra=spectra), 8.0)
    assert parts["information"] < 0 < parts["efficiency"]
    assert torch.equal(parts["quality"], parts["separation"])


def test_dataset_size():
    x, y = clusters(90, 12, 3)
    small, large = (knowledge_quality(x, y, dataset_size=size) for size in (90, 90_000))
    assert values_of(small) == values_of(knowledge_quality(x, y))
    assert large.efficiency == pytest.approx(small.efficiency * 1000 ** (1 / 12))
    assert (large.separation, large.information) == (small.separation, small.information)
    assert large.quality == large.separation + math.sqrt(large.information * large.efficiency)
    got = efficiency(x, y, dataset_size=90_000)
    assert got.item() == large.efficiency
    robust = [
        knowledge_quality(x, y, dataset_size=size, definition="robust") for size in (90, 90_000)
    ]
    assert robust[0] == robust[1]
    assert efficiency(x, y, dataset_size=np.int64(5000), definition="robust").item() == (
        robust[0].efficiency
    )


# ---- the result ----------------------------------------------------------------------------------

NAMES = {
    "published": [
        "mean_within_cosine",
        "mean_between_cosine",
        "min_within_cosine",
        "class_entropy",
        "class_dimension_95",
        "nearest_other_class_distance",
        "mean_norm",
        "size_factor",
    ],
    "robust": [
        "mean_within_cosine",
        "mean_between_cosine",
        "low_within_cosine",
        "class_entropy",
        "nearest_other_class_distance",
        "rms_norm",
    ],
}


@both
def test_result(definition):
    x, y = clusters()
    q = knowledge_quality(x.reshape(120, 2, 3, 4), y, definition=definition)
    assert isinstance(q, KnowledgeQuality)
    assert list(q.details) == NAMES[definition]
    assert all(type(value) is float for value in values_of(q).values())
    assert (q.definition, q.samples, q.dim, q.n_classes) == (definition, 120, 24, 4)
    with pytest.raises(AttributeError):
        q.quality = 0.0


def test_repr_is_one_line():
    q = KnowledgeQuality(1.23456, 0.5, 0.25, 2.0, {"mean_norm": 3.0}, "robust", 120, 24, 4)
    assert repr(q) == (
        "KnowledgeQuality(quality=1.2346, separation=0.5000, information=0.2500, "
        "efficiency=2.0000, definition='robust', n=120, d=24, classes=4)"
    )


def test_html():
    q = KnowledgeQuality(1.23456, 0.5, 0.25, 2.0, {"mean_norm": 3.25}, "robust", 120, 24, 4)
    html = q._repr_html_()
    assert html.startswith("<table><caption>robust definition, n = 120, d = 24, 4 classes</cap")
    assert "<tr><td><b>quality</b></td>" in html
    assert "<b>1.2346</b>" in html
    assert "<tr><td>mean norm</td><td style='text-align:right'>3.25</td></tr>" in html
    assert html.count("<tr>") == html.count("</tr>") == 5


@both
@pytest.mark.parametrize("name", FUNCTIONS)
def test_single_terms(name, definition):
    x, y = clusters(relu=True)
    value = FUNCTIONS[name](x, y, definition=definition)
    assert isinstance(value, torch.Tensor)
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float64, "cpu")
    assert not value.requires_grad
    q = knowledge_quality(x, y, definition=definition)
    assert value.item() == getattr(q, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_single_terms_warn_once_at_the_caller(name):
    x, y = clusters(relu=True)
    x[5] = 0
    with pytest.warns(UserWarning, match=r"^1 of 120 feature rows are zero") as seen:
        FUNCTIONS[name](x, y)
    assert [w.filename for w in seen] == [__file__]


# ---- what is left as it was ----------------------------------------------------------------------


@both
def test_inputs_and_global_state_are_unchanged(definition):
    x, y = (torch.from_numpy(t) for t in clusters(600, 24, 4))
    x.requires_grad_()
    before = x.detach().clone(), y.clone(), x._version
    torch.set_grad_enabled(True)
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
    q = knowledge_quality(x, y, definition=definition)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert x._version == before[2]
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert settings == (torch.get_num_threads(), torch.get_float32_matmul_precision())
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert q == knowledge_quality(before[0], y, definition=definition)


@pytest.fixture(params=["autocast", "inference", "double", "medium", "newer", "meta", "two"])
def setting(request):
    """Settings of the caller under which the same numbers must come out."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    flags = torch.backends.cuda.matmul
    newer = getattr(flags, "fp32_precision", None)
    contexts = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
        "meta": lambda: torch.device("meta"),
    }
    try:
        if request.param in contexts:
            with contexts[request.param]():
                yield
            return
        if request.param == "double":
            torch.set_default_dtype(torch.float64)
        elif request.param == "medium":
            torch.set_float32_matmul_precision("medium")
        elif request.param == "two":
            torch.set_num_threads(2)
        elif newer is not None:
            flags.fp32_precision = "tf32"
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        if newer is not None:
            flags.fp32_precision = newer
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


# At import, outside of the settings.
_SAMPLE = tuple(torch.from_numpy(t) for t in clusters(600, 300, 4, relu=True))
_EXPECTED = {name: values_of(knowledge_quality(*_SAMPLE, definition=name)) for name in DEFINITIONS}


@both
@pytest.mark.usefixtures("setting")
def test_settings_of_the_caller(definition):
    q = knowledge_quality(*_SAMPLE, definition=definition)
    assert values_of(q) == pytest.approx(_EXPECTED[definition], rel=1e-6)
    for name in TERMS[1:]:
        value = FUNCTIONS[name](*_SAMPLE, definition=definition)
        assert value.dtype is torch.float64
        assert value.item() == pytest.approx(getattr(q, name), rel=1e-9)


@both
def test_again_and_again_the_same(definition):
    assert knowledge_quality(*_SAMPLE, definition=definition) == knowledge_quality(
        *_SAMPLE, definition=definition
    )
