"""Students on sets of layers: what is to be done of a teacher, and the doing of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence import choices, objectives, teachers
from benchmarks.evidence.found import Found
from benchmarks.evidence.jobs import Bench, Places, slug
from benchmarks.evidence.moments import last_block, moments
from benchmarks.evidence.objectives import CE, COMPARED, FEATURES, KD, RIVALS, WEIGHTED
from benchmarks.evidence.sets_found import Run, SetsFound
from benchmarks.evidence.students import measured, or_failed
from benchmarks.evidence.teachers import Teacher, beside
from geomkd import candidate_layers, distill

PARTS = ("choices", "objectives", "amounts", "rivals")
AMOUNTS = {  # of the usual number of images, by teacher
    "cifar10-resnet20": (0.25, 1.0, 3.0),
    "quick-sets": (0.25, 1.0),
}
TEACHERS = [
    next(teacher for teacher in teachers.TEACHERS if teacher.name == name)
    for name in ("cifar10-resnet20", "cifar10-resnet-fitted", "tiny-resnet", "fashion-resnet")
]
QUICK_COMPARED = [n for n in COMPARED if n not in WEIGHTED[objectives.WITHOUT_KD].values()]
QUICK = [
    Teacher(
        "quick-sets", "generated", teachers.residual(4, 8, blocks=2),
        teachers.residual(4, 6, blocks=1), epochs=2,
        recipe=teachers.Recipe(per_class=10, epochs=1, batch_size=30, seeds=2),
    ),
]  # fmt: skip
NO_LOSS = ("epoch", "loss", "train_accuracy", "lr", "seconds")  # of a history


@dataclass
class SetPlaces(Places):
    """Also the folder of what `ranking_power` found: weights, scores and the chosen rule."""

    ranking: Path = Path()
    compared: Sequence[str] = COMPARED


@dataclass
class SetBench(Bench):
    """A teacher, and students on sets of its layers."""

    places: SetPlaces

    @property
    def weights(self) -> Path:
        return teachers.weights_file(self.teacher, self.places.data, self.places.ranking)

    @property
    def found(self) -> SetsFound:
        return SetsFound.of(self.teacher, self.places.results)

    def why_waiting(self) -> str | None:
        """Why nothing can be done yet."""
        if not self.weights.exists():
            return f"{self.weights} is not there yet: ranking_power.py trains it"
        if self.teacher.confirmation and self.places.chosen() is None:
            return "confirmation students wait for the rule: ranking_power.py --choose"
        return None

    def scores(self) -> Any:
        """Frame of the held-out scores that `ranking_power` found; None where it is not there."""
        ranked = Found.of(self.teacher, self.places.ranking)
        if ranked.frame() is None:
            return None
        ours, theirs = self.found.about["fingerprint"], ranked.lines[0]["fingerprint"]
        if theirs != ours:
            raise ValueError(
                f"{self.places.ranking} scored another {self.teacher.name}: fingerprint {theirs}, "
                f"here {ours}"
            )
        return ranked.frame()

    # ---- what is open ----------------------------------------------------------------------------

    def open(self, parts: Sequence[str], *, waiting: bool = False) -> Iterator[tuple[str, ...]]:
        """Yield jobs that are not finished: the sets, then students; runs of equal sets once."""
        if self.why_waiting() and not waiting:
            return
        found = self.found
        if not found.choices:
            yield ("choices", "scores")
            return
        if found.rule is None and self.places.chosen() is not None and self.scores() is not None:
            yield ("choices", "rule")
            return
        seeds = range(self.teacher.recipe.seeds)
        for run in dict.fromkeys(run for part in parts for run in self.planned(part, found)):
            if any(seed not in found.runs.get(run, {}) for seed in seeds):
                yield ("students", run.objective, "+".join(run.layers), str(run.per_class))

    def planned(self, part: str, found: SetsFound) -> list[Run]:
        """Runs of a part, as far as they can be told yet."""
        usual = self.teacher.recipe.per_class
        if part == "choices":
            return [found.run(FEATURES, layers) for layers in found.choices.values()]
        if part in ("objectives", "rivals"):
            names = self.places.compared if part == "objectives" else RIVALS
            return [found.run(name) for name in names]
        amounts = AMOUNTS.get(self.teacher.name, ())
        best = found.best_weight(objectives.WITH_KD)
        names = [CE, KD, FEATURES] + ([] if best is None else [WEIGHTED[objectives.WITH_KD][best]])
        return [found.run(name, per_class=int(usual * a)) for a in amounts for name in names]

    # ---- the doing -------------------------------------------------------------------------------

    def do(self, job: tuple[str, ...]) -> None:
        {"choices": self._choose, "students": self._students}[job[0]](*job[1:])

    def _choose(self, by: str) -> None:
        material = self.material
        if by == "rule":
            rule = self.places.chosen()
            content = {"rule": rule, "sets": choices.by_rule(rule, self.scores())}
        else:
            listed = candidate_layers(self.model, beside(self.model, material.x_train[:2]))
            layers = [layer for layer in listed if layer.name in set(self.layers)]
            sets = choices.by_place(layers)
            sets |= choices.by_scores(self.model, material, self.layers)
            right = teachers.right(self.model, material.x_test, material.y_test)
            content = {"sets": sets, "accuracy": float(right.double().mean())}
            content |= {"candidates": self.layers, "test_images": len(right)}
        self.write("choices", {"by": by} | content)

    def _students(self, objective: str, layers: str, per_class: str) -> None:
        run = Run(objective, tuple(filter(None, layers.split("+"))), int(per_class))
        done = self.found.runs.get(run, {})
        cache = self.places.work / "sets" / slug("-".join([self.teacher.name, *map(str, run)]))
        try:
            for seed in range(self.teacher.recipe.seeds):
                if seed not in done:
                    train = partial(self._train, run, seed, cache)
                    line = or_failed(train, len(self.material.y_test))
                    self.write("student", run._asdict() | {"seed": seed} | line)
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    def _train(self, run: Run, seed: int, cache: Path) -> dict[str, Any]:
        started, material = time.perf_counter(), self.material
        teacher = for_amount(self.teacher, run)
        student = teacher.build_student(material, seed=seed).to(self.places.device)
        x, y = teacher.students_images(material)
        listed = candidate_layers(student, beside(student, x[:2]))
        blocks = [c.name for c in listed if c.role == "block"]
        pairs = choices.paired(run.layers, blocks) or None

        def statistics():
            for layer, block in pairs:
                met = last_block(student, block, x)
                yield moments(self.model, [layer], met, x)[layer]

        objective = objectives.objective_of(run.objective, statistics)
        options = {"epochs": teacher.recipe.epochs, "batch_size": teacher.recipe.batch_size}
        options |= {"lr": teacher.recipe.lr, "seed": seed, "progress": False}
        if objective.uses_features or objective.uses_teacher_logits:
            options |= {"cache_dir": cache, "cache_dtype": "float16", "pairs": pairs}
        result = distill(student, self.model, (x, y), objective=objective, **options)
        last = result.history.drop(columns=[*NO_LOSS]).iloc[-1]
        losses = {name: round(float(value), 5) for name, value in last.items()}
        found = measured(result.student, student, (x, y), material) | {"losses": losses}
        found |= {"pairs": pairs, "epochs": teacher.recipe.epochs, "images": len(y)}
        return found | {"seconds": round(time.perf_counter() - started, 1)}


def for_amount(teacher: Teacher, run: Run) -> Teacher:
    """Teacher whose students see so many images; of few, as often as to take the usual steps."""
    usual = teacher.recipe
    epochs = usual.epochs * max(1, usual.per_class // run.per_class)
    return replace(teacher, recipe=replace(usual, per_class=run.per_class, epochs=epochs))
