"""The file of a `LayerScores`: NumPy's npz with a JSON header, nothing pickled."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from geomkd.common.files import atomic_write
from geomkd.scoring.settings import Settings

if TYPE_CHECKING:
    from geomkd.scoring.layer_scores import LayerScores

FORMAT = "geomkd.LayerScores/2"


def write(path: str | os.PathLike, scores: LayerScores) -> None:
    """Write scores, whole or not at all."""
    header = {"format": FORMAT, "settings": scores.settings, "made": scores.made}
    header["columns"] = {name: scores.frame[name].tolist() for name in scores.frame.columns}
    header |= {"scores": list(scores.draws), "swept": list(scores.sweep)}
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    arrays = {f"draws_{name}": drawn for name, drawn in scores.draws.items()}
    arrays |= {f"sweep_{name}": values for name, values in scores.sweep.items()}
    with atomic_write(path) as file:
        np.savez_compressed(file, header=text, kept=scores.kept, **arrays)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Attributes of the scores that `write` was given; ``ValueError`` for any other file."""
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
            how = Settings.of(header["settings"])
        except Exception as error:  # what zipfile and NumPy raise at damaged bytes has no end
            raise ValueError(f"{path} does not hold {FORMAT}: {error}") from None
    own = {"frame": frame, "draws": draws, "how": how, "sweep": sweep, "kept": kept}
    return own | {"made": header.get("made", "")}
