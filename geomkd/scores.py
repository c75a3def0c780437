"""LayerScores: one tidy row a layer, and what a reader wants to see of it."""

from __future__ import annotations

import html
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomkd.files import atomic_write
from geomkd.ranking import rank_sets, ranks, spread, top

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from matplotlib.axes import Axes

    By = str | Callable[[pd.DataFrame], Any]

FORMAT = "geomkd.LayerScores/1"
TERMS = ("separation", "information", "efficiency", "quality")


@dataclass(frozen=True, eq=False, repr=False)
class LayerScores:
    """Scores of a model's layers, with the half-samples behind their uncertainty.

    Attributes
    ----------
    frame : DataFrame
        One row a layer in order of execution: layer, depth, kind, role, shape, n, dim,
        separation, information, efficiency, quality, and every intermediate.
    draws : dict of str to ndarray, shape (L, R)
        Separation, information, efficiency and quality of every layer in R half-samples.
    settings : dict
        How the scores were made: definition, pooling, sample, seed, and whether they are partial.

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

    @classmethod
    def of(cls, rows: list[tuple[Any, dict, dict]], settings: dict[str, Any]) -> LayerScores:
        """Make scores of (stored layer, values, draws) as `score_layers` has them."""
        import pandas as pd

        records = []
        for depth, (stored, values, _) in enumerate(rows):
            layer = stored.layer
            record = {"layer": layer.name, "depth": depth, "kind": layer.kind, "role": layer.role}
            record |= {"shape": layer.shape, "n": settings["samples"], "dim": stored.dim}
            record |= {name: values[name] for name in TERMS}
            records.append(record | {k: v for k, v in values.items() if k not in TERMS})
        draws = {name: np.array([drawn[name] for *_, drawn in rows], dtype=float) for name in TERMS}
        return cls(pd.DataFrame(records), draws, settings)

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the scores, one row a layer."""
        return self.frame.copy()

    def rank(self, level: float = 0.95, *, by: By = "quality") -> pd.DataFrame:
        """Rank the layers from best to worst, with the ranks that the half-samples leave open.

        Parameters
        ----------
        level : float
            Share of the half-samples that a rank set and a spread cover, 0 < level < 1.
        by : str or callable
            A column, or a function of the frame that gives one number a layer. In a half-sample
            the function sees its separation, information, efficiency and quality; all other
            columns are those of the whole sample.

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

    def select(self, k: int = 4, *, by: By = "quality") -> list[str]:
        """Name the k layers of highest score, in order of depth; none after the head's input.

        Parameters
        ----------
        k : int
            How many.
        by : str or callable
            A column, or a function of the frame that gives one number a layer.

        Returns
        -------
        list of str
            Names, as `geomkd.pair_layers` and `geomkd.capture` take them.

        Raises
        ------
        ValueError
            ``k`` is not between 1 and the number of layers up to the head's input.
        """
        before = (self.frame["role"] != "head").to_numpy()
        names = self.frame.loc[before, "layer"].tolist()
        return top(names, _column(self.frame, by)[before], k)

    def plot(
        self, ax: Axes | None = None, *, k: int = 4, by: By = "quality", level: float = 0.95
    ) -> Axes:
        """Draw S, I, E and Q by depth with their spreads; the k selected layers are marked.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new figure.
        k, by
            Layers to mark, as in `select`; all of them where there are fewer than k.
        level : float
            Share of the half-samples that the bands cover, 0 < level < 1.

        Returns
        -------
        Axes
            Not shown; ``ax.figure.savefig(path)`` writes it to a file.
        """
        from geomkd.plots import plot_layers

        _check_level(level)
        bands = {
            name: spread(self.frame[name].to_numpy(float), drawn, level)
            for name, drawn in self.draws.items()
            if drawn.size
        }
        most = int((self.frame["role"] != "head").sum())
        selected = self.select(min(k, most), by=by) if most else []
        return plot_layers(self.frame, bands, selected, level=level, ax=ax)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the scores to one file: NumPy's npz with a JSON header, nothing pickled.

        The file is whole or not there: an interrupted write leaves what was at ``path``.
        """
        header = {"format": FORMAT, "settings": self.settings}
        header["columns"] = {name: self.frame[name].tolist() for name in self.frame.columns}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        arrays = {f"draws_{name}": drawn for name, drawn in self.draws.items()}
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
                    draws = {name: stored[f"draws_{name}"] for name in TERMS}
                frame = pd.DataFrame(header["columns"])
                frame["shape"] = [tuple(shape) for shape in frame["shape"]]
                return cls(frame, draws, header["settings"])
            except Exception as error:  # what zipfile and NumPy raise at damaged bytes has no end
                raise ValueError(f"{path} does not hold {FORMAT}: {error}") from None

    def _drawn(self, by: By) -> np.ndarray | None:
        """Scores in the half-samples: a stored column, or the function on each one's frame."""
        drawn = next(iter(self.draws.values()))
        if not drawn.size:
            return None
        if isinstance(by, str):
            return self.draws.get(by)
        columns = [
            _column(self.frame.assign(**{k: v[:, r] for k, v in self.draws.items()}), by)
            for r in range(drawn.shape[1])
        ]
        return np.stack(columns, axis=1)

    def __repr__(self) -> str:
        """One line: how many layers of which model, and the best."""
        best = self.frame.loc[self.frame["quality"].idxmax()]
        partial = ", partial" if self.settings["partial"] else ""
        return (
            f"LayerScores({self.settings['model']}, {len(self.frame)} layers, "
            f"n={self.settings['samples']}, definition={self.settings['definition']!r}, "
            f"best={best['layer']!r} ({best['quality']:.3f}){partial})"
        )

    def _repr_html_(self) -> str:
        shown = ["layer", "kind", "shape", "dim", "separation", "information", "efficiency"]
        table = self.frame[[*shown, "quality"]].to_html(
            index=False, float_format=lambda value: f"{value:.3f}", border=0
        )
        return f"<p><code>{html.escape(repr(self), quote=False)}</code></p>{table}"


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
