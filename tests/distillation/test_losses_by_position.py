"""Tokens of one text that are not as many, or not padded alike, in teacher and student."""

import re

import numpy as np
import pytest
import torch
from formulas import meeting_of
from small import seeded_model
from texts import CLASSES, bert, padded, texts
from torch import nn
from torch.utils.data import DataLoader

from geomkd.distillation import distill
from geomkd.distillation.objectives import Features, StepTensors, projectors_of
from geomkd.distillation.projectors import Alignment, Projector
from geomkd.distillation.rivals import FeatureKD, FitNet, Relational, SimilarityPreserving
from geomkd.network.layers import Layer, describe_layers
from geomkd.network.masks import mask_of, without_padding

LENGTHS = [3, 7, 1, 5, 2, 6]
FEWER = [2, 7, 1, 3, 1, 3]  # as many here and there
N = len(LENGTHS)


def tokens(width, channels, place="input"):
    return Layer("x", "tokens", (width, channels), place=place)


def side_of(lengths, channels, width, padding, seed):
    """A network's mask and features, padded with what would be noticed, of the same rows always."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, channels, generator=generator, dtype=torch.float64) for n in lengths]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask = mask if padding == "right" else mask.flip(1)
    x = torch.full((N, width, channels), 1e3, dtype=torch.float64)
    x[mask] = torch.cat(rows)
    return rows, mask, without_padding(x, tokens(width, channels), mask)


def averaged(rows, n):
    """Cells of as even a length as may be, overlapping where they have to."""
    t = len(rows)
    return np.stack([rows[i * t // n : -(-(i + 1) * t // n)].mean(0) for i in range(n)])


def error_of(objective, ours=(LENGTHS, 9, "right"), theirs=(LENGTHS, 9, "right")):
    (lengths, width, padding), (their_lengths, their_width, their_padding) = ours, theirs
    s_rows, s_mask, s = side_of(lengths, 4, width, padding, 1)
    t_rows, t_mask, t = side_of(their_lengths, 6, their_width, their_padding, 2)
    meeting = meeting_of([(tokens(their_width, 6), tokens(width, 4))], N)
    made, logits = projectors_of(objective, meeting).double(), torch.zeros(N, 3).double()
    step = StepTensors(torch.arange(N) % 3, logits, logits, [s], [t], made, (s_mask, t_mask))
    return {k: v.item() for k, v in objective(step)[1].items()}, made, s_rows, t_rows


@pytest.mark.parametrize("objective", [Features(), FitNet(), FeatureKD(), Relational()], ids=repr)
@pytest.mark.parametrize("lengths", [LENGTHS, FEWER])
def test_no_side_knows_how_the_other_is_padded(objective, lengths):
    known = error_of(objective, (lengths, 7, "right"))[0]
    for ours, theirs in (((7, "left"), (12, "right")), ((64, "right"), (128, "left"))):
        found = error_of(objective, (lengths, *ours), (LENGTHS, *theirs))[0]
        assert found == pytest.approx(known, rel=1e-9)


def test_as_many_tokens_meet_one_by_one():
    parts, matching, ours, theirs = error_of(
        Features(), (LENGTHS, 64, "left"), (LENGTHS, 128, "right")
    )
    weight = matching.projectors[0].project.weight.detach().numpy()[:, :, 0, 0]
    pairs = zip(ours, theirs, strict=True)
    each = [((s.numpy() @ weight.T - t.numpy()) ** 2).mean() for s, t in pairs]
    assert parts["features"] == pytest.approx(np.mean(each), rel=1e-9)


@pytest.mark.parametrize("swapped", [False, True])
def test_more_tokens_are_averaged_to_the_fewer(swapped):
    lengths = (LENGTHS, FEWER) if swapped else (FEWER, LENGTHS)
    parts, matching, ours, theirs = error_of(
        Features(), (lengths[0], 8, "right"), (lengths[1], 11, "left")
    )
    weight, each = matching.projectors[0].project.weight.detach().numpy()[:, :, 0, 0], []
    for s, t, n in zip(ours, theirs, FEWER, strict=True):
        s, t = averaged(s.numpy(), n), averaged(t.numpy(), n)
        each.append(((s @ weight.T - t) ** 2).mean())
    assert parts["features"] == pytest.approx(np.mean(each), rel=1e-9)


def test_without_a_mask_all_positions_are_real():
    projector = Projector(tokens(4, 4), tokens(7, 6)).double()
    s, t = torch.randn(3, 4, 4).double(), torch.randn(3, 7, 6).double()
    found, target = projector(s, t)
    wanted = np.stack([averaged(x, 4).T for x in t.numpy()])
    np.testing.assert_allclose(target[..., 0], wanted, rtol=1e-12)
    assert found.shape == target.shape
    # A mask of one side alone says nothing of the other.
    mask = torch.arange(7) < torch.tensor([7, 2, 4])[:, None]
    error = projector.error(s, t, (None, mask))
    of_second = projector.error(s[1:2], t[1:2, :2])
    torch.testing.assert_close(error[1:2], of_second)
    torch.testing.assert_close(error[0], ((found - target) ** 2).flatten(1).mean(1)[0])


def test_gradients_reach_the_student_where_it_is_real():
    _, s_mask, s = side_of(FEWER, 4, 8, "right", 1)
    _, t_mask, t = side_of(LENGTHS, 6, 9, "left", 2)
    s.requires_grad_()
    projector = Projector(tokens(8, 4), tokens(9, 6)).double()
    projector.error(s, t, (s_mask, t_mask)).sum().backward()
    assert (s.grad[s_mask] != 0).all() and (s.grad[~s_mask] == 0).all()
    assert t.grad is None and not t.requires_grad


# ---- networks that stride, and those of which nothing is told ----


def test_stretches_of_a_mask():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0]]) > 0
    layer, x = tokens(4, 5, "stretch"), torch.zeros(3, 4, 5)
    wanted = [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert mask_of(layer, mask, x).int().tolist() == wanted
    with pytest.raises(ValueError, match="expected positions as in the mask"):
        mask_of(layer, mask, torch.zeros(3, 8, 5))


class Strided(nn.Module):
    """Words, and a block for each two of them; or as many latents as ever."""

    def __init__(self, latents=0, width=8):
        super().__init__()
        self.words = nn.Embedding(40, width, padding_idx=0)
        self.halve, self.act = nn.Conv1d(width, width, 2, 2, bias=False), nn.ReLU()
        self.latents = nn.Parameter(torch.randn(latents, width)) if latents else None
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        if self.latents is None:
            x = self.halve(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = (self.latents @ x.transpose(1, 2)).softmax(2) @ x
        return self.head(self.act(self.mix(x)).mean(1))


def strided(**options):
    return seeded_model(lambda: Strided(**options))


def place_of(model, inputs):
    return describe_layers(model, ["act"], inputs)[0].place


def test_places_under_a_mask():
    batch = padded(texts(4), width=24)
    masked = {k: v for k, v in batch.items() if k != "labels"}
    bare = {"input_ids": masked["input_ids"]}
    assert place_of(strided(), masked) == "stretch" and place_of(strided(), bare) == "line"
    assert place_of(strided(latents=5), masked) == "apart"
    assert place_of(strided(latents=30), masked) == "apart"
    assert masked["input_ids"].shape == (4, 24)  # what was run on half of it is a copy


def test_what_follows_no_mask_meets_no_tokens():
    text = r"a text's tokens meet others of it, each by itself; got positions of 'x' apart from the"
    for sides in ((tokens(9, 4), tokens(5, 4, "apart")), (tokens(5, 4, "apart"), tokens(9, 4))):
        with pytest.raises(ValueError, match=text):
            Alignment(*sides)
    Alignment(tokens(5, 4, "apart"), tokens(5, 4, "apart"))  # latents do


def run(student, data, **options):
    options = {"pairs": [("bert.encoder.layer.1", "act")], "epochs": 1, "batch_size": 8} | options
    return distill(student, bert(16, seed=1), data, progress=False, **options).history.iloc[0]


def loader(items, of_student=None, of_teacher=None):
    """Batches with one input for both networks, or with a part for each."""

    def collate(batch):
        both = [padded(batch, **(o or {})) for o in (of_student, of_teacher)]
        labels = both[0].pop("labels"), both[1].pop("labels")
        if of_teacher is None:
            return both[0] | {"labels": labels[0]}
        return {"student": both[0], "teacher": both[1], "labels": labels[0]}

    return DataLoader(items, 8, collate_fn=collate)


@pytest.mark.parametrize(
    "objective", [Features(), FitNet(), Relational(), SimilarityPreserving()], ids=repr
)
def test_a_student_that_strides_does_not_know_how_texts_are_padded(objective):
    losses = []
    for width in (24, 40):
        history = run(strided(), loader(texts(24), {"width": width}), objective=objective)
        losses.append(history.drop(["seconds", "loss", "train_accuracy", "cross_entropy"]))
    assert losses[0].to_dict() == pytest.approx(losses[1].to_dict(), rel=1e-3)
    assert len(losses[0]) > 1


def test_a_student_that_strides_is_refused_its_neighbours_and_its_latents():
    with pytest.raises(ValueError, match="got a projector that mixes neighbours"):
        run(strided(), loader(texts(24), {"width": 24}), objective=Features(projector="mlp"))
    whole = [{**item, "ids": item["ids"][:3]} for item in texts(24)]  # else there is a warning too
    with pytest.raises(ValueError, match="got positions of 'act' apart from the mask's"):
        run(strided(latents=2), loader(whole))


# ---- a part of the inputs for each network ----

PAIRS = [(f"bert.encoder.layer.{i}",) * 2 for i in range(2)]


def test_inputs_of_each_network_with_a_mask_of_its_own(tmp_path):
    items, options = texts(24), {"pairs": PAIRS}
    data = loader(items), loader(items, {}, {"width": 40})
    for objective in ("features", "relational", Features(projector="pca")):
        both = [run(bert(), given, objective=objective, **options) for given in data]
        one, other = (history.drop("seconds").to_dict() for history in both)
        assert other == pytest.approx(one, rel=1e-3)
    # The teacher's answers are of texts of one width; the student's batches need not be.
    cached = run(bert(), data[1], cache_dir=tmp_path, val=data[1], **options)
    live = run(bert(), data[0], **options)
    assert cached["features"] == pytest.approx(live["features"], rel=1e-3)
    assert cached["val_accuracy"] >= 0


def test_another_tokenizer_gives_fewer_tokens():
    items = texts(24, least=6)

    def collate(batch):
        pairs = [{**item, "ids": item["ids"][::2]} for item in batch]
        ours, theirs = padded(pairs), padded(batch, side="left")
        labels = ours.pop("labels"), theirs.pop("labels")
        return {"student": ours, "teacher": theirs, "labels": labels[0]}

    result = run(bert(), DataLoader(items, 8, collate_fn=collate), pairs=PAIRS)
    assert np.isfinite(result["features"])


def test_padding_without_a_mask_is_told_of_the_part_that_has_none():
    data = loader(texts(24), {}, {"mask": False})
    with pytest.warns(UserWarning, match=re.escape("inputs end in padding (id 0)")) as caught:
        run(bert(), data, pairs=PAIRS)
    assert [w.filename for w in caught] == [__file__]
