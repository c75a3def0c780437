"""Masks as libraries write them, and class tokens that are there or not."""

import re

import pytest
import torch
from small import seeded_model, vit
from torch import nn

from geomkd.network.forward import evaluating
from geomkd.network.layers import Layer, candidate_layers, describe_layers
from geomkd.network.masks import check_class_token, mask_of, masks_in, prefix_of, token_mask

REAL = torch.tensor([[1, 1, 0], [1, 0, 0]]) > 0


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.uint8, torch.half])
def test_masks_of_any_type(dtype):
    found = token_mask({"input_ids": REAL.long(), "attention_mask": REAL.to(dtype)})
    assert torch.equal(found, REAL)


@pytest.mark.parametrize("mask", [~REAL, torch.zeros(2, 3).masked_fill(~REAL, -torch.inf)])
def test_masks_as_torch_takes_them(mask):
    assert torch.equal(token_mask({"src": REAL, "src_key_padding_mask": mask}), REAL)
    added = torch.zeros(2, 3).masked_fill(~REAL, -1e9)  # to attention scores
    assert torch.equal(token_mask({"attention_mask": added}), REAL)


@pytest.mark.parametrize(
    "inputs",
    [
        REAL,
        (REAL, REAL),
        {"x": REAL},
        {"attention_mask": REAL[:, None, None]},
        {"attention_mask": 1},
    ],
)
def test_no_mask(inputs):
    assert token_mask(inputs) is None


def test_a_mask_speaks_of_the_inputs_positions_alone():
    x = torch.zeros(2, 3, 5)
    assert mask_of(Layer("x", "tokens", (3, 5), place="input"), REAL, x) is REAL
    assert mask_of(Layer("x", "sequence", (5, 3), place="input"), REAL, x.transpose(1, 2)) is REAL
    for place in ("grid", "line", "decoder"):
        assert mask_of(Layer("x", "tokens", (3, 5), place=place), REAL, x) is None
    text = "expected positions as in the mask, (2, 3); got torch.Size([2, 4, 5])"
    with pytest.raises(ValueError, match=re.escape(text)):
        mask_of(Layer("x", "tokens", (3, 5), place="input"), REAL, torch.zeros(2, 4, 5))


def test_a_decoder_has_a_mask_of_its_own():
    other, x = torch.tensor([[1, 1], [1, 0]]), torch.zeros(2, 2, 5)
    decoder = Layer("x", "tokens", (2, 5), place="decoder")
    masks = masks_in({"attention_mask": REAL, "decoder_attention_mask": other})
    assert torch.equal(mask_of(decoder, masks, x), other > 0)
    assert (
        mask_of(Layer("x", "tokens", (3, 5), place="input"), masks, torch.zeros(2, 3, 5))
        is not None
    )
    assert masks_in({"attention_mask": REAL}) is not None and mask_of(decoder, REAL, x) is None


def test_tokens_in_front_of_a_square():
    counts = [1, 2, 4, 5, 6, 7, 9, 10, 14, 49, 50, 196, 197, 198, 201]
    prefixes = [0, 1, 0, 1, 2, None, 0, 1, 5, 0, 1, 0, 1, 2, 5]
    assert [prefix_of(n) for n in counts] == prefixes


class Text(nn.Module):
    """Ids to tokens, each seeing those that `sees` tells."""

    def __init__(self, sees):
        super().__init__()
        self.words, self.sees = nn.Embedding(20, 8), sees
        self.time = nn.GRU(8, 8, batch_first=True, bidirectional=sees == "all")
        self.act = nn.Tanh()
        self.head = nn.Linear(16 if sees == "all" else 8, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.act(self.time(self.words(input_ids))[0])
        return self.head(x[:, 0])


def texts(n=3, length=9):
    ids = torch.randint(1, 20, (n, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def checked(model, inputs, **options):
    with evaluating(model):
        check_class_token(model, candidate_layers(model, inputs, **options), inputs, None)


@pytest.mark.parametrize("sees", ["all", "past"])
@pytest.mark.parametrize("form", [dict, lambda x: x["input_ids"], lambda x: (x["input_ids"],)])
def test_a_first_token_of_a_text_has_to_see_the_others(sees, form):
    model, inputs = seeded_model(lambda: Text(sees)), form(texts())
    if sees == "all":
        return checked(model, inputs)
    text = (
        "^layer 'act': pool='cls' needs a class token in front, which sees others; got 9 tokens "
        "without one: pass pool='mean', 'max' or 'last'$"
    )
    with pytest.raises(ValueError, match=text):
        checked(model, inputs)


def test_all_layers_of_one_length_are_looked_at_in_two_passes():
    model, calls = seeded_model(lambda: Text("all")), []
    names = ["time", "act", "words"]
    layers = describe_layers(model, names, texts())
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    text = "^layer 'words': pool='cls' needs a class token in front"
    with evaluating(model), pytest.raises(ValueError, match=text):
        check_class_token(model, layers, texts(), None)
    assert len(calls) == 2
    check_class_token(model, layers[:2], texts(), None)


class Patches(nn.Module):
    """An image's patches, tokens of a parameter in front of them."""

    def __init__(self, n_before=0, name="cls_token"):
        super().__init__()
        self.patches, self.act, self.head = nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Linear(8, 3)
        setattr(self, name, nn.Parameter(torch.zeros(1, n_before, 8)))
        self.name = name

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(
            self.act(torch.cat([getattr(self, self.name).expand(len(x), -1, -1), x], 1))[:, 0]
        )


SQUARE, OBLONG = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 12)


@pytest.mark.parametrize(
    ("model", "images", "known"),
    [
        (vit(), torch.zeros(2, 3, 32, 32), True),
        (Patches(1), SQUARE, True),
        (Patches(5, "other"), SQUARE, True),
        (Patches(0, "other"), SQUARE, False),  # a mixer: all of them are patches
        (Patches(0), SQUARE, False),  # the parameter comes in later layers
        (Patches(1), OBLONG, True),
        (Patches(1, "other"), OBLONG, False),  # no square, no name
    ],
)
def test_class_tokens_of_images(model, images, known):
    if known:
        return checked(model, images)
    with pytest.raises(ValueError, match=r"pool='cls' needs a class token in front"):
        checked(model, images)


def test_frames_of_a_signal_have_no_class_token():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with pytest.raises(ValueError, match=r"layer '.*': pool='cls' needs a class token in front"):
        checked(model, torch.zeros(2, 10, 4))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["Bert", "BertDecoder", "GPT2"])
def test_class_tokens_of_encoders_and_decoders(kind, side):
    transformers = pytest.importorskip("transformers")
    if kind == "GPT2":
        config = transformers.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=2
        )
        model = seeded_model(lambda: transformers.GPT2Model(config))
    else:
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=8, is_decoder=kind == "BertDecoder",
        )  # fmt: skip
        model = seeded_model(lambda: transformers.BertModel(config))
    inputs = texts(2)
    padding = torch.arange(9) > 4
    inputs["attention_mask"][1, padding if side == "right" else padding.flip(0)] = 0
    if kind == "Bert":
        return checked(model, inputs)
    with pytest.raises(ValueError, match=r"pool='cls' needs a class token in front"):
        checked(model, inputs)
