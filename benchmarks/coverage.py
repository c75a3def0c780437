"""Rank sets of simulated layers: how often they hold what they should, half-samples as they are.

    python benchmarks/coverage.py                # 1,000 repetitions at 2, 10 and 100 classes
    python benchmarks/coverage.py --quick        # five, seconds

Every repetition draws a sample of three layers' features, independent noise about fixed class means
through ReLU: two of one distribution, and one whose classes lie nearer to each other. Counted are

- covered: of the two equal layers alone, those whose rank set holds the rank that they share, 1;
- false order: how often the table does not call the two tied;
- found: how often the third layer is tied with neither;
- width: ranks in a rank set of an equal layer, of three, mean;
- spread: standard deviation of a layer's half-samples over that of its scores between repetitions.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from geomkd.common.results_folder import machine, write_json
from geomkd.geometry.draws import SampleDraws
from geomkd.geometry.gram import ClassGram
from geomkd.geometry.precision import one_thread
from geomkd.measures.quality import TERMS, quality_from
from geomkd.measures.quality_statistics import Published
from geomkd.scoring.ranking import rank_sets

HERE = Path(__file__).resolve().parent
SETTINGS = {2: 200, 10: 500, 100: 1000}  # samples of so many classes
EQUAL, DIM, HALVES = 2, 32, 50
SIGNAL = (1.0, 1.0, 0.85)  # of the class means, by layer
COLUMNS = ("covered", "false order", "found", "width", "spread")


def layer(labels: Tensor, means: Tensor, signal: float, seed: int) -> Tensor:
    """Features of one layer, (n, d)."""
    noise = torch.randn(len(labels), DIM, generator=torch.Generator().manual_seed(seed))
    return (signal * means[labels] + noise).relu_()


def scored(x: Tensor, labels: Tensor, draws: SampleDraws) -> dict[str, np.ndarray]:
    """Q and its terms of a layer and its half-samples, (1 + R,) each."""
    gram = ClassGram.of(x, labels)
    parts = [quality_from(Published(gram, of), len(x)) for of in draws.groups]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in TERMS}


def repetition(labels: Tensor, means: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Scores of all layers of one sample, (L, 1 + R) each."""
    draws = SampleDraws(labels, labels.bincount().tolist(), HALVES, seed)
    seeds = range(len(SIGNAL) * seed, len(SIGNAL) * (seed + 1))
    layers = [
        scored(layer(labels, means, signal, own), labels, draws)
        for signal, own in zip(SIGNAL, seeds, strict=True)
    ]
    return {name: np.stack([of[name] for of in layers]) for name in TERMS}


def counted(scores: np.ndarray) -> dict[str, float]:
    """Shares of one repetition, by column but the spread."""
    sets = rank_sets(scores[:, 0], scores[:, 1:])
    alone = rank_sets(scores[:EQUAL, 0], scores[:EQUAL, 1:])
    return {
        "covered": float((alone.best == 1).mean()),
        "false order": float(1 not in alone.ties[0]),
        "found": float(not sets.ties[EQUAL]),
        "width": float((1 + sets.worst - sets.best)[:EQUAL].mean()),
    }


def simulate(n_classes: int, samples: int, repetitions: int) -> dict[str, dict[str, float]]:
    """Means over repetitions, by score."""
    labels = torch.arange(samples) % n_classes
    means = torch.randn(n_classes, DIM, generator=torch.Generator().manual_seed(n_classes))
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    for seed in range(repetitions):
        for name, scores in repetition(labels, means, seed).items():
            rows[name].append(counted(scores))
            values[name].append(scores[:EQUAL])
    table = {}
    for name, own in rows.items():
        table[name] = {c: float(np.mean([row[c] for row in own])) for c in COLUMNS[:-1]}
        stacked = np.stack(values[name])  # (repetitions, EQUAL, 1 + R)
        drawn = np.sqrt(stacked[:, :, 1:].var(axis=2, ddof=1).mean())
        table[name]["spread"] = float(drawn / stacked[:, :, 0].std(axis=0, ddof=1).mean())
    return table


def report(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = ["| classes, samples | score | " + " | ".join(COLUMNS) + " |"]
    lines += ["| --- | --- |" + " ---: |" * len(COLUMNS)]
    for setting, table in result["table"].items():
        for name, row in table.items():
            cells = [f"{100 * row[c]:.1f} %" for c in COLUMNS[:3]]
            cells += [f"{row[c]:.2f}" for c in COLUMNS[3:]]
            lines.append(f"| {setting} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="five repetitions")
    parser.add_argument("--classes", type=int, nargs="+", default=[*SETTINGS])
    parser.add_argument("--out", type=Path, help="file of the result (default: under results/)")
    options = parser.parse_args(arguments)
    repetitions = 5 if options.quick else 1000
    result = {"date": datetime.date.today().isoformat(), "machine": machine()}
    result |= {"repetitions": repetitions, "halves": HALVES, "table": {}}
    with one_thread():
        for classes in options.classes:
            key = f"{classes}, {SETTINGS[classes]}"
            result["table"][key] = simulate(classes, SETTINGS[classes], repetitions)
            print(f"{key}: done", file=sys.stderr, flush=True)
    path = options.out or HERE / "results" / f"coverage{'-quick' * options.quick}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(report(result))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
