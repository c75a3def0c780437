"""What processes tell each other, by plain Python; run by itself, this file is one of them."""

import atexit
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from geomkd.common.distributed import World, agreed, gathered, own_device, summed, world

SIZE = 2
TORCHRUN = Path(__file__).parents[1] / "torchrun.py"


def test_one_process_has_itself_alone():
    value, tensor = object(), torch.ones(3)
    assert world() == World(0, 1) and world().is_first
    assert gathered(value) == [value]
    assert summed(tensor) is tensor
    assert agreed(lambda: value) is agreed(lambda: value, first_only=True) is value
    assert not dist.is_initialized()


def test_torchrun_of_one_process_makes_no_group(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert dist.is_torchelastic_launched()
    assert world() == World(0, 1) and not dist.is_initialized()


def test_share_is_every_size_th_item():
    assert [World(rank, 3).share("abcdefgh") for rank in range(3)] == ["adg", "beh", "cf"]
    assert World(2, 3).share([1]) == []


def test_each_process_takes_an_accelerator_of_its_own(monkeypatch):
    # There may be none here: "meta" stands for one of two.
    taken = []
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_accelerator": lambda: torch.device("meta"),
        "set_device_index": taken.append,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device() == torch.device("meta", 1) and taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 \(from 0\) of this host finds 2"):
        own_device()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert own_device() is None


# ---- several processes ---------------------------------------------------------------------------


def threads(*, after=0.0):
    """The threads of this process, as the kernel lists them; none where it lists none."""
    time.sleep(after)  # a thread that was joined may be listed for a moment
    return {path.name for path in Path("/proc/self/task").glob("*")}


def what_fails(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def process(folder, how):
    """Write what this process sees of the others."""
    before = threads()
    if how == "group":
        store = dist.FileStore(str(folder / "store"), SIZE)
        dist.init_process_group("gloo", store=store, rank=int(os.environ["NUMBER"]), world_size=2)

    def own_threads(**how_long):
        """How many are gloo's: those that were not there before the group."""
        return len(threads(**how_long) - before)

    # What is registered first is called last: after the group was left, if it was.
    ended = folder / f"ended.{os.environ.get('RANK') or os.environ['NUMBER']}"
    atexit.register(lambda: ended.write_text(f"{dist.is_initialized()} {own_threads(after=0.2)}"))
    here = world()
    tensor = torch.tensor([1.0, 10.0]) * (here.rank + 1)

    def fail():
        raise OSError(f"rank {here.rank}")

    found = {
        "agreed": agreed(lambda: 10 + here.rank),
        "first": agreed(lambda: 10 + here.rank, first_only=True),
        "failed": [
            what_fails(lambda: agreed(fail)),
            what_fails(lambda: agreed(fail if here.rank else int)),
            what_fails(lambda: agreed(fail, first_only=True)),
        ],
        "world": [*here, here.is_first],
        "gathered": gathered({"rank": here.rank, "rows": "x" * here.rank}),
        "summed": summed(tensor).tolist(),
        "own": tensor.tolist(),
        "again": [*world()],
        "threads": own_threads(),
    }
    if how == "torchrun":  # wrapped as `distill` wraps the student, and still there at the end
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        model(tensor).sum().backward()
        model.itself = model
    if how == "group":
        dist.destroy_process_group()
        found["after"] = [*world()]
    (folder / f"{here.rank}.json").write_text(json.dumps(found))


def assert_all_were_seen(folder):
    for rank in range(SIZE):
        found = json.loads((folder / f"{rank}.json").read_text())
        assert found["world"] == [rank, SIZE, rank == 0]
        assert found["gathered"] == [{"rank": r, "rows": "x" * r} for r in range(SIZE)]
        assert found["agreed"] == 10 + rank and found["first"] == 10
        # Its own error, or else that of the others: of both, of the second, of the first.
        own, others = f"OSError: rank {rank}", f"ValueError: rank {1 - rank}"
        assert found["failed"] == [own, (others, own)[rank], (own, others)[rank]]
        assert found["summed"] == [3.0, 30.0]
        assert found["own"] == [1.0 * (rank + 1), 10.0 * (rank + 1)]
        assert found["again"] == [rank, SIZE]
        assert found.get("after", [0, 1]) == [0, 1]
        # A thread that is left may abort the process that ends.
        assert (folder / f"ended.{rank}").read_text() == "False 0"
        assert found["threads"] > 0 or not Path("/proc/self/task").exists()


@pytest.mark.slow
def test_processes_of_torchrun(tmp_path):
    from processes import ended, start  # which this file does not see where it is run by itself

    several = ["--standalone", "--nproc-per-node", SIZE, __file__, tmp_path, "torchrun"]
    said = tmp_path / "said"
    assert ended(start(TORCHRUN, several, output=said)) == [0], said.read_text()
    assert_all_were_seen(tmp_path)


@pytest.mark.slow
def test_group_of_the_callers(tmp_path):
    from processes import ended, start  # which this file does not see where it is run by itself

    options = {"output": tmp_path / "said"}
    each = [
        start(__file__, [tmp_path, "group"], environment={"NUMBER": str(rank)}, **options)
        for rank in range(SIZE)
    ]
    assert [ended(one) for one in each] == [[0]] * SIZE, options["output"].read_text()
    assert_all_were_seen(tmp_path)


if __name__ == "__main__":
    process(Path(sys.argv[1]), sys.argv[2])
