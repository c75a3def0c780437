"""The file of scores: what is saved is loaded, and nothing else is."""

import json
import os
import zipfile
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import TERMS
from scored import jumping, made, measured

import geomkd
from geomkd import LayerScores


def test_what_is_saved_is_loaded(tmp_path):
    scores = measured()
    path = scores.save(tmp_path / "a.scores")
    assert path == tmp_path / "a.scores" and list(tmp_path.iterdir()) == [path]
    loaded = LayerScores.load(path)
    pd.testing.assert_frame_equal(loaded.to_frame(), scores.to_frame())
    assert list(loaded.to_frame()["shape"]) == [(4, 6, 6), (144,), (4,)]
    assert loaded.settings == scores.settings and loaded.made == scores.made
    assert list(loaded.draws) == list(scores.draws)
    for name in TERMS:
        assert np.array_equal(loaded.draws[name], scores.draws[name])
    assert loaded.kept.dtype == np.float32 and np.array_equal(loaded.kept, scores.kept)
    pd.testing.assert_frame_equal(loaded.rank(), scores.rank())


def test_scores_know_when_and_by_what_they_were_made(tmp_path):
    versions = f"geomkd {geomkd.__version__}, torch {torch.__version__}"
    when, rest = measured().made.split(" UTC, ")
    assert rest == versions
    assert abs(datetime.now(UTC) - datetime.fromisoformat(f"{when}+00:00")) < timedelta(hours=1)
    header = header_of(path := made().save(tmp_path / "a"))
    del header["made"]  # as in files of before
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "header"}
    rewrite(path, header, **arrays)
    assert LayerScores.load(path).made == ""


def test_scores_without_half_samples_are_saved_too(tmp_path):
    loaded = LayerScores.load(made().save(tmp_path / "a"))
    pd.testing.assert_frame_equal(loaded.to_frame(), made().to_frame())
    assert loaded.draws["quality"].shape == (4, 0)
    assert loaded.rank()["tied_with"].isna().all()


def test_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = made().save(tmp_path / "a")
    before = path.read_bytes()

    def half(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(OSError, match="disk full"):
        made(jumping()).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def header_of(path):
    return json.loads(np.load(path)["header"].tobytes())


def rewrite(path, header, **arrays):
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, header=text, **arrays)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def damaged(path):
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(20)
    path.write_bytes(data)


def foreign(path):
    with path.open("wb") as file:
        np.savez(file, x=np.zeros(3))


def objects(path):
    with path.open("wb") as file:
        np.savez(file, header=np.array([{"format": "geomkd.LayerScores/2"}], dtype=object))


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("header", "{}")


def one_setting_short(path):
    with np.load(path) as stored:
        arrays = dict(stored)
    header = json.loads(arrays.pop("header").tobytes())
    del header["settings"]["seed"]
    with path.open("wb") as file:
        np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


SPOILS = {
    "truncated": truncated,
    "damaged": damaged,
    "foreign npz": foreign,
    "object array": objects,
    "npy": one_array,
    "zip": other_zip,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("layer,quality\nfc,1.0\n"),
    "other format": lambda path: rewrite(path, header_of(path) | {"format": "other/1"}),
    "older format": lambda path: rewrite(
        path, header_of(path) | {"format": "geomkd.LayerScores/1"}
    ),
    "no half-samples": lambda path: rewrite(path, header_of(path)),
    "no columns": lambda path: rewrite(path, {"format": "geomkd.LayerScores/2"}),
    "a setting short": one_setting_short,
    "list": lambda path: rewrite(path, [1]),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_other_files_are_refused(spoil, tmp_path):
    path = made(jumping()).save(tmp_path / "a")
    SPOILS[spoil](path)
    with pytest.raises(ValueError, match=r"a does not hold geomkd.LayerScores/2"):
        LayerScores.load(path)


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    scores, rng = made(jumping()), np.random.default_rng(0)
    path = scores.save(tmp_path / "a")
    whole, refused = path.read_bytes(), 0
    for turn in range(300):
        data, start = bytearray(whole), rng.integers(len(whole))
        data[start : len(whole) if turn % 3 == 0 else start + 8] = rng.bytes(turn % 3 * 4)
        path.write_bytes(data)
        try:
            loaded = LayerScores.load(path)
        except ValueError as error:
            assert "does not hold geomkd.LayerScores/2" in str(error)
            refused += 1
        else:
            pd.testing.assert_frame_equal(loaded.to_frame(), scores.to_frame())
            assert np.array_equal(loaded.draws["quality"], scores.draws["quality"])
    assert refused > 200


class Unpickled:
    """Leaves a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_is_unpickled(tmp_path):
    path, folder = tmp_path / "a", tmp_path / "left"
    with path.open("wb") as file:
        np.savez(file, header=np.array([Unpickled(str(folder))], dtype=object))
    with pytest.raises(ValueError, match=r"a does not hold geomkd.LayerScores/2: Object arrays"):
        LayerScores.load(path)
    assert not folder.exists()


def test_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        LayerScores.load(tmp_path / "none")
