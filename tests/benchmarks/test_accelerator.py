"""The benchmark on an accelerator: what it says where there is none, and its rows on the CPU."""

import pytest
import torch

from benchmarks import accelerator


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is there")
def test_without_an_accelerator_nothing_is_claimed(tmp_path, capsys):
    assert accelerator.main(["--quick", "--out", str(tmp_path / "found.json")]) == 1
    assert capsys.readouterr().out == "no accelerator here: nothing is measured, nothing claimed\n"
    assert not list(tmp_path.iterdir())


def test_rows_are_told_as_ratios(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    row = accelerator.measures_row(60, 8, torch.device("cpu"))
    assert set(row) == {"n", "d", "bare", *accelerator.MEASURES} and min(row.values()) > 0
    row |= {"bare": 0.5, "two_nn": 0.25}
    scoring = {"n": 60, "layers": 3, "bare": 2.0, "plain": 4.0, "default": 5.0}
    scoring |= dict.fromkeys(accelerator.COUNTED, 1.5)
    told = "\n".join(accelerator.told({"measures": [row], "scoring": scoring}))
    assert "| 60 | 8 | 500.00 |" in told and "| 250.00 (0.50) |" in told
    assert "4.00 s, 2.00 x one forward" in told and "half-samples 5.00 s, +25 %" in told
    assert "a layer of 3: 1.5 copies to the host, 1.5 copies to the device, 1.5 waits" in told
