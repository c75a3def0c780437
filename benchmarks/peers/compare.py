"""two_nn, mle_dimension and cka against scikit-dimension, DADApy and pytorch-cka, in one run.

    python benchmarks/speed.py --peers             # the table in RESULTS.md, about 20 minutes
    python benchmarks/speed.py --peers --quick     # one small size

Every library reads the same .npy in a fresh process with the same number of threads; the processes
take turns. Their environments are made first where they are not there (about 7 GB).
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.run import SHELL, run_peer, thread_variables

ROOT = Path(__file__).parents[2]
SIZES = [(5000, 64), (5000, 512), (5000, 4096), (10000, 64), (10000, 512), (10000, 4096)]
QUICK = [(1000, 64)]
PEERS = {
    "two_nn": ("skdim", "dadapy"),
    "mle_dimension": ("skdim",),  # DADApy has none from k neighbours' distances
    "cka": ("pytorch_cka",),
}
CALLS = [("product", "ours"), ("half", "ours")]
CALLS += [(measure, name) for measure, peers in PEERS.items() for name in ("ours", *peers)]
TURNS, REPEATS = 3, 2


def run_ours(measure: str, paths: list[Path], repeats: int, threads: int) -> dict[str, Any]:
    """Run a measure of ours as `run_peer` runs a peer's: in a fresh process."""
    command = [*SHELL, sys.executable, "-m", "benchmarks.peers.ours", "--measure", measure]
    command += ["--features", str(paths[0]), "--repeats", str(repeats)]
    for other in paths[1:]:
        command += ["--other", str(other)]
    variables = thread_variables(threads)
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=variables
    )
    return json.loads(done.stdout.splitlines()[-1])


def rows(sizes: list[tuple[int, int]], dtype: str, threads: int) -> Iterator[dict[str, Any]]:
    """One row a size, measure and peer."""
    with tempfile.TemporaryDirectory() as folder:
        for n, d in sizes:
            paths = [Path(folder) / name for name in ("a.npy", "b.npy")]
            for seed, path in enumerate(paths):
                np.save(path, _features(n, d, seed).numpy().astype(dtype))
            repeats = 1 if n * n * d > 2e11 else REPEATS
            runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for _ in range(TURNS):
                for measure, name in CALLS:
                    given = paths if measure == "cka" else paths[:1]
                    options = (measure, given, repeats, threads)
                    found = run_ours(*options) if name == "ours" else run_peer(name, *options)
                    runs.setdefault((measure, name), []).append(found)
            yield from _compared({"n": n, "d": d, "dtype": dtype}, runs)


def _compared(size: dict[str, Any], runs: dict[tuple[str, str], list]) -> Iterator[dict[str, Any]]:
    seconds = {k: statistics.median(s for r in v for s in r["seconds"]) for k, v in runs.items()}
    growth = {k: max(r["peak_after"] - r["peak_before"] for r in v) for k, v in runs.items()}
    for measure, name in (call for call in CALLS if call[1] != "ours"):
        ours, theirs = (measure, "ours"), (measure, name)
        yield {
            "measure": measure,
            "peer": name,
            **size,
            "seconds": seconds[ours],
            "peer_seconds": seconds[theirs],
            "product_seconds": seconds["product", "ours"],
            "half_seconds": seconds["half", "ours"],
            "times_faster": seconds[theirs] / seconds[ours],
            "to_product": seconds[ours] / seconds["product", "ours"],
            "to_halves": seconds[ours] / (1 + (measure == "cka")) / seconds["half", "ours"],
            "value": runs[ours][0]["value"],
            "peer_value": runs[theirs][0]["value"],
            "peak_growth": growth[ours],
            "peer_peak_growth": growth[theirs],
            "peer_versions": runs[theirs][0]["versions"],
        }


def _features(n: int, d: int, seed: int) -> torch.Tensor:
    """ReLU features of ten classes; both seeds share what the classes are."""
    shared = torch.randn(10, d, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(1 + seed))
    return (shared[torch.arange(n) % 10] + noise).relu_()


def exponents(found: list[dict[str, Any]]) -> dict[str, float]:
    """Growth exponents of our time: in n at the largest d, in d at the largest n."""
    result = {}
    for measure in PEERS:
        at = {(r["n"], r["d"]): r["seconds"] for r in found if r["measure"] == measure}
        n, d = sorted({n for n, _ in at}), sorted({d for _, d in at})
        if len(n) > 1:
            ratio = at[n[-1], d[-1]] / at[n[0], d[-1]]
            result[f"{measure} in n"] = math.log(ratio) / math.log(n[-1] / n[0])
        if len(d) > 1:
            ratio = at[n[-1], d[-1]] / at[n[-1], d[-2]]
            result[f"{measure} in d"] = math.log(ratio) / math.log(d[-1] / d[-2])
    return result


def table(found: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [
        "| measure | against | type | n | d | ours, s | theirs, s | × faster | ours / X Xᵀ | "
        "ours / floor | ours, MB | theirs, MB | values |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in found:
        lines.append(
            f"| {r['measure']} | {r['peer']} | {r['dtype']} | {r['n']:,} | {r['d']:,} | "
            f"{r['seconds']:.3f} | {r['peer_seconds']:.3f} | {r['times_faster']:.2f} | "
            f"{r['to_product']:.2f} | {r['to_halves']:.2f} | {r['peak_growth'] / 1e6:.0f} | "
            f"{r['peer_peak_growth'] / 1e6:.0f} | {r['value']:.5g}, {r['peer_value']:.5g} |"
        )
    return "\n".join(lines)
