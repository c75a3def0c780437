"""What half-samples add to `score_layers`, and what other processes cost.

    python benchmarks/overhead.py --draws   # the default call with and without half-samples
    python benchmarks/overhead.py --busy    # quickstart and notebooks beside a busy process a core

Each row is written as it is measured: a run that is stopped keeps the rows before.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import geomkd
from geomkd.common.results_folder import machine, write_json
from geomkd.geometry.precision import one_thread

HERE = Path(__file__).parent
TURNS = {"resnet34": 3, "vit": 1}
DRAWS = [(network, c, 5000) for network in TURNS for c in (10, 100)]


def draws_row(network: str, classes: int, n: int) -> dict[str, Any]:
    """CPU time of `score_layers` by default and without half-samples, on one thread, in turn.

    Of several turns the least counts: what slows a machine down only adds.
    """
    import torchvision

    torch.manual_seed(0)
    if network == "vit":  # of CIFAR's size: patches of 4, six blocks
        model = torchvision.models.VisionTransformer(32, 4, 6, 3, 192, 768, num_classes=classes)
    else:
        model = torchvision.models.resnet34(num_classes=classes)
    y = torch.arange(n) % classes
    x = 0.5 * torch.randn(n, 3, 32, 32) + torch.randn(classes, 3, 32, 32)[y]

    def seconds(rows: slice, subsamples: int) -> float:
        started = time.process_time()
        scored = (x[rows], y[rows])
        geomkd.score_layers(model.eval(), scored, subsamples=subsamples, progress=False)
        return time.process_time() - started

    with one_thread():
        seconds(slice(2 * classes), 2)  # the warm-up
        turns = [[seconds(slice(n), draws) for draws in (0, 50)] for _ in range(TURNS[network])]
    plain, default = map(min, zip(*turns, strict=True))
    row = {"network": network, "classes": classes, "n": n, "seconds": plain, "default": default}
    return row | {"more": default / plain - 1, "turns": turns}


def busy_row(name: str, command: list[str]) -> dict[str, Any]:
    """Seconds of a command alone, and beside one busy process a core."""

    def seconds() -> float:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            variables = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(HERE.parent)}
            subprocess.run(command, check=True, cwd=folder, env=variables, capture_output=True)
        return time.perf_counter() - started

    quiet, others = seconds(), []
    try:
        for _ in range(os.cpu_count() or 1):
            others.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        busy = seconds()
    finally:
        for other in others:
            other.kill()
            other.wait()
    return {"command": name, "quiet": quiet, "busy": busy, "ratio": busy / quiet}


def draws_rows() -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of `draws_row`, each with the line that tells it."""
    for row in (draws_row(*case) for case in DRAWS):
        what = f"{row['network']}, n = {row['n']}, C = {row['classes']}"
        yield row, f"{what}: {row['seconds']:.1f} s, {100 * row['more']:+.0f} % with half-samples"


def busy_rows() -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of `busy_row`, each with the line that tells it."""
    commands = {"quickstart": [sys.executable, "-m", "geomkd", "quickstart"]}
    for path in sorted((HERE.parent / "notebooks").glob("[0-9]_*.py")):
        commands[path.stem] = [sys.executable, str(path)]
    for row in (busy_row(*given) for given in commands.items()):
        took = f"{row['quiet']:.0f} s alone, {row['busy']:.0f} s beside busy processes"
        yield row, f"{row['command']}: {took}, {row['ratio']:.1f} x"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--draws", action="store_true", help="what half-samples add, in CPU time")
    which.add_argument("--busy", action="store_true", help="beside a busy process a core")
    parser.add_argument("--out", type=Path, help="file of the result (default: under results/)")
    options = parser.parse_args(arguments)
    name = "draws" if options.draws else "busy"
    path = options.out or HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine()}
    result["rows"] = []
    for row, line in (draws_rows if options.draws else busy_rows)():
        result["rows"].append(row)
        write_json(path, result)
        print(line, flush=True)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
