"""Files of an earlier state of the code: scores load, a run goes on, a cache is read again.

``tests/files/written`` was made before the package had folders, by the calls below.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from geomkd import LayerScores, distill

WRITTEN = Path(__file__).parent / "files" / "written"


def network(width, step):
    """Weights that are the same on every machine."""
    model = nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(((torch.arange(p.numel()) * step) % 17 - 8).reshape(p.shape) / 16)
    return model


def go_on(folder, **changed):
    options = {
        "pairs": [("1", "1"), ("3", "3")],
        "epochs": 2,
        "batch_size": 8,
        "checkpoint_dir": folder / "checkpoints",
        "checkpoint_steps": 2,
        "cache_dir": folder / "cache",
        "progress": False,
    }
    x = ((torch.arange(24 * 4) * 7) % 23 - 11).reshape(24, 4) / 8
    teacher = network(8, 5)
    teacher.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    calls = []
    result = distill(network(4, 3), teacher, (x, torch.arange(24) % 3), **(options | changed))
    return result, calls


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "written")
    return tmp_path / "written"


def test_scores_load():
    scores = LayerScores.load(WRITTEN / "scores.npz")
    assert list(scores.frame["layer"]) == ["1", "3", "4.input"]
    assert scores.settings["sweep"] == [12] and scores.settings["null"] == 3
    assert len(scores.rank()) == 3 and len(scores.select(2, by="loes")) == 2
    assert scores.grams.shape == (3, 24, 24)
    assert list(scores.per_class()["class"]) == 3 * [0, 1, 2]  # labels were not kept
    assert isinstance(scores.settling(by="two_nn"), pd.DataFrame)


def test_run_goes_on_from_its_checkpoint(folder):
    before = torch.load(
        folder / "checkpoints" / "step-000000004-b9802e2fb18356ad.pt", weights_only=True
    )
    result, _ = go_on(folder)
    assert len(result.history) == 2
    assert result.history["loss"][0] == before["rows"][0]["loss"]  # not trained again


def test_other_settings_are_refused(folder):
    with pytest.raises(ValueError, match=r"belongs to another run: lr is 0\.0075 there and 0\.01"):
        go_on(folder, lr=0.01)


def test_cache_is_read(folder):
    (layer,) = (folder / "cache").glob("*/layer0-00000.npy")
    written = np.load(layer)
    changed = np.concatenate([written[:1], written[1:] + 1])  # the first is compared with live ones
    np.save(layer, changed)  # so that it shows where features come from
    shutil.rmtree(folder / "checkpoints")
    other, calls = go_on(folder)
    assert (folder / "cache").glob("*") and len(list((folder / "cache").iterdir())) == 1
    assert np.array_equal(np.load(layer), changed)
    assert max(calls) < 24  # to tell shapes; not all of the samples
    np.save(layer, written)
    shutil.rmtree(folder / "checkpoints")
    assert go_on(folder)[0].history["features"][0] != other.history["features"][0]
