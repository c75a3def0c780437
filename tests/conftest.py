"""One thread a process: the same numbers on any machine, however many processes share the tests."""

import gc
import os
import sys

import pytest

for library in ("OMP", "MKL", "OPENBLAS"):  # read as they are loaded; processes of tests inherit it
    os.environ[f"{library}_NUM_THREADS"] = "1"

gc.disable()  # what is imported and collected stays: no need to look for garbage in it, ever


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if "processes" in sys.modules and not session.config.option.collectonly:
        with pytest.MonkeyPatch.context() as patch:
            sys.modules["processes"].serve(patch)


@pytest.fixture
def elsewhere():
    """A device that no tensor is on by default, and that need not exist."""
    import torch
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False):
        device = torch.device("cuda", 0)
        try:
            _ = ~torch.empty(1, device=device).isfinite()
        except RuntimeError:
            pytest.skip(f"torch {torch.__version__} takes fake tensors to the driver")
        yield device
