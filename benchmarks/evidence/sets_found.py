"""What the journals hold of students on sets of layers, and the figures read off them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evidence.choices import EVENLY
from benchmarks.evidence.found import HEADS
from benchmarks.evidence.journal import Journal
from benchmarks.evidence.objectives import FEATURES, LAST, WEIGHTED, uses_features
from benchmarks.evidence.students import unpacked
from benchmarks.evidence.teachers import Teacher
from benchmarks.evidence.verdict import LEVEL, REPEATS, redrawn


class Run(NamedTuple):
    """Students that differ by their seeds alone; layers in order of depth, none for logits."""

    objective: str
    layers: tuple[str, ...]
    per_class: int


class Difference(NamedTuple):
    """Points that one run is above another, and a bootstrap's interval."""

    gain: float
    low: float
    high: float


@dataclass
class SetsFound:
    """Finished work on one teacher."""

    teacher: Teacher
    lines: list[dict[str, Any]]

    @classmethod
    def of(cls, teacher: Teacher, results: Path) -> SetsFound:
        return cls(teacher, Journal(results / f"{teacher.name}.jsonl").read())

    @cached_property
    def choices(self) -> dict[str, list[str]]:
        """Layers of each set that has been chosen."""
        found = {}
        for line in self.lines:
            if line["kind"] == "choices":
                found |= line["sets"]
        return found

    @property
    def rule(self) -> str | None:
        """Rule by which two of the sets were chosen; None before."""
        return next((line["rule"] for line in self.lines if "rule" in line), None)

    @property
    def about(self) -> dict[str, Any]:
        return next(line for line in self.lines if "candidates" in line)

    @cached_property
    def runs(self) -> dict[Run, dict[int, dict[str, Any]]]:
        """Students by run and seed."""
        found: dict[Run, dict[int, dict[str, Any]]] = {}
        for line in self.lines:
            if line["kind"] == "student":
                run = Run(line["objective"], tuple(line["layers"]), line["per_class"])
                found.setdefault(run, {})[line["seed"]] = line
        return found

    def run(self, objective: str, layers: Any = None, per_class: int | None = None) -> Run:
        """Run on these layers, or on those of the evenly spaced that the objective uses."""
        if layers is None:
            layers = self.choices[EVENLY] if uses_features(objective) else ()
            layers = layers[-1:] if objective == LAST else layers
        usual = self.teacher.recipe.per_class
        return Run(objective, tuple(layers), usual if per_class is None else per_class)

    # ---- figures ---------------------------------------------------------------------------------

    def accuracies(self, run: Run, head: str = "along") -> np.ndarray:
        """Test accuracy in percent of the seeds that are there, (seeds,)."""
        lines = self.runs.get(run, {})
        return 100 * np.array([lines[s][f"{HEADS[head]}accuracy"] for s in sorted(lines)])

    def whole(self, run: Run) -> bool:
        return len(self.runs.get(run, {})) == self.teacher.recipe.seeds

    def difference(self, ours: Run, theirs: Run, *, seed: int = 0) -> Difference | None:
        """Points above another run on the same images, resampling seeds and images.

        None where a seed of one is not there, or where both are the same.
        """
        if ours == theirs or not (self.whole(ours) and self.whole(theirs)):
            return None
        n, rng = self.about["test_images"], np.random.default_rng(seed)
        flags = [
            np.stack([unpacked(line["right"], n) for _, line in sorted(self.runs[run].items())])
            for run in (ours, theirs)
        ]
        points = 100 * (flags[0].astype(float) - flags[1])
        counts = rng.multinomial(n, np.full(n, 1 / n), size=REPEATS) / n
        drawn = redrawn(points, counts, rng)
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Difference(float(points.mean()), float(low), float(high))

    def weighted(self, arm: str) -> np.ndarray | None:
        """Accuracies by weight of the features, (weights, seeds); None before all are there."""
        runs = [self.run(name) for name in WEIGHTED[arm].values()] if self.choices else []
        if not runs or not all(self.whole(run) for run in runs):
            return None
        return np.stack([self.accuracies(run) for run in runs])

    def best_weight(self, arm: str) -> int | None:
        """Weight of the highest mean over all seeds."""
        table = self.weighted(arm)
        return None if table is None else list(WEIGHTED[arm])[int(table.mean(axis=1).argmax())]

    def held_out(self, arm: str) -> tuple[list[int], np.ndarray] | None:
        """Weight that is best on the other seeds and its accuracy on the one left, seed by seed."""
        table = self.weighted(arm)
        if table is None:
            return None
        seeds = range(table.shape[1])
        best = [int(np.delete(table, s, axis=1).mean(axis=1).argmax()) for s in seeds]
        return [list(WEIGHTED[arm])[i] for i in best], table[best, list(seeds)]

    def over_features(self, arm: str) -> np.ndarray | None:
        """Points of `held_out` above features alone, seed by seed."""
        told, features = self.held_out(arm), self.run(FEATURES) if self.choices else None
        if told is None or not self.whole(features):
            return None
        return told[1] - self.accuracies(features)
