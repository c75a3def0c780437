"""Time and memory that open runs will take, from a few steps on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

import geomkd
from benchmarks.paper.augment import augment_crop_flip
from benchmarks.paper.data import MOST_VALIDATION, Sizes
from benchmarks.paper.models import build
from benchmarks.paper.places import Place, read_json, slug
from benchmarks.paper.recipes import Combination, Recipe, layer_indices
from benchmarks.speed import peak, restart_peak
from geomkd.common.results_folder import write_json

WARM_UP, TIMED = 1, 2  # steps
N_CLASSES = 100  # hardly changes what a step costs
COSTLY = "semckd"  # many times the others' cost; a step of features stands for these


def estimate(
    combinations: Sequence[Combination], seeds: int, sizes: dict[str, Sizes], place: Place
) -> Iterator[str]:
    """Yield a line for each data set and pair with open runs, then one on all of them."""
    groups: dict[tuple, list[Combination]] = {}
    for c in combinations:
        groups.setdefault((c.dataset, c.teacher, c.student), []).append(c)
    total = 0.0
    for own in groups.values():
        n_images, side = sizes[own[0].dataset].n_train, sizes[own[0].dataset].image_size
        runs = _open_runs(own, seeds, place)
        step = {role: cost(own[0], role, side, place) for role in runs}
        recipe = own[0].recipe
        n_steps = recipe.epochs * -(-n_images_of(n_images, recipe) // recipe.batch_size)
        seconds = n_steps * sum(n * step[role]["seconds"] for role, n in runs.items())
        total += seconds
        gigabytes = (max(s["bytes"] for s in step.values()) + 3 * side**2 * n_images) / 1e9
        each = ", ".join(
            f"{n} x {role} at {step[role]['seconds']:.3g} s a step" for role, n in runs.items()
        )
        yield (
            f"{slug(own[0].dataset)}, {own[0].teacher} -> {own[0].student}: "
            f"{duration(seconds)}, {gigabytes:.1f} GB ({n_steps:,} steps a run: {each})"
        )
    yield f"together about {duration(total)} on {place.device}, evaluation and scoring left out"


def _open_runs(combinations: list[Combination], seeds: int, place: Place) -> dict[str, int]:
    """Number of open runs that cost like the teacher, like ``features``, like ``semckd``."""
    runs = {"teacher": int(not place.teacher(combinations[0]).exists())}
    for c in combinations:
        role = COSTLY if c.method == COSTLY else "features"
        missing = sum(not place.student(c, seed).exists() for seed in range(seeds))
        runs[role] = runs.get(role, 0) + missing
    return {role: n for role, n in runs.items() if n}


def cost(combination: Combination, role: str, side: int, place: Place) -> dict[str, float]:
    """Seconds of a step and bytes of a run, measured once and kept in the working folder.

    In a process of its own, so that the peak of its memory tells of nothing else.
    """
    recipe, names = combination.recipe, [combination.teacher]
    names += [] if role == "teacher" else [combination.student, role]
    options = f"{side}-{recipe.batch_size}-{recipe.precision}-{recipe.augment}-{place.device}"
    path = place.work / f"cost-{'-'.join(names)}-{options}.json"
    if not path.exists():
        place.say(f"measuring {WARM_UP + TIMED} steps of {' '.join(names)} at {side} pixels")
        path.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            arguments = (combination, role, side, str(place.device), torch.get_num_threads())
            write_json(path, pool.submit(measure, *arguments).result())
    return read_json(path)


def measure(
    combination: Combination, role: str, side: int, device: str, threads: int
) -> dict[str, float]:
    """Train on a batch of noise: time of a step, and memory of parameters, optimiser and step."""
    torch.set_num_threads(threads)
    recipe, device = combination.recipe, torch.device(device)
    n = recipe.batch_size
    images = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    models = [build(combination.teacher, N_CLASSES, side)]
    options: dict[str, Any] = {"objective": "ce"}
    if role != "teacher":
        models.append(build(combination.student, N_CLASSES, side))
        names = [
            [layer.name for layer in geomkd.candidate_layers(model, images[:2])] for model in models
        ]
        indices = layer_indices(replace(combination, layers="paper_even"))
        options = {"objective": role, "pairs": [(names[0][t], names[1][s]) for t, s in indices]}
    for model in models:
        model.to(device)
    before = _restart_peak(device)
    result = geomkd.distill(
        models[-1],
        models[0] if role != "teacher" else None,
        (images, torch.arange(n) % N_CLASSES),
        epochs=WARM_UP + TIMED,  # of one step each
        batch_size=n,
        lr=1e-6,  # noise teaches nothing; nothing shall overflow either
        precision=recipe.precision,
        augment=augment_crop_flip() if recipe.augment else None,
        device=device,
        progress=False,
        **options,
    )
    growth = _peak(device) - before
    parameters = sum(p.nbytes for model in models for p in model.parameters())
    seconds = float(result.history["seconds"][WARM_UP:].mean())
    return {"seconds": seconds, "bytes": parameters + growth}


def _restart_peak(device: torch.device) -> float:
    if device.type == "cpu":
        return restart_peak()
    torch.get_device_module(device).reset_peak_memory_stats(device)
    return _peak(device)


def _peak(device: torch.device) -> float:
    if device.type == "cpu":
        return peak()
    return torch.get_device_module(device).max_memory_allocated(device)


def n_images_of(n_images: int, recipe: Recipe) -> int:
    """Training images that are left by the recipe's validation split and subset."""
    if recipe.validation:
        n_images -= min(n_images // 5, MOST_VALIDATION)
    return n_images if recipe.subset is None else min(n_images, recipe.subset)


def duration(seconds: float) -> str:
    """Seconds in words.

    Examples
    --------
    >>> duration(5400), duration(42)
    ('1.5 h', '42 s')
    """
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
