"""Rows: what a run knows of each layer; of all of them, the scores."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import torch

from geomkd.geometry.draws import parts_of
from geomkd.geometry.principal import unpacked
from geomkd.measures.similarity import cka_from
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.plan import Stored
from geomkd.scoring.settings import Settings


class Row(NamedTuple):
    """What is known of one layer."""

    stored: Stored
    values: dict[str, float]  # columns of the frame
    draws: dict[str, list[float]]  # in the half-samples
    sweep: dict[str, list[float]]  # in the smaller samples
    gram: np.ndarray  # of the kept subset, packed; see `geomkd.geometry.principal`
    notes: tuple[str, ...] = ()  # what was warned of


def scores_of(rows: list[Row], settings: Settings) -> LayerScores:
    """Scores of layers in order of execution; `cka_to_last` is added, of which all are needed."""
    import pandas as pd

    import geomkd

    kept = np.stack([row.gram for row in rows])
    values = [row.values for row in rows]
    draws = {key: np.array([row.draws[key] for row in rows], float) for key in rows[0].draws}
    sweep = {key: np.array([row.sweep[key] for row in rows], float) for key in rows[0].sweep}
    if "cka_to_last" in settings.measures:
        feeds = [row.stored.layer.feeds_head for row in rows]
        last = feeds.index(True) if any(feeds) else len(rows) - 1
        table = cka_to(last, kept, settings)
        own, halves, smaller = np.split(table, [1, 1 + settings.subsamples], axis=1)
        values = [known | {"cka_to_last": x.item()} for known, x in zip(values, own, strict=True)]
        draws["cka_to_last"], sweep["cka_to_last"] = halves, smaller
    notes = settings.notes + tuple(note for row in rows for note in row.notes)
    settings = replace(settings, notes=notes)
    records = []
    for depth, (row, known) in enumerate(zip(rows, values, strict=True)):
        layer = row.stored.layer
        record = {"layer": layer.name, "depth": depth, "kind": layer.kind, "role": layer.role}
        record |= {"shape": layer.shape, "n": settings.samples, "dim": row.stored.dim}
        records.append(record | {name: known[name] for name in draws} | known)  # scores first
    versions = f"geomkd {geomkd.__version__}, torch {torch.__version__}"
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {versions}"
    return LayerScores(pd.DataFrame(records), draws, settings, sweep, kept, made)


def cka_to(last: int, kept: np.ndarray, settings: Settings) -> np.ndarray:
    """Debiased `cka` of every layer with one, in every draw of the kept subset: (L, Q)."""
    index = torch.tensor(settings.subset_classes)
    parts = parts_of(index, settings.subsamples, settings.sweep, settings.seed)
    grams = torch.from_numpy(unpacked(kept, settings.subset))
    table = np.full((len(grams), len(parts)), np.nan)
    for q, part in enumerate(parts):
        if part is not None and len(part) >= 4:
            one = grams[last][part][:, part].double()
            table[:, q] = [cka_from(gram[part][:, part].double(), one).item() for gram in grams]
    return table
