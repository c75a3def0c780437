"""Finished work as JSON lines, one file a teacher, and claims on what is being worked on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """Lines about one teacher; every one tells the teacher's fingerprint and the protocol."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Lines that are whole; all of one teacher and protocol."""
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_bytes().split(b"\n")  # what a killed process left is cut short
        lines = [json.loads(line) for line in whole]
        made = {(line["fingerprint"], line["protocol"]) for line in lines}
        if len(made) > 1:
            raise ValueError(
                f"{self.path} mixes teachers or protocols (fingerprint, protocol): {sorted(made)}"
            )
        return lines

    def add(self, line: dict[str, Any]) -> None:
        """Write a line, behind whole lines only."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        with open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process alone holds a file; it lets go when it ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
