"""Files of weights: names and tensors, whoever wrote them."""

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from geomkd.network.forward import tensors_in

KEYS = ("model_state_dict", "state_dict", "model", "net")  # of a checkpoint; of names in it as well
WRAPPERS = ("module", "_orig_mod")  # what data-parallel classes and torch.compile add to names


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read names and tensors from a file of weights, by themselves or under a key, on the host.

    Nothing but tensors and plain containers is unpickled. Names are without those of wrappers.

    Raises
    ------
    ValueError
        A file of another kind; it names the keys or the objects that were found.
    """
    state = _content(path)
    while isinstance(state, Mapping):
        under = [key for key in KEYS if isinstance(state.get(key), Mapping)]
        under = [key for key in under if any(True for _ in tensors_in(state[key]))]
        if not under:
            break
        state = state[under[0]]
    wanted = f"{path} must hold a state dict, by itself or under {', '.join(KEYS)}; it holds"
    if not isinstance(state, Mapping):
        raise ValueError(f"{wanted} a {type(state).__name__}")
    others = [f"{k} ({type(v).__name__})" for k, v in state.items() if not isinstance(v, Tensor)]
    if others or not state:
        raise ValueError(f"{wanted} {_some(others)}")
    plain = OrderedDict((_plain(str(name)), value) for name, value in state.items())
    if list(plain) == list(state):  # the versions of modules, under the same names
        plain._metadata = getattr(state, "_metadata", None)
    return plain


def fitted(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights under the names that a network, of whose state dict ``own`` is, has for them."""
    names = {_plain(name): name for name in own}
    for prefix in (f"{key}." for key in KEYS):  # of a trainer that held the network so
        mine = any(name.startswith(prefix) for name in names)
        if not mine and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {names.get(key, key): value for key, value in state.items()}


def fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load weights into a network; ``ValueError`` begins with ``what`` and says what is amiss."""
    own, given = model.state_dict(), state
    state = OrderedDict(fitted(given, own))
    if list(state) == list(given):
        state._metadata = getattr(given, "_metadata", None)
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # of a module that needs its version
        lacking = [name for name in own if name not in state]
        besides = [name for name in state if name not in own]
        other = [
            f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in state and getattr(own[name], "shape", None) != state[name].shape
        ]
        faults = {"it lacks": lacking, "has besides": besides, "has": other}
        told = "; ".join(f"{words} {_some(names)}" for words, names in faults.items() if names)
        raise ValueError(f"{what}: {told or error}") from None


def n_classes_in(state: Mapping[str, Tensor], own: Mapping[str, Tensor], known: int) -> int:
    """Count the classes of weights: the length of their head, which has ``known`` in ``own``."""
    heads = [name for name, value in own.items() if value.shape[:1] == (known,) and name in state]
    found = {len(state[n]) for n in heads if state[n].shape[1:] == own[n].shape[1:]} - {known}
    return min(found, default=known)


def on_disk(name: str, default: Any) -> tuple[Path, Any]:
    """Find a file of torchvision's weights, and their member of the enumeration of ``default``."""
    kinds = type(default).__members__
    kind = kinds.get(str(name).removeprefix(f"{type(default).__name__}."))
    if kind is None:
        known = ", ".join(kinds)
        raise FileNotFoundError(f"there is no file {name}; torchvision's weights are {known}")
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(kind.url).path))
    if not path.exists():
        what = f"the weights {name} are not on disk, and nothing is downloaded"
        raise FileNotFoundError(f"{what}: put {kind.url} there as {path}")
    return path, kind


def _content(path: str | os.PathLike) -> Any:
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it all
            return torch.load(path, map_location=torch.empty(0).device, weights_only=True)
    except ModuleNotFoundError as error:
        raise ImportError(f"{path} needs pip install geomkd[safetensors]") from error
    except OSError:
        raise
    except Exception as error:  # what the content of any file raises has no end
        objects = re.search(r"GLOBAL (\S+)", str(error))
        if objects:
            raise ValueError(
                f"{path} holds objects beside tensors, which are not read since they may run code: "
                f"{objects[1]}; save the state dict alone"
            ) from None
        # torch's advice comes first, in bold; what happened stands behind it.
        text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).split("WeightsUnpickler error:")[-1]
        reason = (text.strip().splitlines() or ["it ends too early"])[0]
        kind = type(error).__name__
        raise ValueError(f"{path} is no file of weights ({kind}: {reason})") from None


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "nothing"
