"""Networks of every door: by the library's own loader, from disk, or one line that says why not."""

import json
import warnings

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from small import same
from torch import nn

import geomkd.cli.models as models
from geomkd import candidate_layers
from geomkd.cli.inputs import load_data
from geomkd.cli.main import main
from geomkd.cli.models import Loaded, example_of, load_model
from geomkd.network.forward import call

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what timm uses of torch is deprecated
    timm = pytest.importorskip("timm")
    import transformers
    from safetensors.torch import save_file

IMAGES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGES |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4, "num_labels": 4}
WORDS = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS |= {"intermediate_size": 16, "vocab_size": 11, "max_position_embeddings": 16, "num_labels": 3}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Hugging Face's folder of downloads, empty, and no way to download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    return tmp_path / "cache"


def put(cache, name, *files):
    """Lay files into the cache as a download does."""
    at = cache / f"models--{name.replace('/', '--')}"
    for file in files:
        target = at / "snapshots" / "0123" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text("0123")


def saved(kind, config, folder, seed=0):
    torch.default_generator.manual_seed(seed)
    model = kind(config)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def vit(tmp_path):
    config = transformers.ViTConfig(**IMAGES)
    return saved(transformers.ViTForImageClassification, config, tmp_path / "vit"), tmp_path / "vit"


def test_every_network_of_torchvision_has_a_door():
    for name in torchvision.models.list_models():
        door = models.DOORS["torchvision"](name)
        assert door.shape[0] == 3 and len(door.shape) in (3, 4)


# ---- timm ----------------------------------------------------------------------------------------


def test_timm_by_a_seed():
    same_seed, again, other = (load_model("timm:test_resnet", seed=s) for s in (0, 0, 1))
    assert same(same_seed.model.state_dict(), again.model.state_dict())
    assert not same(same_seed.model.state_dict(), other.model.state_dict())
    assert same_seed.story == "timm:test_resnet, weights random, seed 0"
    few = load_model("timm:test_resnet", n_classes=5)
    assert few.model.num_classes == 5 and "5 classes, weights random" in few.story
    no_head = load_model("timm:vit_small_patch14_dinov2", n_classes=5)
    assert no_head.model.num_classes == 5 and "5 classes" in no_head.story


def test_timm_weights_of_a_file(tmp_path):
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    loaded = load_model("timm:test_resnet", weights=tmp_path / "w.pth", n_classes=4)
    assert same(loaded.model.state_dict(), state) and loaded.transform is None
    with pytest.raises(ValueError, match="does not fit timm:test_vit: it lacks cls_token"):
        load_model("timm:test_vit", weights=tmp_path / "w.pth")


def test_timm_weights_that_are_in_its_cache(cache, tmp_path):
    text = "no file DEFAULT, nor timm/test_resnet.r160_in1k for DEFAULT in .* nothing is downloaded"
    with pytest.raises(FileNotFoundError, match=text):
        load_model("timm:test_resnet", weights="DEFAULT")
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere.pth, nor timm/"):
        load_model("timm:test_resnet", weights="nowhere.pth")
    state = timm.create_model("test_resnet").state_dict()
    save_file(state, tmp_path / "model.safetensors")
    put(cache, "timm/test_resnet.r160_in1k", tmp_path / "model.safetensors")
    loaded = load_model("timm:test_resnet.r160_in1k", weights="DEFAULT")
    assert same(loaded.model.state_dict(), state)
    assert loaded.transform(torch.rand(3, 40, 40)).shape == (3, 160, 160)
    assert loaded.transform(Image.new("RGB", (40, 40))).shape == (3, 160, 160)


# ---- Hugging Face --------------------------------------------------------------------------------


def test_a_folder_brings_its_weights(vit, capsys):
    model, folder = vit
    loaded = load_model(f"hf:{folder}", n_classes=7)
    assert type(loaded.model) is transformers.ViTForImageClassification
    assert same(loaded.model.state_dict(), model.state_dict()) and loaded.transform is None
    assert loaded.story == f"hf:{folder}, weights that it came with"
    assert "".join(capsys.readouterr()) == ""  # transformers has bars


def test_a_folder_without_weights_is_random_by_the_seed(tmp_path):
    transformers.ViTConfig(**IMAGES).save_pretrained(tmp_path)
    loaded, again = (load_model(f"hf:{tmp_path}", n_classes=7, seed=3) for _ in range(2))
    assert same(loaded.model.state_dict(), again.model.state_dict())
    assert loaded.model.classifier.out_features == 7
    assert loaded.story == f"hf:{tmp_path}, 7 classes, weights random, seed 3"


def test_the_head_is_the_one_of_the_weights(tmp_path):
    words = transformers.BertConfig(**WORDS)
    for kind in (transformers.BertForSequenceClassification, transformers.BertModel):
        model = saved(kind, words, tmp_path / kind.__name__)
        loaded = load_model(f"hf:{tmp_path / kind.__name__}").model
        assert type(loaded) is kind and same(loaded.state_dict(), model.state_dict())
    saved(transformers.BertForMaskedLM, words, tmp_path / "masked")
    with pytest.warns(UserWarning, match=r"masked lacks weights, random here: pooler.dense.bias"):
        assert type(load_model(f"hf:{tmp_path / 'masked'}").model) is transformers.BertModel


def test_half_precision_is_made_float32(tmp_path):
    torch.default_generator.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGES)).bfloat16()
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(f"hf:{tmp_path}").model.parameters()} == {torch.float32}


def test_pickled_weights_are_not_read(vit, tmp_path):
    model, folder = vit
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights of .*vit cannot be read, pickled ones never"):
        load_model(f"hf:{folder}")
    loaded = load_model(f"hf:{folder}", weights=folder / "pytorch_model.bin")  # as tensors alone
    assert same(loaded.model.state_dict(), model.state_dict())


def test_a_name_in_the_cache(cache, vit):
    model, folder = vit
    with pytest.raises(FileNotFoundError, match=r"no folder me/tiny .* nor .* nothing is downloa"):
        load_model("hf:me/tiny")
    put(cache, "me/tiny", folder / "config.json", folder / "model.safetensors")
    loaded = load_model("hf:me/tiny").model
    assert same(loaded.state_dict(), model.state_dict())


def test_a_processor_prepares_images_of_both_kinds(vit, tmp_path):
    _, folder = vit
    size = {"height": 8, "width": 8}
    mean = {"image_mean": [0.2, 0.4, 0.6], "image_std": [0.5, 0.5, 0.5]}
    transformers.ViTImageProcessor(size=size, **mean).save_pretrained(folder)
    loaded = load_model(f"hf:{folder}")
    grey = loaded.transform(torch.full((3, 20, 20), 0.8))
    assert grey.shape == (3, 8, 8)
    assert grey.mean((1, 2)).tolist() == pytest.approx([1.2, 0.8, 0.4], abs=1e-4)
    of_file = loaded.transform(Image.new("RGB", (20, 20), (204, 204, 204)))
    torch.testing.assert_close(of_file, grey, atol=1e-3, rtol=0)
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 20, 20, 3), np.uint8), y=np.arange(4) % 2)
    data, words = load_data(tmp_path / "x.npz", loaded)
    assert data[0][0].shape == (3, 8, 8)
    assert words.startswith("the weights' own: ViTImageProcessor")


# ---- what is wrong is one line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timm:test_vitt", "timm has no model 'test_vitt'; close matches: test_vit"),
        ("timm:resnet18.nowhere", "timm has no model 'resnet18.nowhere'; close matches: resnet18."),
        ("timm:hf-hub:timm/resnet18", "timm has no model 'hf-hub:timm/resnet18'"),
        ("hf:nowhere", "there is no folder nowhere with a config.json, nor a model of this name"),
        ("hf:a/b/c", "there is no folder a/b/c with a config.json"),
        ("hf:", "--model must be torchvision:NAME, timm:NAME, hf:NAME_OR_FOLDER or package.module"),
    ],
)
def test_a_name_that_is_not_there(cache, capsys, name, text):
    assert main(["score", "--model", name, "--data", "x.npz"]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("geomkd score: ") and error.count("\n") == 1


def test_damaged_files_of_a_folder(vit):
    _, folder = vit
    weights, config = folder / "model.safetensors", folder / "config.json"
    weights.write_bytes(weights.read_bytes()[:500])
    known = json.loads(config.read_text())
    changes = [({}, "the weights of .*vit cannot be read, .*: "), ({"model_type": "vat"}, "vat")]
    changes += [
        ({"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}, "contains custom code")
    ]
    for change, text in changes:
        config.write_text(json.dumps(known | change))
        with pytest.raises((ValueError, OSError), match=text):
            load_model(f"hf:{folder}")


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("timm:test_resnet", "timm", "timm"),
        ("hf:somewhere", "transformers", "transformers"),
        ("torchvision:resnet18", "torchvision", "vision"),
    ],
)
def test_a_library_that_is_not_installed(monkeypatch, name, library, extra):
    for module in (library, f"{library}.models"):
        monkeypatch.setitem(models.sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {library}: pip install geomkd\[{extra}\]"):
        load_model(name)


# ---- examples ------------------------------------------------------------------------------------


def test_an_example_has_the_size_that_the_library_tells():
    assert example_of(load_model("torchvision:swin_v2_t")).shape == (2, 3, 256, 256)
    assert example_of(load_model("torchvision:mc3_18")).shape == (2, 3, 16, 112, 112)
    resnet = load_model("timm:test_resnet")
    assert example_of(resnet).shape == (2, 3, 160, 160)
    assert example_of(resnet, image_size=32).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("first", "shape"),
    [
        (nn.Conv2d(1, 2, 3), (2, 1, 224, 224)),
        (nn.Conv1d(4, 2, 3), (2, 4, 16_000)),
        (nn.Linear(5, 2), (2, 5)),
        (nn.Embedding(7, 2), (2, 8)),
    ],
)
def test_an_example_for_a_network_of_ones_own(first, shape):
    loaded = Loaded(nn.Sequential(nn.Identity(), first), None, "")
    assert example_of(loaded).shape == shape
    loaded.model(example_of(loaded))


def test_what_nothing_tells_is_an_image():
    assert example_of(Loaded(nn.ReLU(), None, "")).shape == (2, 3, 224, 224)


SOUND = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SOUND |= {"intermediate_size": 16, "num_labels": 3}
CONVS = {"conv_dim": [4, 4], "conv_stride": [8, 8], "conv_kernel": [8, 8]}
CONVS |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
CONVS |= {"num_conv_pos_embedding_groups": 2}
TEXT = {key: value for key, value in WORDS.items() if key != "num_labels"}
TOWERS = {"text_config": TEXT, "vision_config": IMAGES, "projection_dim": 8}
KINDS = {
    "ViT": (transformers.ViTConfig(**IMAGES), ["pixel_values"]),
    "Bert": (transformers.BertConfig(**WORDS), ["input_ids", "attention_mask"]),
    "T5": (
        transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=20),
        ["input_ids", "attention_mask", "decoder_input_ids"],
    ),
    "CLIP": (transformers.CLIPConfig(**TOWERS), ["input_ids", "attention_mask", "pixel_values"]),
    "Wav2Vec2": (transformers.Wav2Vec2Config(**SOUND, **CONVS), ["input_values"]),
    "AST": (transformers.ASTConfig(**SOUND, max_length=64, num_mel_bins=16), ["input_values"]),
}


@pytest.mark.parametrize("kind", ["Wav2Vec2", "AST"])
def test_sounds_come_with_a_processor_and_a_head_by_another_name(tmp_path, kind):
    config, _ = KINDS[kind]
    name = {"Wav2Vec2": "ForSequenceClassification", "AST": "ForAudioClassification"}[kind]
    config.architectures = None
    saved(getattr(transformers, kind + name), config, tmp_path)
    extractor = getattr(transformers, f"{kind}FeatureExtractor")
    extractor(**({"num_mel_bins": 16} if kind == "AST" else {})).save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert type(loaded.model).__name__ == kind + name and loaded.transform is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_for_each_kind_of_transformers_network(tmp_path, kind):
    config, names = KINDS[kind]
    config.architectures = ["CLIPModel"] if kind == "CLIP" else None
    config.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    example = example_of(loaded)
    assert list(example) == names
    assert {len(value) for value in example.values()} == {2}
    with torch.no_grad():
        call(loaded.model.eval(), example)
    assert candidate_layers(loaded.model, example)


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, y = np.random.default_rng(0), np.arange(100) % 4
    np.savez("images.npz", x=rng.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8), y=y)
    return ["--data", "images.npz", "--quiet", "--out"]


def test_score_and_distil_through_every_door(vit, images, tmp_path, capsys):
    transformers.ViTConfig(**(IMAGES | {"num_hidden_layers": 2})).save_pretrained("small")
    teachers = {"hf": "hf:vit", "timm": "timm:test_resnet"}
    for name in ("hf", "timm"):
        command = ["score", "--model", teachers[name], *images, f"scores-{name}"]
        assert main([*command, "--subsamples", "2", "--pool", "mean", "--k", "2"]) == 0
        assert "selected by quality: " in capsys.readouterr().out
    for name, student in (("hf", "hf:small"), ("timm", "timm:test_resnet")):
        command = ["distill", "--teacher", teachers[name], "--student", student, *images]
        command += [name, "--layers", "last", "--k", "1", "--epochs", "1"]
        assert main(command) == 0
        said = capsys.readouterr().out
        folder = "hf:vit, weights that it came with"
        assert "teacher: " + (folder if name == "hf" else "timm:test_resnet, 4 classes") in said
        own = "hf:small" if name == "hf" else "timm:test_resnet, 4 classes"
        assert f"student: {own}, weights random, seed 0" in said and "student.pt" in said
        assert (tmp_path / name / "student.pt").exists()


@pytest.mark.parametrize("command", ["score", "distill"])
def test_texts_are_refused_in_a_line_that_says_where_to_go(images, tmp_path, capsys, command):
    saved(transformers.BertForSequenceClassification, transformers.BertConfig(**WORDS), "words")
    roles = ["--model"] if command == "score" else ["--teacher", "--student"]
    models = [part for role in roles for part in (role, "hf:words")]
    for data in (images, ["--data", "texts.csv", *images[2:]]):
        assert main([command, *models, *data, "out"]) == 2
        assert capsys.readouterr().err == (
            f"geomkd {command}: {roles[0]} hf:words takes input_ids, and the command line has "
            "images alone to give: in Python score_layers and distill take it, masks and all\n"
        )
    assert not (tmp_path / "out").exists()


def test_a_warning_is_a_line_without_code(tmp_path, capsys):
    folder = tmp_path / "masked"
    saved(transformers.BertForMaskedLM, transformers.BertConfig(**WORDS), folder)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".* lacks weights")
        assert main(["layers", f"hf:{folder}"]) == 0
    lacking = "pooler.dense.bias, pooler.dense.weight"
    assert capsys.readouterr().err == f"note: {folder} lacks weights, random here: {lacking}\n"


def test_layers_are_listed_without_data(vit, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in {
        "hf:vit": [
            "2      block tokens 5 x 8  40        600",
            "4 layers, 3 of them blocks",
        ],
        "timm:test_resnet": ["layer4.0", "head_input vector"],
        "torchvision:resnet18 --granularity stages": ["layer1.1", "6 layers, 4 of them blocks"],
        "torchvision:vgg11 --layers features.1? --image-size 64": ["features.19", "256 x 8 x 8"],
    }.items():
        assert main(["layers", *name.split()]) == 0
        said = capsys.readouterr().out
        assert all(part in said for part in words), said
    assert main(["layers", "timm:test_resnet", "--layers", "block*"]) == 2
    assert "layer 'block*': no layer that is run has such a name" in capsys.readouterr().err
