"""Networks, as options name them: by a library's own loader, from disk, or by a factory."""

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geomkd.cli.weights import fill, fitted, n_classes_in, on_disk, read_state_dict
from geomkd.common.randomness import generator_options, seeded

FORMS = "torchvision:NAME, timm:NAME, hf:NAME_OR_FOLDER or package.module:factory"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
SIDE, LENGTH = 224, 16_000  # of an example, where nothing tells it: an image, a second of sound


class Loaded(NamedTuple):
    """A network with what is known of it."""

    model: nn.Module
    transform: Callable[[Any], Tensor] | None  # that belongs to published weights
    story: str  # where network and weights come from, for the output
    shape: tuple[int, ...] | None = None  # of an input, where that is known


class Door(NamedTuple):
    """What makes a network of a name; by itself it has ``n_classes``."""

    build: Callable[[int | None], nn.Module]  # by the seed, with so many classes
    n_classes: int | None = None
    published: Callable[[Any], tuple[nn.Module, Any]] | None = None  # by a name of weights
    transform: Callable[[], Any] = lambda: None  # of a file of weights with as many classes
    shape: tuple[int, ...] | None = None
    has_weights: bool = False  # of its own, published under the name None


def load_model(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    seed: int = 0,
    n_classes: int | None = None,
    option: str = "model",
) -> Loaded:
    """Build a network and fill it with weights from disk, or by a seed; nothing is downloaded.

    ``name`` has one of the `FORMS`: Hugging Face's are a folder with a ``config.json``, or a name
    in the cache, with their safetensors; a factory takes no arguments and is found from the current
    folder too. ``weights`` are a file, see `read_state_dict`, whose number of classes counts, or a
    name of torchvision's, or DEFAULT for timm's; without any, these have ``n_classes`` logits.
    """
    source, colon, rest = name.partition(":")
    if not (colon and source and rest):
        raise ValueError(f"--{option} must be {FORMS}; got {name!r}")
    door = DOORS[source](rest) if source in DOORS else _factory(source, rest, f"--{option} {name}")
    with seeded(seed):
        if weights is None and not door.has_weights:
            n_classes = n_classes if door.n_classes else None
            how = f"random, seed {seed}" if source in DOORS else "as its factory made it"
            story = f"{name}, {f'{n_classes} classes, ' if n_classes else ''}weights {how}"
            return Loaded(door.build(n_classes), None, story, door.shape)
        if weights is None or not os.path.exists(weights):
            if door.published is None or (door.has_weights and weights is not None):
                raise FileNotFoundError(f"there is no file {weights}")
            model, transform = door.published(weights)
        else:
            state, model, transform = read_state_dict(weights), door.build(None), door.transform()
            own = model.state_dict()
            n_classes = n_classes_in(fitted(state, own), own, door.n_classes)
            if n_classes != door.n_classes:
                model, transform = door.build(n_classes), None
            fill(model, state, f"{weights} does not fit {name}")
    return Loaded(model, transform, f"{name}, weights {weights or 'that it came with'}", door.shape)


def _factory(module: str, factory: str, which: str) -> Door:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{which} cannot be found: {error}") from None

    def build(n_classes: int | None) -> nn.Module:
        if not isinstance(model := make(), nn.Module):
            raise TypeError(f"{which} must make a torch.nn.Module; got {type(model).__name__}")
        return model

    return Door(build)


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

    def published(weights: str) -> tuple[nn.Module, Any]:
        file, kind = on_disk(weights, default)
        read_state_dict(file)  # holds tensors and nothing else
        # By its own loader: some networks are built otherwise, or rename what older files hold.
        try:
            return models.get_model(name, weights=kind, progress=False), kind.transforms()
        except RuntimeError as error:
            what = " ".join(str(error).split())  # on one line
            raise ValueError(f"{weights} does not fit {name}: {what}") from None

    images = default.transforms()
    frames = (16,) if type(images).__name__ == "VideoClassification" else ()
    shape = (3, *frames, *2 * (getattr(images, "crop_size", [SIDE])[0],))
    known = len(default.meta.get("categories", ()))
    return Door(build, known, published, default.transforms, shape)


def _timm(name: str) -> Door:
    timm = _imported("timm", "timm")
    _check_known("timm", name, timm.list_pretrained() if "." in name else timm.list_models())
    about = timm.get_pretrained_cfg(name)
    images = timm.data.resolve_data_config({}, about.to_dict())
    transform = partial(timm.data.create_transform, **images)

    def build(n_classes: int | None, **weights: Any) -> nn.Module:
        return timm.create_model(name, num_classes=n_classes, **weights)

    def published(weights: str) -> tuple[nn.Module, Any]:
        file = _file(str(about.hf_hub_id), "model.safetensors")
        if weights != "DEFAULT" or file is None:
            other = f"nor {about.hf_hub_id} for DEFAULT in Hugging Face's cache"
            raise FileNotFoundError(f"there is no file {weights}, {other}; nothing is downloaded")
        overlay = {"state_dict": read_state_dict(file)}
        return build(None, pretrained=True, pretrained_cfg_overlay=overlay), transform()

    n_classes = about.num_classes or 1000  # where what is published has no head
    return Door(build, n_classes, published, transform, about.input_size)


def _hugging_face(name: str) -> Door:
    transformers = _imported("transformers", "transformers")
    if _file(name, "config.json") is None:
        nor = "nor a model of this name in Hugging Face's cache; nothing is downloaded"
        raise FileNotFoundError(f"there is no folder {name} with a config.json, {nor}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(name, **LOCAL)
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    has_weights = any(_file(name, file) for file in files)
    # The head that the configuration says; where it says nothing one for classes, if there is one.
    written, kind = (config.architectures or [""])[0], transformers.AutoModel
    for task in ("Audio", "Sequence", "Image"):
        other = getattr(transformers, f"AutoModelFor{task}Classification")
        known = other._model_mapping.get(type(config), None)  # a class, or several
        kind = other if known is not None and written in str(known) else kind

    def build(n_classes: int | None) -> nn.Module:
        config.num_labels = n_classes or config.num_labels
        return kind.from_config(config, trust_remote_code=False).float()

    def transform() -> Any:
        if len(shape or ()) != 3 or _file(name, "preprocessor_config.json") is None:
            return None
        processor = transformers.AutoImageProcessor.from_pretrained(name, **LOCAL)

        def processed(image: Any) -> Tensor:  # from a file, or a tensor in [0, 1]
            scaled = {"do_rescale": not isinstance(image, Tensor)}
            return processor(images=image, return_tensors="pt", **scaled)["pixel_values"][0]

        processed.__name__ = type(processor).__name__
        return processed

    def published(weights: str | None) -> tuple[nn.Module, Any]:
        options = LOCAL | {"use_safetensors": True, "output_loading_info": True}
        try:
            model, told = kind.from_pretrained(name, **options)
        except Exception as error:  # what the content of any file raises has no end
            what = f"the weights of {name} cannot be read, pickled ones never are"
            raise ValueError(f"{what}: {error}") from error
        if lacking := sorted(told["missing_keys"]):
            warnings.warn(f"{name} lacks weights, random here: {', '.join(lacking)}", stacklevel=3)
        return model.float(), transform()

    shape, vision = None, getattr(config, "vision_config", config)
    if hasattr(vision, "num_channels"):
        side = getattr(vision, "image_size", SIDE)
        shape = (vision.num_channels, *(side if isinstance(side, list | tuple) else (side, side)))
    elif hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        shape = (config.max_length, config.num_mel_bins)
    n_classes = None if kind is transformers.AutoModel else config.num_labels
    return Door(build, n_classes, published, transform, shape, has_weights)


DOORS = {"torchvision": _torchvision, "timm": _timm, "hf": _hugging_face}


def _imported(library: str, extra: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            return importlib.import_module(library)
    except ModuleNotFoundError as error:
        what = f"this needs {library.partition('.')[0]}"
        raise ImportError(f"{what}: pip install geomkd[{extra}]") from error


def _check_known(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, n=5)) or "none"
        raise ValueError(f"{library} has no model {name!r}; close matches: {close}")


def _file(name: str, file: str) -> str | None:
    """Find a file of a model in its folder, or in Hugging Face's cache."""
    if os.path.isdir(name):
        return path if os.path.exists(path := os.path.join(name, file)) else None
    try:
        found = _imported("huggingface_hub", "transformers").try_to_load_from_cache(name, file)
    except ValueError:  # no name that a model may have
        return None
    return found if isinstance(found, str) else None


def example_of(loaded: Loaded, image_size: int | None = None) -> Any:
    """Make a batch of two inputs such as a network takes, of noise or of any words.

    Of transformers' networks it is a mapping: images, words with their mask, or sounds. What no
    library tells is read off the first layer with weights.
    """
    model, shape, ids = loaded.model, loaded.shape, 3 + torch.arange(16).reshape(2, 8)
    name = getattr(model, "main_input_name", None)
    if shape is None and name is None:
        kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding
        first = next((m for m in model.modules() if isinstance(m, kinds)), nn.Conv2d(3, 1, 1))
        if isinstance(first, nn.Embedding):
            return ids % first.num_embeddings
        sides = ((), (LENGTH,), (SIDE, SIDE))[first.weight.ndim - 2]
        shape = (first.in_channels if sides else first.in_features, *sides)
    if image_size is not None and len(shape or ()) > 2:
        shape = (*shape[:-2], image_size, image_size)
    example = torch.rand(2, *(shape or (LENGTH,)), **generator_options(0))
    if name != "input_ids":
        return example if name is None else {name: example}
    text = model.config.get_text_config()
    eos = getattr(text, "eos_token_id", None)
    ids[:, -1] = eos if isinstance(eos, int) else 3  # some heads read there
    words = {"input_ids": ids % text.vocab_size, "attention_mask": torch.ones_like(ids)}
    words |= {"decoder_input_ids": words["input_ids"]} if model.config.is_encoder_decoder else {}
    return words | ({"pixel_values": example} if shape else {})
