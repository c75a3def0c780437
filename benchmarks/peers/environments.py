"""A virtual environment for each peer, made once in a cache folder.

    python -m benchmarks.peers.environments            # all of them, about 7 GB
    python -m benchmarks.peers.environments dadapy     # one

A folder counts as whole only once it holds the list of what was installed, written last.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from geomkd.common.files import atomic_write

HERE = Path(__file__).parent
CACHE = Path("~/.cache/geomkd-peers")
PEERS = ("skdim", "dadapy", "pytorch_cka")
INSTALLED = "installed.txt"  # the list that marks a whole environment


def check_peer(name: str) -> None:
    """Refuse a name that is none of `PEERS`."""
    if name not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}; got {name!r}")


def requirements_of(name: str) -> Path:
    """The pinned requirements of a peer."""
    check_peer(name)
    return HERE / f"requirements-{name.replace('_', '-')}.txt"


def folder_of(name: str, cache: str | os.PathLike, requirements: Path) -> Path:
    """Where a peer's environment is, named for its requirements and the Python version."""
    major, minor = sys.version_info[:2]
    content = f"Python {major}.{minor}\n{requirements.read_text()}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return Path(cache).expanduser().resolve() / f"{name}-{digest}"


def environment(
    name: str, cache: str | os.PathLike = CACHE, *, requirements: str | os.PathLike | None = None
) -> Path:
    """Folder of a peer's environment, which is made if it is not there whole.

    A changed pin makes another one. Two processes that ask at the same time make it once.

    Raises
    ------
    ValueError
        No such peer.
    RuntimeError
        venv or pip failed; the end of what it said is in the message.
    """
    path = requirements_of(name) if requirements is None else Path(requirements)
    folder = folder_of(name, cache, path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / INSTALLED).is_file():
            if folder.exists():
                shutil.rmtree(folder)  # an interrupted install
            _make(folder, path)
    return folder


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def _make(folder: Path, requirements: Path) -> None:
    # This Python's pip installs into the other: an environment without a pip is quick to make.
    _call([sys.executable, "-m", "venv", "--without-pip", folder])
    pip = [sys.executable, "-m", "pip", "--python", python_of(folder), "--no-input"]
    _call([*pip, "install", "--quiet", "--requirement", requirements])
    installed = _call([*pip, "freeze", "--all"])
    with atomic_write(folder / INSTALLED) as file:
        file.write(installed.encode())


def _call(command: list[str | os.PathLike]) -> str:
    # What our own Python was told to find is not to be found by the peer's.
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))} exited {done.returncode}: {said}")
    return done.stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="peer", help=f"of {', '.join(PEERS)}; all")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name in options.peers or PEERS:
        print(f"{name}: {environment(name, options.cache)}")


if __name__ == "__main__":
    main()
