"""geomkd's measures of one array, timed as the peers are; prints one line of JSON.

    python -m benchmarks.peers.ours --measure two_nn --features a.npy --repeats 3

``product`` is the bare matrix product X Xᵀ of the same array, ``half`` its upper triangle in strips
of 512 rows: the floor of whatever reads a Gram matrix once.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import numpy as np
import torch

from geomkd.geometry import neighbours
from geomkd.measures import cka, mle_dimension, two_nn

MEASURES = {
    "two_nn": two_nn,
    "two_nn_mle": lambda x: two_nn(x, method="mle"),
    "mle_dimension": mle_dimension,
    "mle_dimension_mean": lambda x: mle_dimension(x, average="arithmetic"),
    "cka": cka,
    "product": lambda x: (x @ x.T)[0, 0],
    "half": lambda x: sum((x[s : s + 512] @ x[s:].T)[0, 0] for s in range(0, len(x), 512)),
}


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", choices=MEASURES, required=True)
    parser.add_argument("--features", required=True, help=".npy file of shape (n, d)")
    parser.add_argument("--other", help="a second one, for cka")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tile", type=int, default=neighbours.TILE, help="rows of a tile")
    options = parser.parse_args(arguments)
    neighbours.TILE = options.tile
    paths = [options.features, *([options.other] if options.other else [])]
    given, measure = [torch.from_numpy(np.load(path)) for path in paths], MEASURES[options.measure]
    measure(*(x[:100] for x in given))  # loads what is loaded late
    before, seconds = peak(), []
    for _ in range(options.repeats):
        started = time.perf_counter()
        value = float(measure(*given))
        seconds.append(time.perf_counter() - started)
    found = {"value": value, "seconds": seconds, "peak_before": before, "peak_after": peak()}
    print(json.dumps(found | {"threads": torch.get_num_threads()}, allow_nan=False))


if __name__ == "__main__":
    main()
