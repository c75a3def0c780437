"""What half-samples and many classes add to `score_layers`, and what other processes cost.

    python benchmarks/overhead.py --draws   # the default call with and without half-samples
    python benchmarks/overhead.py --logme   # logme at 3 to 1,000 classes
    python benchmarks/overhead.py --busy    # quickstart and notebooks beside a busy process a core
    python benchmarks/overhead.py --busy --only 4_a_text_encoder 5_signals

Each row is written as it is measured: a run that is stopped keeps the rows before. ``--only`` keeps
the other rows of the file as they are; each of them has its date
and machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
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
LOGME = [(c, 5000) for c in (3, 10, 100, 1000)]


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


def logme_row(classes: int, n: int) -> dict[str, Any]:
    """Seconds of `score_layers` by logme, three narrow layers and 50 half-samples: median of 3."""
    torch.manual_seed(0)
    widths, layers = (64, 96, 128), [torch.nn.Linear(64, 64)]
    for below, width in zip((64, *widths), widths, strict=False):
        layers += [torch.nn.Linear(below, width), torch.nn.ReLU()]
    net, names = torch.nn.Sequential(*layers), [str(i) for i in range(2, len(layers), 2)]
    y = torch.arange(n) % classes
    x = torch.randn(classes, 64)[y] + 0.3 * torch.randn(n, 64)

    def seconds() -> float:
        started = time.perf_counter()
        geomkd.score_layers(net, (x, y), names, measures=("logme",), progress=False)
        return time.perf_counter() - started

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a class has fewer than 25 samples")
        turns = [seconds() for _ in range(4)][1:]  # after a warm-up
    return {"classes": classes, "n": n, "widths": widths, "seconds": statistics.median(turns)}


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


def logme_rows() -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of `logme_row`, each with the line that tells it."""
    first = None
    for row in (logme_row(*case) for case in LOGME):
        first = first or row["seconds"]
        times = f"{row['seconds'] / first:.2f} x of {LOGME[0][0]} classes"
        yield row, f"logme, n = {row['n']}, C = {row['classes']}: {row['seconds']:.2f} s, {times}"


def busy_rows(only: list[str] | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of `busy_row`, each with the line that tells it."""
    commands = {"quickstart": [sys.executable, "-m", "geomkd", "quickstart"]}
    for path in sorted((HERE.parent / "notebooks").glob("[0-9]_*.py")):
        commands[path.stem] = [sys.executable, str(path)]
    if unknown := set(only or ()) - set(commands):
        raise SystemExit(f"--only takes {', '.join(commands)}; got {', '.join(sorted(unknown))}")
    for row in (busy_row(name, commands[name]) for name in only or commands):
        took = f"{row['quiet']:.0f} s alone, {row['busy']:.0f} s beside busy processes"
        yield row, f"{row['command']}: {took}, {row['ratio']:.1f} x"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--draws", action="store_true", help="what half-samples add, in CPU time")
    which.add_argument("--logme", action="store_true", help="what many classes add to logme")
    which.add_argument("--busy", action="store_true", help="beside a busy process a core")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="which commands of --busy")
    parser.add_argument("--out", type=Path, help="file of the result (default: under results/)")
    options = parser.parse_args(arguments)
    if options.only and not options.busy:
        parser.error("--only is of --busy")
    name = next(name for name in ("draws", "logme", "busy") if getattr(options, name))
    rows = {"draws": draws_rows, "logme": logme_rows, "busy": lambda: busy_rows(options.only)}
    path = options.out or HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    result: dict[str, Any] = {"date": date, "machine": machine(), "rows": []}
    if options.only and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = [r for r in before["rows"] if r["command"] not in options.only]
        made = {key: before[key] for key in ("date", "machine")}
        result["rows"] = [made | row for row in kept]
    for row, line in rows[name]():
        result["rows"].append(row | {"date": date})
        write_json(path, result)
        print(line, flush=True)
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
