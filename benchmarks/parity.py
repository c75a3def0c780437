"""Our figures beside other libraries' on the same arrays: ours, theirs, difference.

    python benchmarks/parity.py             # scikit-dimension, DADApy, pytorch-cka, scikit-learn
    python benchmarks/parity.py --quick     # scikit-learn, SciPy and NumPy alone

Everything in float64 on the same arrays; each of the first three runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from geomkd import measures
from geomkd.common.results_folder import machine, write_json

HERE = Path(__file__).parent
Row = tuple[str, str, float, float]  # measure, oracle, ours, theirs


def clusters(n: int, d: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes in d dimensions."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return 0.6 * rng.standard_normal((classes, d))[y] + rng.standard_normal((n, d)), y


def of_libraries() -> Iterator[Row]:
    """Measures that scikit-learn and SciPy have, or plain NumPy states in a line."""
    from scipy.stats import entropy
    from sklearn.covariance import ledoit_wolf
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    for n, d in ((400, 20), (300, 500)):
        x, y = clusters(n, d, 5, seed=d)
        name = f"n = {n}, d = {d}"
        yield (
            f"silhouette, {name}",
            "scikit-learn",
            measures.silhouette(x, y),
            silhouette_score(x, y),
        )
        near = NearestNeighbors(n_neighbors=15).fit(x).kneighbors(return_distance=False)
        right = np.array([np.bincount(y[i], minlength=5).argmax() for i in near]) == y
        yield f"knn_accuracy, {name}", "scikit-learn", measures.knn_accuracy(x, y), right.mean()
        means = np.stack([x[y == a].mean(0) for a in range(5)])
        within = ((x - means[y]) ** 2).sum()
        total = ((x - x.mean(0)) ** 2).sum()
        yield (
            f"fisher_ratio, {name}",
            "NumPy",
            measures.fisher_ratio(x, y),
            (total - within) / within,
        )
        covariance, _ = ledoit_wolf(x)
        between = np.cov(means[y].T, bias=True)
        h = np.trace(np.linalg.solve(covariance, (1 - ledoit_wolf(x)[1]) * between))
        yield f"h_score, {name}", "scikit-learn's Ledoit-Wolf", measures.h_score(x, y), h
        s = np.linalg.svd(x - x.mean(0), compute_uv=False)
        s = s[s > 1e-10 * s[0]]
        yield (
            f"spectral_entropy, {name}",
            "SciPy",
            measures.spectral_entropy(x),
            entropy(s / s.sum()),
        )
        yield (
            f"participation_ratio, {name}",
            "NumPy",
            measures.participation_ratio(x),
            (s**2).sum() ** 2 / (s**4).sum(),
        )


def of_peers() -> Iterator[Row]:
    """Measures of libraries whose requirements conflict with ours."""
    sys.path.insert(0, str(HERE.parent))  # run as a file, not as a module
    from benchmarks.peers.run import MEASURES, run_peer

    ours = {
        "two_nn": measures.two_nn,
        "two_nn_mle": lambda x: measures.two_nn(x, method="mle"),
        "mle_dimension": measures.mle_dimension,
        "mle_dimension_mean": lambda x: measures.mle_dimension(x, average="arithmetic"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for n, d in ((1000, 5), (1500, 64), (1000, 1200)):
            x, _ = clusters(n, d, 4, seed=n + d)
            other = np.tanh(x @ np.random.default_rng(1).standard_normal((d, 30)) / d**0.5)
            paths = [Path(folder) / "x.npy", Path(folder) / "other.npy"]
            np.save(paths[0], x), np.save(paths[1], other)
            name = f"n = {n}, d = {d}"
            for measure, of in ours.items():
                for peer in ("skdim", "dadapy"):
                    if measure in MEASURES[peer]:
                        # Theirs keeps no ratio back in its maximum likelihood: nor do we.
                        theirs = run_peer(peer, measure, paths[:1], 1, 2)["value"]
                        yield f"{measure}, {name}", peer, of(x), theirs
            theirs = run_peer("pytorch_cka", "cka", paths, 1, 2)["value"]
            yield f"cka, {name}", "pytorch_cka", measures.cka(x, other), theirs


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the peers' environments")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    found = []
    lines = [f"{'measure':<40}{'against':<28}{'ours':>14}{'theirs':>14}{'difference':>12}"]
    print(lines[0])
    for source in (of_libraries,) if options.quick else (of_libraries, of_peers):
        for measure, oracle, own, theirs in source():
            row = {
                "measure": measure,
                "oracle": oracle,
                "ours": float(own),
                "theirs": float(theirs),
            }
            row["difference"] = row["ours"] - row["theirs"]
            found.append(row)
            print(
                f"{measure:<40}{oracle:<28}{row['ours']:>14.8g}{row['theirs']:>14.8g}"
                f"{row['difference']:>12.1e}",
                flush=True,
            )
    result = {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": found}
    path = options.out or HERE / "results" / (
        "parity-quick.json" if options.quick else "parity.json"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"wrote {path}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
