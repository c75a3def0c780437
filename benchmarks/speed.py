"""Speed and memory of knowledge_quality and score_layers, as ratios taken in one run.

    python benchmarks/speed.py --quick     # under a minute
    python benchmarks/speed.py             # the table in RESULTS.md, about 10 minutes
    python benchmarks/speed.py --stem      # a 16 GB layer within 2 GB, about 10 minutes
    python benchmarks/speed.py --toolbox   # every measure against knowledge quality alone
    python benchmarks/speed.py --peers     # two_nn, mle_dimension, cka against other libraries
    python benchmarks/speed.py --peers --size 10000 4096   # one size; the file's others stay

Figures of knowledge_quality, and of --peers, are medians of repeats that alternate with what they
are compared with, after a warm-up; peak memory is that of a fresh process with the input loaded.
All others are single runs in this process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import geomkd
from geomkd.common.results_folder import machine, write_json

HERE = Path(__file__).parent
CLASSES = 10
FULL = [(1000, 512), (2500, 512), (5000, 512), (1000, 4096), (2500, 4096), (5000, 4096)]
FULL += [(5000, 16384), (5000, 65536)]
QUICK = [(1000, 512), (1000, 4096)]
ROWS_AT = [(1000, 512), (1000, 4096), (2500, 512)]  # the row-by-row computation is slow


def features(n: int, d: int) -> tuple[Tensor, Tensor]:
    """ReLU features of ten Gaussian classes, made in place: no temporary of their size."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    means = torch.randn(CLASSES, d, generator=generator)
    x = torch.randn(n, d, generator=generator)
    for a in range(CLASSES):
        x[a::CLASSES] += means[a]
    return x.relu_(), labels


def row_by_row(x: Tensor, y: Tensor) -> float:
    """Published knowledge quality written down plainly: one row at a time, one SVD a class."""
    n, d = x.shape
    unit = x / x.norm(dim=1, keepdim=True)
    within, between = torch.zeros(CLASSES), torch.zeros(CLASSES, CLASSES)
    least = torch.ones(CLASSES)
    nearest = torch.full((CLASSES,), math.inf)
    for i in range(n):
        a = y[i]
        cosine = (unit @ unit[i]).abs()
        distance = (x - x[i]).norm(dim=1)
        nearest[a] = torch.minimum(nearest[a], distance[y != a].min())
        least[a] = torch.minimum(least[a], cosine[y == a].min())
        sums = torch.zeros(CLASSES).index_add_(0, y, cosine)
        within[a] += sums[a]
        between[a] += sums
    sizes = torch.bincount(y).float()
    between /= sizes * sizes[:, None]
    off = ~torch.eye(CLASSES, dtype=torch.bool)
    separation = (within / sizes**2).mean() - between[off].mean()
    entropies, terms = [], 0
    spectra = []
    for a in range(CLASSES):
        block = x[y == a]
        p = torch.linalg.svdvals(block - block.mean(dim=0)).square()
        spectra.append(p / p.sum())
        terms += int((spectra[-1].cumsum(0) < 0.95).sum()) + 1
    for p in spectra:
        kept = p[:terms] / p[:terms].sum()
        entropies.append(-torch.xlogy(kept, kept).sum())
    information = (1 - least.mean()) * torch.stack(entropies).mean() / math.log(5)
    size = torch.stack([x[y == a].norm(dim=1).mean() for a in range(CLASSES)]).mean()
    efficiency = 2 * nearest.mean() / size * (n / math.pi) ** (1 / min(n, d))
    return float(separation + (information * efficiency).sqrt())


def medians(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """Median seconds of each call, the calls in turn, after one warm-up of each."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            if repeat:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def peak_growth(n: int, d: int) -> float:
    """Growth of the peak memory by knowledge_quality, in bytes, in a fresh process."""
    code = f"import benchmarks.speed as s; s._print_peak_growth({n}, {d})"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    return float(out.stdout)


def _print_peak_growth(n: int, d: int) -> None:
    small = features(40, 8)
    geomkd.knowledge_quality(*small)  # loads what is loaded late
    x, y = features(n, d)
    before = restart_peak()
    geomkd.knowledge_quality(x, y)
    print(peak() - before)


def restart_peak() -> float:
    """Set the process's peak memory back to what it holds now (Linux); bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Peak of the process's resident memory since `restart_peak`, in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return 1024 * float(line.split()[1])


def quality_row(n: int, d: int) -> dict[str, float]:
    """Time against the bare product and against the row-by-row computation; memory."""
    x, y = features(n, d)
    repeats = 7 if n * n * d < 2e11 else 3 if n * n * d < 1e12 else 1
    ours, bare = medians(repeats, lambda: geomkd.knowledge_quality(x, y), lambda: x @ x.T)
    row = {"n": n, "d": d, "seconds": ours, "bare_seconds": bare, "ratio": ours / bare}
    row["more_than_bare"] = ours - bare
    if (n, d) in ROWS_AT:
        started = time.perf_counter()
        plain = row_by_row(x, y)
        row["row_by_row_ratio"] = (time.perf_counter() - started) / ours
        row["difference"] = abs(plain - geomkd.knowledge_quality(x, y).quality)
    limit = 4 * n * n + 4 * n * d + 2 * 8 * 512 * n  # one n x n, one copy, two 512-row blocks
    return row | {"peak_growth": peak_growth(n, d), "peak_limit": limit}


def scoring_row(n: int, size: int = 32) -> dict[str, float]:
    """score_layers on resnet34 against one bare forward pass and the bare Gram products."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet34(num_classes=CLASSES).eval()
    x = torch.randn(n, 3, size, size)
    y = torch.arange(n) % CLASSES

    def score() -> object:
        return geomkd.score_layers(model, (x, y), subsamples=0, progress=False)

    before = restart_peak()
    dims = score().to_frame()["dim"].tolist()  # the warm-up too
    growth = peak() - before

    def bare() -> None:
        with torch.no_grad():
            for batch in x.split(256):
                model(batch)
            for d in dims:
                z = torch.empty(n, d).fill_(0.5)
                z @ z.T

    ours, plain = medians(1, score, bare)
    row = {"n": n, "size": size, "seconds": ours, "bare_seconds": plain, "ratio": ours / plain}
    return row | {"peak_growth": growth, "budget": 2e9}


def toolbox_row(n: int, size: int = 32) -> dict[str, float]:
    """Scoring resnet34 by every measure against scoring it by knowledge quality alone.

    The probe and logme are apart: they state their own cost.
    """
    import torchvision

    from geomkd.measures.table import NAMES

    torch.manual_seed(0)
    model = torchvision.models.resnet34(num_classes=CLASSES).eval()
    x, y = torch.randn(n, 3, size, size), torch.arange(n) % CLASSES

    def score(*measures: str) -> Callable[[], object]:
        return lambda: geomkd.score_layers(model, (x, y), measures=measures, progress=False)

    most = [name for name in NAMES if name not in ("linear_probe", "logme")]
    calls = {"quality": score("knowledge_quality"), "all": score(*most)}
    row: dict = {"n": n, "size": size, "measures": most}
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        row[name] = time.perf_counter() - started
    return row | {"ratio": row["all"] / row["quality"]}


def stem_row(n: int) -> dict[str, float]:
    """A layer of 64 x 112 x 112 features, in slices, within memory="2GB"."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet34(num_classes=CLASSES).eval()
    x = torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8)
    y = torch.arange(n) % CLASSES

    def forward(net: torch.nn.Module, batch: Tensor) -> Tensor:
        return net(batch.float().div_(255))

    geomkd.score_layers(model, (x[:40], y[:40]), ["relu"], forward=forward, progress=False)
    before, started = restart_peak(), time.perf_counter()
    scores = geomkd.score_layers(
        model, (x, y), ["relu"], memory="2GB", subsamples=0, forward=forward, progress=True
    )
    seconds = time.perf_counter() - started
    growth = peak() - before
    features_bytes = 4 * n * int(scores.to_frame()["dim"][0])
    quality = float(scores.to_frame()["quality"][0])
    row = {"n": n, "layer_bytes": features_bytes, "seconds": seconds, "quality": quality}
    return row | {"peak_growth": growth, "budget": 2e9}


def exponents(rows: list[dict[str, float]]) -> dict[str, float]:
    """Growth exponents of the time in n (at d = 4,096) and in d (at n = 5,000)."""
    at = {(row["n"], row["d"]): row["seconds"] for row in rows}
    found = {}
    for name, small, large in (
        ("n, 1,000 to 5,000 at d = 4,096", (1000, 4096), (5000, 4096)),
        ("d, 4,096 to 65,536 at n = 5,000", (5000, 4096), (5000, 65536)),
    ):
        if small in at and large in at:
            growth = math.prod(large) / math.prod(small)
            found[name] = math.log(at[large] / at[small]) / math.log(growth)
    return found


def table(rows: list[dict[str, float]]) -> str:
    """Rows of `quality_row` as Markdown."""
    lines = [
        "| n | d | knowledge_quality, s | X Xᵀ, s | ratio | row by row, × ours | "
        "peak growth, MB | limit, MB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        plain = f"{row['row_by_row_ratio']:.0f}" if "row_by_row_ratio" in row else ""
        lines.append(
            f"| {row['n']:,} | {row['d']:,} | {row['seconds']:.3f} | {row['bare_seconds']:.3f} | "
            f"{row['ratio']:.2f} | {plain} | {row['peak_growth'] / 1e6:.0f} | "
            f"{row['peak_limit'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def picture(rows: list[dict[str, float]], path: Path) -> None:
    """Time against the number of features, ours and the bare product's."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for n, dashes in zip(sorted({row["n"] for row in rows}), (":", "--", "-"), strict=False):
        own = [row for row in rows if row["n"] == n]
        d = [row["d"] for row in own]
        label = f"n = {n:,}"
        ax.loglog(d, [r["seconds"] for r in own], "o", ls=dashes, color="#0072B2",
                  label=f"knowledge_quality, {label}")  # fmt: skip
        ax.loglog(d, [r["bare_seconds"] for r in own], "s", ls=dashes, color="#D55E00",
                  label=f"X Xᵀ, {label}")  # fmt: skip
    ax.set_xlabel("features d")
    ax.set_ylabel("time (s)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    ax.figure.savefig(path, dpi=150)
    plt.close(ax.figure)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--stem", action="store_true", help="only the 16 GB layer within 2 GB")
    parser.add_argument("--toolbox", action="store_true", help="only every measure's cost")
    parser.add_argument("--peers", action="store_true", help="only against other libraries")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("N", "D"), help="of --peers: this one"
    )
    parser.add_argument("--dtype", default="float32", help="of --peers: float32 or float64")
    parser.add_argument("--out", type=Path, help="where to write the JSON (and the picture)")
    options = parser.parse_args(arguments)
    result: dict = {"date": datetime.date.today().isoformat(), "machine": machine()}
    if options.stem:
        name = "stem"
        result["stem"] = stem_row(5000)
        print(json.dumps(result["stem"], indent=1))
    elif options.toolbox:
        name = "toolbox"
        result["toolbox"] = toolbox_row(200)  # the warm-up
        if not options.quick:
            result["toolbox"] = toolbox_row(5000)
        print(json.dumps(result["toolbox"], indent=1))
    elif options.peers:
        sys.path.insert(0, str(HERE.parent))  # run as a file, not as a module
        from benchmarks.peers import compare

        name, result["peers"] = f"peers-{options.dtype}", []
        sizes = compare.QUICK if options.quick else compare.SIZES
        if options.size:
            sizes = [tuple(options.size)]
            before = json.loads((options.out or HERE / "results" / f"{name}.json").read_text())
            kept = [row for row in before["peers"] if [row["n"], row["d"]] != options.size]
            made = {key: before[key] for key in ("date", "machine")}
            result["peers"] = [made | row for row in kept]
        for row in compare.rows(sizes, options.dtype, torch.get_num_threads()):
            result["peers"].append(row | {"date": result["date"]})
            print(compare.table([row]).splitlines()[-1], file=sys.stderr, flush=True)
        result["exponents"] = compare.exponents(result["peers"])
        print(compare.table(result["peers"]))
        for what, exponent in result["exponents"].items():
            print(f"growth exponent, {what}: {exponent:.2f}")
    else:
        name = "speed-quick" if options.quick else "speed"
        result["quality"] = []
        for n, d in QUICK if options.quick else FULL:
            result["quality"].append(quality_row(n, d))
            print(f"n = {n}, d = {d}: ratio {result['quality'][-1]['ratio']:.2f}", file=sys.stderr)
        result["scoring"] = scoring_row(60 if options.quick else 5000)
        result["exponents"] = exponents(result["quality"])
        scoring = result["scoring"]
        print(table(result["quality"]))
        print(f"\nscore_layers, resnet34, n = {scoring['n']}, {scoring['size']} pixels: "
              f"{scoring['ratio']:.2f} x one forward pass and the bare products; peak growth "
              f"{scoring['peak_growth'] / 1e6:.0f} MB of memory='2GB'")  # fmt: skip
        for what, exponent in result["exponents"].items():
            print(f"growth exponent in {what}: {exponent:.2f}")
    path = options.out or HERE / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    if "quality" in result:
        picture(result["quality"], path.with_suffix(".png"))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main()
