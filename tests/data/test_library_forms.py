"""Data as Hugging Face's libraries hand it over: each form is the same samples to both readers."""

import copy

import pytest
import torch
from small import seeded_model
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils.data import DataLoader, default_collate
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerFast

from geomkd import distill, score_layers

N, LENGTH = 48, 6
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 20, (N, LENGTH), generator=GENERATOR)
MASK = torch.ones_like(IDS)
Y = torch.arange(N) % 3
WHOLE = {"input_ids": IDS, "attention_mask": MASK}


class Encoder(nn.Module):
    """Takes what a tokenizer gives, by name."""

    def __init__(self):
        super().__init__()
        self.words, self.relu, self.head = nn.Embedding(20, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        mean = (self.words(input_ids) * attention_mask[..., None]).sum(1) / LENGTH
        return {"logits": self.head(self.relu(mean))}


def part(index):
    return {key: value[index] for key, value in WHOLE.items()}


def encoded(items):
    inputs, labels = default_collate(items)
    return BatchEncoding(inputs), labels


ROWS = range(N)
FORMS = {
    "(BatchEncoding, y)": (BatchEncoding(WHOLE), Y),
    "(dict, y)": ({key: value.numpy() for key, value in WHOLE.items()}, Y.numpy()),
    "{..., labels}": WHOLE | {"labels": Y},
    "BatchEncoding with label": BatchEncoding(WHOLE | {"label": Y}),
    "samples (dict, y)": [(part(i), int(Y[i])) for i in ROWS],
    "samples (BatchEncoding, y)": [(BatchEncoding(part(i)), Y[i]) for i in ROWS],
    "samples {..., labels}": [part(i) | {"labels": Y[i]} for i in ROWS],
    "loader of dicts": DataLoader([part(i) | {"label": int(Y[i])} for i in ROWS], batch_size=5),
    "loader of (BatchEncoding, y)": DataLoader(
        [(part(i), int(Y[i])) for i in ROWS], batch_size=5, collate_fn=encoded
    ),
}
STARTS = range(0, N, 16)
BATCHES = {
    "batches (BatchEncoding, y)": [
        (BatchEncoding(part(slice(i, i + 16))), Y[i : i + 16]) for i in STARTS
    ],
    "batches (dict, y)": [(part(slice(i, i + 16)), Y[i : i + 16]) for i in STARTS],
    "batches {..., label}": [part(slice(i, i + 16)) | {"label": Y[i : i + 16]} for i in STARTS],
}


def scored(data, **options):
    frame = score_layers(seeded_model(Encoder), data, subsamples=0, progress=False, **options)
    return frame.to_frame()["quality"].tolist()


def trained(data, **options):
    options = {"objective": "ce", "epochs": 1, "batch_size": 16, "progress": False} | options
    result = distill(seeded_model(Encoder), None, data, val=data, **options)
    return result.history[["loss", "val_accuracy"]].iloc[0].tolist()


@pytest.fixture(scope="module")
def expected():
    class Pairs(torch.utils.data.Dataset):
        targets = Y

        def __len__(self):
            return N

        def __getitem__(self, i):
            return part(i), Y[i]

    return scored(Pairs()), trained(Pairs())


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_scored_and_trained_on(form, expected):
    data = copy.copy(FORMS[form])
    assert (scored(data), trained(data)) == expected


@pytest.mark.parametrize("form", BATCHES)
def test_batches_are_scored(form, expected):
    assert scored(BATCHES[form]) == expected[0]


def test_keys_that_are_named_count_before_those_that_are_found(expected):
    data = WHOLE | {"label": Y.flip(0), "kind": Y}
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        scored(data, label_key="kind")
    only = {"ids": IDS, "kind": Y, "labels": Y.flip(0)}
    forward = {"forward": lambda model, ids: model(ids, MASK[: len(ids)])}
    keys = {"input_key": "ids", "label_key": "kind"}
    assert scored(only, **keys, **forward) == expected[0]
    assert trained(only, **keys, **forward) == expected[1]


def test_labels_in_place_of_those_of_a_mapping(expected):
    assert scored(WHOLE, labels=Y) == scored((WHOLE, Y.flip(0)), labels=Y) == expected[0]


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ((BatchEncoding({"input_ids": IDS.tolist()}), Y), TypeError, r"inputs\['input_ids'\] must"),
        (({"input_ids": IDS, "attention_mask": MASK[:9]}, Y), ValueError, r"6\) and \(9, 6\)"),
        (({}, Y), ValueError, "inputs must be .*; got shape none"),
        (WHOLE | {"labels": Y[:9]}, ValueError, "as many as the features, n = 48; got 9"),
        (WHOLE, ValueError, "label_key must be one of the batch's keys .*; got None"),
        ([(part(i), str(i)) for i in ROWS], TypeError, "labels must hold numbers torch knows"),
        (
            [{"input_ids": IDS[i].tolist(), "label": int(Y[i])} for i in ROWS],
            TypeError,
            r"got lists in .* \(a Hugging Face .* after .with_format\('torch'\)",
        ),
        (
            [({"input_ids": IDS[i, : 1 + i % 5]}, int(Y[i])) for i in ROWS],
            ValueError,
            "make no batch .*: pad them, or give a DataLoader whose .*DataCollatorWithPadding",
        ),
    ],
)
def test_what_is_no_such_data_says_so(data, error, text):
    for act in (scored, trained):
        with pytest.raises(error, match=text):
            act(data)


@pytest.mark.parametrize("images", [(24, 3, 8, 8), (24, 8, 8, 3)])
def test_uint8_images_are_told_to_be_normalised(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    raw, y = torch.randint(0, 256, images, dtype=torch.uint8, generator=GENERATOR), Y[:24]
    shape = ", ".join(map(str, images[1:]))
    text = rf"uint8, \(\d, {shape}\) .*normalise them as the model was trained: x.float\(\) / 255"
    with pytest.raises(ValueError, match=text):
        score_layers(model, (raw, y), progress=False)
    with pytest.raises(ValueError, match=text):
        distill(model, None, (raw, y), objective="ce", progress=False)


def test_uint8_images_that_a_model_takes_as_they_are():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(144, 3)

        def forward(self, x):
            return self.head(self.act(self.conv(x.float())).flatten(1))

    raw = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)
    model, options = seeded_model(Casting), {"subsamples": 0, "progress": False}
    with pytest.warns(UserWarning, match="takes 0 ... 255 as they are: .*normalise them as"):
        score_layers(model, (raw, Y[:24]), **options)
    score_layers(model, (raw, Y[:24]), forward=lambda m, x: m(x), **options)  # no word
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ValueError, match="normalise them as the model was trained"):
        score_layers(plain, (raw, Y[:24]), labels="predicted", **options)


def test_a_model_that_scales_uint8_itself_gets_it():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.head = nn.ReLU(), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.relu(x.float() / 255 - 0.5))

    raw = torch.randint(0, 256, (24, 8), dtype=torch.uint8, generator=GENERATOR)
    score_layers(seeded_model(Scaling), (raw, Y[:24]), subsamples=0, progress=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        score_layers(seeded_model(Scaling), (raw[:, :5].float(), Y[:24]), progress=False)


def test_a_hugging_face_dataset(expected, monkeypatch):
    datasets = pytest.importorskip("datasets")
    columns = {key: value.tolist() for key, value in WHOLE.items()} | {"label": Y.tolist()}
    plain = datasets.Dataset.from_dict(columns)
    data = plain.with_format("torch")
    assert (scored(data), trained(data)) == expected
    assert scored(DataLoader(data, batch_size=7)) == expected[0]
    with pytest.raises(TypeError, match=r"after .with_format\('torch'\)"):
        scored(plain)
    # Its labels are read as a column, not sample by sample.
    asked = []
    whole = type(data).__getitems__
    monkeypatch.setattr(
        type(data), "__getitems__", lambda self, index: asked.extend(index) or whole(self, index)
    )
    scored(data, samples=6, layers=["relu"])
    assert len(set(asked)) == 6


def test_texts_of_unequal_length_are_padded_by_a_collate_function():
    words = {"[PAD]": 0} | {str(i): i for i in range(1, 20)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="[PAD]"
    )
    texts = [{"input_ids": IDS[i, : 1 + i % 5].tolist(), "label": int(Y[i])} for i in ROWS]
    loader = DataLoader(texts, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer))
    assert len(scored(loader)) == 1 and 0 <= trained(loader)[1] <= 1
