"""LayerScores: one tidy row a layer, and what a reader wants to see of it."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomkd.common.checks import check_number
from geomkd.geometry.principal import unpacked
from geomkd.plots import plot_layers, plot_sweep, words_of
from geomkd.scoring import scores_file
from geomkd.scoring.ranking import rank_table, scores_by, settling_table, spread, warn_of_order
from geomkd.scoring.selection import selected
from geomkd.scoring.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from geomkd.scoring.ranking import By


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
    how : Settings
        How the scores were made; see `settings`.
    sweep : dict of str to ndarray, shape (L, S)
        Every score in the S smaller samples of ``settings["sweep"]``.
    kept : ndarray, shape (L, m (m + 1) / 2)
        Upper triangles of the Gram matrices of the subset's m samples, float32; see `grams`.
    made : str
        When, in UTC, and by which versions of geomkd and torch; of older files "".

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd import score_layers
    >>> _ = torch.manual_seed(0)
    >>> layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    >>> model = nn.Sequential(*layers)
    >>> x, y = torch.randn(90, 8), torch.arange(90) % 3
    >>> scores = score_layers(model, (x, y), progress=False)
    >>> scores.rank()[["layer", "rank"]].shape
    (2, 2)
    >>> len(scores.select(1, by=lambda frame: frame["separation"]))
    1
    >>> len(scores.select(2, by="loes")), len(scores.select(2, redundancy=0.5))
    (2, 2)
    """

    frame: pd.DataFrame
    draws: dict[str, np.ndarray]
    how: Settings
    sweep: dict[str, np.ndarray] = field(default_factory=dict)
    kept: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    made: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """How the scores were made: measures, definition, sample, seed, whether partial, ..."""
        return self.how.as_dict()

    @property
    def grams(self) -> np.ndarray:
        """Centred Gram matrices of the same m samples of every layer, (L, m, m), float32."""
        return unpacked(self.kept, self.how.subset)

    @property
    def by(self) -> str:
        """Column that layers are ranked and selected by where none is named."""
        return "quality" if "quality" in self.draws else next(iter(self.draws))

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the scores, one row a layer."""
        return self.frame.copy()

    def rank(self, level: float = 0.95, *, by: By | None = None) -> pd.DataFrame:
        """Rank the layers from highest to lowest, with the ranks that half-samples leave open.

        What is better the lower, such as nc1, takes a function: ``by=lambda f: -f["nc1"]``.

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
            layer; rank, best and worst (the rank set); score, low and high (its subsampling spread;
            no confidence interval); tied_with, the ranks, such as "2..4,6", of the layers whose
            order against this one flips in more than ``1 - level`` of the half-samples. Without
            half-samples, or by a column that they do not have, what they tell is missing values.

        Raises
        ------
        ValueError
            ``level`` outside (0, 1), a column that is not there, or a layer without a score.

        Warns
        -----
        UserWarning
            Scores with a ``sweep`` whose last step has a tau below 0.9: the order has not settled.

        Notes
        -----
        Rank sets tell what other images would do to the order, not what more of them would: of a
        ResNet-20, those of 25 images a class held the order at 500 a class in 19 of 20 samples for
        Q (robust: 12), in none for the published S (robust: 19), in all for k-NN: see `settling`.
        """
        by = self.by if by is None else by
        if self.how.sweep and (callable(by) or by in self.sweep):
            warn_of_order(self.settling(by=by), stacklevel=3)
        names = self.frame["layer"].tolist()
        return rank_table(names, scores_by(self.frame, by), self._drawn(by), level)

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
            [0, 1] first; see `geomkd.scoring.selection.top_apart`.
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
        """
        return selected(self, k, self.by if by is None else by, redundancy, options)

    def settling(self, *, by: By | None = None) -> pd.DataFrame:
        """Kendall's tau between the orders of the layers at successive sample sizes.

        Parameters
        ----------
        by : str or callable, optional
            As in `rank`.

        Returns
        -------
        DataFrame
            from_samples, to_samples (as asked for: fewer where a class has fewer) and tau (tau-b),
            a row a step; the last step is to the whole sample. Near 1 in the last rows: more
            samples would hardly change the order. None beyond the kept subset for scores of it.

        Raises
        ------
        ValueError
            Scores made without ``sweep=``.
        """
        return settling_table([*self.how.sweep, self.how.samples], self.swept(by=by))

    def swept(self, *, by: By | None = None) -> np.ndarray:
        """Scores at every sample size, (L, S + 1), the whole sample last."""
        by = self.by if by is None else by
        if not self.how.sweep:
            raise ValueError("there is one sample size; score_layers(..., sweep=[...]) adds others")
        whole = scores_by(self.frame, by, among=list(self.sweep))
        return np.column_stack([self._in_draws(self.sweep, by), whole])

    def plot_sweep(self, ax: Axes | None = None, *, by: By | None = None) -> Axes:
        """Draw every layer's score by sample size, and the tau of each step; returns the Axes.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new figure.
        by : str or callable, optional
            As in `rank`.
        """
        by = self.by if by is None else by
        names, sizes = self.frame["layer"].tolist(), [*self.how.sweep, self.how.samples]
        taus = self.settling(by=by)["tau"].to_numpy()
        return plot_sweep(names, sizes, self.swept(by=by), taus, name=words_of(by), ax=ax)

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
            More than six have a panel each; what is returned is the empty Axes around these.

        Returns
        -------
        Axes
            Not shown; ``ax.figure.savefig(path)`` writes it to a file.
        """
        check_number(level, "level", above=0, below=1)
        shown = list(self.draws if measures is None else measures)
        curves = {name: self.curve(name, level) for name in shown}
        bands = {name: band for name, (_, band) in curves.items() if band is not None}
        most = int((self.frame["role"] != "head").sum())
        scored = by == "loes" or not np.isnan(scores_by(self.frame, by or self.by)).any()
        marked = self.select(min(k, most), by=by) if most and scored else []
        options = {"selected_by": by or self.by, "level": level, "ax": ax}
        return plot_layers(self.frame, shown, bands, marked, **options)

    def curve(self, by: By, level: float = 0.95) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores (L,) by a column or a function, and their spread (L, 2) if they are drawn."""
        values, drawn = scores_by(self.frame, by), self._drawn(by)
        return values, None if drawn is None else spread(values, drawn, level)

    def per_class(self) -> pd.DataFrame:
        """Tell which classes a layer separates; `geomkd.plots.plot_classes` draws it.

        Of the ``settings["subset"]`` samples alone whose Gram matrices are kept, by cosines about
        their mean: over classes ``separation`` has the mean that `geomkd.separation` gives of these
        samples with ``definition="robust"``, whatever the definition of the scores.

        Returns
        -------
        DataFrame
            layer, class (its label), n (samples of it), within_cosine (mean of two of them),
            between_cosine (mean over the other classes of the mean with these), separation.
        """
        import pandas as pd

        how, index, tables = self.how, np.array(self.how.subset_classes), []
        if how.classes < 2 or not self.kept.size:
            got = f"labels={how.labels!r}, {how.subset} samples"
            raise ValueError(f"per_class needs labels and kept samples; got {got}")
        labels, n = np.array(how.class_labels or range(how.classes)), np.bincount(index)
        mean = np.eye(how.classes)[index] / n
        for name, packed in zip(self.frame["layer"], self.kept, strict=True):
            gram = unpacked(packed[None], how.subset)[0].astype(float)
            sq = gram.diagonal()
            norm = np.sqrt(np.where(sq > 1e-12 * sq.mean(), sq, np.inf))  # none at the mean
            cosine = gram / norm / norm[:, None]
            means = mean.T @ cosine @ mean
            within = (means.diagonal() * n**2 - np.bincount(index, cosine.diagonal())) / (n**2 - n)
            between = (means.sum(axis=1) - means.diagonal()) / (how.classes - 1)
            columns = {"layer": name, "class": labels, "n": n, "within_cosine": within}
            columns |= {"between_cosine": between, "separation": within - between}
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the scores to one file: NumPy's npz with a JSON header, nothing pickled.

        The file is whole or not there: an interrupted write leaves what was at ``path``.
        """
        scores_file.write(path, self)
        return Path(path)

    def to_html(self, path: str | os.PathLike, **options: Any) -> Path:
        """Write a page to show, one file; ``options`` are those of `geomkd.report.page`."""
        from geomkd.report import page

        return page(self, path, **options)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LayerScores:
        """Read what `save` wrote; ``ValueError`` for any other file."""
        return cls(**scores_file.read(path))

    def _drawn(self, by: By) -> np.ndarray | None:
        known = next(iter(self.draws.values())).size and (callable(by) or by in self.draws)
        drawn = self._in_draws(self.draws, by) if known else None
        return None if drawn is None or np.isnan(drawn).all() else drawn

    def _in_draws(self, draws: dict[str, np.ndarray], by: By) -> np.ndarray:
        """Scores in every draw, (L, R); a function sees the frame with each draw's."""
        if not callable(by):
            return draws[by]
        columns = [
            scores_by(self.frame.assign(**{k: v[:, r] for k, v in draws.items()}), by)
            for r in range(next(iter(draws.values())).shape[1])
        ]
        return np.stack(columns, axis=1)

    def __repr__(self) -> str:
        """One line: how many layers of which model, and the best."""
        parts = [self.how.model, f"{len(self.frame)} layers", f"n={self.how.samples}"]
        if "quality" in self.draws:
            parts.append(f"definition={self.how.definition!r}")
        if self.frame[self.by].notna().any():
            row = self.frame.loc[self.frame[self.by].idxmax()]
            of = "" if self.by == "quality" else f" {self.by}"
            parts.append(f"best={row['layer']!r} ({row[self.by]:.3f}{of})")
        return f"LayerScores({', '.join(parts + ['partial'] * self.how.partial)})"

    def _repr_html_(self) -> str:
        shown = ["layer", "kind", "shape", "dim", *self.draws]
        table = self.frame[shown].to_html(index=False, float_format="{:.3f}".format, border=0)
        return f"<p><code>{html.escape(repr(self), quote=False)}</code></p>{table}"
