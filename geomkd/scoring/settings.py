"""Settings: how scores were made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Settings:
    """How scores were made: the arguments of `score_layers`, and what they came to."""

    model: str  # its class
    measures: tuple[str, ...]
    definition: str
    pool: str
    center: bool
    samples: int
    samples_per_class: tuple[int, int]  # fewest and most
    classes: int
    labels: str  # "own" of the data, "given", "predicted" or "none"
    subset: int  # samples whose Gram matrices are kept
    subset_classes: tuple[int, ...]  # the class of each of them
    entropy_per_class: int | None
    dataset_size: float
    subsamples: int
    sweep: tuple[int, ...]
    null: int
    seed: int
    partial: bool = False
    protocol: str | None = None  # "paper": all of the published sampling
    class_labels: tuple[int, ...] = ()  # what each class index stands for; of old files unknown
    notes: tuple[str, ...] = ()  # what was warned of: padding that counts, rows of zeros, ...

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Self:
        """Read what `as_dict` gave."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})

    def as_dict(self) -> dict[str, Any]:
        """Return what a reader and a file are given."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
