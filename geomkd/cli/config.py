"""Options of ``geomkd distill`` in TOML, and the folder of a run, which keeps them."""

import argparse
import difflib
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geomkd.common.distributed import ERRORS, agreed, world
from geomkd.common.files import atomic_write
from geomkd.common.results_folder import check_same_run, new_folder

CONFIG = "config.toml"
# Of one start alone: where its results are, not what they are.
OF_A_START = ("config", "out", "resume")
# What a run may go on with otherwise than it began: none of it changes the student.
FREE = ("quiet", "memory", "checkpoint_steps", "log_dir", "device")


def arguments_of(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """Read a TOML file of options as the arguments that they would be on the command line.

    Keys are names of options, with dashes or underscores; ``set`` may be a table.

    Raises
    ------
    ValueError
        No TOML, an unknown or repeated name, a value of no option's kind.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML file: {error}") from None
    actions = {
        name.removeprefix("--"): action
        for action in parser._actions
        for name in action.option_strings
        if action.dest not in ("help", "config") and not name.startswith("--no-")
    }
    arguments: list[str] = []
    names = [key.replace("_", "-") for key in values]
    for (key, value), name in zip(values.items(), names, strict=True):
        if name not in actions:
            near = difflib.get_close_matches(name, actions)
            meant = f"near it are {', '.join(near)}" if near else f"there are {', '.join(actions)}"
            raise ValueError(f"{path}: there is no option {key!r}; {meant}")
        if names.count(name) > 1:
            raise ValueError(f"{path}: {name!r} is there more than once")
        arguments += _arguments(actions[name], name, value, f"{path}: {key}")
    return arguments


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Every option in force but for those of one start; without those that have no value."""
    left_out = (*OF_A_START, "command", "arguments")
    known = {k: v for k, v in vars(options).items() if k not in left_out and v is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}


def as_toml(settings: Mapping[str, Any]) -> str:
    """Write settings as TOML."""
    # JSON's escapes are TOML's, but for a character that TOML wants escaped.
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()}
    return "".join(f"{name} = {text}\n" for name, text in texts.items()).replace("\x7f", "\\u007f")


@contextmanager
def run_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Folder of a run: made by the first process, or that of the run that goes on.

    One that was made for nothing is removed again. Called by every process.
    """
    name, is_new = agreed(lambda: _opened(options), first_only=True)
    folder = Path(name)
    try:
        yield folder
    except ERRORS:
        if is_new and world().is_first:
            files = [path for path in folder.rglob("*") if path.is_file()]
            if files == [folder / CONFIG]:
                shutil.rmtree(folder)
        raise


def _opened(options: argparse.Namespace) -> tuple[str, bool]:
    settings, there = settings_of(options), options.out is not None and Path(options.out).exists()
    if options.resume and options.out is None:
        raise ValueError("--resume needs --out, the folder of the run")
    if there and not options.resume:
        raise ValueError(f"{options.out} is there already: give another --out, or --resume")
    if there:
        folder = Path(options.out)
        visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        if CONFIG in visible:
            stored = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
            theirs, ours = ({k: s[k] for k in s if k not in FREE} for s in (stored, settings))
            check_same_run(folder / CONFIG, theirs, ours, remedy="give another --out")
        elif visible:  # a run that was killed at once has left nothing
            raise ValueError(f"{folder} is no folder of a run: it has no {CONFIG}")
    else:
        folder = new_folder(options.out, "geomkd-distill")
    with atomic_write(folder / CONFIG) as file:
        file.write(b"# geomkd distill --config THIS_FILE --out FOLDER repeats the run.\n")
        file.write(as_toml(settings).encode())
    return str(folder), not there


def _arguments(action: argparse.Action, name: str, value: Any, where: str) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false; got {value!r}")
        off = [f"--no-{name}"] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [f"--{name}"] if value else off
    if name == "set" and isinstance(value, dict):
        value = [f"{k}={json.dumps(v) if isinstance(v, bool) else v}" for k, v in value.items()]
    values = value if isinstance(value, list) and action.nargs else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise ValueError(f"{where} must be text or a number; got {item!r}")
    return [f"--{name}", *map(str, values)] if action.nargs else [f"--{name}={value}"]
