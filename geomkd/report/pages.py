"""The page: what is told of scores and distillations, in one file with nothing to fetch."""

import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import chain, repeat
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from geomkd import __version__, measures
from geomkd.common.files import atomic_write
from geomkd.distillation.result import DistillationResult
from geomkd.measures.null import NULL_COLUMNS
from geomkd.plots import COLOURS, compare, plot_layers, words_of
from geomkd.scoring.arguments import warn_of_few
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.ranking import scores_by

OF = {"quality": "knowledge_quality", "cka_to_last": "cka"}  # measures with columns of other names
SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", ".": "●"}  # marks of lines, in a key
PLAIN = {"True": "yes", "False": "no", "None": "–"}  # as a reader who does not program says it
SCROLL = '<div class="scroll" role="region" tabindex="0" aria-label="{}">{}</div>'.format


def page(
    contents: Any, path: str | os.PathLike, *, by: Any = None, k: int = 4,
    about: Mapping[str, Any] | None = None, notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write a page, one file that fetches nothing: curves that tell values, ranks, tables to sort.

    Parameters
    ----------
    contents : LayerScores, DistillationResult, or mapping of str to these
        What to tell of; several by their names.
    path : str or path-like
        The file; one that is there is replaced.
    by, k
        Of scores: what layers are ranked and selected by, and how many, as in `LayerScores.select`.
    about, notes
        What else to say by name, such as data and weights, and to warn of: what `score_layers` did.
    """
    several = isinstance(contents, Mapping)
    if several:
        if not contents:
            raise ValueError("a page is of LayerScores and DistillationResult; got none of them")
        contents = {str(name): value for name, value in contents.items()}  # such as epochs
    rows, body, level = [], _warned(notes), 2 + several
    for i, (name, value) in enumerate((contents if several else {"": contents}).items()):
        if isinstance(value, LayerScores):
            row, cautions, parts = _of_scores(value, f"p{i}", by, k)
        elif isinstance(value, DistillationResult):
            row, cautions, parts = _of_result(value, f"p{i}")
        else:
            raise TypeError(f"a page is of LayerScores and DistillationResult; got {value!r}")
        rows.append({"name": name or next(iter(row.values()))} | row)
        new = [text for text in cautions if not any(note.startswith(text) for note in notes)]
        body += f"<h2>{escape(name)}</h2>" * several + _warned(new)
        for title, part in parts.items():
            body += f"<section><h{level}>{title}</h{level}>{part}</section>"
    if several:
        drawn = _compared({k: v for k, v in contents.items() if isinstance(v, LayerScores)}, by)
        found = _table(pd.DataFrame(rows), "What each came to")
        body = f"<section><h2>Side by side</h2>{drawn}{found}</section>{body}"
    body += f"<h2>Data, weights, versions</h2>{_explained(about or {})}" * bool(about)
    here, title = Path(__file__), escape(", ".join(row["name"] for row in rows))
    kept = {k: here.with_name(f"page.{k}").read_text("utf-8") for k in ("html", "css", "js")}
    filled = kept | {"title": title, "body": body, "version": __version__}
    with atomic_write(path) as file:
        file.write(Template(kept["html"]).substitute(filled).encode())
    return Path(path)


def _compared(scores: Mapping[str, LayerScores], by: Any) -> str:
    """Draw networks that are selected from by one score in one picture."""
    rules = {s.by if by in (None, "loes") else by for s in scores.values()}
    if len(scores) < 2 or len(rules) > 1:
        return ""
    told = [(s.frame["layer"].tolist(), s.curve(*rules)[1]) for s in scores.values()]
    draw = partial(compare, scores, by=(rule := rules.pop()), x="relative depth")
    return _picture(draw, (4.8, 3.4), words_of(rule), "all", told)


def _warned(texts: Sequence[str]) -> str:
    shown = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="warnings" aria-label="Warnings">{shown}</ul>' if shown else ""


def _explained(pairs: Mapping[str, Any]) -> str:
    said = {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in pairs.items()}
    said = {k: escape(PLAIN.get(v, v)) or "–" for k, v in said.items()}
    rows = (f"<dt>{escape(words_of(k))}</dt><dd>{v}</dd>" for k, v in said.items())
    return f"<dl>{''.join(rows)}</dl>"


def _table(frame: pd.DataFrame, label: str) -> str:
    """Table whose first column names its rows; the page's script lets a reader sort it."""
    shown = frame.astype(object).where(frame.notna(), "–").rename(columns=words_of)
    shown = shown.set_index(first := shown.columns[0]).rename_axis(index=None, columns=first)
    text = shown.to_html(border=0, float_format="{:.4g}".format)
    return f"<p>{escape(label)}</p>{SCROLL(escape(label), text)}"


def _of_scores(scores: LayerScores, name: str, by: Any, k: int) -> tuple[dict, list, dict]:
    """Tell of a network's layers: its row beside others, warnings, parts by title."""
    by = scores.by if by is None else by
    ranked_by, rule = scores.by if by == "loes" else by, getattr(by, "__name__", by)
    how, frame, ranked, chosen = scores.how, scores.frame, {}, []
    row = {"model": how.model, "layers": len(frame), "samples": how.samples}
    cautions = ["scoring was interrupted: layers are missing"] * how.partial + list(how.notes)
    most = int((frame["role"] != "head").sum())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warn_of_few(how, how.samples, stacklevel=1)
        if np.isnan(scores_by(frame, ranked_by)).any():
            cautions.append(f"not every layer has a score by {rule}: there are no ranks")
        else:
            ranks = scores.rank(by=ranked_by)
            chosen = scores.select(min(k, most), by=by) if most else []
            ranked = {"Ranks": _table(ranks, f"Layers by {rule}")}
            row |= {"best layer": ranks["layer"][0], "its score": f"{ranks['score'][0]:.4g}"}
            tied = ranks["tied_with"].fillna("").ne("") | ranks["rank"].duplicated(keep=False)
            if tied.any():
                cautions.append(f"{tied.sum()} of {len(tied)} layers are tied: their order is open")
    told = [str(w.message).rsplit(": ", 1)[0] for w in warned if w.category is UserWarning]
    why = "chosen together by LOES" if by == "loes" else f"of highest {words_of(by)}"
    short = row | {"selected": chosen, "why": f"{why}, among the layers up to the head's input"}
    frame = frame.assign(shape=[" × ".join(map(str, shape)) for shape in frame["shape"]])
    frame.insert(1, "selected", ["yes" if layer in chosen else "" for layer in frame["layer"]])
    every = frame[["layer", "selected", "depth", "kind", "shape", "dim", *scores.draws]]
    told_elsewhere = ("subset_classes", "class_labels", "notes")
    known = {k: v for k, v in how.as_dict().items() if k not in told_elsewhere}
    per_class = " to ".join(map(str, dict.fromkeys(how.samples_per_class)))
    known |= {"samples_per_class": per_class, "dataset_size": f"{how.dataset_size:.12g}"}
    known["made"] = scores.made
    parts = {"In short": _explained(short), "Scores by layer": _curves(scores, name, chosen)}
    parts |= ranked | {"Every score": _table(every, "Layers in order of execution")}
    for kind in NULL_COLUMNS:
        if of := {f"{key}_{kind}": key for key in scores.draws if f"{key}_{kind}" in frame}:
            found = frame[["layer", *of]].rename(columns=of)
            parts[f"Permuted labels: {words_of(kind)}"] = _table(found, "Of each score")
    parts["What the scores mean"] = _explained({column: meaning(column) for column in scores.draws})
    return row, told + cautions, parts | {"How they were made": _explained(known)}


def _curves(scores: LayerScores, name: str, chosen: Sequence[str]) -> str:
    """Draw knowledge quality large, with the layers' names; every other score small, by depth."""
    frame, layers, found = scores.frame, scores.frame["layer"].tolist(), ""
    bands = {k: band for k in scores.draws if (band := scores.curve(k)[1]) is not None}
    large = [key for key in scores.draws if key in COLOURS] or [scores.by]
    depths = range(0, len(layers), -(-len(layers) // 6))

    def draw(shown: Sequence[str], ax: Any) -> None:
        plot_layers(frame, shown, bands, chosen, ax=ax)
        if shown != large:
            ax.set_xticks(depths, depths, rotation=0, ha="center", rotation_mode="default")
            ax.set(xlabel="depth", ylabel="")

    for shown in (large, *([key] for key in scores.draws if key not in large)):
        wide = 8 + 0.2 * len(layers), 3.2 + 0.06 * max(map(len, layers))
        given = wide if shown == large else (3.6, 2.4), words_of(", ".join(shown))
        told = [(layers, bands.get(key)) for key in shown]
        found += _picture(partial(draw, shown), *given, f"{name}-{shown[0]}", told)
    return f'<div class="pictures">{found}</div>'


def meaning(column: str) -> str:
    """Say in a line what a score is: the first of its documentation."""
    if part := re.search(rf"^ +{column}\n +(.+)$", measures.NeuralCollapse.__doc__, re.M):
        return part[1]
    name, text = OF.get(column, column), "A function of the caller's own."
    text = getattr(measures, name).__doc__ if name in measures.__all__ else text
    return text.splitlines()[0].replace("`", "")


def _of_result(result: DistillationResult, name: str) -> tuple[dict, list, dict]:
    history, pairs = result.history, [f"{teacher} → {student}" for teacher, student in result.pairs]
    row = {"model": type(result.student).__name__, "objective": result.objective}
    row |= {"epochs": len(history), f"{result.accuracy_on} accuracy": f"{result.accuracy:.4g}"}
    cautions = ["a callback ended the run before its last epoch"] * result.stopped
    untold = ["no validation data: the accuracy is of the images trained on"]
    cautions += untold * (result.accuracy_on == "train")
    told = repeat(([f"epoch {epoch}" for epoch in history["epoch"]], None))
    drawn = _picture(result.plot, (4.6, 3.2), "accuracy and loss by epoch", name, told)
    parts = {"In short": _explained(row | {"pairs of layers": pairs}), "Training": drawn}
    parts["Every epoch"] = _table(history, "Accuracies are from 0 to 1")
    return row, cautions, parts


def _picture(
    draw: Any, size: Any, caption: str, name: str, told: Iterable[tuple[Sequence[str], Any]]
) -> str:
    """Figure, ``size`` inches, of what ``draw`` puts on Axes, whose lines have points to focus.

    ``told``: of each line where its points are, and their spreads (n, 2) or None; ``name``: of ids.
    """
    options = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    with style.context(["default", options]), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts of its own
        figure = Figure(figsize=size, dpi=72, layout="constrained")  # a point: a unit of the SVG
        draw(ax=figure.subplots())
        for legend in filter(None, [ax.get_legend() for ax in figure.axes]):
            legend.remove()  # a key is below
        figure.savefig(file := io.StringIO(), format="svg", transparent=True)
    text = re.sub(r"<(metadata|style).*?</\1>|<!--.*?-->", "", file.getvalue(), flags=re.S)
    text = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{name}-", text).replace("xlink:", "")
    text = re.sub(r"(fill|stroke): #([0-9a-f]{6})", r"\1: var(--c-\2)", text)
    label, (width, height), key, points = escape(caption), 72 * np.array(size), "", ""
    lines = [line for ax in figure.axes for line in ax.get_lines()]
    for line, (at, ends) in zip(lines, chain(told, repeat(((), None))), strict=False):
        own, circles = escape(str(line.get_label())), ""
        places = line.get_transform().transform(line.get_xydata())
        for i, where in enumerate(at):
            value, (left, up) = line.get_ydata()[i], places[i]
            said = f"{escape(where)}: {own} {value:.4g}"
            if ends is not None:
                said += ", spread {:.4g} to {:.4g}".format(*ends[i])
            if np.isfinite(value):
                circles += f'<circle class="point" role="img" tabindex="0" cx="{left:.1f}" '
                circles += f'cy="{height - up:.1f}" r="7"><title>{said}</title></circle>'
        colour, sign = to_hex(line.get_color())[1:], SIGNS.get(line.get_marker(), "━")
        key += f'<li data-sign="{sign}" style="--sign:var(--c-{colour})">{own}</li>'
        points += f'<g class="curve" role="group" aria-label="{own}">{circles}</g>'
    view = f'viewBox="0 0 {width:g} {height:g}" style="--width:{width:g}pt"'
    drawn = f'<svg {view} role="group"><g aria-hidden="true">{text}</g>{points}</svg>'
    key = f'<ul class="key">{key}</ul>' if len(lines) > 1 else ""
    notes = _warned([str(w.message) for w in warned if w.category is UserWarning])
    return f"<figure>{notes}{SCROLL(label, drawn)}{key}<figcaption>{label}</figcaption></figure>"
