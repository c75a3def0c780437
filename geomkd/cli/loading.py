"""Models by name or from a file, and the data that goes with them, for the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from geomkd.common.randomness import seeded
from geomkd.datasets import load_folder, open_dataset

PREFIXES = ("_orig_mod.", "module.")  # that torch.compile and data-parallel wrappers add


class Loaded(NamedTuple):
    """A model with what is known of it.

    Attributes
    ----------
    model : nn.Module
        The model.
    transform : callable or None
        The transform that belongs to its weights, where these are a published set's.
    story : str
        Where model and weights come from, for the output.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor] | None
    story: str


def load_model(name: str, *, weights: str | os.PathLike | None = None, seed: int = 0) -> Loaded:
    """Build a model and fill it with weights from a file.

    Parameters
    ----------
    name : str
        ``torchvision:resnet34`` (any of torchvision's), or ``package.module:factory`` for a
        callable without arguments that is found from the current folder too.
    weights : path, optional
        A file of a state dict, by itself or under "state_dict" or "model"; read without unpickling
        objects. Of torchvision's models the number of classes is taken from it.
    seed : int
        Seeds the initial weights.

    Raises
    ------
    ValueError
        A name of another form, an unknown model, weights that do not fit.
    TypeError
        A factory that does not make a module.
    """
    source, colon, rest = name.partition(":")
    if not (colon and source and rest):
        raise ValueError(
            f"--model must be torchvision:NAME or package.module:factory; got {name!r}"
        )
    state = None if weights is None else read_state_dict(weights)
    with seeded(seed):
        if source == "torchvision":
            model, transform = _torchvision(rest, state)
        else:
            model, transform = _from_factory(source, rest), None
    if state is None:
        trained = "as its factory made it" if source != "torchvision" else f"random, seed {seed}"
        return Loaded(model, None, f"{name}, weights {trained}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit {name}: {error}") from None
    return Loaded(model, transform, f"{name}, weights {weights}")


def load_data(
    path: str | os.PathLike,
    loaded: Loaded,
    *,
    split: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Dataset, str]:
    """Open a data set as a model expects it; the data, and what is done to an image, in words.

    Without ``mean``, ``std`` and ``image_size`` the weights' own transform is used where there is
    one; else images are scaled to [0, 1] alone.
    """
    given = {"image_size": image_size, "mean": mean, "std": std}
    given = {key: value for key, value in given.items() if value is not None}
    options = {} if split is None else {"split": split}
    if given or loaded.transform is None:
        words = ", ".join(f"{key} {value}" for key, value in given.items())
        data = open_dataset(path, **options, **given)
        return data, f"scaled to [0, 1]{'; ' if words else ''}{words}"
    words = f"the weights' own: {' '.join(str(loaded.transform).split())}"
    if Path(path).is_dir():
        return load_folder(path, transform=loaded.transform), words
    return Transformed(open_dataset(path, **options), loaded.transform), words


class Transformed(Dataset):
    """A data set of (image, label) with a transform of the images.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.ones(2, 3), torch.tensor([0, 1]))
    >>> Transformed(data, lambda image: image * 2)[0][0]
    tensor([2., 2., 2.])
    """

    def __init__(self, data: Any, transform: Callable[[Any], Tensor]) -> None:
        self.data, self.transform = data, transform
        if hasattr(data, "targets"):
            self.targets = data.targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.data[index]
        return self.transform(image), label


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read names and tensors from a file of weights, by themselves or under a key, on the host.

    Raises
    ------
    ValueError
        A file that holds no state dict.
    """
    import pickle

    try:
        state = torch.load(path, map_location=torch.empty(0).device, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no file of weights: {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} must hold a state dict, names and tensors; it holds none")
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _torchvision(name: str, state: Mapping[str, Tensor] | None) -> tuple[nn.Module, Any]:
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise ImportError("this needs torchvision: pip install geomkd[vision]") from error
    try:
        published = models.get_model_weights(name).DEFAULT
    except ValueError:
        close = ", ".join(n for n in models.list_models() if n.startswith(name[:3])) or "none"
        message = f"torchvision has no model {name!r}; names that begin alike: {close}"
        raise ValueError(message) from None
    if state is None:
        return models.get_model(name, weights=None), None
    heads = [value for key, value in state.items() if key.endswith("weight") and value.ndim >= 2]
    if not heads:
        raise ValueError(f"the weights of {name!r} hold no matrix: not a state dict of a network")
    n_classes = len(heads[-1])
    own = n_classes == len(published.meta.get("categories", ()))
    model = models.get_model(name, weights=None, num_classes=n_classes)
    return model, published.transforms() if own else None


def _from_factory(module: str, factory: str) -> nn.Module:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {module}:{factory} cannot be found: {error}") from None
    model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"--model {module}:{factory} must make a torch.nn.Module; got {type(model).__name__}"
        )
    return model
