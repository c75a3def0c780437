"""What is offered of models of three libraries against the table of what their definitions have."""

import pytest
import torch
from architectures import ARCHITECTURES

from geomkd.network.layers import candidate_layers, describe_layers


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda row: row.id)
def case(request):
    """A row, the layers that its model offers, and what is told of its head's input by name."""
    row = request.param
    with torch.device(row.device):
        model, example = row.build()
        layers = candidate_layers(model, example)
        head = describe_layers(model, [row.head], example) if row.stands else []
    return row, layers, head


def names_of(layers, role):
    return [layer.name for layer in layers if layer.role == role]


def test_blocks(case):
    row, layers, _ = case
    blocks = names_of(layers, "block")
    assert len(blocks) == row.blocks, blocks
    assert blocks[:1] + blocks[-1:] == [name for name in (row.first, row.last) if name]


def test_transitions(case):
    row, layers, _ = case
    assert names_of(layers, "transition") == row.transitions.split()


def test_the_input_of_the_head(case):
    row, layers, head = case
    heads = names_of(layers, "head_input")
    if row.stands:  # of two candidates that are one tensor the first is offered
        assert (heads, names_of(head, "head_input")) == ([], [row.head])
        assert [layer.name for layer in layers if layer.feeds_head] == [row.stands]
    else:
        assert heads == [name for name in [row.head] if name]


def test_no_class_scores(case):
    row, layers, _ = case
    offered = [layer.name for layer in layers]
    assert offered and len(set(offered)) == len(offered)
    for scores in row.score_modules:
        # Neither the last module of a head nor what is around it.
        assert not [name for name in offered if f"{scores}.".startswith(f"{name}.")]
