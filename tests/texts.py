"""Texts of unequal length, padded as a tokenizer's collator pads them, and small models of them."""

import pytest
import torch
from small import seeded_model
from torch.nn.functional import pad
from torch.utils.data import DataLoader

CLASSES, LONGEST = 3, 24


def texts(n=60, least=3):
    """Ids of texts whose first and frequent words tell their class."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(least, LONGEST, (n,), generator=generator).tolist()
    ids = [torch.randint(5, 30, (length,), generator=generator) for length in lengths]
    for i, text in enumerate(ids):
        text[::3] = 30 + i % CLASSES
    return [{"ids": text, "label": i % CLASSES} for i, text in enumerate(ids)]


def padded(items, width=None, side="right", mask=True):
    """A batch of texts; to the longest of them, or to a width."""
    width = width or max(len(item["ids"]) for item in items)
    gaps = [width - len(item["ids"]) for item in items]
    rows = [(0, gap) if side == "right" else (gap, 0) for gap in gaps]
    ids = torch.stack([pad(item["ids"], row) for item, row in zip(items, rows, strict=True)])
    batch = {"input_ids": ids, "labels": torch.tensor([item["label"] for item in items])}
    return batch | ({"attention_mask": (ids > 0).long()} if mask else {})


def loader(items, *, batch_size=8, **options):
    return DataLoader(items, batch_size, collate_fn=lambda batch: padded(batch, **options))


def bert(width=8, seed=0):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return seeded_model(lambda: transformers.BertForSequenceClassification(config), seed)


def gpt(width=8):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=width, n_layer=2, n_head=2, n_positions=64, num_labels=CLASSES,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return seeded_model(lambda: transformers.GPT2ForSequenceClassification(config))
