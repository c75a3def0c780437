"""Padding and class tokens: which positions count, and when that cannot be told."""

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool1d

from geomkd.network.forward import Forward, evaluating, tensors_in, unwrap
from geomkd.network.hooks import features_of
from geomkd.network.kinds import positions_first

MASKS = {"attention_mask": True, "src_key_padding_mask": False}  # whether it is 0 at padding
CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}  # as libraries name the parameter
DECODER = "decoder_attention_mask"  # beside the encoder's, of as many positions as its own inputs
Mask = Tensor | dict[str, Tensor | None] | None  # of the inputs, or theirs and the "decoder"'s
Masks = Mask | tuple[Mask, Mask]  # of one batch, or of each network's
PREFIX_TOKENS = (0, 1, 2, 5)  # none, a class token, with a distillation token, with four registers


def token_mask(inputs: Any) -> Tensor | None:
    """Tell which positions of a batch hold tokens, (B, T), by the mask in a mapping; else None.

    ``attention_mask`` is 0 at padding, as Hugging Face's models take it in any type (or at tokens,
    if it is below 0 elsewhere), and ``src_key_padding_mask`` at tokens, as torch's take it.
    """
    for key, of_tokens in MASKS.items():
        mask = inputs.get(key) if isinstance(inputs, Mapping) else None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            of_tokens &= not (mask.is_floating_point() and bool((mask < 0).any()))
            return mask != 0 if of_tokens else mask == 0
    return None


def masks_in(inputs: Any) -> Mask:
    """Find the masks of a batch: `token_mask`, and a ``decoder_attention_mask`` beside it."""
    if not isinstance(inputs, Mapping) or inputs.get(DECODER) is None:
        return token_mask(inputs)
    of_decoder = token_mask({next(iter(MASKS)): inputs[DECODER]})
    return {"input": token_mask(inputs), "decoder": of_decoder}


def laid_on(layer: Any, mask: Mask) -> Tensor | None:
    """Choose the mask that tells of a layer: of a decoder's, its own alone."""
    of_decoder = layer.place == "decoder"
    if isinstance(mask, dict):
        return mask["decoder" if of_decoder else "input"]
    return None if of_decoder else mask


def of_both(mask: Masks) -> tuple[Mask, Mask]:
    """Masks of the student's inputs and of the teacher's, where they may be one."""
    return mask if isinstance(mask, tuple) else (mask, mask)


def mask_of(layer: Any, mask: Mask, x: Tensor) -> Tensor | None:
    """Tell which positions of a layer's features are real, (B, T); None where no mask tells.

    Of a "stretch" of the mask's positions, as average pooling has them, one that is real will do.
    """
    mask = laid_on(layer, mask)
    if mask is None or layer.place not in ("input", "stretch", "decoder"):
        return None
    here = positions_first(x, layer.kind).shape[:2]
    if layer.place == "stretch" and here[1] < mask.shape[1]:
        return adaptive_max_pool1d(mask.float(), here[1]) > 0
    if here != mask.shape:
        raise ValueError(f"expected positions as in the mask, {tuple(mask.shape)}; got {x.shape}")
    return mask


def under_mask(
    model: nn.Module, layers: Sequence[Any], inputs: Any, forward: Forward | None
) -> list[Any]:
    """Tell what positions on a line are under a mask: of the "input", a "stretch" of it, "apart".

    They stand for stretches if there are fewer, and fewer still where the inputs end at half of
    their positions. Those that do not follow, such as latents, and more positions are "apart".
    """
    mask = token_mask(inputs)
    lines = [layer for layer in layers if mask is not None and layer.place == "line"]
    if not lines:
        return list(layers)
    most, half, found, places = mask.shape[1], copy.deepcopy(inputs), {}, {}
    with evaluating(model), suppress(Exception):  # of a model that takes but one length
        for x in tensors_in(half):
            ends = [most // 2 if size == most else size for size in x.shape[1:]]
            x.data = x[(slice(None), *map(slice, ends))]
        found = features_of(model, half, [layer.name for layer in lines], forward=forward)
    for layer in lines:
        n, x = layer.shape[layer.kind == "sequence"], found.get(layer.name)
        fewer = x is not None and positions_first(x, layer.kind).shape[1] < n < most
        places[layer.name] = "stretch" if fewer else "input" if n == most else "apart"
    return [replace(x, place=places[x.name]) if x.name in places else x for x in layers]


def without_padding(x: Tensor, layer: Any, mask: Mask) -> Tensor:
    """Features with zeros at padded positions."""
    real = mask_of(layer, mask, x)
    return x if real is None else x.masked_fill(~positions_first(real[..., None], layer.kind), 0)


def one_by_one(x: Tensor, layer: Any, mask: Mask) -> Tensor:
    """Features with each token as a sample of its own, and none of the padding."""
    real, kind = mask_of(layer, mask, x), layer.kind
    return x if real is None else positions_first(positions_first(x, kind)[real][:, None], kind)


def prefix_of(n_tokens: int) -> int | None:
    """Count the tokens in front of the square grid that the others form, if they form one."""
    rests = {prefix: n_tokens - prefix for prefix in PREFIX_TOKENS if n_tokens > prefix}
    return next((prefix for prefix, rest in rests.items() if math.isqrt(rest) ** 2 == rest), None)


def warn_of_padding(
    model: nn.Module, layers: Sequence[Any], example: Any, more: Iterable[Any], stacklevel: int
) -> Mask:
    """Warn of padding that counts, as nothing tells it from tokens; return the example's masks.

    A layer has other positions than the mask; or there is no mask, and in ``more`` integer inputs
    the model's ``config.pad_token_id`` is at the ends of samples, and nowhere else.
    """
    mask, told = token_mask(example), None
    apart = [layer.name for layer in layers if layer.place == "apart"]
    pad = getattr(getattr(unwrap(model), "config", None), "pad_token_id", None)
    masks = map(token_mask, more) if mask is not None and apart else ()
    if any(of is not None and not of.all() for of in masks):
        told = f"layers {apart} have other positions than the {mask.shape[1]} of the mask"
    elif mask is None and pad is not None and _ids(example) is not None:
        turns = ((_ids(x) != pad).int().diff(dim=1).abs().sum(dim=1).max() for x in more)
        if any(most == 1 for most in turns):
            told = f"inputs end in padding (id {pad}) and no attention_mask (B, T) is with them"
    if told:
        warnings.warn(f"{told}: padded positions count as tokens", stacklevel=stacklevel + 1)
    return masks_in(example)


def check_class_token(
    model: nn.Module, layers: Sequence[Any], inputs: Any, forward: Forward | None
) -> None:
    """Refuse tokens the first of which is no class token, as far as a model shows it.

    Of tokens that stand for integer inputs one by one: the first is the same with all inputs set to
    the first, so it sees no other (decoders, causal and recurrent models); what a tokenizer put
    there is not known. Else: their number is a square grid with none in front (mixers, hierarchical
    models); or it is not 1, 2 or 5 more than one, of an image, and no parameter is named
    ``cls_token``, ``class_token`` or ``class_embedding``.
    """
    own = {name.rpartition(".")[2] for name, _ in unwrap(model).named_parameters()}
    tokens, alone = [layer for layer in layers if layer.kind == "tokens"], {}
    for n_tokens in {layer.shape[0] for layer in tokens if layer.place == "input"}:
        mask, other = token_mask(inputs), copy.deepcopy(inputs)
        shape = len(next(tensors_in(inputs))), n_tokens
        first = (torch.zeros(shape) if mask is None else mask.int().cpu()).argmax(dim=1)
        at = torch.arange(shape[0]), first
        for x in (x for x in tensors_in(other) if x.shape[:2] == shape):
            x.copy_(x[at].unsqueeze(1).expand_as(x))
        if isinstance(other, dict):
            other |= {key: inputs[key] for key in MASKS if key in inputs}
        names = [x.name for x in tokens if x.place == "input" and x.shape[0] == n_tokens]
        found = [features_of(model, x, names, forward=forward) for x in (inputs, other)]
        for name in names:
            ours, theirs = (features[name][at].double() for features in found)
            alone[name] = n_tokens > 1 and (ours - theirs).abs().max() <= 1e-6 * ours.abs().max()
    for layer in tokens:
        n_tokens, prefix = layer.shape[0], prefix_of(layer.shape[0])
        shown = own & CLASS_TOKENS or (prefix and layer.place == "grid")
        if alone.get(layer.name, not shown or (prefix == 0 and layer.place == "grid")):
            raise ValueError(
                f"layer {layer.name!r}: pool='cls' needs a class token in front, which sees others;"
                f" got {n_tokens} tokens without one: pass pool='mean', 'max' or 'last'"
            )


def _ids(inputs: Any) -> Tensor | None:
    return next((x for x in tensors_in(inputs) if x.ndim == 2 and not x.is_floating_point()), None)
