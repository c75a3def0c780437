"""One thread a process: the same numbers on any machine, however many processes share the tests."""

import os

for library in ("OMP", "MKL", "OPENBLAS"):  # read as they are loaded; processes of tests inherit it
    os.environ[f"{library}_NUM_THREADS"] = "1"
