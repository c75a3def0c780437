"""What is to be done, in order, and the doing of it by one or more processes."""

from __future__ import annotations

import datetime
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import scores, students, teachers
from benchmarks.evidence.journal import Journal, claim
from benchmarks.evidence.material import LOAD, Material
from benchmarks.evidence.moments import Moments, last_block, moments
from benchmarks.evidence.students import ARMS, ZERO_LINE
from benchmarks.evidence.teachers import Teacher
from geomkd import pair_layers
from geomkd.common.results_folder import machine
from geomkd.distillation.pairing import evenly_spaced

FEW = 5  # layers of the longer runs
WAIT = 5  # seconds, where other processes have claimed what is open


@lru_cache(maxsize=1)
def material_of(data: str, folder: Path) -> Material:
    """Images of a data set, of one at a time."""
    return LOAD[data](folder)


@dataclass
class Places:
    """Folders: archives and published weights, results, what unfinished work leaves."""

    data: Path
    results: Path
    work: Path
    chosen: Callable[[], str | None]  # rule that goes to confirmation
    device: str = "cpu"  # where students are trained and measured


@dataclass
class Bench:
    """A teacher with what was finished about it."""

    teacher: Teacher
    places: Places
    _moments: dict[bool, dict[str, Moments]] = field(default_factory=dict)

    @property
    def journal(self) -> Journal:
        return Journal(self.places.results / f"{self.teacher.name}.jsonl")

    @property
    def weights(self) -> Path:
        return teachers.weights_file(self.teacher, self.places.data, self.places.results)

    @property
    def material(self) -> Material:
        return material_of(self.teacher.data, self.places.data)

    @cached_property
    def model(self) -> nn.Module:
        return teachers.load(self.teacher, self.material, self.weights).to(self.places.device)

    @cached_property
    def layers(self) -> list[str]:
        """Candidates, as the teacher's line has them where there is one."""
        told = [line["layers"] for line in self.journal.read() if line["kind"] == "teacher"]
        return told[0] if told else self.teacher.layers(self.model, self.material)

    @cached_property
    def stamp(self) -> dict[str, str]:
        mark = teachers.fingerprint(self.model)
        return {"fingerprint": mark, "protocol": self.teacher.protocol}

    def layers_of(self, arm: str) -> list[str]:
        """The zero line where the arm has one of its own, then the layers."""
        chosen = self.layers
        if ARMS[arm].few:
            chosen = evenly_spaced(chosen, min(FEW, len(chosen)))
        own = ARMS[arm] == ARMS["features"] or ARMS[arm].times > 1
        return [ZERO_LINE] * own + chosen

    def moments_of(self, *, pooled: bool) -> dict[str, Moments]:
        """Of the students' training images, once for all layers."""
        if pooled not in self._moments:
            x, _ = self.teacher.students_images(self.material)
            student = self.teacher.build_student(self.material, seed=0)
            ((_, name),) = pair_layers(self.layers[:1], student, x[:2])
            block = last_block(student, name, x)
            self._moments[pooled] = moments(self.model, self.layers, block, x, pooled=pooled)
        return self._moments[pooled]

    # ---- what is open ----------------------------------------------------------------------------

    def open(self, arms: Sequence[str], *, waiting: bool = False) -> Iterator[tuple[str, ...]]:
        """Yield jobs that are not finished: the teacher, its scores, its students by layer.

        Students of confirmation teachers wait for the rule; ``waiting`` yields them too.
        """
        lines = self.journal.read()
        if not any(line["kind"] == "teacher" for line in lines):
            yield ("teacher",)
            return
        scored = {line["images"] for line in lines if line["kind"] == "scores"}
        yield from (("scores", images) for images in scores.IMAGES if images not in scored)
        if self.teacher.confirmation and self.places.chosen() is None and not waiting:
            return
        done = {(r["arm"], r["layer"], r["seed"]) for r in lines if r["kind"] == "student"}
        for arm in arms:
            if ARMS[arm].teachers is None or self.teacher.name in ARMS[arm].teachers:
                for layer in self.layers_of(arm):
                    seeds = range(self.teacher.recipe.seeds)
                    if any((arm, layer, seed) not in done for seed in seeds):
                        yield ("student", arm, layer)

    def do(self, job: tuple[str, ...]) -> None:
        {"teacher": self._teach, "scores": self._score, "student": self._train}[job[0]](*job[1:])

    def write(self, kind: str, content: dict[str, Any]) -> None:
        about = {"kind": kind, "teacher": self.teacher.name, **self.stamp, **content}
        where = machine() | device_told(self.places.device)
        about |= {"date": datetime.date.today().isoformat(), "machine": where}
        self.journal.add(about)

    def _teach(self) -> None:
        started = time.perf_counter()
        if not self.weights.exists():
            teachers.train(self.teacher, self.material, self.weights, self.places.work)
        m, right = self.material, teachers.right
        accuracies = {
            "accuracy": float(right(self.model, m.x_test, m.y_test).double().mean()),
            "scored_accuracy": float(right(self.model, m.x_score, m.y_score).double().mean()),
            "training_accuracy": float(right(self.model, m.x_train, m.y_train).double().mean()),
        }
        parameters = sum(p.numel() for p in self.model.parameters())
        seconds = round(time.perf_counter() - started, 1)
        about = {"parameters": parameters, "layers": self.layers, "seconds": seconds}
        about["test_images"] = len(m.y_test)
        self.write("teacher", accuracies | about)

    def _score(self, images: str) -> None:
        found = scores.score(self.teacher, self.model, self.material, images, self.layers)
        self.write("scores", found)

    def _train(self, arm: str, layer: str) -> None:
        lines = [line for line in self.journal.read() if line["kind"] == "student"]
        done = {line["seed"] for line in lines if (line["arm"], line["layer"]) == (arm, layer)}
        cache = self.places.work / "features" / "-".join([self.teacher.name, arm, slug(layer)])
        about = None
        if layer != ZERO_LINE:
            about = self.moments_of(pooled=ARMS[arm].pooled)[layer]
        try:
            for seed in range(self.teacher.recipe.seeds):
                if seed not in done:
                    given = self.teacher, self.model, self.material, ARMS[arm], layer, about, seed
                    train = partial(students.train_student, *given, cache)
                    run = students.or_failed(train, len(self.material.y_test))
                    self.write("student", {"arm": arm, "layer": layer, "seed": seed} | run)
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def work(benches: Sequence[Bench], arms: Sequence[str], say: Callable[[str], Any]) -> None:
    """Do what is open, one job after the other, until nothing is; others may do the same."""
    while True:
        found, did = False, False
        for bench in benches:
            for job in bench.open(arms):
                found = True
                name = slug("-".join([bench.teacher.name, *job]))
                with claim(bench.places.work / "claims" / name) as mine:
                    if not mine or job not in set(bench.open(arms)):  # another's, or done by one
                        continue
                    started = time.perf_counter()
                    bench.do(job)
                    did = True
                    seconds = time.perf_counter() - started
                    say(f"{bench.teacher.name}: {', '.join(job)} ({seconds:.0f} s)")
        if not found:
            return
        if not did:
            time.sleep(WAIT)


def device_told(device: str) -> dict[str, str]:
    """Name of an accelerator, as what keeps a run tells it."""
    kind = torch.device(device).type
    if kind == "cpu":
        return {}
    return {"device": torch.get_device_module(device).get_device_name(device)}


def slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text)
