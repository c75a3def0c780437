"""Checkpoints: a run that is killed at any moment goes on where it was."""

import hashlib
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from geomkd.common.checks import check_int
from geomkd.common.distributed import gathered, world
from geomkd.common.files import atomic_write
from geomkd.common.results_folder import check_same_run

FORMAT = "geomkd.checkpoint/1"
KEPT = 2  # files: the last one, and the one before in case that is damaged
NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    A file is written beside its place, synchronised and renamed; its name holds its step and a
    digest of its bytes, so damage is noticed. The last two are kept. Only the first of several
    processes writes. ``config`` is what makes this run this run: another one's files are refused.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: Mapping[str, Any],
        *,
        every: int | None = None,
        resume: bool = True,
    ) -> None:
        self.folder, self.config = Path(folder), dict(config)
        self.every = None if every is None else check_int(every, "checkpoint_steps", least=1)
        if not resume and (there := self.files()):
            raise ValueError(
                f"resume=False needs a folder without checkpoints; got {there[0][1]} (delete it, "
                "or give another folder)"
            )
        if world().is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".step-*.pt.*"):  # of a process that was killed
                left.unlink(missing_ok=True)

    def due(self, step: int) -> bool:
        """Whether there is a checkpoint after so many steps within an epoch."""
        return self.every is not None and step % self.every == 0

    def files(self) -> list[tuple[int, Path]]:
        """List steps and files, the last one first."""
        found = [(NAME.fullmatch(path.name), path) for path in self.folder.glob("step-*.pt")]
        return sorted(((int(m[1]), path) for m, path in found if m), reverse=True)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after a step, then delete what is too old.

        A disk that is full is a warning: what was written before stays, and training goes on.
        """
        if not world().is_first:
            return
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "config": self.config, "step": step, **state}, buffer)
        content = buffer.getbuffer()
        path = self.folder / f"step-{step:09d}-{_digest(content)}.pt"
        try:
            with atomic_write(path) as file:
                file.write(content)
        except OSError as error:
            kept = self.files()
            last = f"the last one is {kept[0][1]}" if kept else "there is none"
            warnings.warn(
                f"the checkpoint of step {step} could not be written ({error}); training goes on, "
                f"{last}",
                stacklevel=2,
            )
            return
        older = [file for number, file in self.files() if number < step]
        for _, file in self.files():
            if file not in (path, *older[: KEPT - 1]):
                file.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Last state that is whole; None where there is none.

        Raises
        ------
        ValueError
            A checkpoint of another run; the message names what differs.

        Warns
        -----
        UserWarning
            A damaged file; the one before it is used.
        """
        for _, path in self.files():
            content = path.read_bytes()
            if _digest(content) != NAME.fullmatch(path.name)[2]:
                warnings.warn(
                    f"{path} is damaged: its {len(content)} bytes are not those that were written; "
                    "an earlier checkpoint is used, if there is one",
                    stacklevel=2,
                )
                continue
            place = torch.empty(0).device  # optimisers and modules take it to their own
            state = torch.load(io.BytesIO(content), map_location=place, weights_only=True)
            self._check(path, state)
            return self._agreed(state)
        return self._agreed(None)

    def _agreed(self, state: dict[str, Any] | None) -> dict[str, Any] | None:
        steps = gathered(None if state is None else state["step"])
        if len(set(steps)) > 1:
            raise ValueError(
                f"every process must see the same files in {self.folder}; the last steps they "
                f"found are {steps}"
            )
        return state

    def _check(self, path: Path, state: Mapping[str, Any]) -> None:
        if state.get("format") != FORMAT:
            raise ValueError(f"{path}: its format is {state.get('format')!r}, expected {FORMAT!r}")
        check_same_run(path, state["config"], self.config, remedy="give another folder")


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
