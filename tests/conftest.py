"""One thread a process: the same numbers on any machine, however many processes share the tests."""

import gc
import os

for library in ("OMP", "MKL", "OPENBLAS"):  # read as they are loaded; processes of tests inherit it
    os.environ[f"{library}_NUM_THREADS"] = "1"


def pytest_collection_finish():
    """What is loaded by now stays: the collector need not look at it after every few tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
