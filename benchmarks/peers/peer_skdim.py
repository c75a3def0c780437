"""scikit-dimension's estimates of one array, timed; prints one line of JSON.

    python peer_skdim.py --measure two_nn --features a.npy --repeats 3
    python peer_skdim.py --write-manifolds FOLDER

Needs what requirements-skdim.txt names and nothing else. OMP_NUM_THREADS sets the threads.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib.metadata import version

import numpy as np

MEASURES = ("two_nn", "two_nn_mle", "mle_dimension", "mle_dimension_mean")
NEIGHBOURS = 20
MANIFOLDS = (
    "M1_Sphere",
    "M4_Nonlinear",
    "M7_Roll",
    "M8_Nonlinear",
    "M9_Affine",
    "M10b_Cubic",
    "M10d_Cubic",
    "M12_Norm",
    "Mbeta",
)


def estimate(measure, x, threads):
    from skdim.id import MLE, TwoNN

    if measure == "two_nn":
        return TwoNN(discard_fraction=0.1).fit(x).dimension_
    if measure == "two_nn_mle":  # discarded ratios would be taken as censored
        return TwoNN(discard_fraction=0, method="mle").fit(x).dimension_
    # comb="mle" is the harmonic mean of the points' estimates, MacKay and Ghahramani's.
    comb = "mle" if measure == "mle_dimension" else "mean"
    return MLE().fit(x, n_neighbors=NEIGHBOURS, comb=comb, n_jobs=threads).dimension_


def write_manifolds(folder):
    from skdim.datasets import BenchmarkManifolds, hyperBall, hyperSphere

    os.makedirs(folder, exist_ok=True)
    ball = hyperBall(300, 5, random_state=0)
    arrays = {
        "ball5_in10": np.hstack([ball, np.zeros((300, 5))]),
        "sphere4_in5": hyperSphere(300, 4, random_state=1),
    }
    for name in MANIFOLDS:
        for seed in range(5):
            sets = BenchmarkManifolds(random_state=seed)
            d, dim, _ = sets._dict_truth[name]  # `generate` needs both for a set by its name
            x = sets.generate(name, n=1000, dim=dim, d=d)
            arrays[f"{name.split('_')[0]}-{seed}"] = x
    for name, x in arrays.items():
        path = os.path.join(folder, f"{name}.npy")
        with open(path + ".part", "wb") as file:
            np.save(file, x)
        os.replace(path + ".part", path)


def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(measure, x, repeats):
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    small = np.random.default_rng(0).standard_normal((100, x.shape[1]))
    estimate(measure, small.astype(x.dtype), threads)  # loads what is loaded late
    before, seconds = peak(), []
    for _ in range(repeats):
        started = time.perf_counter()
        value = estimate(measure, x, threads)
        seconds.append(time.perf_counter() - started)
    packages = ("scikit-dimension", "scikit-learn", "scipy", "numba", "numpy")
    return {
        "value": float(value),
        "seconds": seconds,
        "peak_before": before,
        "peak_after": peak(),
        "shape": x.shape,
        "dtype": str(x.dtype),
        "threads": threads,
        "versions": {"python": sys.version.split()[0], **{p: version(p) for p in packages}},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=MEASURES)
    parser.add_argument("--features", help=".npy file of shape (n, d)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write-manifolds", metavar="FOLDER", help="write the test manifolds")
    options = parser.parse_args()
    if options.write_manifolds:
        write_manifolds(options.write_manifolds)
    elif options.measure and options.features:
        x = np.load(options.features)
        print(json.dumps(timed(options.measure, x, options.repeats), allow_nan=False))
    else:
        parser.error("give --measure and --features, or --write-manifolds")


if __name__ == "__main__":
    main()
