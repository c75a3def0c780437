"""Speed of a distillation step, as ratios taken in one run.

    python benchmarks/distill_speed.py --quick     # under a minute
    python benchmarks/distill_speed.py             # the figures in RESULTS.md, about 10 minutes

`distill` against the same step written out by hand, and teacher features read from files against
running the teacher. Repeats alternate, after a warm-up; medians. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import geomkd
from geomkd.common.results_folder import machine, write_json
from geomkd.geometry.precision import one_thread
from geomkd.quickstart import residual_network

HERE = Path(__file__).parent
RECIPE = {"epochs": 1, "lr": 1e-3, "progress": False}


def images(n: int, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0)), (
        torch.arange(n) % 10
    )


def by_hand(
    student: nn.Module,
    teacher: nn.Module,
    data: tuple[Tensor, Tensor],
    layers: list[str],
    channels: list[tuple[int, int]],
    batch_size: int,
) -> float:
    """Seconds of an epoch of feature distillation with a detached head, all written out."""
    x, y = data
    projectors = nn.ModuleList(nn.Conv2d(s, t, 1, bias=False) for s, t in channels)
    theirs, ours = {}, {}
    handles = []
    for name in layers:
        handles.append(teacher.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: theirs.__setitem__(name, out)))  # fmt: skip

        def keep(m, a, out, name=name):
            ours[name] = out.clone()
            return out.detach().clone() if name == layers[-1] else None

        handles.append(student.get_submodule(name).register_forward_hook(keep))
    head = list(student.fc.parameters())
    body = [p for p in student.parameters() if all(p is not h for h in head)]
    groups = [[*body, *projectors.parameters()], head]
    steps = -(-len(x) // batch_size)
    optimisers = [torch.optim.AdamW(group, lr=1e-3, weight_decay=0.01) for group in groups]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, total_steps=steps) for o in optimisers
    ]
    teacher.eval()
    student.train()
    started = time.perf_counter()
    total = correct = 0.0
    for index in torch.randperm(len(x)).split(batch_size):
        inputs, labels = x[index], y[index]
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            teacher(inputs)
        logits = student(inputs)
        errors = [
            nn.functional.mse_loss(projector(ours[name]), theirs[name])
            for projector, name in zip(projectors, layers, strict=True)
        ]
        loss = sum(errors) / len(errors) + nn.functional.cross_entropy(logits, labels)
        loss.backward()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        total += loss.item() * len(index)
        correct += (logits.argmax(1) == labels).sum().item()
    seconds = time.perf_counter() - started
    for handle in handles:
        handle.remove()
    return seconds


def overhead(quick: bool) -> dict:
    """`distill` against `by_hand`, for torchvision's resnet34 and resnet18 at 32 pixels."""
    batch_size, steps, repeats = (8, 2, 1) if quick else (32, 8, 21)
    data = images(batch_size * steps)
    torch.manual_seed(0)
    teacher = torchvision.models.resnet34(num_classes=10)
    layers = [f"layer{i}" for i in (1, 2, 3, 4)]
    channels = [(width, width) for width in (64, 128, 256, 512)]
    ours, hand = [], []
    for repeat in range(repeats + 1):
        for seconds in (ours, hand):
            student = torchvision.models.resnet18(num_classes=10)
            if seconds is ours:
                pairs = [(name, name) for name in layers]
                options = {"pairs": pairs, "batch_size": batch_size, **RECIPE}
                taken = (
                    geomkd.distill(student, teacher, data, **options).history["seconds"].tolist()[0]
                )
            else:
                taken = by_hand(student, teacher, data, layers, channels, batch_size)
            if repeat:
                seconds.append(taken)
    ratios = [a / b for a, b in zip(ours, hand, strict=True)]
    return {
        "seconds_a_step": statistics.median(ours) / steps,
        "by_hand_seconds_a_step": statistics.median(hand) / steps,
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def forward_seconds(model: nn.Module, x: Tensor) -> float:
    model.eval()
    taken = []
    with torch.no_grad():
        for _ in range(5):
            started = time.perf_counter()
            model(x)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def caching(width: int, quick: bool) -> dict:
    """An epoch with the teacher run live against one with its features read from files."""
    n, repeats = (64, 1) if quick else (1024, 5)
    data = images(n)
    teacher = residual_network(
        widths=tuple(width * 2**i for i in range(4)), blocks=2, channels=3, seed=0
    )
    layers = [f"block{i}" for i in (2, 4, 6, 8)]
    seconds: dict[str, list[float]] = {"live": [], "cached": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            for kind, taken in seconds.items():
                student = small_student()
                pairs = geomkd.pair_layers(layers, student, data[0][:2])
                options = {"pairs": pairs, "cache_dir": folder if kind == "cached" else None}
                started = time.perf_counter()
                result = geomkd.distill(student, teacher, data, **options, **RECIPE)
                if repeat:
                    taken.append(result.history["seconds"].tolist()[0])
                elif kind == "cached":
                    first = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.npy"))
    live, cached = (statistics.median(seconds[kind]) for kind in ("live", "cached"))
    cost = forward_seconds(teacher, data[0][:128]) / forward_seconds(small_student(), data[0][:128])
    return {
        "teacher_cost": cost,
        "live_seconds": live,
        "cached_seconds": cached,
        "speed_up": live / cached,
        "first_call_seconds": first,
        "bytes_a_sample": size / n,
    }


def small_student() -> nn.Module:
    return residual_network(widths=(16, 32, 64, 128), blocks=1, channels=3, seed=1)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    result: dict = {"date": datetime.date.today().isoformat(), "machine": machine()}
    result["overhead_threads"] = 1
    with one_thread():  # two wait for each other wherever something else runs
        result["overhead"] = overhead(options.quick)
    print(f"distill: {result['overhead']['ratio']:.3f} x the same steps written out by hand")
    result["caching"] = []
    for width in (8,) if options.quick else (22, 38):
        row = caching(width, options.quick)
        result["caching"].append(row)
        print(
            f"teacher {row['teacher_cost']:.1f} x the student's forward pass: an epoch from files "
            f"is {row['speed_up']:.2f} x as fast as one with the teacher live"
        )
    name = "distill-speed" + "-quick" * options.quick
    path = options.out or HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
