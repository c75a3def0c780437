"""DADApy's two-neighbour estimates of one array, timed; prints one line of JSON.

    python peer_dadapy.py --measure two_nn --features a.npy --repeats 3

Needs what requirements-dadapy.txt names and nothing else. OMP_NUM_THREADS sets the threads.
DADApy has no Levina-Bickel estimate from k neighbours' distances (its gride is another one).
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib.metadata import version

import numpy as np

MEASURES = ("two_nn", "two_nn_mle")


def estimate(measure, x, threads):
    from dadapy import Data

    data = Data(coordinates=x, n_jobs=threads)
    data.compute_distances(maxk=2)  # two neighbours are all it uses; by default it looks for 100
    algorithm = "base" if measure == "two_nn" else "ml"
    return data.compute_id_2NN(algorithm=algorithm, mu_fraction=0.9)[0]


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
    packages = ("dadapy", "scikit-learn", "scipy", "numpy")
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
    parser.add_argument("--measure", choices=MEASURES, required=True)
    parser.add_argument("--features", required=True, help=".npy file of shape (n, d)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    x = np.load(options.features)
    print(json.dumps(timed(options.measure, x, options.repeats), allow_nan=False))


if __name__ == "__main__":
    main()
