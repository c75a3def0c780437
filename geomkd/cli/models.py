"""Networks, as options name them: by a library's own loader, from disk, or by a factory."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geomkd.cli.weights import fill, fitted, n_classes_in, on_disk, read_state_dict
from geomkd.common.randomness import generator_options, seeded

FORMS = "torchvision:NAME, timm:NAME, hf:NAME_OR_FOLDER or package.module:factory"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
SIDE, FRAMES, TOKENS, LENGTH = 224, 16, 8, 16_000  # of an example, where nothing tells them
Filled = tuple[nn.Module, Callable[[Any], Tensor] | None]  # a network, a transform of its images


class Loaded(NamedTuple):
    """A network with what is known of it."""

    model: nn.Module
    transform: Callable[[Any], Tensor] | None  # that belongs to published weights
    story: str  # where network and weights come from, for the output
    shape: tuple[int, ...] | None = None  # of an input, where that is known


class Door(NamedTuple):
    """What makes a network of a name."""

    build: Callable[[int | None], nn.Module]  # with so many classes, or as many as it has by itself
    n_classes: int | None = None  # that it has by itself
    published: Callable[[Any], Filled | None] = lambda weights: None  # None: its own; unknown: None
    transform: Callable[[], Any] = lambda: None  # of weights of its own number of classes
    shape: tuple[int, ...] | None = None
    has_weights: bool = False  # of its own, where none are named


def load_model(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    seed: int = 0,
    n_classes: int | None = None,
    option: str = "model",
) -> Loaded:
    """Build a network and fill it with weights from disk, or by a seed; nothing is downloaded.

    ``name`` has one of the `FORMS`. A factory takes no arguments and is found from the current
    folder too; what is Hugging Face's is a folder with a ``config.json`` or a name in the cache,
    and brings its safetensors. ``weights`` is a file, see `read_state_dict`, whose number of
    classes counts, or a name of torchvision's weights, or DEFAULT for timm's. Without any, a
    library's classifier has ``n_classes`` logits. Errors name the ``option``.

    Raises
    ------
    ValueError, TypeError
        An unknown name, a factory of something else, weights that do not fit or are pickled.
    ImportError, FileNotFoundError
        A library, weights or a folder that is not there.
    """
    door = _door(name, option)
    with seeded(seed):
        if weights is None and not door.has_weights:
            n_classes = n_classes if door.n_classes else None
            how = f"{f'{n_classes} classes, ' if n_classes else ''}weights random, seed {seed}"
            how = how if name.partition(":")[0] in DOORS else "weights as its factory made it"
            return Loaded(door.build(n_classes), None, f"{name}, {how}", door.shape)
        story = f"{name}, weights {weights or 'that it came with'}"
        if weights is None or not os.path.exists(weights):
            if (filled := door.published(weights)) is None:
                raise FileNotFoundError(f"there is no file {weights}")
            return Loaded(*filled, story, door.shape)
        state, model = read_state_dict(weights), door.build(None)
        own = model.state_dict()
        n_classes = n_classes_in(fitted(state, own), own, door.n_classes)
        model = model if n_classes == door.n_classes else door.build(n_classes)
    fill(model, state, f"{weights} does not fit {name}")
    transform = door.transform() if n_classes == door.n_classes else None
    return Loaded(model, transform, story, door.shape)


def brings_weights(name: str) -> bool:
    """Whether a network has weights though none are named, as Hugging Face's folders do."""
    return name.startswith("hf:") and _door(name, "model").has_weights


def _door(name: str, option: str) -> Door:
    source, colon, rest = name.partition(":")
    if not (colon and source and rest):
        raise ValueError(f"--{option} must be {FORMS}; got {name!r}")
    if source in DOORS:
        return DOORS[source](rest)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(source), rest)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--{option} {name} cannot be found: {error}") from None

    def build(n_classes: int | None) -> nn.Module:
        model = make()
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise TypeError(f"--{option} {name} must make a torch.nn.Module; got {kind}")
        return model

    return Door(build)


# ---- libraries -----------------------------------------------------------------------------------


def _torchvision(name: str) -> Door:
    models = _imported("torchvision.models", "vision")
    _check_known("torchvision", name, models.list_models())
    default = models.get_model_weights(name).DEFAULT
    options = {"weights": None}
    if "weights_backbone" in signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # by default they are downloaded

    def build(n_classes: int | None) -> nn.Module:
        more = {} if n_classes is None else {"num_classes": n_classes}
        return models.get_model(name, **options, **more)

    def published(weights: str) -> Filled:
        file, kind = on_disk(weights, default)
        model = build(None)
        fill(model, read_state_dict(file), f"{weights} does not fit {name}")
        return model, kind.transforms()

    side = getattr(default.transforms(), "crop_size", [SIDE])[0]
    is_video = default.transforms.func.__name__ == "VideoClassification"
    shape = (3, *[FRAMES] * is_video, side, side)
    n_classes = len(default.meta.get("categories", ()))
    return Door(build, n_classes, published, default.transforms, shape)


def _timm(name: str) -> Door:
    timm = _imported("timm", "timm")
    _check_known("timm", name, timm.list_pretrained() if "." in name else timm.list_models())
    about = timm.get_pretrained_cfg(name)

    def build(n_classes: int | None, **weights: Any) -> nn.Module:
        return timm.create_model(name, num_classes=n_classes, **weights)

    def transform() -> Any:
        return timm.data.create_transform(**timm.data.resolve_data_config({}, about.to_dict()))

    def published(weights: str) -> Filled | None:
        if weights != "DEFAULT":
            return None
        if (file := _file(about.hf_hub_id, "model.safetensors")) is None:
            at = f"{about.hf_hub_id} in Hugging Face's cache"
            raise FileNotFoundError(f"there is no model.safetensors of {at}; nothing is downloaded")
        overlay = {"state_dict": read_state_dict(file)}
        return build(None, pretrained=True, pretrained_cfg_overlay=overlay), transform()

    return Door(build, about.num_classes, published, transform, about.input_size)


def _hugging_face(name: str) -> Door:
    transformers = _imported("transformers", "transformers")
    if _file(name, "config.json") is None:
        nor = "nor a model of this name in Hugging Face's cache; nothing is downloaded"
        raise FileNotFoundError(f"there is no folder {name} with a config.json, {nor}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(name, **LOCAL)
    safe = [_file(name, f"model.safetensors{more}") for more in ("", ".index.json")]
    pickled = _file(name, "pytorch_model.bin")
    # The head that the configuration says; where it says nothing one for classes, if there is one.
    written, kind = (config.architectures or [""])[0], transformers.AutoModel
    for task in ("Audio", "Sequence", "Image"):
        other = getattr(transformers, f"AutoModelFor{task}Classification")
        has_head = written.endswith(f"For{task}Classification")
        if has_head or (not written and type(config) in other._model_mapping):
            kind = other

    def build(n_classes: int | None) -> nn.Module:
        config.num_labels = n_classes or config.num_labels
        return kind.from_config(config, trust_remote_code=False).float()

    def transform() -> Any:
        has_one = _file(name, "preprocessor_config.json") is not None
        return Processed(transformers.AutoImageProcessor, name) if has_one else None

    def published(weights: str | None) -> Filled | None:
        if weights is not None:
            return None
        if not any(safe):
            remedy = "save it as safetensors"
            raise ValueError(f"{pickled} is pickled and not read, since it may run code: {remedy}")
        options = LOCAL | {"use_safetensors": True, "output_loading_info": True}
        try:
            model, told = kind.from_pretrained(name, **options)
        except Exception as error:  # what the content of any file raises has no end
            raise ValueError(f"the weights of {name} cannot be read: {error}") from error
        if lacking := sorted(told["missing_keys"]):
            warnings.warn(f"{name} lacks weights, random here: {', '.join(lacking)}", stacklevel=3)
        return model.float(), transform()

    n_classes = None if kind is transformers.AutoModel else config.num_labels
    has_weights = any((*safe, pickled))
    return Door(build, n_classes, published, transform, _shape_of(config), has_weights)


DOORS = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}


class Processed:
    """Images by a processor of transformers, from PIL or from tensors in [0, 1]."""

    def __init__(self, kind: Any, name: str) -> None:
        self.processor = kind.from_pretrained(name, **LOCAL)

    def __call__(self, image: Any) -> Tensor:
        """Return what the processor makes of an image."""
        options = {"do_rescale": False} if isinstance(image, Tensor) else {}
        return self.processor(images=image, return_tensors="pt", **options)["pixel_values"][0]

    def __repr__(self) -> str:
        return type(self.processor).__name__


def _imported(library: str, extra: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            return importlib.import_module(library)
    except ModuleNotFoundError as error:
        name = library.partition(".")[0]
        raise ImportError(f"this needs {name}: pip install geomkd[{extra}]") from error


def _check_known(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, n=5)) or "none"
        raise ValueError(f"{library} has no model {name!r}; close matches: {close}")


def _file(name: str, file: str) -> str | None:
    """Find a file of a model in its folder, or in Hugging Face's cache."""
    if os.path.isdir(name):
        return os.path.join(name, file) if os.path.exists(os.path.join(name, file)) else None
    try:
        found = _imported("huggingface_hub", "transformers").try_to_load_from_cache(name, file)
    except ValueError:  # no name that a model may have
        return None
    return found if isinstance(found, str) else None


# ---- examples ------------------------------------------------------------------------------------


def example_of(loaded: Loaded, image_size: int | None = None) -> Any:
    """Make a batch of two inputs such as a network takes, of noise or of any words.

    Of transformers' networks it is a mapping: images, words with their mask, or sounds. What no
    library tells is read off the first layer with weights.

    Examples
    --------
    >>> example_of(Loaded(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), None, "")).shape
    torch.Size([2, 5])
    """
    model, shape, noise = loaded.model, loaded.shape, generator_options(0)
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    ids = 3 + torch.arange(2 * TOKENS).reshape(2, TOKENS)
    if name == "input_ids":
        text = config.get_text_config()
        if isinstance(text.eos_token_id, int):  # some heads read there
            ids[:, -1] = text.eos_token_id
        words = {"input_ids": ids % text.vocab_size, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            words["decoder_input_ids"] = words["input_ids"]
        if hasattr(config, "vision_config"):
            words["pixel_values"] = torch.rand(2, *_shape_of(config.vision_config), **noise)
        return words
    if shape is None:
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding
        first = next((m for m in model.modules() if isinstance(m, kinds)), None)
        if first is None:
            raise ValueError(f"no layer tells what a {type(model).__name__} takes")
        if isinstance(first, nn.Embedding):
            return ids % first.num_embeddings
        sides = ((), (LENGTH,), (SIDE, SIDE), (FRAMES, SIDE, SIDE))[first.weight.ndim - 2]
        shape = (first.in_channels if sides else first.in_features, *sides)
    if image_size is not None and len(shape) > 2:
        shape = (*shape[:-2], image_size, image_size)
    example = torch.rand(2, *shape, **noise)
    return example if name is None else {name: example}


def _shape_of(config: Any) -> tuple[int, ...]:
    """Shape of an image, a spectrum or a sound, as a configuration of transformers has it."""
    if hasattr(config, "num_channels"):
        side = getattr(config, "image_size", SIDE)
        sides = side if isinstance(side, list | tuple) else (side, side)
        frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
        return (*frames, config.num_channels, *sides)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return config.max_length, config.num_mel_bins
    return (LENGTH,)
