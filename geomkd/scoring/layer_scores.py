"""LayerScores: one tidy row a layer, and what a reader wants to see of it."""

from __future__ import annotations

import html
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomkd.common.files import atomic_write
from geomkd.geometry.subset_gram import parts_of, unpacked
from geomkd.scoring.loes import loes, top_apart
from geomkd.scoring.loes import redundancy as overlap
from geomkd.scoring.ranking import rank_sets, ranks, spread, top

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    By = str | Callable[[pd.DataFrame], Any]

FORMAT = "geomkd.LayerScores/2"


@dataclass(frozen=True, eq=False, repr=False)
class LayerScores:
    """Scores of a model's layers, with the half-samples behind their uncertainty.

    Attributes
    ----------
    frame : DataFrame
        One row a layer in order of execution: layer, depth, kind, role, shape, n, dim, every score
        (of knowledge quality: separation, information, efficiency, quality), and intermediates.
    draws : dict of str to ndarray, shape (L, R)
        Every score of every layer in R half-samples.
    sweep : dict of str to ndarray, shape (L, S)
        Every score in the S smaller samples of ``settings["sweep"]``.
    kept : ndarray, shape (L, m (m + 1) / 2)
        Upper triangles of the Gram matrices of the subset's m samples, float32; see `grams`.
    settings : dict
        How the scores were made: measures, definition, pooling, centring, sample, labels, seed, and
        whether they are partial.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd import score_layers
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
    >>> scores = score_layers(model, (x, y), progress=False)
    >>> scores.rank()[["layer", "rank"]].shape
    (3, 2)
    >>> len(scores.select(1, by=lambda frame: frame["separation"]))
    1
    """

    frame: pd.DataFrame
    draws: dict[str, np.ndarray]
    settings: dict[str, Any]
    sweep: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @classmethod
    def of(cls, rows: list[Any], settings: dict[str, Any]) -> LayerScores:
        """Make scores of the rows that `score_layers` has."""
        import pandas as pd

        kept = np.stack([row.gram for row in rows])
        columns = {row.stored.layer.name: dict(row.values) for row in rows}
        draws = {key: np.array([row.draws[key] for row in rows], float) for key in rows[0].draws}
        sweep = {key: np.array([row.sweep[key] for row in rows], float) for key in rows[0].sweep}
        if "cka_to_last" in settings["measures"]:
            roles = [row.stored.layer.role for row in rows]
            last = roles.index("head_input") if "head_input" in roles else len(rows) - 1
            values = to_one(kept, last, settings)
            for column, value in zip(columns.values(), values[:, 0], strict=True):
                column["cka_to_last"] = value
            first = 1 + settings["subsamples"]
            draws["cka_to_last"], sweep["cka_to_last"] = values[:, 1:first], values[:, first:]
        records = []
        for depth, (row, values) in enumerate(zip(rows, columns.values(), strict=True)):
            layer = row.stored.layer
            record = {"layer": layer.name, "depth": depth, "kind": layer.kind, "role": layer.role}
            record |= {"shape": layer.shape, "n": settings["samples"], "dim": row.stored.dim}
            record |= {name: values[name] for name in draws}
            records.append(record | {k: v for k, v in values.items() if k not in draws})
        return cls(pd.DataFrame(records), draws, settings, sweep, kept)

    @property
    def grams(self) -> np.ndarray:
        """Centred Gram matrices of the same m samples of every layer, (L, m, m), float32."""
        return unpacked(self.kept, self.settings["subset"])

    @property
    def by(self) -> str:
        """Column that layers are ranked and selected by where none is named."""
        return "quality" if "quality" in self.draws else next(iter(self.draws))

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the scores, one row a layer."""
        return self.frame.copy()

    def rank(self, level: float = 0.95, *, by: By | None = None) -> pd.DataFrame:
        """Rank the layers from best to worst, with the ranks that the half-samples leave open.

        Parameters
        ----------
        level : float
            Share of the half-samples that a rank set and a spread cover, 0 < level < 1.
        by : str or callable, optional
            A column, or a function of the frame that gives one number a layer; by default quality,
            or the first measure where there is none. In a half-sample the function sees its scores;
            all other columns are those of the whole sample.

        Returns
        -------
        DataFrame
            layer, score, rank, lowest_rank, highest_rank (the rank set), spread_low, spread_high
            (subsampling spread; no confidence interval) and tied_with, the layers whose order
            against this one flips in more than ``1 - level`` of the half-samples. Without
            half-samples, or by a column that they do not have, the last five are missing values.

        Raises
        ------
        ValueError
            ``level`` outside (0, 1), a column that is not there, or a layer without a score.
        """
        import pandas as pd

        _check_level(level)
        by = self.by if by is None else by
        estimate, drawn = _column(self.frame, by), self._drawn(by)
        names = self.frame["layer"].tolist()
        unscored = [name for name, score in zip(names, estimate, strict=True) if np.isnan(score)]
        if unscored:
            raise ValueError(f"every layer needs a score to be ranked by; NaN for {unscored}")
        table = {"layer": names, "score": estimate, "rank": ranks(estimate)}
        if drawn is None:
            missing = pd.array([pd.NA] * len(names), dtype="Int64")
            table |= {"lowest_rank": missing, "highest_rank": missing}
            table |= {"spread_low": np.nan, "spread_high": np.nan, "tied_with": None}
        else:
            sets, band = rank_sets(estimate, drawn, level), spread(estimate, drawn, level)
            table |= {"lowest_rank": sets.lowest, "highest_rank": sets.highest}
            table |= {"spread_low": band[:, 0], "spread_high": band[:, 1]}
            table["tied_with"] = [", ".join(names[j] for j in tied) for tied in sets.ties]
        return pd.DataFrame(table).sort_values("rank", kind="stable", ignore_index=True)

    def select(
        self, k: int = 4, *, by: By | None = None, redundancy: float = 0.0, **options: Any
    ) -> list[str]:
        """Name k layers, in order of depth; none after the head's input.

        Parameters
        ----------
        k : int
            How many.
        by : str or callable, optional
            A column, or a function of the frame that gives one number a layer, of which the highest
            are chosen; or "loes", which chooses layers jointly (`geomkd.scoring.loes.loes`,
            without its labels' terms where the scores have no labels). By default as in `rank`.
        redundancy : float
            Weight of the redundancy with the layers chosen so far, against scores that are put on
            [0, 1] first; see `geomkd.scoring.loes.top_apart`.
        **options
            Of "loes": alpha, gamma, eta, ridge.

        Returns
        -------
        list of str
            Names, as `geomkd.pair_layers` and `geomkd.capture` take them.

        Raises
        ------
        ValueError
            ``k`` is not between 1 and the number of layers up to the head's input; a column that is
            not there; a layer without a score.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> from geomkd import score_layers
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
        >>> scores = score_layers(model, (x, y), subsamples=0, progress=False)
        >>> len(scores.select(2, by="loes")), len(scores.select(2, redundancy=0.5))
        (2, 2)
        """
        by = self.by if by is None else by
        before = np.flatnonzero(self.frame["role"] != "head")
        names = self.frame["layer"].tolist()
        if options and by != "loes":
            raise TypeError(f"{sorted(options)} are options of by='loes' alone")
        if by == "loes":
            if redundancy:
                raise ValueError("by='loes' has its own weight of redundancy: gamma=")
            chosen = self._loes(before, k, options)
        elif redundancy:
            scores = _column(self.frame, by)[before]
            chosen = top_apart(scores, overlap(self.grams[before]), k, redundancy)
        else:
            return top([names[i] for i in before], _column(self.frame, by)[before], k)
        return [names[i] for i in sorted(before[chosen])]

    def _loes(self, before: np.ndarray, k: int, options: dict[str, float]) -> list[int]:
        index, n_classes = self.settings["subset_classes"], self.settings["classes"]
        dims = self.frame["dim"].tolist()
        labels = (np.array(index), n_classes) if n_classes > 1 else (None, None)
        found = loes(self.grams[before], *labels, k, dims=[dims[i] for i in before], **options)
        return [step.layer for step in found]

    def settling(self, *, by: By | None = None) -> pd.DataFrame:
        """Kendall's tau between the orders of the layers at successive sample sizes.

        Parameters
        ----------
        by : str or callable, optional
            As in `rank`.

        Returns
        -------
        DataFrame
            from_samples, to_samples and tau (tau-b), a row a step; the last step is to the whole
            sample. Near 1 in the last rows: more samples would hardly change the order.

        Raises
        ------
        ValueError
            Scores made without ``sweep=``.
        """
        import pandas as pd
        from scipy.stats import kendalltau

        curves, sizes = self.swept(by=by), [*self.settings["sweep"], self.settings["samples"]]
        steps = range(len(sizes) - 1)
        taus = [kendalltau(curves[:, i], curves[:, i + 1]).statistic for i in steps]
        return pd.DataFrame(
            {"from_samples": sizes[:-1], "to_samples": sizes[1:], "tau": np.array(taus, float)}
        )

    def swept(self, *, by: By | None = None) -> np.ndarray:
        """Scores at every sample size, (L, S + 1), the whole sample last."""
        by = self.by if by is None else by
        if not self.settings["sweep"]:
            raise ValueError("there is one sample size; score_layers(..., sweep=[...]) adds others")
        if isinstance(by, str):
            known = self.sweep.get(by)
            if known is None:
                raise ValueError(f"by= must be a function or one of {list(self.sweep)}; got {by!r}")
        else:
            known = self._by_draw(self.sweep, by)
        return np.column_stack([known, _column(self.frame, by)])

    def plot_sweep(self, ax: Axes | None = None, *, by: By | None = None) -> Axes:
        """Draw every layer's score by sample size, and the tau of each step.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new figure.
        by : str or callable, optional
            As in `rank`.

        Returns
        -------
        Axes
            Not shown.
        """
        from geomkd.plots import plot_sweep

        by = self.by if by is None else by
        name = by if isinstance(by, str) else getattr(by, "__name__", "score")
        sizes = [*self.settings["sweep"], self.settings["samples"]]
        taus = self.settling(by=by)["tau"].to_numpy()
        names = self.frame["layer"].tolist()
        return plot_sweep(names, sizes, self.swept(by=by), taus, name=name, ax=ax)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        k: int = 4,
        by: By | None = None,
        level: float = 0.95,
        measures: Sequence[str] | None = None,
    ) -> Axes:
        """Draw scores by depth with their spreads; the k selected layers are marked.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new figure.
        k, by
            Layers to mark, as in `select`; all of them where there are fewer than k, none where a
            layer has no score.
        level : float
            Share of the half-samples that the bands cover, 0 < level < 1.
        measures : sequence of str, optional
            Columns to draw; by default every score. The four of knowledge quality share an axis;
            with any other, each is put on its own range over the layers, which the legend tells.

        Returns
        -------
        Axes
            Not shown; ``ax.figure.savefig(path)`` writes it to a file.
        """
        from geomkd.plots import plot_layers

        _check_level(level)
        shown = list(self.draws if measures is None else measures)
        for name in shown:
            _column(self.frame, name)
        bands = {
            name: spread(self.frame[name].to_numpy(float), self.draws[name], level)
            for name in shown
            if name in self.draws and self.draws[name].size
        }
        most = int((self.frame["role"] != "head").sum())
        scored = by == "loes" or not np.isnan(_column(self.frame, by or self.by)).any()
        selected = self.select(min(k, most), by=by) if most and scored else []
        return plot_layers(self.frame, shown, bands, selected, level=level, ax=ax)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the scores to one file: NumPy's npz with a JSON header, nothing pickled.

        The file is whole or not there: an interrupted write leaves what was at ``path``.
        """
        header = {"format": FORMAT, "settings": self.settings}
        header["columns"] = {name: self.frame[name].tolist() for name in self.frame.columns}
        header |= {"scores": list(self.draws), "swept": list(self.sweep)}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        arrays = {f"draws_{name}": drawn for name, drawn in self.draws.items()}
        arrays |= {f"sweep_{name}": values for name, values in self.sweep.items()}
        arrays["kept"] = self.kept
        with atomic_write(path) as file:
            np.savez_compressed(file, header=text, **arrays)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LayerScores:
        """Read what `save` wrote; ``ValueError`` for any other file."""
        import pandas as pd

        # Opened here: of a file that is not whole NumPy would leave its own handle open.
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as stored:
                    header = json.loads(stored["header"].tobytes())
                    if header["format"] != FORMAT:
                        raise ValueError(f"its format is {header['format']!r}")
                    draws = {name: stored[f"draws_{name}"] for name in header["scores"]}
                    sweep = {name: stored[f"sweep_{name}"] for name in header["swept"]}
                    kept = stored["kept"]
                frame = pd.DataFrame(header["columns"])
                frame["shape"] = [tuple(shape) for shape in frame["shape"]]
                return cls(frame, draws, header["settings"], sweep, kept)
            except Exception as error:  # what zipfile and NumPy raise at damaged bytes has no end
                raise ValueError(f"{path} does not hold {FORMAT}: {error}") from None

    def _drawn(self, by: By) -> np.ndarray | None:
        """Scores in the half-samples: a stored column, or the function on each one's frame."""
        drawn = next(iter(self.draws.values()))
        if not drawn.size:
            return None
        if isinstance(by, str):
            return self.draws.get(by)
        return self._by_draw(self.draws, by)

    def _by_draw(self, draws: dict[str, np.ndarray], by: Callable) -> np.ndarray:
        count = next(iter(draws.values())).shape[1]
        columns = [
            _column(self.frame.assign(**{k: v[:, r] for k, v in draws.items()}), by)
            for r in range(count)
        ]
        return np.stack(columns, axis=1)

    def __repr__(self) -> str:
        """One line: how many layers of which model, and the best."""
        best = ""
        if self.frame[self.by].notna().any():
            row = self.frame.loc[self.frame[self.by].idxmax()]
            best = f"best={row['layer']!r} ({row[self.by]:.3f}" + (
                ")" if self.by == "quality" else f" {self.by})"
            )
        partial = ", partial" if self.settings["partial"] else ""
        how = f", definition={self.settings['definition']!r}" if "quality" in self.draws else ""
        return (
            f"LayerScores({self.settings['model']}, {len(self.frame)} layers, "
            f"n={self.settings['samples']}{how}, {best}{partial})"
        )

    def _repr_html_(self) -> str:
        shown = ["layer", "kind", "shape", "dim", *self.draws]
        table = self.frame[shown].to_html(
            index=False, float_format=lambda value: f"{value:.3f}", border=0
        )
        return f"<p><code>{html.escape(repr(self), quote=False)}</code></p>{table}"


def to_one(kept: np.ndarray, last: int, settings: dict[str, Any]) -> np.ndarray:
    """Debiased `cka` of every layer with one, in every draw of the kept subset: (L, Q)."""
    import torch

    from geomkd.measures.similarity import cka_from

    index = torch.tensor(settings["subset_classes"])
    draws = settings["subsamples"], settings["sweep"], settings["seed"]
    parts = parts_of(index, *draws)
    grams = torch.from_numpy(unpacked(kept, settings["subset"]))
    table = np.full((len(grams), len(parts)), np.nan)
    for q, part in enumerate(parts):
        if len(part) >= 4:
            drawn = [gram[part][:, part].double() for gram in grams]
            table[:, q] = [cka_from(gram, drawn[last]).item() for gram in drawn]
    return table


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level}")


def _column(frame: pd.DataFrame, by: By) -> np.ndarray:
    if callable(by):
        values = np.asarray(by(frame), dtype=float)
        if values.shape != (len(frame),):
            raise ValueError(
                f"by= must give one number for each of {len(frame)} layers; got {values.shape}"
            )
        return values
    numeric = [name for name in frame if frame[name].dtype.kind in "if"]
    if by not in numeric:
        raise ValueError(f"by= must be a function or one of {numeric}; got {by!r}")
    return frame[by].to_numpy(float)
