"""Options of ``geomkd distill`` in TOML: read, checked, written, compared."""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of one start alone: where its results are, not what they are.
OF_A_START = ("config", "out", "resume")
# What a run may go on with otherwise than it began: none of it changes the student.
FREE = ("quiet", "memory", "checkpoint_steps", "log_dir", "device")


def arguments_of(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """Read a TOML file of options as the arguments that they would be on the command line.

    Parameters
    ----------
    path : str
        Keys are names of options, with dashes or underscores; ``set`` may be a table.
    parser : ArgumentParser
        Knows the options.

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
    left_out = (*OF_A_START, "command", "run", "arguments")
    return {k: v for k, v in vars(options).items() if k not in left_out and v is not None}


def as_toml(settings: Mapping[str, Any]) -> str:
    """Write settings as TOML.

    Examples
    --------
    >>> print(as_toml({"lr": 0.01, "layers": ["auto"], "quiet": False}), end="")
    lr = 0.01
    layers = ["auto"]
    quiet = false
    """
    return "".join(f"{name} = {_value(value)}\n" for name, value in settings.items())


def check_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than those in a file; ``ValueError`` names them."""
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    names = [*settings, *(name for name in stored if name not in settings)]
    differing = [n for n in names if n not in FREE and stored.get(n) != settings.get(n)]
    if differing:
        listed = "; ".join(
            f"{name} is {stored.get(name)!r} there and {settings.get(name)!r} here"
            for name in differing
        )
        raise ValueError(f"{path} belongs to another run: {listed}; give another --out")


def _arguments(action: argparse.Action, name: str, value: Any, where: str) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false; got {value!r}")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [f"--{name}" if value else f"--no-{name}"]
        return [f"--{name}"] if value else []
    if action.nargs is None:
        return [f"--{name}={_text(value, where)}"]
    if name == "set" and isinstance(value, dict):
        value = [f"{k}={json.dumps(v) if isinstance(v, bool) else v}" for k, v in value.items()]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(_text(item, where) for item in values)]


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where} must be text or a number; got {value!r}")
    return str(value)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str | bool):
        # JSON's escapes are TOML's, but for a character that TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
