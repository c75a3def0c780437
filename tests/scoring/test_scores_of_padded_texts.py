"""Scores of padded texts are those of each text run by itself."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from small import seeded_model
from texts import CLASSES, bert, gpt, loader, padded, texts
from torch.utils.data import DataLoader

from geomkd import knowledge_quality, score_layers
from geomkd.network.hooks import features_of
from geomkd.scoring.similarity_matrix import similarity_matrix

OF_BERT = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
OF_GPT = ["transformer.h.0", "transformer.h.1"]
POOLED = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "last": lambda x: x[-1]}
POOLED["cls"] = lambda x: x[0]


def of_each(model, items, names, pool):
    """Every layer's pooled features, from texts that are run one by one without padding."""
    found = {name: [] for name in names}
    with torch.no_grad():
        for item in items:
            features = features_of(model.eval(), {"input_ids": item["ids"][None]}, names)
            for name, x in features.items():
                found[name].append(POOLED[pool](x[0]))
    return {name: torch.stack(rows) for name, rows in found.items()}


def quality(model, data, names, pool, **options):
    options = {"subsamples": 0, "progress": False} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a class has fewer than 25 samples")
        scores = score_layers(model, data, names, pool=pool, **options)
    return scores.to_frame().set_index("layer")["quality"][names].tolist()


def expected(model, items, names, pool):
    labels = torch.arange(len(items)) % CLASSES
    each = of_each(model, items, names, pool)
    return pytest.approx([knowledge_quality(x, labels).quality for x in each.values()], abs=1e-4)


@pytest.mark.parametrize("pool", ["mean", "max", "last", "cls"])
@pytest.mark.parametrize("width", [None, 32, 64])
def test_padding_to_any_width_is_none(pool, width):
    model, items = bert(), texts()
    found = quality(model, loader(items, width=width), OF_BERT, pool)
    assert found == expected(model, items, OF_BERT, pool)


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_batches_of_any_size(batch, monkeypatch):
    monkeypatch.setattr("geomkd.scoring.plan.BATCH", batch)
    model, items = bert(), texts()
    assert quality(model, loader(items), OF_BERT, "mean") == expected(model, items, OF_BERT, "mean")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_decoders_padded_on_either_side(side, pool):
    model, items = gpt(), texts()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()  # else places count from where the padding begins
    found = quality(model, loader(items, width=30, side=side), OF_GPT, pool)
    assert found == expected(model, items, OF_GPT, pool)


def test_decoders_have_no_class_token():
    text = "layer 'transformer.h.0': pool='cls' needs a class token in front, which sees others"
    with pytest.raises(ValueError, match=text):
        quality(gpt(), loader(texts()), OF_GPT, "cls")


def test_iterables_keep_their_masks():
    model, items = bert(), texts()
    batches = [padded(items[i : i + 6]) for i in range(0, 60, 6)]
    assert quality(model, iter(batches), OF_BERT, "mean") == expected(model, items, OF_BERT, "mean")


def test_with_forward_the_mask_is_that_of_the_mapping():
    model, items = bert(), texts()
    options = {"forward": lambda model, batch: model.bert(**batch)}
    names = ["bert.encoder.layer.1"]
    found = quality(model, loader(items, width=40), names, "mean", **options)
    assert found == expected(model, items, names, "mean")


@pytest.mark.parametrize("pool", ["flatten", "published", None])
def test_texts_of_unequal_length_are_not_flattened(pool):
    text = (
        f"layer 'bert.encoder.layer.0': pool={pool or 'flatten'!r} needs as many tokens in every "
        "sample; got "
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        quality(bert(), loader(texts(), width=30), OF_BERT, pool)


def test_texts_of_one_length_are_flattened_without_their_padding():
    model, items = bert(), texts()
    items = [{**item, "ids": item["ids"][:3]} for item in items]
    labels = torch.arange(60) % CLASSES
    x = torch.stack([item["ids"] for item in items])
    with torch.no_grad():
        features = features_of(model.eval(), {"input_ids": x}, OF_BERT)
    wanted = [knowledge_quality(f.flatten(1), labels).quality for f in features.values()]
    found = quality(model, loader(items, width=9), OF_BERT, "flatten")
    assert found == pytest.approx(wanted, abs=1e-4)


def test_similarities_of_padded_texts():
    model, items = bert(), texts()
    options = {"pool": "mean", "layers_a": OF_BERT, "batch_size": 60, "progress": False}
    frame = similarity_matrix(model, None, loader(items, width=48), **options)
    alone = of_each(model, items, OF_BERT, "mean")
    direct = similarity_matrix(alone, progress=False)
    np.testing.assert_allclose(frame, direct, atol=1e-5)


# ---- padding that nothing tells ----


def warned(data, model=None, names=OF_BERT):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score_layers(model or bert(), data, names, pool="mean", subsamples=0, progress=False)
    return [w for w in caught if "padded positions" in str(w.message)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_without_a_mask_is_told_once(side):
    (warning,) = warned(loader(texts(), width=30, side=side, mask=False))
    assert str(warning.message) == (
        "inputs end in padding (id 0) and no attention_mask (B, T) is with them: "
        "padded positions count as tokens"
    )
    assert warning.filename == __file__
    ids = padded(texts(), mask=False)
    assert len(warned((ids["input_ids"], ids["labels"]))) == 1  # a pair of tensors too
    with pytest.warns(UserWarning, match="inputs end in padding") as caught:
        similarity_matrix(
            bert(), None, loader(texts(), width=30, mask=False), layers_a=OF_BERT, pool="mean",
            progress=False,
        )  # fmt: skip
    assert {w.filename for w in caught} == {__file__}


def test_no_word_where_nothing_is_padded():
    assert not warned(loader(texts(), width=30))
    whole = [{**item, "ids": item["ids"][:3]} for item in texts()]
    assert not warned(loader(whole, mask=False))
    ids = torch.randint(4, (60, 8), generator=torch.Generator().manual_seed(0))
    assert not warned((ids, torch.arange(60) % 3))  # id 0 is a word like others
    model = bert()
    model.config.pad_token_id = None
    assert not warned(loader(texts(), width=30, mask=False), model)


class Frames(torch.nn.Module):
    """A signal with a mask of its samples, to frames of which there are fewer, or to five."""

    def __init__(self, five=False):
        super().__init__()
        self.frames, self.act = torch.nn.Conv1d(1, 6, 4, 4), torch.nn.ReLU()
        self.pool = torch.nn.AdaptiveAvgPool1d(5) if five else torch.nn.Identity()
        self.head = torch.nn.Linear(6, 3)

    def forward(self, input_values, attention_mask):
        return self.head(self.act(self.pool(self.frames(input_values[:, None]))).mean(2))


def signals(padded):
    x, mask = torch.randn(60, 32, generator=torch.Generator().manual_seed(0)), torch.ones(60, 32)
    mask[::2, 20:] = int(not padded)
    rows = zip(x, mask, strict=True)
    keys = "input_values", "attention_mask", "labels"
    return [dict(zip(keys, (*row, i % 3), strict=True)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("padded", [False, True])
def test_masks_of_other_positions_are_told(padded):
    found = [str(w.message) for w in warned(DataLoader(signals(padded)), Frames(True), ["act"])]
    told = "layers ['act'] have other positions than the 32 of the mask: padded positions count"
    assert found == [f"{told} as tokens"] * padded


def test_of_a_network_that_strides_the_frames_of_padding_count_nowhere():
    model, items = Frames(), signals(padded=True)
    with torch.no_grad():
        rows = [x["input_values"][x["attention_mask"] > 0][None, None] for x in items]
        each = torch.cat([model.act(model.frames(row)).mean(2) for row in rows])
    known = knowledge_quality(each, torch.arange(60) % 3).quality
    assert not warned(DataLoader(items), model, ["act"])
    assert quality(model, DataLoader(items, 8), ["act"], "mean") == pytest.approx([known], abs=1e-4)


def test_a_sequence_is_pooled_over_time():
    layers = torch.nn.Conv1d(1, 5, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(90, 3)
    model = torch.nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 1, 20, generator=generator), torch.arange(60) % 3
    with torch.no_grad():
        f = model[:2](x)
    for pool, by_channel in (("mean", f.mean(2)), ("max", f.amax(2)), ("last", f[:, :, -1])):
        (found,) = quality(model, (x, y), ["1"], pool)
        assert math.isclose(found, knowledge_quality(by_channel, y).quality, rel_tol=1e-5)


def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=40,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return seeded_model(lambda: transformers.T5Model(config))


@pytest.mark.parametrize("width", [24, 30])
def test_a_decoder_goes_by_its_own_mask(width):
    """Whatever stands where its texts are padded, in as many positions as the encoder's or not."""
    items, names = texts(), ["encoder.block.1", "decoder.block.0", "decoder.block.1"]
    batch, other = padded(items, width=24), padded(items[::-1], width=width)
    labels, real = batch.pop("labels"), other["attention_mask"]
    found = []
    for filler in (0, 7):
        ids = other["input_ids"].masked_fill(real == 0, filler)
        inputs = batch | {"decoder_input_ids": ids, "decoder_attention_mask": real}
        found.append(quality(t5(), (inputs, labels), names, "mean"))
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    without = {key: value for key, value in inputs.items() if key != "decoder_attention_mask"}
    alone = quality(t5(), (without, labels), names, "mean")  # all of its positions count
    assert alone[0] == pytest.approx(found[0][0], abs=1e-5)
    assert alone[2] != pytest.approx(found[0][2], abs=1e-3)


def test_padding_that_counts_is_warned_of_wherever_it_is():
    """The first samples, of which shapes are known, are full; the layer has twice the positions."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.act = torch.nn.Linear(4, 4), torch.nn.ReLU()

        def forward(self, x, attention_mask):
            return self.act(self.wide(x.repeat_interleave(2, 1)))

    x, mask = torch.randn(60, 5, 4), torch.ones(60, 5)
    mask[40:, 3:] = 0
    data = {"x": x, "attention_mask": mask}, torch.arange(60) % 2
    text = r"^layers \['act'\] have other positions than the 5 of the mask: padded positions count"
    with pytest.warns(UserWarning, match=text):
        scores = score_layers(Twice(), data, ["act"], pool="mean", subsamples=0, progress=False)
    assert [note for note in scores.settings["notes"] if re.match(text, note)]
