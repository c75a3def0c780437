"""Losses on padded texts are those on their tokens alone; sequences keep channels and time."""

import re

import numpy as np
import pytest
import torch
from formulas import distances, huber, layer, meeting_of, triples, unit_rows
from small import seeded_model
from texts import CLASSES, bert, loader, texts
from torch import nn

from geomkd.distillation import distill
from geomkd.distillation.objectives import Features, StepTensors, projectors_of
from geomkd.distillation.projectors import Alignment, PrincipalComponents, Projector
from geomkd.distillation.rivals import (
    FeatureKD,
    FitNet,
    Relational,
    SemCKD,
    SimilarityPreserving,
)
from geomkd.network.layers import Layer
from geomkd.network.masks import without_padding

LENGTHS = [3, 7, 1, 5, 2, 6]
N = len(LENGTHS)


def tokens(width, channels, name="x", kind="tokens"):
    shape = (width, channels) if kind == "tokens" else (channels, width)
    return Layer(name, kind, shape, place="input")


def mask_of(width, side="right"):
    real = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    return real if side == "right" else real.flip(1)


def put(rows, mask, kind="tokens"):
    """Texts' features padded with numbers that would be noticed, then as a step hands them on."""
    x = torch.full((*mask.shape, rows[0].shape[1]), 1e3, dtype=torch.float64)
    x[mask] = torch.cat(rows)
    x = x if kind == "tokens" else x.transpose(1, 2)
    return without_padding(x, tokens(mask.shape[1], rows[0].shape[1], kind=kind), mask)


def rows_of(channels, seed):
    generator = torch.Generator().manual_seed(seed)
    make = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(length, channels, **make) for length in LENGTHS]


THEIRS, OURS = rows_of(6, 1), rows_of(4, 2)


def parts_of(objective, width, side="right", kind="tokens"):
    """Parts of an objective's loss on the texts, padded to a width."""
    mask, pair = mask_of(width, side), (tokens(width, 6, kind=kind), tokens(width, 4, kind=kind))
    theirs, ours = put(THEIRS, mask, kind), put(OURS, mask, kind)
    one_by_one = torch.cat(THEIRS)[:, None]
    fitted = one_by_one if kind == "tokens" else one_by_one.transpose(1, 2)
    meeting = meeting_of([pair], N, features=[fitted])
    made = projectors_of(objective, meeting).double()
    logits = torch.zeros(N, 3, dtype=torch.float64)
    labels = torch.arange(N) % 3
    step = StepTensors(labels, logits, logits, [ours], [theirs], made, mask)
    loss, parts = objective(step)
    return {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}, made


OBJECTIVES = [
    Features(),
    Features(normalize="channel", distance="cosine"),
    Features(pairing="attention"),
    Features(projector="pca"),
    FitNet(),
    FeatureKD(),
    Relational(),
    SimilarityPreserving(),
]


@pytest.mark.parametrize("kind", ["tokens", "sequence"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_no_loss_knows_how_texts_are_padded(objective, kind):
    known, _ = parts_of(objective, 7)
    for width, side in ((9, "right"), (16, "left")):
        # Similarities compare texts place by place: those of the same side.
        if side == "right" or objective not in OBJECTIVES[-1:] + OBJECTIVES[2:3]:
            assert parts_of(objective, width, side, kind)[0] == pytest.approx(known, rel=1e-9)


def test_features_are_the_mean_over_texts_of_the_mean_over_tokens():
    parts, matching = parts_of(Features(), 12)
    weight = matching.projectors[0].project.weight[:, :, 0, 0]
    each = [((s @ weight.T - t) ** 2).mean().item() for s, t in zip(OURS, THEIRS, strict=True)]
    assert parts["features"] == pytest.approx(np.mean(each), rel=1e-9)


def test_channels_are_standardised_over_tokens():
    parts, matching = parts_of(Features(normalize="channel"), 12)
    weight, every = matching.projectors[0].project.weight[:, :, 0, 0], torch.cat(THEIRS)
    mean, std = every.mean(0), every.std(0, correction=0)
    pairs = zip(OURS, THEIRS, strict=True)
    each = [((s @ weight.T - (t - mean) / std) ** 2).mean().item() for s, t in pairs]
    assert parts["features"] == pytest.approx(np.mean(each), rel=1e-4)


def test_the_hints_batch_normalisation_sees_tokens_alone():
    parts, projector = parts_of(FitNet(), 12)
    x = torch.cat(OURS) @ projector.project[0].weight[:, :, 0, 0].T
    x = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).relu()
    each = [((s - t) ** 2).mean().item() for s, t in zip(x.split(LENGTHS), THEIRS, strict=True)]
    assert parts["hint"] == pytest.approx(np.mean(each), rel=1e-9)


def test_relations_are_those_of_the_texts_means():
    parts, _ = parts_of(Relational(), 12)
    ours, theirs = (np.stack([x.mean(0).numpy() for x in rows]) for rows in (OURS, THEIRS))
    assert parts["distance"] == pytest.approx(huber(distances(ours), distances(theirs)), rel=1e-9)
    assert parts["angle"] == pytest.approx(huber(triples(ours), triples(theirs)), rel=1e-9)


def test_similarities_are_of_the_places_that_both_texts_have():
    parts, _ = parts_of(SimilarityPreserving(), 12)

    def gram(rows):
        rows = [x.numpy() for x in rows]
        shared = [[(a[: len(b)] * b[: len(a)]).sum() for b in rows] for a in rows]
        return unit_rows(np.array(shared))

    expected = ((gram(OURS) - gram(THEIRS)) ** 2).mean()
    assert parts["similarity"] == pytest.approx(expected, rel=1e-9)


def test_a_vector_meets_the_mean_of_a_text():
    mask = mask_of(8)
    align = Alignment(layer("vector", 6), tokens(8, 6))
    ours, theirs = align(torch.zeros(N, 6).double(), put(THEIRS, mask), mask)
    assert ours.shape == theirs.shape == (N, 6, 1, 1)
    torch.testing.assert_close(theirs.flatten(1), torch.stack([x.mean(0) for x in THEIRS]))


def test_principal_components_are_those_of_the_tokens():
    features = torch.cat(THEIRS)[:, None]
    projector = PrincipalComponents(tokens(9, 4), tokens(9, 6), features=features).double()
    x = torch.cat(THEIRS).numpy()
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    _, target = projector(put(OURS, mask_of(9)), put(THEIRS, mask_of(9)), mask_of(9))
    expected = (x - x.mean(0)) @ axes[:4].T
    np.testing.assert_allclose(np.abs(target.flatten(1).numpy()), np.abs(expected), atol=1e-9)


# ---- what meets what ----


def line(kind, *shape, name="x"):
    return Layer(name, kind, shape, place="line")


def test_sequences_project_channels_and_average_lengths():
    student, teacher = line("sequence", 4, 6), line("sequence", 7, 12)
    projector = Projector(student, teacher).double()
    x, t = torch.randn(3, 4, 6).double(), torch.randn(3, 7, 12).double()
    found, target = projector(x, t)
    weight = projector.project.weight.detach().numpy()[:, :, 0, 0]
    np.testing.assert_allclose(found[..., 0].detach(), np.einsum("oc,bct->bot", weight, x))
    np.testing.assert_allclose(target[..., 0], t.numpy().reshape(3, 7, 6, 2).mean(3))


@pytest.mark.parametrize(
    ("student", "teacher", "shape"),
    [
        (line("sequence", 4, 25), line("sequence", 4, 100), (4, 25, 1)),
        (line("sequence", 4, 8), line("tokens", 20, 4), (4, 8, 1)),
        (line("tokens", 7, 4), line("tokens", 20, 4), (4, 7, 1)),  # no square on either side
        (line("tokens", 16, 4), line("tokens", 9, 4), (4, 9, 1)),  # nor where there were one
        (line("sequence", 4, 25), layer("vector", 4), (4, 1, 1)),
        (layer("vector", 4), line("tokens", 7, 4), (4, 1, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["none", "linear", "mlp"])
def test_signals_meet_along_their_line(student, teacher, shape, kind):
    x, t = torch.randn(3, *student.shape), torch.randn(3, *teacher.shape)
    found, target = Projector(student, teacher, kind=kind)(x, t)
    assert found.shape == target.shape == (3, *shape)


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "text"),
    [
        (tokens(9, 4), tokens(9, 4), "mlp", r"each by itself; got a projector that mixes neighb"),
        (tokens(9, 4, "a"), layer("map", 4, 3, 3), "linear", "^tokens of 'a' have no grid to meet"),
        (
            line("sequence", 4, 9, name="b"),
            layer("tokens", 9, 4),
            "linear",
            "^sequence of 'b' have",
        ),
    ],
)
def test_layers_that_do_not_meet(student, teacher, kind, text):
    with pytest.raises(ValueError, match=text):
        Projector(student, teacher, kind=kind)


def test_neighbours_of_tokens_are_not_asked_for():
    text = r"pair \('t', 's'\): a text's tokens meet others of it, each by itself; got a projec"
    with pytest.raises(ValueError, match=text):
        projectors_of(SemCKD(), meeting_of([(tokens(8, 6, "t"), tokens(8, 4, "s"))]))


# ---- runs ----

PAIRS = [(f"bert.encoder.layer.{i}",) * 2 for i in range(2)]


def run(data, **options):
    options = {"pairs": PAIRS, "epochs": 1, "batch_size": 8, "progress": False} | options
    return distill(bert(8), bert(16, seed=1), data, **options)


@pytest.mark.parametrize("objective", ["features", "fitnet", "relational", "similarity_preserving"])
def test_training_does_not_know_how_texts_are_padded(objective):
    items = texts(24)
    dynamic = run(loader(items), objective=objective)
    wide = run(loader(items, width=40), objective=objective)
    columns = [c for c in dynamic.history if c not in ("seconds", "train_accuracy")]
    expected = wide.history[columns].iloc[0].to_dict()
    assert dynamic.history[columns].iloc[0].to_dict() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("objective", ["attention_transfer", "semckd", "simkd"])
def test_objectives_of_places_on_maps_say_so(objective):
    text = (
        r"needs maps; layer .* gives tokens|is put on maps; layer .* gives tokens|mixes neighbours"
    )
    with pytest.raises(ValueError, match=text):
        run(loader(texts(24)), objective=objective)


def test_principal_components_of_texts_of_many_lengths():
    items, options = texts(24), {"objective": Features(projector="pca"), "batch_size": 6}
    losses = [run(loader(items, **w), **options).history["features"] for w in ({}, {"width": 40})]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-3)


def test_teachers_answers_in_files_need_texts_of_one_width(tmp_path):
    text = re.escape(
        "cache_dir= keeps tokens of samples of one length; got several: pad all to the "
    )
    with pytest.raises(ValueError, match=text):
        run(loader(texts(24)), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    cached = run(loader(texts(24), width=30), cache_dir=tmp_path)
    live = run(loader(texts(24), width=30))
    losses = [result.history["features"].iloc[0] for result in (cached, live)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_padding_without_a_mask_is_told():
    with pytest.warns(UserWarning, match="inputs end in padding") as caught:
        run(loader(texts(24), mask=False))
    assert [w.filename for w in caught] == [__file__]


def network(c, seed=0):
    layers = [nn.Conv1d(1, c, 5, 2, 2), nn.ReLU(), nn.Conv1d(c, c, 5, 2, 2), nn.ReLU()]
    head = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(c, CLASSES)]
    return seeded_model(lambda: nn.Sequential(*layers, *head), seed)


@pytest.mark.parametrize(
    "objective", ["features", "fitnet", "relational", "similarity_preserving", "semckd"]
)
def test_signals_from_a_layer_of_another_length(objective):
    x, y = torch.randn(24, 1, 50, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    result = distill(
        network(4), network(7, 1), (x, y), pairs=[("1", "3")], objective=objective, epochs=1,
        batch_size=8, progress=False,
    )  # fmt: skip
    shapes = [tuple(p.shape) for p in result.projectors.parameters() if p.ndim == 4]
    if objective in ("features", "fitnet"):
        assert shapes == [(7, 4, 1, 1)]
