"""What is offered of models of three libraries against the table of what their definitions have."""

from collections import Counter

import pytest
import torch
from architectures import ARCHITECTURES

from geomkd.network.layers import candidate_layers, describe_layers


def names_of(layers, role):
    return [layer.name for layer in layers if layer.role == role]


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.id)
def test_what_is_offered_is_what_the_definition_has(row):
    with torch.device(row.device):
        model, example = row.build()
    layers = candidate_layers(model, example)
    # What is told of the head's input by name, where a block stands for it.
    head = describe_layers(model, [row.head], example) if row.stands else []
    blocks_are_those(row, layers)
    assert names_of(layers, "transition") == row.transitions.split()
    the_input_of_the_head_is_that(row, layers, head)
    no_class_scores_are_offered(row, layers)
    offered = [layer.name for layer in layers]
    assert not row.ends or [offered[0], offered[-1]] == row.ends.split()
    kinds = Counter(layer.kind for layer in layers)
    assert not row.kinds or ", ".join(f"{n} {kind}" for kind, n in kinds.items()) == row.kinds
    orders = [layer.order for layer in layers]
    assert orders == sorted(orders)


def blocks_are_those(row, layers):
    blocks = names_of(layers, "block")
    assert len(blocks) == row.blocks, blocks
    assert blocks[:1] + blocks[-1:] == [name for name in (row.first, row.last) if name]


def the_input_of_the_head_is_that(row, layers, head):
    heads = names_of(layers, "head_input")
    if row.stands:  # of two candidates that are one tensor the first is offered
        assert (heads, names_of(head, "head_input")) == ([], [row.head])
        assert [layer.name for layer in layers if layer.feeds_head] == [row.stands]
    else:
        assert heads == [name for name in [row.head] if name]


def no_class_scores_are_offered(row, layers):
    offered = [layer.name for layer in layers]
    assert offered and len(set(offered)) == len(offered)
    for scores in row.score_modules:
        # Neither the last module of a head nor what is around it.
        assert not [name for name in offered if f"{scores}.".startswith(f"{name}.")]
