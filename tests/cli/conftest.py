import sys

import pytest
from commands import make_files


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own with tiny networks and images, the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_nets", raising=False)
    make_files(tmp_path)
    return tmp_path
