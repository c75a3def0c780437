"""What the teacher says about a batch: live, or read from files that hold it for every sample."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomkd.common.checks import check_choice
from geomkd.common.distributed import gathered, world
from geomkd.common.files import atomic_write
from geomkd.common.progress import bar_of
from geomkd.distillation.running.batches import Batches, part_of
from geomkd.distillation.running.fingerprints import (
    data_fingerprint,
    draws_at_random,
    probes,
    weights_fingerprint,
)
from geomkd.distillation.running.setup import Networks
from geomkd.network.forward import call, evaluating, first_tensor
from geomkd.network.hooks import capture, features_of
from geomkd.network.kinds import on_line

Answer = tuple[list[Tensor], Tensor | None]
SHARD = 512  # samples of one file
BATCH = 128  # samples of a forward pass while files are written
CACHE_DTYPES = (None, "float16")


class LiveTeacher:
    """Runs the teacher on each batch, in the context that ``autocast`` makes."""

    def __init__(self, networks: Networks, autocast: Callable[[], AbstractContextManager]) -> None:
        self.networks, self.autocast = networks, autocast
        self.stored = None

    def __call__(self, inputs: Any, index: list[int]) -> Answer:
        """Features of the teacher layer of each pair, and logits, whichever the objective uses."""
        networks = self.networks
        teacher, names, forward = networks.teacher, networks.teacher_layers, networks.forward
        if teacher is None:
            return [], None
        inputs = part_of(inputs, "teacher")
        with evaluating(teacher), self.autocast():
            # Not beyond the last layer; but forward= may call again, and the last call counts.
            if not networks.objective.uses_teacher_logits and forward is None:
                features, logits = features_of(teacher, inputs, names, forward=forward), None
            else:
                with capture(teacher, names) as features:
                    logits = first_tensor(call(teacher, inputs, forward))
        values = [_usable(features[name]) for name in names]
        return values, None if logits is None else _usable(logits)


def _usable(value: Tensor) -> Tensor:
    """Copy what a forward under ``inference_mode`` made: no backward pass may save it."""
    return value.clone() if value.is_inference() else value


class CachedTeacher:
    """Reads what a teacher said of each training sample from memory-mapped files.

    The files lie in a folder named by a fingerprint of the teacher, its layers and the data, some
    hundred samples a file. Each is written whole or not at all, so an interrupted run goes on with
    what is missing; several processes share the work out. Without ``dtype="float16"`` values are
    stored in the teacher's own type, at least float32.

    Raises
    ------
    ValueError
        A data set whose transforms draw at random, tokens of unequal samples, or a damaged file.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        teacher: LiveTeacher,
        train: Batches,
        *,
        dtype: str | None = None,
        precision: str = "fp32",
        progress: bool = True,
    ) -> None:
        if draws_at_random(train):
            raise ValueError(
                "cache_dir= needs the same inputs in every epoch; the data set's transforms draw "
                "at random"
            )
        networks = teacher.networks
        lengths = {first_tensor(part_of(x, "teacher")).shape for x in probes(train)}
        if len(lengths) > 1 and any(on_line(layer) for layer, _ in networks.layers):
            raise ValueError(
                "cache_dir= keeps tokens of samples of one length; got several: pad all to the "
                "longest, not each batch to its own, or leave cache_dir= out"
            )
        self.names = list(dict.fromkeys(networks.teacher_layers))
        self.order = [self.names.index(name) for name in networks.teacher_layers]
        self.has_logits = networks.objective.uses_teacher_logits
        self.device, self.total = train.device, train.order.total
        self.kinds = range(len(self.names) + self.has_logits)  # the files of a shard
        self.starts = range(0, self.total, SHARD)
        self.stored = dtype or "float32"
        what = {"teacher": weights_fingerprint(networks.teacher), "data": data_fingerprint(train)}
        what |= {"layers": self.names, "logits": self.has_logits, "samples": self.total}
        what |= {"stored": self.stored, "shard": SHARD, "precision": precision}
        text = json.dumps(what, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "contents.json") as file:
            file.write(json.dumps(what, indent=1).encode())
        self._fill(teacher, train, progress)
        self.shards = [[_opened(self._path(k, s)) for s in self.starts] for k in self.kinds]
        live, kept = teacher(train.of([0]), [0]), self(None, [0])
        for ours, theirs in zip((*live[0], live[1]), (*kept[0], kept[1]), strict=False):
            if theirs is not None and (ours - theirs).abs().max() > 0.05 * theirs.abs().max():
                raise ValueError(
                    f"{self.folder} has other answers than the teacher gives now (is "
                    "forward= another one?): give another folder"
                )

    def __call__(self, inputs: Any, index: list[int]) -> Answer:
        """Features and logits of the samples at ``index``; the inputs are not looked at."""
        rows = np.asarray(index)
        values = [self._rows(shards, rows) for shards in self.shards]
        logits = values.pop() if self.has_logits else None
        return [values[i] for i in self.order], logits

    def _fill(self, teacher: LiveTeacher, train: Batches, progress: bool) -> None:
        """Write what is missing, each process a share of the files."""
        missing = [s for s in self.starts if not all(self._path(k, s).exists() for k in self.kinds)]
        gathered(None)  # every process has seen what is missing before one writes
        here = world()
        own = here.share(missing)
        options = {"show": progress and own, "unit": " files", "leave": True}
        for start in bar_of(len(own), "teacher features", iterable=own, **options):
            places = list(range(start, min(start + SHARD, self.total)))
            parts: list[list[Tensor]] = [[] for _ in self.kinds]
            for at in range(0, len(places), BATCH):
                index = places[at : at + BATCH]
                features, logits = teacher(train.of(index), index)
                by_name = dict(zip(teacher.networks.teacher_layers, features, strict=True))
                answers = [by_name[name] for name in self.names]
                for part, value in zip(parts, answers + [logits] * self.has_logits, strict=True):
                    part.append(self._stored(value))
            for kind, part in enumerate(parts):
                with atomic_write(self._path(kind, start)) as file:
                    np.save(file, torch.cat(part).numpy(), allow_pickle=False)
        gathered(None)  # every file is there

    def _stored(self, value: Tensor) -> Tensor:
        least = torch.promote_types(value.dtype, torch.float32)
        return value.to(torch.float16 if self.stored == "float16" else least).cpu()

    def _path(self, kind: int, start: int) -> Path:
        name = f"layer{kind}" if kind < len(self.names) else "logits"
        return self.folder / f"{name}-{start // SHARD:05d}.npy"

    def _rows(self, shards: list[np.ndarray], rows: np.ndarray) -> Tensor:
        values = np.empty((len(rows), *shards[0].shape[1:]), dtype=shards[0].dtype)
        for number in np.unique(rows // SHARD):
            here = rows // SHARD == number
            values[here] = shards[number][rows[here] % SHARD]
        found = torch.from_numpy(values).to(self.device)
        return found.to(torch.promote_types(found.dtype, torch.float32))


def _opened(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, it is made again") from None


def teacher_of(
    networks: Networks,
    train: Batches,
    *,
    autocast: Callable[[], AbstractContextManager],
    cache_dir: str | os.PathLike | None,
    cache_dtype: str | None,
    augment: Any,
    **options: Any,
) -> LiveTeacher | CachedTeacher:
    """Teacher that is asked in training: live, or cached where a folder is given."""
    live = LiveTeacher(networks, autocast)
    check_choice(cache_dtype, "cache_dtype", CACHE_DTYPES)
    if cache_dir is None:
        return live
    if augment is not None:
        raise ValueError(
            "cache_dir= and augment= exclude each other: cached features are of the images as "
            "they are"
        )
    if networks.teacher is None:
        raise ValueError(
            f"cache_dir= needs a teacher; objective {networks.objective.name!r} has none"
        )
    return CachedTeacher(cache_dir, live, train, dtype=cache_dtype, **options)
