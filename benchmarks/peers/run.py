"""One measure of one peer on arrays that are on disk."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence

from benchmarks.peers.environments import CACHE, HERE, check_peer, environment, python_of
from geomkd.common.checks import check_int

# two_nn drops the largest tenth of the ratios and fits a line, two_nn_mle is (n - 1) / sum of logs;
# mle_dimension is the harmonic mean over 20 neighbours, mle_dimension_mean the arithmetic one.
MEASURES = {
    "skdim": ("two_nn", "two_nn_mle", "mle_dimension", "mle_dimension_mean"),
    "dadapy": ("two_nn", "two_nn_mle"),  # it has no estimate from k neighbours' distances
    "pytorch_cka": ("cka",),
}
# An exec hands its peak memory on: a shell between keeps ours out of the peer's.
SHELL = ["sh", "-c", '"$@"; exit $?', "sh"]


def run_peer(
    name: str,
    measure: str,
    paths: Sequence[str | os.PathLike],
    repeats: int,
    threads: int,
    *,
    cache: str | os.PathLike = CACHE,
) -> dict:
    """Value, seconds and memory of a peer's measure, in a fresh process of its environment.

    `paths` names one .npy file of shape (n, d), for cka two. The environment is made first if it is
    not in `cache`.

    Returns
    -------
    dict
        value; seconds, one of each repeat after a warm-up on 100 rows; peak_before and peak_after,
        the process's largest resident memory in bytes with the input loaded and at the end; shape,
        dtype, threads and versions.

    Raises
    ------
    ValueError
        No such peer, a measure it does not have, a wrong number of paths, repeats or threads.
    FileNotFoundError
        A path that is no file.
    RuntimeError
        The process failed; the end of what it said is in the message.
    """
    check_peer(name)
    if measure not in MEASURES[name]:
        raise ValueError(f"{name} has {', '.join(MEASURES[name])}; got measure {measure!r}")
    expected = 2 if measure == "cka" else 1
    if isinstance(paths, (str, os.PathLike)) or len(paths) != expected:
        raise ValueError(f"{measure} takes a list of {expected} path(s); got {paths!r}")
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no array of features at {path}")
    check_int(repeats, "repeats", 1)
    check_int(threads, "threads", 1)
    # -I: neither PYTHONPATH nor the working folder shows the peer a package of ours.
    command = [*SHELL, python_of(environment(name, cache)), "-I", HERE / f"peer_{name}.py"]
    command += ["--measure", measure, "--repeats", str(repeats), "--features", paths[0]]
    for other in paths[1:]:
        command += ["--other", other]
    done = subprocess.run(command, capture_output=True, text=True, env=thread_variables(threads))
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        raise RuntimeError(f"{name}'s {measure} of {paths[0]} exited {done.returncode}: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def thread_variables(threads: int) -> dict[str, str]:
    """Environment of a process in which every library uses so many threads."""
    names = ("OMP", "OPENBLAS", "MKL", "NUMBA", "VECLIB_MAXIMUM")
    return os.environ | {f"{name}_NUM_THREADS": str(threads) for name in names}
