"""score_layers within a bound of memory: groups, slices, and what they take."""

import re
import sys

import pytest
import torch
from oracle import DEFINITIONS
from processes import ended, start
from teachers import (
    CLASSES,
    WIDTHS,
    N,
    Y,
    assert_same,
    least_of,
    rows_of,
    score,
    sequential,
    vectors,
    wide,
)

from geomkd import candidate_layers
from geomkd.data.sample import Sample
from geomkd.scoring.plan import Stored, parse_bytes, plan_of


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_small_memory_takes_groups_and_slices(definition, plans):
    model, n = wide(*WIDTHS), 200
    data = (vectors(n), torch.arange(n) % CLASSES)
    options = {"definition": definition, "subsamples": 3, "memory": "2GB"}
    whole = score(model, data, **options)
    assert [len(group) for group in plans[-1].groups] == [4] and plans[-1].passes == 1
    least = least_of(model, data, subsamples=3)
    options["memory"] = f"{least + 3}MB"
    small = score(model, data, **options)
    plan = plans[-1]
    names = [[s.layer.name for s in group] for group in plan.groups]
    assert names == [["1", "3"], ["5"], ["7"]]
    assert 1024 <= plan.width < 20_000
    assert plan.passes == 2 + -(-20_000 // plan.width)
    assert_same(whole, small)


def test_order_of_the_groups_is_that_of_execution(plans):
    model, n = wide(*WIDTHS), 400
    data = (vectors(n), torch.arange(n) % CLASSES)
    least = least_of(model, data)
    scores = score(model, data, memory=f"{least}MB", layers=["7", "1", "3"])
    assert [[s.layer.name for s in group] for group in plans[-1].groups] == [["1"], ["3"], ["7"]]
    assert list(rows_of(scores).index) == ["1", "3", "7"]


def test_impossible_budget_names_the_least(plans):
    model, data = sequential(width=3000), (vectors(), Y)
    least = least_of(model, data, subsamples=2)
    text = (
        rf"memory must be at least {least} MB for 60 samples of this model .*; got {least - 1} MB"
    )
    with pytest.raises(ValueError, match=text):
        score(model, data, subsamples=2, memory=f"{least - 1}MB")
    assert_same(
        score(model, data, subsamples=2, memory=f"{least}MB"), score(model, data, subsamples=2)
    )
    assert plans[-2].passes > plans[-1].passes == 1


def test_entropy_samples_of_every_layer_count_as_memory(plans):
    model, x, y = sequential(), vectors(1000), torch.arange(1000) % CLASSES
    options = {"samples": 16, "entropy_per_class": 250}
    least, without = (least_of(model, (x, y), **o) for o in (options, {"samples": 16}))
    squares = 8 * CLASSES * 250**2 / 1e6  # one class's Gram matrix after the other
    assert least - without > squares
    score(model, (x, y), memory=f"{least}MB", **options)
    assert [len(group) for group in plans[-1].groups] == [1, 1, 1]
    score(model, (x, y), memory=f"{least + squares:.0f}MB", **options)
    assert [len(group) for group in plans[-1].groups] == [2, 1]


def test_least_budget_leaves_room_for_a_slice():
    model, x = sequential(), vectors(400)
    sample = Sample((x, torch.arange(400) % CLASSES), 400, seed=0)
    layers = candidate_layers(model, x[:2])
    stored = [Stored(layer, layer.dim, torch.float32, x.device) for layer in layers]

    def plan(budget):
        return plan_of(stored, sample, budget, 256, halves=False)

    low, high = 1, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(middle)
            high = middle
        except ValueError:
            low = middle
    assert plan(high).batch_size == 1
    assert all(plan(high + more).width >= 16 for more in range(0, 10**5, 1000))


def test_kept_inputs_count_as_memory():
    model, x = sequential(d=300_000), torch.randn(N, 300_000)
    kept = x.nbytes / 1e6
    batches = list(zip(x.split(7), Y.split(7), strict=True))
    difference = least_of(model, batches) - least_of(model, (x, Y))
    assert abs(difference - kept) <= 1


def test_forward_passes_are_as_many_as_planned(plans):
    model, n, rows = wide(*WIDTHS), 200, []
    data = (vectors(n), torch.arange(n) % CLASSES)
    least = least_of(model, data)

    def forward(model, batch):
        rows.extend([len(batch)] * len(plans))  # not before there is a plan
        return model(batch)

    score(model, data, memory=f"{least + 3}MB", forward=forward)
    # All slices are read again where distances so small that products lose them are re-measured.
    again = sum(rows) / n - plans[-1].passes
    assert again >= 0 and again % -(-20_000 // plans[-1].width) == 0
    rows.clear()
    plans.clear()
    score(model, data, layers=["1", "3"], forward=forward)
    assert plans[0].passes == 1 and sum(rows) == n


@pytest.mark.parametrize(
    ("text", "value"), [("2GB", 2e9), (" 512 MiB", 2**29), ("1e6", 1e6), ("3b", 3), (7.9, 7)]
)
def test_parse_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "2 TB", "nan", "inf", "-1GB", None, "0.1"])
def test_parse_bytes_errors(text):
    with pytest.raises(ValueError, match=re.escape(f"such as '2GB'; got {text!r}")):
        parse_bytes(text)


PEAK = """
import torch, torchvision
from geomkd import score_layers

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def growth(model, x, memory, **options):
    y = torch.arange(len(x)) % 4
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    scores = score_layers(model, (x, y), memory=memory, progress=False, **options)
    print(len(scores.to_frame()), resident("VmHWM") - before)

torch.set_num_threads(1)
resnet = torchvision.models.resnet18(num_classes=4)
growth(resnet, torch.randn(400, 3, 32, 32), "250MB", subsamples=4)
conv, x = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.randn(100, 3, 160, 160)
model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten())
growth(model, x * 1e22, "500MB", layers=["1"], subsamples=0)  # of 655 MB; squares leave float32
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_memory_stays_under_the_budget(tmp_path):
    program, said = tmp_path / "peak.py", tmp_path / "said"
    program.write_text(PEAK)
    assert ended(start(program, [], output=said)) == [0], said.read_text()
    whole, sliced = (map(int, line.split()) for line in said.read_text().splitlines())
    layers, growth = whole
    assert layers == 10
    assert 20e6 < growth <= 250e6
    layers, growth = sliced
    assert layers == 1
    assert 100e6 < growth <= 500e6
