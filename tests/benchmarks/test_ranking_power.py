import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import ranking_power
from benchmarks.evidence import jobs, material, teachers, verdict
from benchmarks.evidence.found import Found
from benchmarks.evidence.journal import Journal, claim
from benchmarks.evidence.moments import Moments, last_block, moments
from benchmarks.evidence.networks import Basic, build
from benchmarks.evidence.rules import RULES, values
from benchmarks.evidence.scores import IMAGES
from benchmarks.evidence.students import ARMS, ZERO_LINE, Standardised, packed, unpacked
from geomkd import capture
from geomkd.distillation.objectives import StepTensors
from geomkd.distillation.projectors import Meeting, linear_projectors

RESNET, VIT = teachers.QUICK


# ---- the script ----


def lines_of(folder, teacher):
    return [
        json.loads(line) for line in (folder / f"{teacher.name}.jsonl").read_text().split("\n")[:-1]
    ]


def outcomes(lines):
    kept = ("kind", "images", "arm", "layer", "seed", "accuracy", "right", "refitted_right")
    return [{key: line.get(key) for key in kept} for line in lines]


def test_quick_takes_every_step_and_goes_on_where_it_was(tmp_path, capsys):
    options = ["--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    ranking_power.main(options)
    told = capsys.readouterr().out
    assert "confirmation students wait for the rule" in told and "## Verdict" in told
    assert told.index("quick-resnet: student") < told.index("the rule that goes to confirmation")
    assert told.index("the rule that goes to confirmation") < told.index("quick-vit: student")
    resnet, vit = (lines_of(tmp_path / "out", teacher) for teacher in (RESNET, VIT))
    for found in (resnet, vit):
        layers = found[0]["layers"]
        kinds = [line["kind"] for line in found]
        runs = [(r["arm"], r["layer"], r["seed"]) for r in found if r["kind"] == "student"]
        assert kinds == ["teacher"] + ["scores"] * len(IMAGES) + ["student"] * len(runs)
        assert runs == [("features", n, s) for n in [ZERO_LINE, *layers] for s in (0, 1)]
        assert len({line["fingerprint"] for line in found}) == 1
    assert (tmp_path / "out" / "regret.png").stat().st_size > 10_000
    assert not list((tmp_path / "work" / "features").iterdir())  # the layers' features are gone
    weights = torch.load(tmp_path / "out" / "teachers" / "quick-vit.pt", weights_only=True)
    assert weights["head.weight"].dtype is torch.float16

    path = tmp_path / "out" / "quick-resnet.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:-3]) + b'\n{"cut sho')
    ranking_power.main([*options, "--list"])
    assert "| quick-resnet | 1 teacher, 5 scores, 8 student | 1 |" in capsys.readouterr().out
    ranking_power.main([*options, "--teachers", "quick-resnet"])
    assert outcomes(lines_of(tmp_path / "out", RESNET)) == outcomes(resnet)
    ranking_power.main([*options, "--list"])
    assert "| all |  |  | 0.0 h of one core |" in capsys.readouterr().out


def test_arms_and_the_published_teachers_are_what_the_protocol_says():
    names = [teacher.name for teacher in teachers.TEACHERS]
    assert [t.confirmation for t in teachers.TEACHERS] == [False] * 4 + [True] * 5
    for arm, of in (("labels", [0, 4]), ("pooled", [0, 4]), ("longer", [0, 3, 4])):
        assert [i for i, name in enumerate(names) if name in ARMS[arm].teachers] == of
    for teacher in teachers.TEACHERS:
        side = 28 if teacher.data == "fashion" else 32
        channels, classes = (1, 10) if teacher.data == "fashion" else (3, 40)
        x, y = torch.zeros(2, channels, side, side), torch.zeros(2, dtype=torch.long)
        given = material.Material(x, y, x, y, x, y, classes)
        model = teacher.build(given)
        layers = teacher.layers(model, given)
        assert 8 <= len(layers) <= 16 and layers[-1].endswith(".input")
        state = 2 * sum(value.numel() for value in model.state_dict().values())
        assert teacher.published or state < 2e6  # bytes in half precision
        assert teacher.build_student(given, seed=0)(x).shape == (2, classes)


# ---- networks and images ----


def test_the_published_shortcut_takes_every_second_pixel_and_pads_channels():
    block = Basic(2, 4, stride=2).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)  # what is left is the shortcut
    x = torch.rand(1, 2, 4, 4)
    assert torch.equal(block(x)[:, 1:3], x[:, :, ::2, ::2])
    assert not block(x)[:, [0, 3]].any()
    names = build("published", {"blocks": 3}, shape=(3, 32, 32), classes=10, seed=0).state_dict()
    assert {"conv1.weight", "bn1.running_mean", "layer3.2.conv2.weight", "linear.bias"} <= set(
        names
    )


def write_idx(path, array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


def test_fashion_images_that_score_and_measure_are_apart_and_balanced(tmp_path, monkeypatch):
    monkeypatch.setattr(material, "FASHION_TRAINED", 3)
    monkeypatch.setattr(material, "FASHION_SCORED", 2)
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name, n in (("train", 40), ("t10k", 50)):
        x = np.arange(n, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte", x)
        write_idx(folder / f"{name}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    found = material.fashion(tmp_path)
    assert found.y_score.bincount().tolist() == [2] * 10
    assert found.y_test.bincount().tolist() == [3] * 10
    assert found.y_train.bincount().tolist() == [3] * 10
    pixels = [
        (255 * (0.353 * x[:, 0, 0, 0] + 0.286)).round() for x in (found.x_score, found.x_test)
    ]
    assert sorted(torch.cat(pixels).tolist()) == list(range(50))


# ---- targets ----


def test_moments_are_of_all_images_where_teacher_and_student_meet():
    given = material.generated()
    model = RESNET.build(given).eval()
    student = last_block(RESNET.build_student(given, seed=0), "block2", given.x_test)
    found = moments(model, ["block1", "head.input"], student, given.x_test)
    pooled = moments(model, ["block1"], student, given.x_test, pooled=True)
    with capture(model, ["block1", "head.input"]) as features, torch.no_grad():
        model(given.x_test)
    maps = F.avg_pool2d(features["block1"], 2)  # 8 x 8 to the student's 4 x 4
    for held, x in (
        (found["block1"], maps.movedim(1, -1).flatten(0, 2)),
        (found["head.input"], features["head.input"]),
        (pooled["block1"], features["block1"].mean((2, 3))),
    ):
        x = x.double()
        torch.testing.assert_close(held.mean, x.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(held.std, x.std(0, correction=0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(held.second, x.T @ x / len(x), rtol=1e-5, atol=1e-7)


def test_a_channel_that_hardly_varies_is_not_blown_up():
    mean, spread = torch.tensor([100.0, 0.0, 1.0]).double(), torch.tensor([0.01, 0.0, 0.5]).double()
    held = Moments(mean, torch.outer(mean, mean) + torch.diag(spread**2))
    assert held.std.tolist() == pytest.approx([0.2, 1e-6, 0.5])


def test_reach_is_the_share_of_the_largest_eigenvalues():
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    second = turn @ torch.diag(torch.tensor([5.0, 3.0, 2.0]).double()) @ turn.T
    held = Moments(torch.zeros(3), second)
    assert [held.reach(width) for width in (1, 2, 3)] == pytest.approx([0.5, 0.8, 1.0])


@pytest.mark.parametrize(("pooled", "weight"), [(False, 1.0), (True, 100.0)])
def test_standardised_targets_are_those_of_the_training_images(pooled, weight):
    from geomkd.network.layers import Layer

    pair = Layer("t", "map", (5, 4, 4)), Layer("s", "map", (3, 2, 2))
    meeting = Meeting([pair], 6, torch.Generator().manual_seed(0), list)
    mean, std = torch.rand(5), torch.rand(5) + 0.5
    objective = Standardised(mean, std, weight, pooled=pooled)
    projectors = linear_projectors(meeting)
    s, t = torch.randn(6, 3, 2, 2), torch.randn(6, 5, 4, 4)
    logits, labels = torch.randn(6, 3), torch.arange(6) % 3
    step = StepTensors(labels, logits, None, [s], [t], projectors)
    loss, parts = objective(step)
    projected = torch.einsum("oc,bchw->bohw", projectors[0].project.weight[:, :, 0, 0], s)
    target = (F.avg_pool2d(t, 2) - mean[:, None, None]) / std[:, None, None]
    if pooled:
        projected, target = projected.mean((2, 3)), target.mean((2, 3))
    error = (projected - target).square().mean()
    assert parts["features"].item() == pytest.approx(error.item(), rel=1e-5)
    ce = F.cross_entropy(logits, labels).item()
    assert loss.item() == pytest.approx(weight * error.item() + ce, rel=1e-5)


# ---- what is kept ----


def test_journal_drops_what_was_cut_short_and_refuses_mixtures(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    line = {"fingerprint": "a", "protocol": "p", "n": 1}
    journal.add(line)
    with open(journal.path, "ab") as file:
        file.write(b'{"fingerprint": "a", "prot')
    assert journal.read() == [line]
    journal.add(line | {"n": 2})
    assert [found["n"] for found in journal.read()] == [1, 2]
    for other in ({"fingerprint": "b"}, {"protocol": "q"}):
        journal.add(line | other)
        with pytest.raises(ValueError, match=r"a\.jsonl mixes teachers or protocols"):
            journal.read()
        journal.path.write_text(json.dumps(line) + "\n")


def test_a_claim_is_held_by_one(tmp_path):
    with claim(tmp_path / "job") as first, claim(tmp_path / "job") as second:
        assert (first, second) == (True, False)
    with claim(tmp_path / "job") as again:
        assert again


@pytest.mark.parametrize("n", [1, 8, 13])
def test_flags_come_back(n):
    flags = torch.rand(n) < 0.5
    assert unpacked(packed(flags), n).tolist() == flags.tolist()


# ---- rules, regret, verdict ----

LAYERS = ["a", "b", "c", "head.input"]


def made_up(teacher, right, quality, n=400):
    """A finished teacher whose students of each layer are right on so many of n images."""
    stamp = {"fingerprint": "f", "protocol": "p"}
    lines = [{"kind": "teacher", "layers": LAYERS, "test_images": n} | stamp]
    roles = ["block", "block", "block", "head_input"]
    for images in IMAGES:
        columns = {"role": roles, "quality": quality, "silhouette": quality[::-1]}
        lines.append({"kind": "scores", "images": images, "layers": LAYERS, "columns": columns})
    for layer, counts in zip(LAYERS, right, strict=True):
        for seed, count in enumerate(counts):
            flags = packed(torch.arange(n) < count)
            run = {"arm": "features", "layer": layer, "seed": seed, "accuracy": count / n}
            lines.append({"kind": "student", "right": flags} | run)
    return Found(replace(teacher, recipe=replace(teacher.recipe, least_ceiling=0.7)), lines)


RIGHT = [[100, 104], [200, 204], [300, 240], [260, 290]]


def test_regret_takes_the_best_layer_of_the_other_seeds():
    found = made_up(RESNET, RIGHT, [1.0, 4.0, 3.0, 2.0])
    # Seed 0: best by seed 1 is the head's input, 260; of seed 1: best by seed 0 is c, 240.
    assert found.regret("deepest block") == pytest.approx(25 * ((260 - 300) + (240 - 240)) / 200)
    assert found.regret("Q") == pytest.approx(25 * ((260 - 200) + (240 - 204)) / 200)
    assert found.regret("head's input") == pytest.approx(25 * (0 + (240 - 290)) / 200)
    assert found.regret("random") == pytest.approx(25 * ((260 - 215) + (240 - 209.5)) / 200)
    assert np.isnan(found.regret("LogME"))  # not among the columns
    assert found.ceiling() == pytest.approx(4 / 6) and not found.decided
    assert found.tau("Q") == pytest.approx(0.0)
    assert found.tau("depth") == pytest.approx(1.0)


CLEAR = [[100, 104], [200, 204], [240, 244], [300, 308]]


def test_choice_and_verdict(monkeypatch):
    monkeypatch.setattr(
        verdict,
        "RULES",
        {n: RULES[n] for n in ("deepest block", "head's input", "Q", "silhouette")},
    )
    discovery = [made_up(RESNET, CLEAR, [4.0, 3.0, 2.0, 1.0])]
    assert verdict.choose(discovery) == "silhouette"  # the only score that picks the last
    with pytest.raises(ValueError, match="once all of these are through: quick-resnet"):
        verdict.choose([Found(RESNET, discovery[0].lines[:-1])])
    confirmation = [made_up(VIT, CLEAR, [4.0, 3.0, 2.0, 1.0])]
    a = verdict.against("silhouette", "Q", confirmation)
    assert a.gain == pytest.approx(100 * (304 - 102) / 400)
    assert a.low < a.gain < a.high and a.high - a.low < 12  # 2 x 1.64 x 2.5 points
    assert verdict.verdict("silhouette", confirmation).startswith("Recommended: silhouette")
    told = verdict.verdict("Q", confirmation)
    assert told.startswith("No score did better") and told.endswith("Recommended: head's input.")
    unsure = [made_up(VIT, RIGHT, [4.0, 3.0, 2.0, 1.0])]
    assert "nothing is shown" in verdict.verdict("silhouette", unsure)


def test_confirmation_students_wait_for_the_rule(tmp_path):
    found = made_up(VIT, CLEAR, [4.0, 3.0, 2.0, 1.0])
    journal = Journal(tmp_path / "quick-vit.jsonl")
    for line in found.lines[:6]:
        journal.add({"fingerprint": "f", "protocol": "p"} | line)
    rule = []
    places = jobs.Places(tmp_path, tmp_path, tmp_path, lambda: rule[0] if rule else None)
    bench = jobs.Bench(VIT, places)
    assert list(bench.open(["features"])) == []
    waiting = list(bench.open(["features"], waiting=True))
    assert waiting == [("student", "features", name) for name in [ZERO_LINE, *LAYERS]]
    rule.append("Q")
    assert list(bench.open(["features"])) == waiting


def test_a_layer_without_a_number_is_never_picked():
    found = made_up(RESNET, CLEAR, [1.0, None, 3.0, 2.0])
    assert values(RULES["Q"], found.frame()).tolist() == [1.0, -np.inf, 3.0, 2.0]
    assert values(RULES["LogME"], found.frame()) is None
