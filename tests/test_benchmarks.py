import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import speed


def test_speed_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "QUICK", [(300, 64), (600, 64)])
    monkeypatch.setattr(speed, "ROWS_AT", [(300, 64)])
    result = speed.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    first = result["quality"][0]
    assert first["difference"] < 1e-4  # the plain computation and ours are the same number
    assert first["ratio"] == pytest.approx(first["seconds"] / first["bare_seconds"])
    assert "| 300 | 64 |" in capsys.readouterr().out
    assert result["machine"]["torch"]


def test_exponents_of_a_known_growth():
    rows = [{"n": n, "d": d, "seconds": n**2 * d} for n, d in speed.FULL]
    assert list(speed.exponents(rows).values()) == pytest.approx([2.0, 1.0])
