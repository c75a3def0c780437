"""The bar: one line where it can move, a line now and then where it cannot."""

import os
import pty
import re
import select
import sys
import termios
import time

import pytest

from geomkd.common import progress
from geomkd.common.progress import bar_of


def written(monkeypatch, ends, seconds=0.2, **options):
    """What a bar of 3,000 pieces writes to the second of two connected files in some time."""
    read, write = ends
    with os.fdopen(write, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        started = time.perf_counter()
        with bar_of(3000, "work", show=True, **options) as bar:
            for _ in range(3000):
                bar.update(1)
                time.sleep(seconds / 3000)
        took = time.perf_counter() - started
        file.flush()
        text = b""
        while select.select([read], [], [], 0.2)[0]:  # a terminal hands on what it has bit by bit
            text += os.read(read, 10**6)
    monkeypatch.undo()
    os.close(read)
    return text.decode(), took


def test_a_pipe_is_given_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    text, took = written(monkeypatch, os.pipe(), unit=" pieces")
    lines = text.splitlines()
    assert "\r" not in text and text.endswith("\n") and all(lines)
    assert 2 <= len(lines) <= took / 0.05 + 1
    shares = [int(re.match(r"work: +(\d+)%", line)[1]) for line in lines]
    assert shares == sorted(shares) and shares[0] < 100 and shares[-1] == 100
    assert re.search(r"[\d.]+k?/3\.00k \[\d\d:\d\d<\d\d:\d\d, .* pieces/s\]", lines[0])


def test_what_is_quickly_done_is_one_line(monkeypatch):
    text, _ = written(monkeypatch, os.pipe(), seconds=0.01)
    assert text.count("\n") == 1 and text.startswith("work: 100%")


@pytest.mark.parametrize("leave", [True, False])
def test_a_terminal_has_one_line_that_moves(monkeypatch, leave):
    ends = pty.openpty()
    termios.tcsetwinsize(ends[1], (24, 80))
    text, _ = written(monkeypatch, ends, leave=leave)
    assert text.count("\r") >= 2 and text.count("\n") == leave
    # Where it does not stay, blanks are the last that is written, whatever they cover had come to.
    end = r"\rwork: 100%[^\r]*3\.00k/3\.00k[^\r]*\r?\n$" if leave else r"\r {60,}\r$"
    assert re.search(end, text), text[-300:]


def test_where_it_is_not_asked_for_nothing_is_written(capfd):
    with bar_of(10, "work", show=False) as bar:
        bar.update(10)
    assert capfd.readouterr() == ("", "")
