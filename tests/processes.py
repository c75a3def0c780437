"""Python processes that start at once: forks of one that has loaded what they all need."""

import atexit
import faulthandler
import gc
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
LOADED = ["torch._dynamo", "torch.distributed.nn.functional", "torchvision", "geomkd.cli.main"]
LOADED += ["pandas", "matplotlib.pyplot", "scipy.stats", "sklearn.datasets"]
CONTEXT.set_forkserver_preload(LOADED)
# By Python itself, where pytest has not made errors of them.
NOT_SHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def serve(patch):
    """Fork the server from this process, which has loaded most of that, in place of a new one.

    To be called before a first backward pass: torch refuses those of a fork of their threads.
    """
    if sys.platform != "linux":  # elsewhere what is loaded may not outlive a fork
        return
    resource_tracker.ensure_running()  # a process of its own
    patch.setattr(forkserver.util, "spawnv_passfds", _forked)
    forkserver.ensure_running()


def _forked(path, command, passed):
    """Run a command of Python code as ``multiprocessing`` starts it, in a fork of this process."""
    if pid := os.fork():
        return pid
    try:
        faulthandler.disable()  # it writes to a file that is closed here
        kept = sorted({0, 1, 2, *passed, os.sysconf("SC_OPEN_MAX")})
        for one, next_one in itertools.pairwise(kept):  # who reads the others would wait for us
            os.closerange(one + 1, next_one)
        for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
            setattr(sys, name, os.fdopen(number, mode))  # not pytest's
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
        warnings.resetwarnings()
        for category in NOT_SHOWN:
            warnings.simplefilter("ignore", category)
        forkserver._forkserver.__init__()  # its lock is held here
        exec(command[-1], {})
    finally:
        os._exit(0)


def start(
    program, arguments, *, size=1, output=os.devnull, environment=(), folder=None, context=CONTEXT
):
    """Start ``python PROGRAM ARGUMENTS`` as torchrun starts ``size`` processes of it.

    ``program`` is a file, the name of a module, or ``-c`` in front of code; each process leads a
    group of its own, and writes what it says to the end of ``output``, or where this one does
    (``None``).
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
        given = (str(program), [*map(str, arguments)], own, place, output and os.fspath(output))
        started.append(context.Process(target=_run, args=given))
        started[-1].start()
    return started


class Forked:
    """A process as those who would have started it ask a ``subprocess.Popen``.

    ``arguments``: the ones of `start`.
    """

    stdin = stdout = stderr = None

    def __init__(self, program, arguments, **options):
        (process,) = start(program, arguments, **options)
        self.process, self.pid = process, process.pid
        self.kill, self.terminate = process.kill, process.terminate
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.01)  # it may be ended with its group

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode


def run(command, *, cwd=None, env=None, **_):
    """``subprocess.run`` of Python on a module (``-m``) or on code (``-c``); checks what it gives.

    What it says on both streams is in ``stdout``.
    """
    how, what, *arguments = command[command.index(sys.executable) + 1 :]
    given = (what, arguments) if how == "-m" else (how, [what, *arguments])
    with tempfile.NamedTemporaryFile("r") as said:
        options = {"environment": env or (), "folder": cwd, "output": said.name}
        (code,) = ended(start(*given, **options))
        done = subprocess.CompletedProcess(command, code, said.read())
    done.check_returncode()
    return done


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
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # of whom it was forked from
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # what all of them have loaded
    # Its own processes (of a loader) start as by `python PROGRAM`, not by another fork server.
    multiprocessing.set_start_method(None, force=True)
    if output:
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
        elif program == "-c":
            exec(arguments[0], {"__name__": "__main__"})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
