"""Every objective on one teacher and student: test accuracy of the last epoch, all seeds.

    python benchmarks/distillation.py --quick                 # digits, one seed, under a minute
    python benchmarks/distillation.py --data cifar.npz        # the table in RESULTS.md, an hour
    python benchmarks/distillation.py --data cifar.npz --tabulate

Each finished run is one JSON file; what is there is skipped, and a run that was interrupted goes on
from its checkpoint. Sizes are the constants below. Images are averaged to 16 x 16 pixels (digits
stay 8 x 8); the teacher is trained on all training images, students on the first of each class.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from geomkd import distill, pair_layers
from geomkd.common.results_folder import machine, write_json, write_picture
from geomkd.datasets import digits, load_npz
from geomkd.distillation.pairing import evenly_spaced
from geomkd.distillation.rivals import OBJECTIVES
from geomkd.geometry.precision import one_thread
from geomkd.quickstart import residual_network

HERE = Path(__file__).parent
TEACHER = {"widths": (16, 32, 64, 128), "blocks": 2}
STUDENT = {"widths": (8, 16, 32, 64), "blocks": 1}
FULL = {"teacher_epochs": 10, "epochs": 10, "per_class": 500, "batch_size": 128, "seeds": 3}
QUICK = {"teacher_epochs": 3, "epochs": 3, "per_class": 80, "batch_size": 32, "seeds": 1}
LR = 0.0075
LAYERS = 4


def arrays(path: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and labels."""
    if path is None:
        split = digits(seed=0)
        return split.x_train, split.y_train, split.x_test, split.y_test
    parts = []
    for split in ("train", "test"):
        data = load_npz(path, split=split)
        images = data.images.movedim(-1, 1).float() / 255
        parts += [nn.functional.adaptive_avg_pool2d(images, 16), data.targets]
    return tuple(parts)


def first_of_each_class(y: Tensor, per_class: int) -> Tensor:
    """Indices, rising."""
    return torch.cat([(y == a).nonzero().flatten()[:per_class] for a in y.unique()]).sort().values


class Benchmark:
    """Teacher, students, and where their runs are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.size = QUICK if options.quick else FULL
        self.seeds = options.seeds or self.size["seeds"]
        name = f"distillation-{'digits' if options.data is None else Path(options.data).stem}"
        self.results = options.out or HERE / "results" / (name + "-quick" * options.quick)
        self.work = options.work
        self.objectives = options.objectives or list(OBJECTIVES)
        self.data = options.data

    def run(self) -> None:
        """Train what is missing."""
        self.results.mkdir(parents=True, exist_ok=True)
        x, y, x_test, y_test = arrays(self.data)
        shape = {"channels": x.shape[1], "classes": len(y.unique())}
        teacher = residual_network(**TEACHER, **shape, seed=0)
        folder = self.work / self.results.name
        recipe = {"lr": LR, "batch_size": self.size["batch_size"], "progress": False}
        taught = distill(
            teacher, None, (x, y), objective="ce", val=(x_test, y_test), seed=0,
            epochs=self.size["teacher_epochs"], checkpoint_dir=folder / "teacher", **recipe,
        )  # fmt: skip
        self.write("teacher-0", taught)
        blocks = [f"block{i + 1}" for i in range(TEACHER["blocks"] * len(TEACHER["widths"]))]
        chosen = first_of_each_class(y, self.size["per_class"])
        for name in self.objectives:
            for seed in range(self.seeds):
                if (self.results / f"{name}-{seed}.json").exists():
                    continue
                student = residual_network(**STUDENT, **shape, seed=seed)
                result = distill(
                    student, teacher, (x[chosen], y[chosen]), objective=name, seed=seed,
                    pairs=pair_layers(evenly_spaced(blocks, LAYERS), student, x[:2]),
                    val=(x_test, y_test), epochs=self.size["epochs"],
                    checkpoint_dir=folder / f"{name}-{seed}", **recipe,
                )  # fmt: skip
                self.write(f"{name}-{seed}", result)

    def write(self, name: str, result) -> None:
        """One run as JSON: times are left out, for other runs may share the machine."""
        history = result.history.drop(columns="seconds").to_dict(orient="list")
        content = {
            "test_accuracy": result.accuracy,
            "objective": result.objective,
            "pairs": result.pairs,
            "history": history,
            "size": self.size,
            "teacher": TEACHER,
            "student": STUDENT,
            "lr": LR,
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
        }
        write_json(self.results / f"{name}.json", content)
        print(f"{name}: {100 * result.accuracy:.2f} %", flush=True)

    def found(self) -> dict[str, list[float]]:
        """Accuracies of the finished runs, a list an objective."""
        runs = {}
        for name in OBJECTIVES:
            files = sorted(self.results.glob(f"{name}-[0-9]*.json"))
            if files:
                runs[name] = [100 * json.loads(f.read_text())["test_accuracy"] for f in files]
        return runs

    def tabulate(self) -> str:
        """Runs as Markdown."""
        lines = ["| objective | test accuracy, % | each seed |", "| --- | ---: | --- |"]
        for name, runs in self.found().items():
            deviation = f" ± {statistics.stdev(runs):.1f}" if len(runs) > 1 else ""
            each = ", ".join(f"{run:.1f}" for run in runs)
            lines.append(f"| {name} | {statistics.mean(runs):.1f}{deviation} | {each} |")
        return "\n".join(lines)

    def picture(self) -> None:
        """Every run as a point, the mean as a bar."""
        import matplotlib.pyplot as plt

        runs = self.found()
        order = sorted(runs, key=lambda name: statistics.mean(runs[name]))
        teacher = json.loads((self.results / "teacher-0.json").read_text())["test_accuracy"]
        _, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
        for place, name in enumerate(order):
            ax.plot(runs[name], [place] * len(runs[name]), "o", color="#0072B2", ms=5, alpha=0.7)
            ax.plot(statistics.mean(runs[name]), place, "|", color="#000000", ms=18, mew=2)
        ax.axvline(100 * teacher, color="#D55E00", ls="--", lw=1.4, label="teacher")
        ax.plot([], [], "o", color="#0072B2", label="a seed")
        ax.plot([], [], "|", color="#000000", ms=12, mew=2, label="mean")
        ax.set_yticks(range(len(order)), order)
        ax.set_xlabel("test accuracy after the last epoch (%)")
        ax.set_ylabel("objective")
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=8, frameon=False, loc="upper left")
        write_picture(self.results / "accuracy.png", ax)


def main(arguments: list[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, help="students of each objective")
    parser.add_argument("--out", type=Path, help="folder of the JSON files")
    parser.add_argument("--work", type=Path, default=Path(".distillation-work"),
                        help="folder of checkpoints (default: %(default)s)")  # fmt: skip
    parser.add_argument("--tabulate", action="store_true", help="only what is there")
    benchmark = Benchmark(parser.parse_args(arguments))
    if not parser.parse_args(arguments).tabulate:
        with one_thread():  # the same numbers whatever the number of cores
            benchmark.run()
    print(benchmark.tabulate())
    benchmark.picture()
    return benchmark


if __name__ == "__main__":
    main()
