"""What the benchmarks' command lines share: folders, processes, the rule that was chosen."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.jobs import Bench, work
from benchmarks.evidence.teachers import Teacher
from geomkd.geometry.precision import one_thread


def parser_of(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark on teachers has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("GEOMKD_DATA", "data")),
        help="folder of the archives and the published weights, and of "
        "fashion-mnist/ if it is not where Debian has it (default: $GEOMKD_DATA)",
    )
    parser.add_argument("--teachers", nargs="+", metavar="NAME", help="in this order; all")
    parser.add_argument("--processes", type=int, default=1, help="one thread each")
    parser.add_argument(
        "--device", default="cpu", help="where students are trained (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".distillation-work", "evidence"),
        help="folder of features and checkpoints (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="generated images, tiny networks")
    parser.add_argument("--list", action="store_true", help="what is finished and what is open")
    parser.add_argument("--report", action="store_true", help="tables and pictures, no run")
    return parser


def wanted(names: Sequence[str] | None, known: Sequence[Teacher]) -> list[Teacher]:
    """Teachers of these names, in their order; all of them without names."""
    by_name = {teacher.name: teacher for teacher in known}
    wrong = set(names or ()) - set(by_name)
    if wrong:
        raise SystemExit(f"teachers are {', '.join(by_name)}; got {', '.join(sorted(wrong))}")
    return [by_name[name] for name in names or by_name]


def in_processes(
    script: str, benches: Sequence[Bench], kinds: Sequence[str], options: argparse.Namespace,
    arguments: Sequence[str] | None, say: Callable[[str], Any],
) -> None:  # fmt: skip
    """Do what is open here and in as many processes more as are asked for."""
    again = [sys.executable, script, *(sys.argv[1:] if arguments is None else arguments)]
    others = [
        subprocess.Popen([*again, "--processes", "1"]) for _ in range(1, options.processes)
    ]  # of an option given twice the last counts
    with one_thread():
        work(benches, kinds, say)
    for other in others:
        other.wait()


def chosen_rule(ranking: Path) -> str | None:
    """Rule that goes to confirmation, once ``ranking_power.py --choose`` has written it down."""
    path = ranking / "chosen.json"
    return json.loads(path.read_text())["rule"] if path.exists() else None
