import json
import sys
from dataclasses import replace

import numpy as np
import processes
import pytest
import scored
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet

from benchmarks import coverage, distill_speed, overhead, parity, sample_size, speed
from benchmarks.peers import compare
from geomkd.measures import two_nn


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """A block a stage, of the published widths: what is measured here is not read."""
    for name in ("resnet18", "resnet34"):
        monkeypatch.setattr(
            torchvision.models, name, lambda num_classes: ResNet(BasicBlock, [1] * 4, num_classes)
        )


def test_speed_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "subprocess", processes)
    monkeypatch.setattr(speed, "QUICK", [(300, 64)])
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


def test_distill_speed_quick(tmp_path, monkeypatch, capsys):
    data = distill_speed.images(16, size=8)
    monkeypatch.setattr(distill_speed, "images", lambda n, size=8: data)
    result = distill_speed.main(["--quick", "--out", str(tmp_path / "speed.json")])
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    taken = result["overhead"]
    assert taken["ratios"] == [round(taken["ratio"], 4)]  # of one pair
    (row,) = result["caching"]
    assert row["speed_up"] == pytest.approx(row["live_seconds"] / row["cached_seconds"])
    assert "x the same steps written out by hand" in capsys.readouterr().out


def test_parity_quick(tmp_path, capsys):
    result = parity.main(["--quick", "--out", str(tmp_path / "parity.json")])
    assert len(result["rows"]) == 12
    for row in result["rows"]:
        assert row["ours"] == pytest.approx(row["theirs"], rel=1e-6), row["measure"]
    assert "silhouette, n = 400, d = 20" in capsys.readouterr().out


def test_sample_size_quick(tmp_path, monkeypatch, capsys):
    size = {"noise": 3, "sizes": (10, 30), "repetitions": 1, "halves": 3}
    monkeypatch.setattr(sample_size, "QUICK", size)
    result = sample_size.main(["--quick", "--out", str(tmp_path / "sizes.json")])
    assert json.loads((tmp_path / "sizes.json").read_text()) == json.loads(json.dumps(result))
    assert [row["permutations"] for row in result["noise"]] == [19, 20, 39]
    assert all(row["rule"] == row["p_value"] <= row["interpolated"] for row in result["noise"])
    few = result["ranks"]["published"]["ranks_of_few"]["quality"]
    assert few["repetitions"] == 1 and 0 <= few["layers_held"] <= 1
    assert "| quality |" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the order of the layers has not settled")
def test_what_sample_size_says_of_known_scores():
    """By hand: four layers, of which the second and third change places with more samples."""
    few = scored.swept([1.0, 3.0, 2.0, 9.0], [1.0, 2.0, 3.0, 9.0])
    draws = {**few.draws, "quality": np.tile(few.frame["quality"].to_numpy()[:, None], 5)}
    many = scored.made(quality=[1.0, 2.0, 3.0, 9.0])
    found = sample_size.held(replace(few, draws=draws), many, "quality")
    assert found == {
        "by": "quality", "held": False, "layers_held": 0.5, "tau_of_sweep": 0.667,
        "tau_to_many": 0.667,
    }  # fmt: skip
    assert sample_size.changes(few)["quality"]["block"] == 0.0
    assert sample_size.steps(few)["quality"] == [1.0, 0.667]


def test_peers_take_turns(tmp_path, monkeypatch):
    """A real process of ours; peers, whose environments are not here, by figures made up."""
    monkeypatch.setattr(compare, "subprocess", processes)
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((200, 8)))
    own = compare.run_ours("two_nn", [tmp_path / "a.npy"], 2, 1)
    assert own["value"] == pytest.approx(two_nn(np.load(tmp_path / "a.npy")).item())
    assert len(own["seconds"]) == 2
    assert own["peak_after"] >= own["peak_before"] > 1e6

    def slower(name, measure, paths, repeats, threads):
        peak = {"peak_before": 5, "peak_after": 7, "versions": {"peer": name}}
        return {"value": 1.0, "seconds": [2 * seconds for seconds in own["seconds"]]} | peak

    monkeypatch.setattr(compare, "run_ours", lambda *given: own)
    monkeypatch.setattr(compare, "run_peer", slower)
    monkeypatch.setattr(compare, "QUICK", [(200, 8), (200, 16)])
    result = speed.main(["--peers", "--quick", "--out", str(tmp_path / "peers.json")])
    assert [(row["measure"], row["peer"]) for row in result["peers"]] == 2 * [
        ("two_nn", "skdim"),
        ("two_nn", "dadapy"),
        ("mle_dimension", "skdim"),
        ("cka", "pytorch_cka"),
    ]
    for row in result["peers"]:
        assert (row["times_faster"], row["to_product"]) == (2, 1)
        assert row["to_halves"] == (0.5 if row["measure"] == "cka" else 1)
        assert row["peer_peak_growth"] == 2
    assert set(result["exponents"]) == {"two_nn in d", "mle_dimension in d", "cka in d"}
    one = ["--peers", "--size", "200", "16", "--out", str(tmp_path / "peers.json")]
    again = speed.main(one)["peers"]
    assert [row["d"] for row in again] == 4 * [8] + 4 * [16]
    machine = {"machine": result["machine"]}
    assert again[:4] == [row | machine for row in result["peers"][:4]]  # as they were


@pytest.mark.filterwarnings("ignore:a class has fewer than 25 samples")
def test_what_half_samples_add_and_busy_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "DRAWS", [("resnet34", 4, 8)])
    path = tmp_path / "draws.json"
    (row,) = overhead.main(["--draws", "--out", str(path)])["rows"]
    assert json.loads(path.read_text())["rows"] == [row]
    assert row["more"] == pytest.approx(row["default"] / row["seconds"] - 1)
    monkeypatch.setattr(overhead, "LOGME", [(2, 60), (20, 60)])
    few, many = overhead.main(["--logme", "--out", str(tmp_path / "logme.json")])["rows"]
    assert few["classes"] == 2 and many["seconds"] > 0
    row = overhead.busy_row("sleep", [sys.executable, "-c", "import time; time.sleep(0.1)"])
    assert row["quiet"] > 0.1
    assert row["ratio"] == row["busy"] / row["quiet"]


def test_busy_rows_that_are_not_measured_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "busy_row", lambda name, _: {
        "command": name, "quiet": 1.0, "busy": 2.0, "ratio": 2.0})  # fmt: skip
    path = tmp_path / "busy.json"
    old = {"command": "quickstart", "quiet": 3.0, "busy": 3.0, "ratio": 1.0}
    made = {"date": "2026-01-01", "machine": {"threads": 7}}
    path.write_text(json.dumps(made | {"rows": [old, old | {"command": "5_signals"}]}))
    rows = overhead.main(["--busy", "--only", "5_signals", "--out", str(path)])["rows"]
    assert rows[0] == old | made
    assert [row["command"] for row in rows] == ["quickstart", "5_signals"]
    assert rows[1]["ratio"] == 2.0 and rows[1]["date"] > "2026-01-01"
    with pytest.raises(SystemExit, match=r"--only takes quickstart, .*; got nothing_such"):
        overhead.main(["--busy", "--only", "nothing_such", "--out", str(path)])
    with pytest.raises(SystemExit):
        overhead.main(["--draws", "--only", "5_signals"])


def test_coverage_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coverage, "SETTINGS", {2: 20, 10: 40})
    monkeypatch.setattr(coverage, "HALVES", 12)
    result = coverage.main(["--quick", "--out", str(tmp_path / "coverage.json")])
    assert list(result["table"]) == ["2, 20", "10, 40"]
    assert f"| 2, 20 | quality | {100 * result['table']['2, 20']['quality']['covered']:.1f} %" in (
        capsys.readouterr().out
    )


def test_what_coverage_counts():
    """By hand: two equal layers whose order never flips, and a third that is always below."""
    draws = np.stack([np.full(40, 3.0), np.full(40, 2.0), np.full(40, 1.0)])
    scores = np.concatenate([draws[:, :1], draws], axis=1)
    assert coverage.counted(scores) == {
        "covered": 0.5, "false order": 1.0, "found": 1.0, "width": 1.0
    }  # fmt: skip
    scores[1, 1:21] = 4.0  # flips in half of the draws
    assert coverage.counted(scores) == {
        "covered": 1.0, "false order": 0.0, "found": 1.0, "width": 2.0
    }  # fmt: skip
