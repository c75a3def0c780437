"""What the journals hold of a teacher, and the figures that are read off it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from benchmarks.evidence.journal import Journal
from benchmarks.evidence.rules import RULES, values
from benchmarks.evidence.scores import IMAGES
from benchmarks.evidence.students import ZERO_LINE, unpacked
from benchmarks.evidence.teachers import Teacher

HEADS = {"along": "", "refitted": "refitted_"}  # the head that trained along, or one refitted


@dataclass
class Found:
    """Finished work on one teacher."""

    teacher: Teacher
    lines: list[dict[str, Any]]
    _kept: dict[Any, Any] = field(default_factory=dict)  # frames and scores, once read

    @classmethod
    def of(cls, teacher: Teacher, results: Path) -> Found:
        return cls(teacher, Journal(results / f"{teacher.name}.jsonl").read())

    def _kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def about(self) -> dict[str, Any] | None:
        return next(iter(self._kind("teacher")), None)

    @cached_property
    def runs(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        """Students by arm, layer and seed."""
        return {(r["arm"], r["layer"], r["seed"]): r for r in self._kind("student")}

    @property
    def seeds(self) -> range:
        return range(self.teacher.recipe.seeds)

    def layers(self, arm: str = "features") -> list[str]:
        """Layers all of whose seeds are finished, in order of depth."""
        whole = [[(arm, n, seed) in self.runs for seed in self.seeds] for n in self.about["layers"]]
        return [n for n, done in zip(self.about["layers"], whole, strict=True) if all(done)]

    @property
    def complete(self) -> bool:
        """Whether the main arm and all scores are there."""
        return self.about is not None and (
            self.layers() == self.about["layers"] and len(self._kind("scores")) == len(IMAGES)
        )

    def frame(self, images: str = "held-out") -> pd.DataFrame | None:
        """Scores on a kind of images, one row a layer."""
        if images not in self._kept:
            lines = [line for line in self._kind("scores") if line["images"] == images]
            self._kept[images] = _frame(lines[0]) if lines else None
        return self._kept[images]

    def accuracies(self, arm: str = "features", head: str = "along") -> np.ndarray:
        """Test accuracy in percent, (layers, seeds)."""
        key = f"{HEADS[head]}accuracy"
        table = [[self.runs[arm, n, s][key] for s in self.seeds] for n in self.layers(arm)]
        return 100 * np.array(table).reshape(-1, len(self.seeds))

    def zero_line(self, arm: str = "features", head: str = "along") -> np.ndarray:
        """Accuracy of cross entropy alone, (seeds,), of those that are there."""
        arm = arm if (arm, ZERO_LINE, 0) in self.runs else "features"
        there = [self.runs.get((arm, ZERO_LINE, s)) for s in self.seeds]
        return 100 * np.array([run[f"{HEADS[head]}accuracy"] for run in there if run])

    def right(self, layer: str, head: str = "along", arm: str = "features") -> np.ndarray:
        """Which test images students of a layer are right on, (seeds, images)."""
        runs = [self.runs[arm, layer, seed] for seed in self.seeds]
        n = self.about["test_images"]
        return np.stack([unpacked(run[f"{HEADS[head]}right"], n) for run in runs])

    # ---- figures ---------------------------------------------------------------------------------

    def ceiling(self, arm: str = "features", head: str = "along") -> float:
        """Mean Kendall's tau between the orders of the layers by two seeds; without order 0."""
        columns = self.accuracies(arm, head).T
        return float(np.mean([np.nan_to_num(tau(a, b)) for a, b in combinations(columns, 2)]))

    @property
    def decided(self) -> bool:
        return self.ceiling() >= self.teacher.recipe.least_ceiling

    def scored(self, rule: str, images: str = "held-out", arm: str = "features") -> Any:
        """What a rule gives each of an arm's layers, (layers,); None without its columns."""
        key = rule, images, arm
        if key not in self._kept:
            frame = self.frame(images)
            found = None if frame is None else values(RULES[rule], frame)
            if found is not None:
                found = found[frame["layer"].isin(self.layers(arm)).to_numpy()]
            self._kept[key] = found
        return self._kept[key]

    def tau(self, rule: str, images: str = "held-out", arm: str = "features") -> float:
        """Kendall's tau of a rule with the students' mean accuracies; NaN without an order."""
        scored = self.scored(rule, images, arm)
        if scored is None or not RULES[rule].ordered:
            return np.nan
        return tau(scored, self.accuracies(arm).mean(axis=1))

    def regret(
        self, rule: str, images: str = "held-out", arm: str = "features", head: str = "along"
    ) -> float:
        """Points that a rule's layer is below the best, which the other seeds have told."""
        table, scored = self.accuracies(arm, head), self.scored(rule, images, arm)
        if scored is None:
            return np.nan
        picked = table.mean(axis=0) if rule == "random" else table[scored.argmax()]
        others = [np.delete(table, seed, axis=1).mean(axis=1).argmax() for seed in self.seeds]
        return float(np.mean(table[others, self.seeds] - picked))


def _frame(line: dict[str, Any]) -> pd.DataFrame:
    numbers = {n: np.array(v, float) for n, v in line["columns"].items() if n != "role"}
    return pd.DataFrame({"layer": line["layers"], "role": line["columns"]["role"], **numbers})


def tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b; NaN where one has no order at all."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return float(kendalltau(a, b).statistic)
