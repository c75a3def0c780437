"""The teacher's answers, live and from files."""

import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from small import PAIRS, blobs, images, mlp, resnet, resnet2, run_mlp, same, state
from torch.utils.data import Dataset, TensorDataset

from geomkd.common.distributed import World
from geomkd.distillation import distill
from geomkd.distillation.running import teacher as features
from geomkd.distillation.running.batches import Batches
from geomkd.distillation.running.fingerprints import weights_fingerprint
from geomkd.distillation.running.order import Order
from geomkd.distillation.running.setup import as_objective, join
from geomkd.distillation.running.teacher import CachedTeacher, LiveTeacher


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "SHARD", 16)
    monkeypatch.setattr(features, "BATCH", 5)


def folder_of(cache):
    (folder,) = cache.iterdir()
    return folder


@pytest.mark.parametrize("objective", ["features", "kd", "feature_kd"])
@pytest.mark.parametrize("as_data", [tuple, lambda pair: TensorDataset(*pair)])
def test_cached_training_is_live_training(tmp_path, objective, as_data):
    options = {"objective": objective, "epochs": 3}
    live = run_mlp(as_data(blobs()), **options)
    for _ in range(2):  # written, then read
        cached = run_mlp(as_data(blobs()), cache_dir=tmp_path, **options)
        # The teacher's products of other batches may differ in the last bit.
        for a, b in zip(live.student.parameters(), cached.student.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    kinds = {"features": ["layer0", "layer1"], "kd": ["logits"]}
    kinds["feature_kd"] = kinds["features"] + kinds["kd"]
    names = [f"{kind}-{i:05d}.npy" for kind in kinds[objective] for i in range(4)]
    assert sorted(path.name for path in folder_of(tmp_path).iterdir()) == ["contents.json", *names]


def test_maps_of_a_real_network(tmp_path):
    options = {"pairs": [("layer3.0", "layer3.0"), ("layer4.0", "layer4.0")], "epochs": 2}
    options |= {"progress": False, "lr": 1e-4}
    live = distill(resnet(), resnet2(), images(40), **options)
    cached = distill(resnet(), resnet2(), images(40), cache_dir=tmp_path, **options)
    assert cached.history["loss"].tolist() == pytest.approx(live.history["loss"].tolist(), rel=1e-4)


class Counting(torch.nn.Module):
    calls = 0

    def forward(self, x):
        Counting.calls += len(x)
        return x


def counting_teacher():
    teacher = mlp((6, 32, 32, 3), seed=1)
    teacher.insert(0, Counting())
    Counting.calls = 0
    return teacher, [("2", "1"), ("5", "4")]


def cached(cache, *, teacher=None, train=None, stop=None):
    teacher, pairs = counting_teacher() if teacher is None else teacher
    networks = join(mlp(), teacher, as_objective("features"), pairs, blobs()[0][:4])
    order = lambda n: Order(n, 16, seed=0, world=World(0, 1))  # noqa: E731
    train = Batches(train or blobs(), order, device=torch.device("cpu"))
    live = LiveTeacher(networks, nullcontext)
    if stop is not None:
        ask = live.__call__

        class Stopping(LiveTeacher):
            def __call__(self, inputs, index):
                if index[0] >= stop:
                    raise KeyboardInterrupt
                return ask(inputs, index)

        live = Stopping(networks, nullcontext)
    Counting.calls = 0
    return CachedTeacher(cache, live, train, progress=False)


def test_answers_come_by_index(tmp_path):
    teacher, pairs = counting_teacher()
    read = cached(tmp_path, teacher=(teacher, pairs))
    x, _ = blobs()
    index = [49, 0, 17, 17, 33]
    answers, logits = read(None, index)
    with torch.no_grad():
        expected = [teacher[:3](x[index]), teacher[:6](x[index])]
    assert logits is None
    for answer, value in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, value)


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, stop=40)
    there = {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir()}
    assert sorted(there) == ["contents.json"] + [
        f"layer{kind}-{i:05d}.npy" for kind in (0, 1) for i in (0, 1)
    ]
    cached(tmp_path)
    assert Counting.calls == 50 - 32 + 1  # and whether it still answers the same
    after = folder_of(tmp_path)
    assert all((after / name).read_bytes() == content for name, content in there.items())
    cached(tmp_path)
    assert Counting.calls == 1


@pytest.mark.parametrize("what", ["teacher", "data", "layers", "logits", "stored"])
def test_another_teacher_data_or_layer_has_files_of_its_own(tmp_path, what):
    teacher, (x, y) = mlp((6, 32, 32, 3), seed=1), blobs()
    run_mlp((x, y), teacher=teacher, cache_dir=tmp_path, epochs=1)
    options = {}
    if what == "teacher":
        with torch.no_grad():
            teacher[6].bias[0] += 1e-6
    elif what == "data":
        x = x.clone()
        x[3, 2] += 1e-6
    else:
        options = {
            "layers": {"pairs": PAIRS[:1]},
            "logits": {"objective": "feature_kd"},
            "stored": {"cache_dtype": "float16"},
        }[what]
    run_mlp((x, y), teacher=teacher, cache_dir=tmp_path, epochs=1, **options)
    contents = [json.loads((f / "contents.json").read_text()) for f in tmp_path.iterdir()]
    assert len(contents) == 2
    assert contents[0].keys() == contents[1].keys()
    differing = {key for key in contents[0] if contents[0][key] != contents[1][key]}
    assert differing == {what}


def test_half_precision_files_are_half_as_large_and_nearly_the_same(tmp_path):
    full = run_mlp(cache_dir=tmp_path / "full", epochs=3)
    half = run_mlp(cache_dir=tmp_path / "half", cache_dtype="float16", epochs=3)
    first = [np.load(folder_of(tmp_path / n) / "layer0-00000.npy") for n in ("full", "half")]
    assert [array.dtype for array in first] == [np.float32, np.float16]
    assert half.history["loss"].tolist() == pytest.approx(full.history["loss"].tolist(), rel=0.01)


class Noisy(Dataset):
    def __init__(self):
        self.x, self.y = blobs()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.randn(6), self.y[i]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"augment": lambda x: x}, "cache_dir= and augment= exclude each other"),
        ({"train": Noisy()}, "the same inputs in every epoch; .* draw at random"),
        ({"objective": "ce"}, "cache_dir= needs a teacher; objective 'ce' has none"),
        ({"cache_dtype": "bfloat16"}, r"one of \(None, 'float16'\); got 'bfloat16'"),
    ],
)
def test_what_does_not_go_with_a_cache(tmp_path, options, text):
    student = mlp()
    before = state(student)
    with pytest.raises(ValueError, match=text):
        run_mlp(options.pop("train", None), student=student, cache_dir=tmp_path, **options)
    assert same(before, student.state_dict())
    assert not list(tmp_path.glob("*/*.npy"))


def test_a_damaged_file_is_named(tmp_path):
    run_mlp(cache_dir=tmp_path, epochs=1)
    path = folder_of(tmp_path) / "layer1-00002.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"layer1-00002.npy is damaged .*; delete it, it is made"):
        run_mlp(cache_dir=tmp_path, epochs=1)


def test_the_fingerprint_is_of_the_weights_alone():
    model = resnet()
    other = copy.deepcopy(model)
    assert weights_fingerprint(model) == weights_fingerprint(other)
    assert weights_fingerprint(model) == weights_fingerprint(torch.nn.DataParallel(other))
    other.bn1.running_mean[3] += 1e-7
    assert weights_fingerprint(model) != weights_fingerprint(other)
    assert weights_fingerprint(model) != weights_fingerprint(copy.deepcopy(model).half())


@pytest.mark.parametrize("objective", ["features", "kd"])
def test_answers_through_another_forward_are_refused(tmp_path, objective):
    def normalised(model, x):
        return model((x - 2) / 3)

    run_mlp(cache_dir=tmp_path, objective=objective)
    with pytest.raises(ValueError, match=r"has other answers than the teacher gives now \(is forw"):
        run_mlp(cache_dir=tmp_path, objective=objective, forward=normalised)


def test_a_checkpoint_of_another_forward_is_refused(tmp_path):
    run_mlp(checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another run: forward is None there and True here"):
        run_mlp(checkpoint_dir=tmp_path, forward=lambda model, x: model(x))


class Seldom(Dataset):
    """Samples, one in twenty of which has its sign changed."""

    def __len__(self):
        return 50

    def __getitem__(self, i):
        x, y = blobs()
        return x[i] * (-1 if torch.rand(()) < 0.05 else 1), int(y[i])


@pytest.mark.parametrize("seed", range(5))
def test_transforms_that_seldom_change_anything_are_noticed(tmp_path, seed):
    with pytest.raises(ValueError, match="draw"):
        run_mlp(Seldom(), cache_dir=tmp_path, seed=seed)


class Own(Dataset):
    """Samples with noise of a generator that nothing else seeds."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __len__(self):
        return 50

    def __getitem__(self, i):
        x, y = blobs()
        return x[i] + torch.from_numpy(self.generator.normal(size=6)).float(), int(y[i])


def test_a_run_on_data_with_a_generator_of_their_own_goes_on(tmp_path):
    run_mlp(Own(), checkpoint_dir=tmp_path, callbacks=[lambda row: True])
    assert len(run_mlp(Own(), checkpoint_dir=tmp_path).history) == 2
