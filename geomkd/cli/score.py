"""``geomkd score``: from options to a folder of scores, ranks and pictures."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomkd.cli.inputs import check_takes_images, load_data, of_images
from geomkd.cli.models import load_model
from geomkd.cli.parser import options_of
from geomkd.common.distributed import world
from geomkd.common.results_folder import (
    check_new,
    filled_folder,
    machine,
    write_frame,
    write_json,
    write_picture,
)
from geomkd.measures.table import columns_of, named
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.ranking import RULES
from geomkd.scoring.score_layers import score_layers

if TYPE_CHECKING:
    from pandas import DataFrame


def scored(options: argparse.Namespace, say: Callable[[str], Any]) -> None:
    """Score the layers of a network and write what came out; ``say`` takes each line of text."""
    check_by(options.by, columns_of(named(options.measures)))
    say = say if world().is_first else lambda text: None
    if world().is_first:
        check_new(options.out)
    how = {"weights": options.weights, "seed": options.seed}
    loaded = of_images("model", options.model, load_model(options.model, **how))
    data, images = load_data(options.data, loaded, **options_of(load_data, options))
    check_takes_images(f"--model {options.model}", loaded, data)
    say(f"model: {loaded.story}\ndata: {options.data}, {len(data)} images\nimages: {images}")
    inputs = {"model": loaded.model, "data": data, "progress": not options.quiet}
    inputs = options_of(score_layers, options) | inputs
    if world().is_first:  # the others lend a hand
        with filled_folder(options.out, "geomkd-scores") as folder:
            about = {"model": loaded.story, "data": str(options.data), "images": images}
            _write(folder, options, inputs, about, say)
    else:
        score_layers(**inputs)


def _write(
    folder: Path, options: argparse.Namespace, inputs: dict, about: dict, say: Callable[[str], Any]
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        scores = score_layers(**inputs)
        name = options.by or scores.by
        by = RULES.get(name, name)
        ranked = scores.by if by == "loes" else by
        before_head = int((scores.to_frame()["role"] != "head").sum())
        selected = scores.select(min(options.k, before_head), by=by)
        scores.save(folder / "scores.npz")  # first: a layer without a score has no rank
        write_frame(folder / "layers.csv", scores.to_frame())
        ranks = scores.rank(by=ranked)
    notes = [str(warning.message) for warning in told]
    write_frame(folder / "ranks.csv", ranks)
    wrote = ["layers.csv", "ranks.csv", "layers.png", "scores.npz"]
    if options.sweep:
        write_picture(folder / "sweep.png", scores.plot_sweep(by=ranked))
        wrote.append("sweep.png")
    write_picture(folder / "layers.png", scores.plot(k=len(selected), by=by))
    if options.report:
        made = {"about": about | machine(), "notes": notes}
        scores.to_html(folder / "report.html", by=by, k=len(selected), **made)
        wrote.append("report.html")
    summary = about | {"selected": selected, "by": name}
    summary["settings"] = {k: v for k, v in scores.settings.items() if k != "subset_classes"}
    write_json(folder / "summary.json", summary | {"machine": machine()})
    say("\n" + ranked_table(scores, ranks))
    for note in notes:  # where it is read, in the place of a line of code
        say(f"note: {note}")
    say(f"selected by {name}: {', '.join(selected)}")
    say(f"wrote {', '.join(wrote)} and summary.json to {folder}")
    if scores.settings["partial"]:  # of the layers that were done
        raise KeyboardInterrupt


def check_by(by: str | None, columns: Sequence[str]) -> None:
    """Refuse what there is no column of, before anything is scored."""
    offered = [*columns, "loes", *(RULES if "quality" in columns else ())]
    if by not in (None, *offered):
        raise ValueError(f"--by must be one of {', '.join(offered)}; got {by!r}")


def ranked_table(scores: LayerScores, ranks: DataFrame) -> str:
    """Layers from best to worst with every score, as text."""
    columns = ["layer", "kind", "dim", *scores.draws]
    table = ranks.drop(columns="score").merge(scores.to_frame()[columns], on="layer")
    low, high = table["best"].astype("string"), table["worst"].astype("string")
    table["95% ranks"] = (low + "-" + high).fillna("-")
    shown = ["rank", "95% ranks", *columns, "tied_with"]
    return table[shown].to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="")
