"""Python processes that start at once: forks of one that has loaded what they all need."""

import atexit
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
LOADED = ["torch._dynamo", "torch.distributed.nn.functional", "torchvision", "geomkd.cli.main"]
LOADED += ["pandas", "matplotlib.pyplot", "scipy.stats", "sklearn.datasets"]
CONTEXT.set_forkserver_preload(LOADED)


def start(program, arguments, *, size=1, output=os.devnull, environment=(), folder=None):
    """Start ``python PROGRAM ARGUMENTS`` as torchrun starts ``size`` processes of it.

    ``program`` is a file, or the name of a module; each process leads a group of its own, and
    writes what it says to the end of ``output``.
    """
    several = {}
    if size > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        several |= {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": str(size)}
    started = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        own = os.environ | several | own | dict(environment)
        place = os.fspath(folder or os.getcwd())
        given = (str(program), [*map(str, arguments)], own, place, os.fspath(output))
        started.append(CONTEXT.Process(target=_run, args=given))
        started[-1].start()
    return started


def ended(processes, timeout=120):
    """Exit codes; where one process fails, the others are ended, as by torchrun."""
    until = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
        assert time.monotonic() < until, "a process does not end"
        time.sleep(0.02)
    return [process.exitcode for process in processes]


def _run(program, arguments, environment, folder, output):
    os.setsid()
    gc.freeze()  # what all of them have loaded
    # Its own processes (of a loader) start as by `python PROGRAM`, not by another fork server.
    multiprocessing.set_start_method(None, force=True)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [program, *arguments]
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    try:
        if Path(program).suffix == ".py":
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
