"""Every check of input, and its wording: what was expected, what came, where."""

import mmap
import numbers
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DEFINITIONS = ("published", "robust")
IGNORED = -100  # what losses of torch take for no label
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Classes(NamedTuple):
    """Labels as class indices, in the order in which they came."""

    index: Tensor  # (n,) class of each sample, 0 ... C - 1
    sizes: list[int]  # samples of each class
    names: list[Any]  # the label that each class index stands for


def sums_device(device: torch.device) -> torch.device:
    """Where sums are taken of what is on a device: there, or on the CPU if it has no float64."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # such as Apple's MPS
        return torch.Generator().device
    return device


def as_tensor(value: Any, name: str) -> Tensor:
    """Tensor of an array or a tensor, without its graph; ``TypeError`` for anything else."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc" or value.dtype in (np.longdouble, np.clongdouble):
            raise TypeError(
                f"{name} must hold numbers torch knows; got a NumPy array of dtype {value.dtype}"
            )
        if isinstance(value, np.memmap) and value.mode == "r" and isinstance(value.base, mmap.mmap):
            order = "F" if value.flags.fnc else "C"  # copy on write: nothing is read yet
            value = np.memmap(value.filename, value.dtype, "c", value.offset, value.shape, order)
        native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be dense; got a tensor of layout {value.layout}")
        return value.detach()
    raise TypeError(f"{name} must be a torch.Tensor or a numpy.ndarray; got {type(value).__name__}")


def as_features(features: Any, name: str = "features") -> Tensor:
    """Features of n samples, flattened to (n, d); on the CPU where their device has no float64."""
    x = as_tensor(features, name)
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be float64, float32, float16 or bfloat16; got {_dtype(x)}"
            + (" (convert with .float())" if not x.is_complex() else "")
        )
    if x.ndim < 2:
        raise ValueError(f"{name} must be (n, ...), at least 2-d; got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty; got shape {tuple(x.shape)}")
    return x.flatten(1).to(sums_device(x.device))


def as_labels(
    labels: Any, n: int | None = None, device: torch.device | None = None, *, soft: bool = False
) -> Tensor:
    """Labels as (n,) integers, of integers or of exact one-hot rows (n, C), on ``device``.

    With ``soft`` rows may be probabilities (>= 0, of sum 1), and are given as they are, as floats.
    """
    y = as_tensor(labels, "labels")
    rows = "rows (n, C) of probabilities" if soft else "exact one-hot rows (n, C)"
    form = f"labels must be (n,) integers or {rows} with C >= 2"
    if y.is_complex():
        raise TypeError(f"{form}; got {_dtype(y)}")
    if y.ndim not in (1, 2) or (y.ndim == 2 and y.shape[1] < 2):
        raise ValueError(f"{form}; got shape {tuple(y.shape)} of {_dtype(y)}")
    if y.ndim == 1 and (y.is_floating_point() or y.dtype is torch.bool):
        raise TypeError(f"1-d labels must be integers; got {_dtype(y)}")
    if n is not None and len(y) != n:
        raise ValueError(f"labels must be as many as the features, n = {n}; got {len(y)}")
    y = y.to(sums_device(y.device))
    if device is not None and y.device != device:
        raise ValueError(f"labels must be on the features' device, {device}; got {y.device}")
    if y.ndim == 2:
        probabilities = _checked_rows(y, form, soft)
        return probabilities if soft else probabilities.argmax(dim=1)
    y = y.long()
    if bool((y == IGNORED).any()):
        raise ValueError(
            f"labels must be classes; got {IGNORED}, which stands for no label, first in row "
            f"{int((y == IGNORED).nonzero()[0])}: leave such samples out"
        )
    return y


def _checked_rows(y: Tensor, form: str, soft: bool) -> Tensor:
    """One-hot rows, or of probabilities too, as floats; ``ValueError`` says what else a row is."""
    is_float = y.is_floating_point()
    rows = y.to(torch.promote_types(y.dtype, torch.float32)) if is_float else y.double()
    binary, sums = ((rows == 0) | (rows == 1)).all(dim=1), rows.sum(dim=1)
    # Probabilities in half precision are rounded more coarsely than 1e-4.
    close = max(1e-4, torch.finfo(y.dtype).eps) if is_float else 0
    mixed = (rows >= 0).all(dim=1) & ((sums - 1).abs() <= close)
    bad = ~(mixed if soft else binary & (sums == 1))
    if not bool(bad.any()):
        return rows
    i = int(bad.nonzero()[0])
    low, high = (f"{value:.4g}" for value in torch.stack(torch.aminmax(rows[i])).tolist())
    if not bool(torch.isfinite(rows[i]).all()):
        what = "NaN or Inf"
    elif bool(binary[i]):
        what = f"{int(sums[i])} ones (several labels of a sample, or none)"
    elif not is_float:
        what = f"integers {low} ... {high} (labels of tokens or positions, or counts)"
    elif bool(mixed[i]):
        what = "a mixture of classes (which only distill takes)"
    else:
        what = f"scores {low} ... {high} of sum {float(sums[i]):.4g}"
    raise ValueError(f"{form}; got {what} in row {i}")


def as_classes(labels: Any, n: int | None = None, device: torch.device | None = None) -> Classes:
    """Class indices and sizes; at least two classes, each of at least two samples."""
    names, index, counts = torch.unique(
        as_labels(labels, n, device), return_inverse=True, return_counts=True
    )
    classes = Classes(index, counts.tolist(), names.tolist())
    if len(classes.sizes) < 2:
        raise ValueError(
            f"at least 2 classes are needed; the labels hold {len(classes.sizes)}: {classes.names}"
        )
    if min(classes.sizes) < 2:
        lonely = [k for k, m in zip(classes.names, classes.sizes, strict=True) if m < 2]
        shown = ", ".join(map(str, lonely[:5])) + (", ..." if len(lonely) > 5 else "")
        raise ValueError(f"every class needs at least 2 samples; got 1 of class {shown}")
    return classes


def check_rows_finite(largest: Tensor, row_of: Tensor, name: str = "features") -> None:
    """``ValueError`` that counts the rows, ``row_of`` each, whose ``largest`` is NaN or Inf."""
    bad = ~torch.isfinite(largest)
    if bool(bad.any()):
        rows = row_of[bad]
        raise ValueError(
            f"{name} must be finite; got NaN or Inf in {len(rows)} of {len(largest)} rows, "
            f"first in row {int(rows.min())}"
        )


def check_finite(features: Tensor, name: str = "features") -> None:
    """``ValueError`` that counts the rows of (n, d) features in which NaN or Inf stands."""
    low, high = torch.aminmax(features)
    if not bool(torch.isfinite(high - low)):  # which rows, in more time
        largest = torch.linalg.vector_norm(features, float("inf"), dim=1)
        check_rows_finite(largest, torch.arange(len(largest), device=largest.device), name)


def check_names(names: Any, option: str, *, distinct: bool = True) -> list[str]:
    """Check a list of layers' names: no single string, which has letters, no set, without order."""
    if isinstance(names, str | set | frozenset) or not isinstance(names, Iterable):
        raise TypeError(
            f"{option} must be a list of layer names; got {type(names).__name__} {names!r}"
        )
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"{option} must hold layer names (str); got {type(name).__name__} {name!r}"
            )
    if distinct:
        if not names:
            raise ValueError(f"{option} must hold at least one layer name; got none")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{option} must differ from each other; got {twice} more than once")
    return names


@contextmanager
def about(what: str) -> Iterator[None]:
    """Begin the text of a ``TypeError`` or ``ValueError`` raised within by ``what`` it is of."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from error


def check_definition(definition: str) -> str:
    """One of the definitions of knowledge quality."""
    return check_choice(definition, "definition", DEFINITIONS)


def check_dataset_size(dataset_size: Any, n: int) -> float:
    """Size of the data set that n samples were drawn from; n where it is not given."""
    if dataset_size is None:
        return float(n)
    size = check_number(dataset_size, "dataset_size")
    if not n <= size < float("inf"):
        raise ValueError(
            f"dataset_size must be at least the number of samples, n = {n}; got {dataset_size}"
        )
    return size


def check_int(value: Any, name: str, least: int) -> int:
    """Check that a whole number is at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return int(value)


def check_number(
    value: Any,
    name: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Check that a real number lies in a range; a range without an upper end means finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    bounds = (least, above, below, most)
    if bounds == (None,) * 4:
        return float(value)
    fits = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
        and (value <= most if most is not None else value < float("inf"))
    )
    if not fits:
        low = f"at least {least}" if above is None else f"above {above}"
        if above is not None and below is not None:
            words = f"between {above} and {below}"
        elif below is not None or most is not None:
            words = f"{low} and {f'at most {most}' if below is None else f'below {below}'}"
        else:
            words = f"finite and {low}"
        raise ValueError(f"{name} must be {words}; got {value}")
    return float(value)


def check_choice(value: Any, name: str, choices: Collection[Any]) -> Any:
    """Check that a value is one of some choices."""
    if not any(value is choice or value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {tuple(choices)}; got {value!r}")
    return value


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
