import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import distillation
from benchmarks.evidence import choices, material, objectives, sets, sets_report, students
from benchmarks.evidence.choices import EVENLY
from benchmarks.evidence.journal import Journal
from benchmarks.evidence.objectives import CE, COMPARED, FEATURES, LAST, RIVALS, WEIGHTED, WITH_KD
from benchmarks.evidence.sets import SetBench, SetPlaces
from benchmarks.evidence.sets_found import Run, SetsFound
from geomkd import distill, pair_layers
from geomkd.distillation.objectives import StepTensors
from geomkd.distillation.projectors import Meeting, linear_projectors
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.network.layers import Layer

(TEACHER,) = sets.QUICK
BLOCKS = ["block1", "block2", "block3", "block4"]
CANDIDATES = ["relu", *BLOCKS, "head.input"]

# ---- the script ----


def lines_of(folder):
    return [json.loads(t) for t in (folder / "quick-sets.jsonl").read_text().split("\n")[:-1]]


def outcomes(lines):
    kept = ("kind", "sets", "objective", "layers", "per_class", "seed", "right", "refitted_right")
    return [{key: line.get(key) for key in kept} for line in lines]


def test_quick_takes_every_step_and_goes_on_where_it_was(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--quick", "--out", str(out), "--work", str(tmp_path / "work")]
    distillation.main(options)
    told, lines = capsys.readouterr().out, lines_of(out)
    found = SetsFound(TEACHER, lines)
    assert [line["kind"] for line in lines] == ["choices"] * 2 + ["student"] * (len(lines) - 2)
    assert found.rule == "silhouette" and found.about["candidates"] == CANDIDATES
    # Equal sets are trained once: here the last 4 are the evenly spaced ones.
    distinct = {found.run(FEATURES, layers) for layers in found.choices.values()}
    assert 4 < len(distinct) < len(found.choices) == 14
    best = WEIGHTED[WITH_KD][found.best_weight(WITH_KD)]
    amounts = {found.run(name, per_class=2) for name in (CE, "kd", FEATURES, best)}
    assert set(found.runs) == distinct | {found.run(n) for n in sets.QUICK_COMPARED} | amounts
    assert all(set(of) == {0, 1} for of in found.runs.values())
    epochs = {run.per_class: of[0]["epochs"] for run, of in found.runs.items()}
    assert epochs == {2: 5, 10: 1}
    assert f"| all |  |  |  | {2 * len(found.runs)} | 0 |  |" in told
    assert "## Amounts of images, quick-sets" in told
    for name in ("accuracy", "objectives", "amounts-quick-sets"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    assert not list((tmp_path / "work" / "sets").iterdir())  # the layers' features are gone

    path = out / "quick-sets.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:-4]) + b'\n{"cut sho')
    distillation.main([*options, "--list"])
    assert f"| quick-sets | {len(lines) - 5} | 2 |" in capsys.readouterr().out
    distillation.main(options)
    assert outcomes(lines_of(out)) == outcomes(lines)
    distillation.main([*options, "--list"])
    assert "| all |  |  |  | 0.0 h of one core |" in capsys.readouterr().out


def test_teachers_are_those_of_the_protocol_and_others_are_named():
    names = [teacher.name for teacher in sets.TEACHERS]
    assert names == ["cifar10-resnet20", "cifar10-resnet-fitted", "tiny-resnet", "fashion-resnet"]
    with pytest.raises(SystemExit, match=r"teachers are cifar10-resnet20, .*; got tiny-vit"):
        distillation.main(["--teachers", "tiny-vit", "--list"])


def bench_on(tmp_path, teacher=TEACHER, rule=None):
    places = SetPlaces(tmp_path, tmp_path, tmp_path, lambda: rule, ranking=tmp_path / "ranking")
    return SetBench(teacher, places)


def test_what_is_not_there_is_waited_for(tmp_path):
    bench = bench_on(tmp_path)
    assert "quick-sets.pt is not there yet" in bench.why_waiting()
    assert list(bench.open(["choices"])) == []
    weights = tmp_path / "ranking" / "teachers" / "quick-sets.pt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert list(bench.open(["choices"])) == [("choices", "scores")]
    confirmation = replace(TEACHER, confirmation=True)
    assert "wait for the rule" in bench_on(tmp_path, confirmation).why_waiting()
    assert bench_on(tmp_path, confirmation, "Q").why_waiting() is None


def test_scores_of_another_teacher_are_refused(tmp_path):
    bench = bench_on(tmp_path, rule="Q")
    assert bench.scores() is None
    for line in made_up(RIGHT).lines:
        bench.journal.add(line)
    columns = {"role": ["block"], "quality": [1.0]}
    scored = {"kind": "scores", "images": "held-out", "layers": ["a"], "columns": columns}
    journal = Journal(tmp_path / "ranking" / "quick-sets.jsonl")
    journal.add(scored | {"fingerprint": "theirs", "protocol": "p"})
    with pytest.raises(ValueError, match="another quick-sets: fingerprint theirs, here f"):
        bench.scores()
    journal.path.unlink()
    journal.add(scored | {"fingerprint": "f", "protocol": "p"})
    assert bench.scores()["quality"].tolist() == [1.0]
    assert next(bench.open(["choices"], waiting=True)) == ("choices", "rule")


# ---- sets ----


@pytest.mark.parametrize(
    ("anchor", "k", "expected"),
    [
        ("head.input", 4, ["block1", "block2", "block4", "head.input"]),
        ("head.input", 2, ["block2", "head.input"]),
        ("block4", 4, BLOCKS),
        ("block3", 2, ["block2", "block3"]),
        ("block2", 4, ["block1", "block2"]),
        ("relu", 4, ["relu"]),
    ],
)
def test_an_anchored_set_ends_in_its_anchor(anchor, k, expected):
    assert choices.anchored(CANDIDATES, BLOCKS, anchor, k) == expected


def test_sets_by_place_of_the_published_network():
    shapes = [(16, 32)] * 3 + [(32, 16)] * 3 + [(64, 8)] * 3
    blocks = [f"layer{i // 3 + 1}.{i % 3}" for i in range(9)]
    layers = [Layer("relu", "map", (16, 32, 32), "activation")]
    layers += [
        Layer(n, "map", (c, s, s), "block") for n, (c, s) in zip(blocks, shapes, strict=True)
    ]
    layers += [Layer("linear.input", "vector", (64,), "head_input")]
    found = choices.by_place(layers)
    assert found["stage ends"] == ["layer1.2", "layer2.2", "layer3.2"]
    assert found[EVENLY] == ["layer1.1", "layer2.0", "layer3.0", "layer3.2"]
    assert found["last 4"] == blocks[-4:] and found["head's input alone"] == ["linear.input"]
    assert found["anchored at the head's input"] == [
        blocks[1],
        blocks[4],
        blocks[7],
        "linear.input",
    ]
    names, draws = [layer.name for layer in layers], [found[f"random {i}"] for i in (1, 2, 3)]
    assert all(len(set(d)) == 4 and d == sorted(d, key=names.index) for d in draws)
    assert len(set(map(tuple, draws))) == 3


def test_sets_by_the_rule():
    roles = ["activation", *["block"] * 4, "head_input"]
    knn = [0.2, 0.3, 0.96, 0.5, 1.0, 0.9]
    columns = {"silhouette": [0.0, 1.0, 2.0, 5.0, 4.0, 3.0], "knn_accuracy": knn}
    frame = pd.DataFrame({"layer": CANDIDATES, "role": roles, **columns})
    found = choices.by_rule("silhouette", frame)
    assert found["the rule's top 4"] == ["block2", "block3", "block4", "head.input"]
    assert found["anchored at the rule's best"] == ["block1", "block2", "block3"]
    alone = choices.by_rule("tunnel entrance", frame)  # names one layer, has no order
    assert alone["the rule's top 4"] == ["block2"]
    assert alone["anchored at the rule's best"] == ["block1", "block2"]


def test_pairs_are_the_librarys_and_go_on_where_a_student_has_too_few_blocks():
    given = material.generated()
    student = TEACHER.build_student(given, seed=0)  # two blocks
    for layers in (["a"], ["a", "b"]):
        ours = choices.paired(layers, ["block1", "block2"])
        assert ours == pair_layers(layers, student, given.x_test[:2])
    assert choices.paired("abcd", ["x", "y", "z"]) == list(zip("abcd", "xyyz", strict=True))
    assert choices.paired("abcd", ["x", "y"]) == list(zip("abcd", "xxyy", strict=True))
    assert choices.paired([], ["x"]) == []


def test_few_images_are_seen_as_often_as_to_take_the_usual_steps():
    (published, *_) = sets.TEACHERS
    recipes = [sets.for_amount(published, Run(CE, (), n)).recipe for n in (125, 500, 1500)]
    assert [(r.per_class, r.epochs) for r in recipes] == [(125, 32), (500, 8), (1500, 8)]


# ---- objectives ----


def test_every_published_objective_is_compared():
    weighted = {name for of in WEIGHTED.values() for name in of.values()}
    named = {*COMPARED, *RIVALS} - weighted - {objectives.STANDARDISED, LAST}
    assert named == set(OBJECTIVES) - {"feature_kd"}  # which the weighted ones are
    heavy = objectives.GIVEN["CE + KD + 100 features"]
    assert (heavy.kd_weight, heavy.feature_weight, heavy.temperature) == (1.0, 100, 4.0)
    assert objectives.GIVEN["CE + 10 features"].kd_weight == 0.0


def step_of(make_projectors, shapes, kinds=("map", "map")):
    generator = torch.Generator().manual_seed(0)
    layers = [[Layer("l", k, s) for k, s in zip(kinds, pair, strict=True)] for pair in shapes]
    meeting = Meeting([tuple(pair) for pair in layers], 6, generator, list)
    teachers, ours = (
        [torch.randn(6, *pair[side], generator=generator) for pair in shapes] for side in (0, 1)
    )
    labels, logits = torch.arange(6) % 3, torch.randn(6, 3, generator=generator)
    return StepTensors(labels, logits, None, ours, teachers, make_projectors(meeting))


def test_standardised_targets_are_averaged_over_pairs():
    shapes = [((5, 4, 4), (3, 2, 2)), ((4, 2, 2), (3, 2, 2))]
    step = step_of(linear_projectors, shapes)
    given = [(torch.rand(pair[0][0]), torch.rand(pair[0][0]) + 0.5) for pair in shapes]
    objective = objectives.StandardisedSet(tuple(students.Standardised(*of) for of in given))
    loss, parts = objective(step)
    errors = []
    for i, (mean, std) in enumerate(given):
        projected, target = step.projectors[i](step.student_features[i], step.teacher_features[i])
        errors.append((projected - (target - mean[:, None, None]) / std[:, None, None]).square())
    expected = np.mean([error.mean().item() for error in errors])
    assert parts["features"].item() == pytest.approx(expected, rel=1e-5)
    ce = F.cross_entropy(step.logits, step.labels).item()
    assert loss.item() == pytest.approx(expected + ce, rel=1e-5)


def test_last_normalised_is_smooth_l1_through_an_orthogonal_matrix_that_stays_so():
    objective = objectives.GIVEN[LAST]
    step = step_of(objective.make_projectors, [((5, 4, 4), (3, 2, 2))])
    optimiser = torch.optim.AdamW(step.projectors.parameters(), lr=0.1)
    for _ in range(3):
        weight = step.projectors.project.weight.detach()
        torch.testing.assert_close(weight.T @ weight, torch.eye(3), atol=1e-5, rtol=0)
        pooled = step.student_features[0].mean((2, 3)) @ weight.T
        target = step.teacher_features[0].mean((2, 3))
        centred = target - target.mean(1, keepdim=True)
        target = centred / (target.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        gap = (pooled - target).abs()
        expected = torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
        loss, parts = objective(step)
        torch.testing.assert_close(parts["features"].detach(), expected)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert not torch.equal(step.projectors.project.weight, weight)  # it has been trained


def test_a_run_that_diverged_is_kept_and_other_errors_are_raised():
    x, y = torch.full((8, 4), torch.nan), torch.arange(8) % 2
    options = {"objective": "ce", "epochs": 1, "batch_size": 4, "progress": False}
    run = partial(distill, nn.Linear(4, 2), None, (x, y), **options)
    line = students.or_failed(run, 13)
    assert line["accuracy"] == 0 and "NaN" in line["failed"]
    assert not students.unpacked(line["right"], 13).any()

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        students.or_failed(broken, 13)


# ---- the report ----


def made_up(right, n=400):
    """Finished runs on evenly spaced layers, right on so many of n images by objective and seed."""
    stamp = {"fingerprint": "f", "protocol": "p"}
    about = {"candidates": CANDIDATES, "test_images": n, "accuracy": 0.9}
    sets_of = {EVENLY: BLOCKS, "last 4": BLOCKS, "head's input alone": ["head.input"]}
    lines = [{"kind": "choices", "by": "scores", "sets": sets_of} | about | stamp]
    found = SetsFound(TEACHER, lines)
    for name, counts in right.items():
        run = found.run(FEATURES, ["head.input"]) if name == "head" else found.run(name)
        for seed, count in enumerate(counts):
            share = {"accuracy": count / n, "refitted_accuracy": (count + 4) / n}
            flags = {"right": students.packed(torch.arange(n) < count), "seconds": 1.0}
            line = {"kind": "student", "seed": seed} | run._asdict() | share | flags
            lines.append(line | stamp)
    seeds = len(next(iter(right.values())))
    return SetsFound(replace(TEACHER, recipe=replace(TEACHER.recipe, seeds=seeds)), lines)


WEIGHTED_RIGHT = {1: [100, 100, 100], 10: [200, 240, 220], 100: [240, 200, 220], 1000: [120] * 3}
RIGHT = {FEATURES: [200, 220, 240], "head": [240, 220, 260], CE: [160, 168]} | {
    WEIGHTED[WITH_KD][w]: counts for w, counts in WEIGHTED_RIGHT.items()
}


def test_the_weight_is_chosen_on_the_other_seeds():
    found = made_up(RIGHT)
    best, there = found.held_out(WITH_KD)
    assert best == [10, 100, 10]  # of equals on the third the first
    assert there == pytest.approx([50, 50, 55])
    assert found.over_features(WITH_KD) == pytest.approx([0, -5, -5])
    assert found.best_weight(WITH_KD) == 10
    assert found.held_out("CE + w features") is None  # not finished


def test_differences_are_those_of_the_same_images():
    found = made_up(RIGHT)
    head, evenly = found.run(FEATURES, ["head.input"]), found.run(FEATURES)
    told = found.difference(head, evenly)
    assert told.gain == pytest.approx((10 + 0 + 5) / 3)
    assert 0 <= told.low < told.gain < told.high <= 14
    assert found.difference(evenly, evenly) is None
    assert found.difference(found.run(CE), evenly) is None  # a seed is missing


def test_report_and_pictures_of_what_is_there(tmp_path):
    found, nothing = made_up(RIGHT), SetsFound(replace(TEACHER, name="other"), [])
    found.lines.append(found.lines[-1] | {"seed": 9, "failed": "NaN", "objective": "kd"})
    found = SetsFound(found.teacher, found.lines)
    told = sets_report.report([found, nothing], ["3", "its weights"])
    assert "| quick-sets | f | 90.0 | – | 21 | 1 | 3 |" in told
    assert "| other | – | – | – | 0 | 0 | its weights |" in told
    evenly = "| evenly spaced | block1 block2 block3 block4 | 50.0 55.0 60.0 | 55.0 ± 5.0 | same |"
    assert f"{evenly} 56.0 |" in told
    assert evenly.replace("evenly spaced", "last 4") in told
    assert "| head's input alone | head.input | 60.0 55.0 65.0 | 60.0 ± 5.0 | +5.0 (" in told
    assert "| ce | 40.0 42.0 | 41.0 ± 1.4 | – | 42.0 |" in told
    weights = "| 25.0 | 55.0 | 55.0 | 30.0 | 10 100 10 | 51.7 | 55.0 | -3.3 (+0.0 -5.0 -5.0) |"
    assert f"| quick-sets | CE + KD + w features {weights}" in told
    assert "## Amounts" not in told
    sets_report.picture([found], sets_report.choices_of, EVENLY, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_report_needs_neither_data_nor_weights(tmp_path, capsys):
    name = sets.TEACHERS[0].name
    for line in made_up({FEATURES: [200, 220, 240]}).lines:
        usual = {"per_class": 500} if line["kind"] == "student" else {}
        Journal(tmp_path / f"{name}.jsonl").add(line | usual)
    nowhere = str(tmp_path / "nowhere")
    options = ["--out", str(tmp_path), "--data", nowhere, "--ranking", nowhere]
    distillation.main([*options, "--report", "--parts", "choices"])
    told = capsys.readouterr().out
    assert f"| {name} | f | 90.0 | – | 3 | 0 | 1 and the rule's |" in told
    assert "| tiny-resnet | – | – | – | 0 | 0 | everything |" in told
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    distillation.main([*options, "--list"])
    assert "resnet20_cifar10.pth is not there yet" in capsys.readouterr().out


def test_amounts_are_told_by_objective():
    found = made_up({FEATURES: [200, 220]})
    more = found.run(FEATURES, per_class=30)
    found.lines.append(found.lines[-1] | more._asdict() | {"seed": 0, "accuracy": 0.625})
    found = SetsFound(found.teacher, found.lines)
    row = "| features | 52.5 ± 3.5 (50.0 55.0) | 62.5 (62.5) |"
    assert sets_report.amounts(found).endswith(row)
