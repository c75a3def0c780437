"""pytorch-cka's linear CKA of two arrays, timed; prints one line of JSON.

    python peer_pytorch_cka.py --measure cka --features a.npy --other b.npy --repeats 3

Needs what requirements-pytorch-cka.txt names and nothing else. OMP_NUM_THREADS sets the threads.
Its one estimator is the debiased one, cut to [0, 1]; arrays go in whole, as its README has it.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib.metadata import version

import numpy as np

MEASURES = ("cka",)


def similarity(x, y):
    import torch
    from cka import cka_from_features

    return cka_from_features(torch.from_numpy(x), torch.from_numpy(y)).item()


def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(x, y, repeats):
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    draw = np.random.default_rng(0).standard_normal
    small = [draw((100, a.shape[1])).astype(a.dtype) for a in (x, y)]
    similarity(*small)  # loads what is loaded late
    before, seconds = peak(), []
    for _ in range(repeats):
        started = time.perf_counter()
        value = similarity(x, y)
        seconds.append(time.perf_counter() - started)
    packages = ("pytorch-cka", "torch", "numpy")
    return {
        "value": value,
        "seconds": seconds,
        "peak_before": before,
        "peak_after": peak(),
        "shape": [x.shape, y.shape],
        "dtype": str(x.dtype),
        "threads": threads,
        "versions": {"python": sys.version.split()[0], **{p: version(p) for p in packages}},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=MEASURES, required=True)
    parser.add_argument("--features", required=True, help=".npy file of shape (n, d)")
    parser.add_argument("--other", required=True, help=".npy file of shape (n, e), the same dtype")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    x, y = np.load(options.features), np.load(options.other)
    print(json.dumps(timed(x, y, options.repeats), allow_nan=False))


if __name__ == "__main__":
    main()
