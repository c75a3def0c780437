"""What scores owe to the number of images: nulls of few permutations, and ranks from few images.

    python benchmarks/sample_size.py --data cifar10_subset.npz --weights resnet20_cifar10.pth
    python benchmarks/sample_size.py --quick     # generated images, an untrained network, seconds

1. `null_95` on pure noise: how often a score without meaning lies beyond it, by the rule in force
   and by the interpolated quantile of the permutations, which it replaced.
2. Every layer of the published CIFAR ResNet-20, one pass: Q, S, I and E of both definitions, and
   k-NN accuracy, from 25 to 500 images a class, each sample within the next.
3. Samples of 25 images a class, drawn anew: whether their rank sets hold every layer's rank at 500
   a class, and what the last step of a sweep within the sample tells of it.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.evidence.material import COLOUR, generated
from benchmarks.evidence.networks import CifarResNet
from geomkd import LayerScores, score_layers
from geomkd.common.results_folder import machine, write_json
from geomkd.datasets import load_npz
from geomkd.geometry.precision import one_thread
from geomkd.measures import fisher_ratio
from geomkd.measures.null import beside_null, permutations
from geomkd.scoring.ranking import SETTLED, ranks

HERE = Path(__file__).resolve().parent
TERMS = ("quality", "separation", "information", "efficiency")
MEASURES = {"published": ("knowledge_quality", "knn_accuracy"), "robust": ("knowledge_quality",)}
PER_CLASS = (25, 50, 100, 250, 500)
FULL = {"noise": 1000, "sizes": PER_CLASS, "repetitions": 20, "halves": 50}
QUICK = {"noise": 20, "sizes": (10, 20, 30), "repetitions": 2, "halves": 10}


def exceeded(count: int, repetitions: int) -> dict[str, Any]:
    """Share of scores of pure noise beyond the 95 % point of ``count`` permutations."""
    index, hits = torch.arange(60) % 3, {"rule": 0, "interpolated": 0, "p_value": 0}
    for seed in range(repetitions):
        x = torch.randn(60, 10, generator=torch.Generator().manual_seed(seed))
        drawn = torch.stack([fisher_ratio(x, y) for y in permutations(index, count, seed)])
        found = beside_null(fisher_ratio(x, index), drawn)
        hits["rule"] += bool(found.value > found.null_95)
        hits["interpolated"] += bool(found.value > drawn.quantile(0.95))
        hits["p_value"] += bool(found.p_value <= 0.05)
    shares = {name: hit / repetitions for name, hit in hits.items()}
    return {"permutations": count, "repetitions": repetitions} | shares


def changes(scores: LayerScores) -> dict[str, dict[str, float]]:
    """Change of every score in percent from the smallest sample to the whole one, by layer."""
    names = scores.to_frame()["layer"]
    return {
        by: dict(zip(names, np.round(100 * (c[:, -1] / c[:, 0] - 1), 1).tolist(), strict=True))
        for by in scores.draws
        for c in [scores.swept(by=by)]
    }


def steps(scores: LayerScores) -> dict[str, list[float]]:
    """Kendall's tau of every score between the order in each sample and in the whole one."""
    curves = {by: scores.swept(by=by) for by in scores.draws}
    return {by: [tau_of(c[:, i], c[:, -1]) for i in range(c.shape[1] - 1)]
            for by, c in curves.items()}  # fmt: skip


def tau_of(one: np.ndarray, other: np.ndarray) -> float:
    """Tau-b; 0 where all layers have one score."""
    return round(float(np.nan_to_num(kendalltau(one, other).statistic)), 3)


def held(few: LayerScores, many: LayerScores, by: str) -> dict[str, Any]:
    """Whether rank sets of few images hold the ranks of many, and what a sweep told of it."""
    table = few.rank(by=by).set_index("layer").loc[few.to_frame()["layer"]]
    there = ranks(many.to_frame()[by].to_numpy())
    inside = (table["best"] <= there) & (there <= table["worst"])
    return {
        "by": by,
        "held": bool(inside.all()),
        "layers_held": float(inside.mean()),
        "tau_of_sweep": tau_of(*few.swept(by=by)[:, -2:].T),
        "tau_to_many": tau_of(few.to_frame()[by].to_numpy(), many.to_frame()[by].to_numpy()),
    }


def ranked(model: Any, data: Any, size: dict[str, Any], classes: int) -> dict[str, Any]:
    """Parts 2 and 3."""
    sizes, found = [classes * m for m in size["sizes"]], {"sizes": size["sizes"]}
    few, most = sizes[0], sizes[-1]
    for definition, measures in MEASURES.items():
        options = {"measures": measures, "definition": definition, "progress": False}
        options |= {"dataset_size": len(data[0])}
        many = score_layers(model, data, samples=most, sweep=sizes[:-1], subsamples=0, **options)
        found[definition] = {"change_percent": changes(many), "tau_to_most": steps(many)}
        rows = []
        for seed in range(1, 1 + size["repetitions"]):
            options |= {"samples": few, "sweep": [few // 2], "seed": seed}
            options |= {"subsamples": size["halves"]}
            scores = score_layers(model, data, **options)
            rows += [held(scores, many, by) for by in scores.draws]
        found[definition]["ranks_of_few"] = summary(rows)
        print(f"{definition}: done", file=sys.stderr, flush=True)
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over repetitions, of each score; of settled sweeps and of others."""
    table: dict[str, dict[str, Any]] = {}
    for by in dict.fromkeys(row["by"] for row in rows):
        own = [row for row in rows if row["by"] == by]
        sure = [row["tau_to_many"] for row in own if row["tau_of_sweep"] >= SETTLED]
        unsure = [row["tau_to_many"] for row in own if not row["tau_of_sweep"] >= SETTLED]
        table[by] = {name: round(float(np.mean([row[name] for row in own])), 3)
                     for name in ("held", "layers_held", "tau_to_many")}  # fmt: skip
        table[by] |= {"repetitions": len(own), "warned": len(unsure)}
        table[by]["tau_to_many_not_warned"] = round(float(np.mean(sure)), 3) if sure else None
        table[by]["tau_to_many_warned"] = round(float(np.mean(unsure)), 3) if unsure else None
    return table


def report(result: dict[str, Any]) -> str:
    """All of it as Markdown."""
    lines = ["| permutations | beyond null_95, % | interpolated, % | p <= 0.05, % |",
             "| ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in result["noise"]:
        shares = " | ".join(f"{100 * row[k]:.1f}" for k in ("rule", "interpolated", "p_value"))
        lines.append(f"| {row['permutations']} | {shares} |")
    for definition in MEASURES:
        found, sizes = result["ranks"][definition], result["ranks"]["sizes"]
        head = f"{definition}, {sizes[0]} to {sizes[-1]} a class | change, % | tau | order held, %"
        lines += ["", f"| {head} | ranks held, % | warned, % |", "| ---" + 5 * " | ---:" + " |"]
        for by, of in found["change_percent"].items():
            low, high = min(of.values()), max(of.values())
            few = found["ranks_of_few"][by]
            lines.append(
                f"| {by} | {low:+.0f} to {high:+.0f} | {found['tau_to_most'][by][0]:.2f} | "
                f"{100 * few['held']:.0f} | {100 * few['layers_held']:.0f} | "
                f"{100 * few['warned'] / few['repetitions']:.0f} |"
            )
    return "\n".join(lines)


def teacher_and_images(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """The published ResNet-20 and its normalised training images; or small ones of noise."""
    if options.quick:
        torch.manual_seed(0)
        made = generated()
        return CifarResNet(1, made.classes).eval(), (made.x_train, made.y_train), made.classes
    if options.data is None or options.weights is None:
        raise SystemExit("sample_size.py: --data and --weights are needed, or --quick")
    model = CifarResNet(3, 10).eval()
    model.load_state_dict(torch.load(options.weights, map_location="cpu", weights_only=True))
    own = load_npz(options.data, split="train", mean=COLOUR[0], std=COLOUR[1])
    images = torch.stack([own[i][0] for i in range(len(own))])
    return model, (images, own.targets), 10


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="an npz file with x_train, y_train of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="of akamaster's ResNet-20, a state dict")
    parser.add_argument("--quick", action="store_true", help="small sizes, for trials")
    parser.add_argument("--out", type=Path, help="file of the result (default: under results/)")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")  # what they say is what is measured
        model, data, classes = teacher_and_images(options)
        result = {"date": datetime.date.today().isoformat(), "machine": machine()}
        result |= {"settled": SETTLED, "noise": [exceeded(r, size["noise"]) for r in (19, 20, 39)]}
        result["ranks"] = ranked(model, data, size, classes)
    name = "sample-size-quick" if options.quick else "sample-size"
    path = options.out or HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(report(result))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
