import functools
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, vgg11_bn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from geomkd.distillation.pairing import choose_layers, pair_layers
from geomkd.quickstart import residual_network
from geomkd.scoring.similarity_matrix import similarity_matrix

IMAGES = torch.zeros(2, 3, 32, 32)
untrained = functools.cache(resnet18)


def student_layers(k, student, images=IMAGES):
    return [layer for _, layer in pair_layers([f"t{i}" for i in range(k)], student, images)]


def test_all_blocks_of_a_small_resnet_are_taken_in_order():
    student = ResNet(BasicBlock, [1, 1, 1, 1])
    assert pair_layers(["a", "b", "c", "d"], student, IMAGES) == [
        ("a", "layer1.0"),
        ("b", "layer2.0"),
        ("c", "layer3.0"),
        ("d", "layer4.0"),
    ]


def test_vgg_without_blocks_gives_its_activations_before_the_head():
    # Eight activations before the head: the published student layers 1, 3, 5, 7.
    with torch.device("meta"):  # shapes alone: no weights are drawn
        student, images = vgg11_bn(), torch.zeros(2, 3, 32, 32)
        layers = student_layers(4, student, images)
    activations = [name for name, m in student.features.named_children() if type(m) is nn.ReLU]
    assert layers == [f"features.{activations[i]}" for i in (1, 3, 5, 7)]


def test_eight_transformer_layers_give_every_second():
    student = VisionTransformer(16, 4, 8, 2, 16, 32)
    images = torch.zeros(2, 3, 16, 16)
    expected = [f"encoder.layers.encoder_layer_{i}" for i in (1, 3, 5, 7)]
    assert student_layers(4, student, images) == expected


@pytest.mark.parametrize("k", range(1, 9))
def test_student_layers_differ_and_end_with_the_last_block(k):
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    layers = student_layers(k, untrained())
    assert layers == [blocks[round((i + 1) * 8 / k) - 1] for i in range(k)]
    assert len(set(layers)) == k and layers[-1] == "layer4.1"


def test_mobilenet_indices():
    blocks = [f"features.{i}" for i in range(1, 18)]
    layers = student_layers(4, mobilenet_v2(width_mult=0.25))
    assert [blocks.index(layer) for layer in layers] == [3, 7, 12, 16]


def test_forward_runs_the_student():
    student = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = {"x": torch.zeros(2, 4)}
    pairs = pair_layers(["t"], student, batch, forward=lambda model, b: model(b["x"]))
    assert pairs == [("t", "1")]


def test_more_teacher_layers_than_student_layers():
    student = ResNet(BasicBlock, [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"got 5 teacher layers for the 4 layers of the student"):
        pair_layers(list("abcde"), student, IMAGES)


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        ("layer4", TypeError, "teacher_layers must be a list of layer names; got str 'layer4'"),
        ([3], TypeError, r"teacher_layers must hold layer names \(str\); got int 3"),
        ([], ValueError, "at least one layer name"),
        (["a", "b", "a"], ValueError, r"must differ from each other; got \['a'\] more than once"),
    ],
)
def test_names_are_checked(names, error, text):
    with pytest.raises(error, match=text):
        pair_layers(names, untrained(), IMAGES)


@pytest.mark.parametrize(
    ("how", "k", "names"),
    [
        ("last", 2, ["block8", "block9"]),
        ("last", 9, [f"block{i}" for i in range(1, 10)]),
        ("evenly_spaced", 3, ["block3", "block6", "block9"]),
        ("evenly_spaced", 4, ["block2", "block4", "block7", "block9"]),  # (i + 1) 9 / 4, rounded
        ("anchored", 4, ["block2", "block5", "block8", "head.input"]),  # (i + 1) 10 / 4, to even
        ("anchored", 1, ["head.input"]),
        ("anchored", 10, [*(f"block{i}" for i in range(1, 10)), "head.input"]),
    ],
)
def test_teacher_layers_by_their_place(how, k, names):
    teacher = residual_network(widths=(4, 4, 4), blocks=3, seed=0)
    assert choose_layers(teacher, torch.zeros(2, 1, 8, 8), k, how=how) == names


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"how": "first"}, "how must be one of .*'anchored', 'last'\\); got 'first'"),
        ({"k": 10}, "k must be between 1 and the 9 layers to choose from; got 10"),
        ({"k": 11, "how": "anchored"}, "k must be between 1 and the 10 layers to choose from"),
        ({"k": 0}, "k must be between 1 and the 9 layers to choose from; got 0"),
    ],
)
def test_choosing_is_checked(options, text):
    teacher = residual_network(widths=(4, 4, 4), blocks=3, seed=0)
    with pytest.raises(ValueError, match=text):
        choose_layers(teacher, torch.zeros(2, 1, 8, 8), **options)


def test_anchored_needs_a_head():
    with pytest.raises(ValueError, match="the teacher has no linear head whose input could be"):
        choose_layers(nn.Sequential(nn.ReLU()), torch.zeros(2, 3), 1, how="anchored")


# ---- by similarity -------------------------------------------------------------------------------

BLOCKS = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]


def frame_of(values, teacher="tuvw", columns=BLOCKS):
    return pd.DataFrame(values, index=list(teacher)[: len(values)], columns=columns)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_most_similar_in_order_is_the_best_of_all_choices(k, seed):
    values = np.random.default_rng(seed).normal(size=(k, 8))
    frame = frame_of(values).iloc[::-1, ::-1]  # the order of the frame does not matter
    frame["fc.input"] = 9.0  # no block of the student: not chosen without similarity either
    names = list("tuvw"[:k])
    pairs = pair_layers(names, untrained(), IMAGES, similarity=frame)
    best = max(itertools.combinations(range(8), k), key=lambda js: values[range(k), list(js)].sum())
    assert pairs == list(zip(names, [BLOCKS[j] for j in best], strict=True))


def test_order_of_depth_is_kept():
    """Each alone would take the other's layer."""
    values = np.zeros((2, 8))
    values[0, 5], values[1, 2], values[0, 1] = 1.0, 0.8, 0.3
    pairs = pair_layers(["t", "u"], untrained(), IMAGES, similarity=frame_of(values))
    assert pairs == [("t", "layer1.1"), ("u", "layer2.0")]


def test_as_many_layers_on_both_sides_leaves_no_choice():
    student = ResNet(BasicBlock, [1, 1, 1, 1])
    frame = frame_of(-np.eye(4)[::-1], columns=BLOCKS[::2])
    pairs = pair_layers(list("tuvw"), student, IMAGES, similarity=frame)
    assert pairs == list(zip("tuvw", BLOCKS[::2], strict=True))


def test_matrix_of_two_models_pairs_a_model_with_its_copy():
    teacher = resnet18(num_classes=4, norm_layer=lambda width: nn.GroupNorm(4, width))
    student = resnet18(num_classes=4, norm_layer=lambda width: nn.GroupNorm(4, width))
    student.load_state_dict(teacher.state_dict())
    data = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    frame = similarity_matrix(teacher, student, (data, torch.arange(24) % 4), progress=False)
    names = ["layer1.1", "layer3.0", "layer4.0"]
    pairs = pair_layers(names, student, IMAGES, similarity=frame)
    assert pairs == [(name, name) for name in names]


GOOD = frame_of(np.zeros((2, 8)))


@pytest.mark.parametrize(
    ("frame", "error", "text"),
    [
        (np.zeros((2, 8)), TypeError, "must be a pandas DataFrame; got ndarray"),
        (GOOD.rename(index={"u": "z"}), ValueError, r"row of teacher layer .* of \['u'\] among"),
        (GOOD.T, ValueError, r"row of teacher layer each; got none or several of \['t', 'u'\]"),
        (GOOD[BLOCKS[1:]], ValueError, r"column of student layer .* \['layer1.0'\] among"),
        (pd.concat([GOOD, GOOD]), ValueError, r"none or several of \['t', 'u'\]"),
        (GOOD.replace(0.0, np.nan), ValueError, "similarity must be finite"),
    ],
    ids=["array", "row", "transposed", "column", "twice", "nan"],
)
def test_similarity_is_checked(frame, error, text):
    with pytest.raises(error, match=text):
        pair_layers(["t", "u"], untrained(), IMAGES, similarity=frame)


def test_distances_are_refused():
    frame = GOOD.copy()
    frame.attrs["measure"] = "procrustes"
    with pytest.raises(ValueError, match="larger where layers are more alike; got distances"):
        pair_layers(["t", "u"], untrained(), IMAGES, similarity=frame)
