"""Measures and the default call of `score_layers` on an accelerator, as ratios taken in one run.

    python benchmarks/accelerator.py            # a minute or two
    python benchmarks/accelerator.py --quick    # small sizes

Medians of repeats that alternate with the bare product X Xᵀ in float32 (no TF32), after a warm-up,
each ended by a synchronisation. Copies from and to the host, and waits for the device, are counted
by torch's profiler in a call of `score_layers` without half-samples, and divided by its layers.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import geomkd
from geomkd.common.results_folder import machine, write_json
from geomkd.measures import mle_dimension, two_nn

HERE = Path(__file__).resolve().parent
CLASSES = 10
SIZES = [(1000, 512), (5000, 512), (5000, 4096), (5000, 65536), (10000, 4096), (20000, 1024)]
QUICK = [(500, 64)]
MEASURES: dict[str, Callable[..., Any]] = {
    "knowledge_quality": geomkd.knowledge_quality,
    "two_nn": lambda x, y: two_nn(x),
    "mle_dimension": lambda x, y: mle_dimension(x),
}
COUNTED = {  # names that the profiler gives, as of CUDA
    "copies to the host": ("Memcpy DtoH",),
    "copies to the device": ("Memcpy HtoD",),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}


def medians(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """Median seconds of each call, the calls in turn, after one warm-up of each."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            torch.accelerator.synchronize()
            started = time.perf_counter()
            call()
            torch.accelerator.synchronize()
            if repeat:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def measures_row(n: int, d: int, device: torch.device) -> dict[str, float]:
    """Seconds of the bare product and of each measure."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % CLASSES
    x = torch.randn(n, d, generator=generator) + torch.randn(CLASSES, d, generator=generator)[y]
    x, y = x.relu_().to(device), y.to(device)
    calls = [lambda: x @ x.T, *(lambda f=f: f(x, y) for f in MEASURES.values())]
    bare, *ours = medians(5, *calls)
    return {"n": n, "d": d, "bare": bare} | dict(zip(MEASURES, ours, strict=True))


def scoring_row(n: int, device: torch.device, size: int = 32) -> dict[str, Any]:
    """`score_layers` on resnet34, images on the host; what its layers copy and wait for."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet34(num_classes=CLASSES).eval().to(device)
    x, y = torch.randn(n, 3, size, size), torch.arange(n) % CLASSES

    def score(subsamples: int) -> Any:
        return geomkd.score_layers(model, (x, y), subsamples=subsamples, progress=False)

    dims = score(0).to_frame()["dim"].tolist()

    def bare() -> None:
        with torch.no_grad():
            for batch in x.split(256):
                model(batch.to(device))
            for d in dims:
                z = torch.full((n, d), 0.5, device=device)
                z @ z.T

    plain, default, floor = medians(3, lambda: score(0), lambda: score(50), bare)
    row = {"n": n, "layers": len(dims), "bare": floor, "plain": plain, "default": default}
    with torch.profiler.profile(acc_events=True) as profile:
        score(0)
    counts: Counter[str] = Counter()
    for event in profile.events():
        for what, names in COUNTED.items():
            counts[what] += event.name.startswith(names)
    return row | {what: counts[what] / len(dims) for what in COUNTED}


def told(result: dict[str, Any]) -> Iterator[str]:
    """Yield the rows as lines of Markdown tables."""
    yield "| n | d | X Xᵀ, ms | " + " | ".join(f"{name}, ms (× X Xᵀ)" for name in MEASURES) + " |"
    yield "| ---: " * (3 + len(MEASURES)) + "|"
    for row in result["measures"]:
        cells = (f"{1e3 * row[name]:.2f} ({row[name] / row['bare']:.2f})" for name in MEASURES)
        yield f"| {row['n']:,} | {row['d']:,} | {1e3 * row['bare']:.2f} | {' | '.join(cells)} |"
    row = result["scoring"]
    yield ""
    yield (
        f"score_layers, resnet34, n = {row['n']:,}, 32 pixels: {row['plain']:.2f} s, "
        f"{row['plain'] / row['bare']:.2f} x one forward pass and the bare products; with 50 "
        f"half-samples {row['default']:.2f} s, {100 * (row['default'] / row['plain'] - 1):+.0f} %"
    )
    counts = ", ".join(f"{row[what]:.1f} {what}" for what in COUNTED)
    yield f"a layer of {row['layers']}: {counts}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accelerator.json")
    options = parser.parse_args(arguments)
    if not torch.accelerator.is_available():
        print("no accelerator here: nothing is measured, nothing claimed")
        return 1
    device = torch.accelerator.current_accelerator()
    name = torch.get_device_module(device).get_device_name()
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": name}
    result |= {"machine": machine(), "measures": []}
    for n, d in QUICK if options.quick else SIZES:
        result["measures"].append(measures_row(n, d, device))
    result["scoring"] = scoring_row(300 if options.quick else 5000, device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    print("\n".join(told(result)))
    print(f"{name}; wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
