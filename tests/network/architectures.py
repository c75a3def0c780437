"""Architectures of three libraries, and the layers that their definitions have.

Written from the papers and from the libraries' sources, not from what `candidate_layers` gives. A
block is the deepest repeated unit that a reader of the paper would call a block: a residual block,
no stage and no convolution; a transformer layer, no attention. Between two of them may stand a
transition, a module with a class of its own that changes the shape alone: neither a bare
`nn.Sequential` (ConvNeXt's downsampling) nor what `torch.nn` has itself (pooling).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

CLASSES = 7


@dataclass(frozen=True)
class Architecture:
    """What a model's definition says of its layers; names are paths of modules."""

    id: str
    build: Callable[[], tuple[nn.Module, Any]]  # the model, and a batch of two for it
    blocks: int
    first: str | None  # of the blocks, in order of execution
    last: str | None
    head: str | None  # name of the head's input; None where nothing ends in class scores
    transitions: str = ""  # names
    scores: str = ""  # modules that give class scores; where empty, the one whose input `head` is
    stands: str = ""  # the block whose output is, as the very same tensor, the head's input
    kinds: str = ""  # of all that is offered, activations of the stem and in the head too
    ends: str = ""  # the first and the last that is offered
    device: str = "meta"  # the CPU is quicker with narrow models, and some build on no other

    @property
    def score_modules(self) -> list[str]:
        return (self.scores or (self.head or "").removesuffix(".input")).split()


def vision(name, blocks, first, last, head, *, size=32, settings=None, **options):
    """A row of torchvision."""

    def build():
        model = getattr(torchvision.models, name)(num_classes=CLASSES, **(settings or {}))
        return model, torch.zeros(2, 3, size, size)

    return Architecture(f"torchvision-{name}", build, blocks, first, last, head, **options)


def timm(name, blocks, first, last, head, *, size=32, settings=None, **options):
    """A row of timm."""

    def build():
        models = pytest.importorskip("timm", minversion="1.0.22")
        model = models.create_model(name, num_classes=CLASSES, **(settings or {}))
        return model, torch.zeros(2, 3, size, size)

    return Architecture(f"timm-{name}", build, blocks, first, last, head, **options)


RENAMED = "5.23"  # in 5.0 the modules of these have other names


def hugging(name, blocks, first, last, head, example, config, since="5.0", **options):
    """A row of transformers, whose models look at values: small ones, on the CPU."""

    def build():
        models = pytest.importorskip("transformers", minversion=since)
        kind = getattr(models, name)
        return kind(kind.config_class(**config)), example

    own = {"device": "cpu", **options}
    return Architecture(f"transformers-{name}", build, blocks, first, last, head, **own)


class TwoStreams(nn.Module):
    """Two networks of one class side by side, and one classifier of both."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = (torchvision.models.resnet18(num_classes=32) for _ in range(2))
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.fc(torch.cat([self.rgb(x), self.depth(x)], 1))


class Head(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.drop, self.fc = nn.Dropout(), nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.drop(x))


class TwoHeads(nn.Module):
    """A plain network whose two classifiers are of one class: heads, no blocks."""

    def __init__(self):
        super().__init__()
        self.species, self.sex = Head(CLASSES), Head(2)
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, x):
        x = self.body(x)
        return self.species(x), self.sex(x)


IDS = torch.tensor([[4, 5, 6, 7, 8, 2], [4, 5, 6, 2, 0, 0]])  # 2 ends a text, 0 pads
TEXT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
PAIR = {**TEXT, "decoder_input_ids": IDS}
IMAGES = {"pixel_values": torch.zeros(2, 3, 32, 32)}
SOUND = {"input_values": torch.zeros(2, 1000), "attention_mask": torch.ones(2, 1000).long()}
MELS = {"input_features": torch.zeros(2, 8, 16)}

ENCODER = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": CLASSES,
}
WORDS = {
    "vocab_size": 16,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {**ENCODER, **WORDS}
PATCHES = {**ENCODER, "image_size": 32, "patch_size": 16}
STAGES = {"num_labels": CLASSES, "depths": [2, 3, 1, 2], "hidden_sizes": [8, 8, 16, 16]}
GPT = {**WORDS, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_inner": 16, "num_labels": CLASSES}
DISTIL = {**WORDS, "dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 16, "num_labels": CLASSES}
DISTIL = {**WORDS, "dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 16, "num_labels": CLASSES}
SEQ2SEQ = {
    **WORDS,
    "d_model": 8,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "decoder_start_token_id": 2,
    "num_labels": CLASSES,
}

# fmt: off
TORCHVISION = [
    vision("resnet34", 16, "layer1.0", "layer4.2", "fc.input", kinds="17 map, 1 vector"),
    vision("resnet50", 16, "layer1.0", "layer4.2", "fc.input"),
    vision("wide_resnet50_2", 16, "layer1.0", "layer4.2", "fc.input"),
    vision("vgg19_bn", 0, None, None, "classifier.0.input", scores="classifier.6",
           kinds="16 map, 3 vector"),
    vision("alexnet", 0, None, None, "classifier.1.input", scores="classifier.6", size=64,
           ends="features.1 classifier.5"),
    # The first and the last convolution are numbered with the blocks, but are plain Sequentials.
    vision("mobilenet_v2", 17, "features.1", "features.17", "classifier.1.input", device="cpu",
           kinds="19 map, 1 vector"),
    vision("mobilenet_v3_small", 11, "features.1", "features.11", "classifier.0.input",
           scores="classifier.3", device="cpu", ends="features.0.2 classifier.1"),
    vision("vit_b_16", 12, "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11",
           "heads.head.input", settings={"image_size": 32}, kinds="12 tokens, 1 vector"),
    vision("swin_t", 12, "features.1.0", "features.7.1", "head.input",
           transitions="features.2 features.4 features.6", kinds="15 map_last, 1 vector"),
    vision("convnext_tiny", 18, "features.1.0", "features.7.2", "classifier.2.input",
           kinds="18 map, 1 vector"),
    # Dense blocks, as the paper's table has them: a dense layer's output is not the next one's
    # input. Its "transition layers" are sequences without a forward of their own.
    vision("densenet121", 4, "features.denseblock1", "features.denseblock4", "classifier.input",
           device="cpu", kinds="8 map, 1 vector"),
    vision("efficientnet_b0", 16, "features.1.0", "features.7.0", "classifier.1.input",
           device="cpu", kinds="18 map, 1 vector"),
    # Fused-MBConv first, then MBConv: both are the paper's blocks.
    vision("efficientnet_v2_s", 40, "features.1.0", "features.6.14", "classifier.1.input",
           device="cpu"),
    vision("regnet_y_400mf", 16, "trunk_output.block1.block1-0", "trunk_output.block4.block4-5",
           "fc.input", device="cpu", ends="stem.2 fc.input"),
    # The paper's "MaxViT block" is called MaxVitLayer here, and MaxVitBlock is a stage.
    vision("maxvit_t", 11, "blocks.0.layers.0", "blocks.3.layers.1", "classifier.3.input",
           scores="classifier.5", size=224, settings={"input_size": (224, 224)}),
    # Dropout hands on, in evaluation mode, what the last Fire module gave.
    vision("squeezenet1_1", 8, "features.3", "features.12", "classifier.1.input",
           scores="classifier.1 classifier.3", stands="features.12", ends="features.1 features.12"),
    vision("shufflenet_v2_x0_5", 16, "stage2.0", "stage4.3", "fc.input", device="cpu",
           ends="conv1.2 fc.input"),
    # Inception modules; the stem's convolutions, a chain of one class as well, are no blocks.
    vision("googlenet", 9, "inception3a", "inception5b", "fc.input",
           settings={"init_weights": False}, kinds="9 map, 1 vector"),
    # Nine of the paper's three kinds of modules; its two "grid reductions" stand between them.
    vision("inception_v3", 9, "Mixed_5b", "Mixed_7c", "fc.input", size=96,
           transitions="Mixed_6a Mixed_7a", settings={"init_weights": False}),
    # The separable convolution in front of the first inverted residual is no module.
    vision("mnasnet0_5", 16, "layers.8.0", "layers.13.0", "classifier.1.input", device="cpu",
           ends="layers.2 classifier.1.input"),
]

TIMM = [
    timm("resnet26", 8, "layer1.0", "layer4.1", "fc.input"),
    timm("resnet50", 16, "layer1.0", "layer4.2", "fc.input"),
    timm("convnext_atto", 12, "stages.0.blocks.0", "stages.3.blocks.1", "head.fc.input",
         device="cpu"),
    timm("convnext_tiny", 18, "stages.0.blocks.0", "stages.3.blocks.2", "head.fc.input"),
    timm("swin_tiny_patch4_window7_224", 12, "layers.0.blocks.0", "layers.3.blocks.1",
         "head.fc.input", size=224,
         transitions="layers.1.downsample layers.2.downsample layers.3.downsample"),
    timm("regnety_002", 13, "s1.b1", "s4.b7", "head.fc.input", device="cpu"),
    timm("regnety_004", 16, "s1.b1", "s4.b6", "head.fc.input", device="cpu"),
    timm("maxvit_pico_rw_256", 11, "stages.0.blocks.0", "stages.3.blocks.1", "head.fc.input",
         size=64, settings={"img_size": 64}, device="cpu"),
    # Two stages of convolution blocks, two of transformer blocks: the paper stacks both.
    timm("coatnet_nano_rw_224", 16, "stages.0.blocks.0", "stages.3.blocks.2", "head.fc.input",
         size=224),
    # The paper's "shrinking attention block" stands between stages and is of another class.
    timm("levit_128s", 9, "stages.0.blocks.0", "stages.2.blocks.3", "head.linear.input", size=128,
         settings={"img_size": 128}, device="cpu",
         transitions="stages.1.downsample stages.2.downsample",
         scores="head.linear head_dist.linear"),
    timm("efficientnet_b0", 16, "blocks.0.0", "blocks.6.0", "classifier.input", device="cpu"),
    timm("densenet121", 4, "features.denseblock1", "features.denseblock4", "classifier.input",
         device="cpu"),
    timm("vit_tiny_patch16_224", 12, "blocks.0", "blocks.11", "head.input",
         settings={"img_size": 32}, device="cpu"),
    timm("deit_tiny_distilled_patch16_224", 12, "blocks.0", "blocks.11", "head.input",
         settings={"img_size": 32}, device="cpu", scores="head head_dist"),
    timm("mixer_s32_224", 8, "blocks.0", "blocks.7", "head.input", size=224),
    # The convolution behind the 11 bottlenecks is numbered as a block; the paper has it apart.
    timm("mobilenetv3_small_050", 11, "blocks.0.0", "blocks.4.2", "classifier.input", device="cpu"),
    # Between stages stand a norm and the overlapping patch embedding, which changes the shape.
    timm("pvt_v2_b0", 8, "stages.0.blocks.0", "stages.3.blocks.1", "head.input", size=64,
         device="cpu",
         transitions="stages.1.downsample stages.2.downsample stages.3.downsample"),
    # 24 layers of self-attention. Each of the 2 of class attention behind them takes all tokens of
    # the 24th and adds to a class token on the side: they follow from it, not from one another.
    timm("cait_xxs24_224", 24, "blocks.0", "blocks.23", "head.input",
         settings={"img_size": 32}, device="cpu"),
    # The paper's first stage is one block like all the others; timm calls it the stem.
    timm("repvgg_a0", 22, "stem", "stages.3.0", "head.fc.input"),
    timm("poolformerv2_s12", 12, "stages.0.blocks.0", "stages.3.blocks.1", "head.fc.input",
         size=64, transitions="stages.1.downsample stages.2.downsample stages.3.downsample"),
    # 7 inverted residuals, 3 MobileViT blocks; the transformer layers are parts of the latter.
    timm("mobilevit_xxs", 10, "stages.0.0", "stages.4.1", "head.fc.input", size=64, device="cpu"),
]

TRANSFORMERS = [
    hugging("BertForSequenceClassification", 3, "bert.encoder.layer.0", "bert.encoder.layer.2",
            "bert.pooler.dense.input", TEXT, BERT, scores="classifier"),
    hugging("RobertaForSequenceClassification", 3, "roberta.encoder.layer.0",
            "roberta.encoder.layer.2", "classifier.dense.input", TEXT, BERT,
            scores="classifier.out_proj"),
    hugging("DistilBertForSequenceClassification", 3, "distilbert.transformer.layer.0",
            "distilbert.transformer.layer.2", "pre_classifier.input", TEXT, DISTIL,
            scores="classifier"),
    hugging("DistilBertModel", 3, "transformer.layer.0", "transformer.layer.2", None, TEXT,
            DISTIL),
    # One layer that is called three times. Around it is a group of one layer: the deeper counts.
    hugging("AlbertForSequenceClassification", 3,
            "albert.encoder.albert_layer_groups.0.albert_layers.0",
            "albert.encoder.albert_layer_groups.0.albert_layers.0#3",
            "albert.pooler.input", TEXT, {**BERT, "embedding_size": 8}, scores="classifier"),
    # In each layer is a chain of three feed-forward networks of one class: parts of the layer.
    hugging("MobileBertForSequenceClassification", 3, "mobilebert.encoder.layer.0",
            "mobilebert.encoder.layer.2", "mobilebert.pooler.dense.input", TEXT,
            {**BERT, "embedding_size": 8, "intra_bottleneck_size": 4}, scores="classifier"),
    hugging("DebertaV2ForSequenceClassification", 3, "deberta.encoder.layer.0",
            "deberta.encoder.layer.2", "pooler.dense.input", TEXT,
            {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
            scores="classifier"),
    hugging("GPT2LMHeadModel", 3, "transformer.h.0", "transformer.h.2", "lm_head.input", TEXT, GPT),
    hugging("GPT2ForSequenceClassification", 3, "transformer.h.0", "transformer.h.2",
            "score.input", TEXT, GPT),
    hugging("LlamaForCausalLM", 3, "model.layers.0", "model.layers.2", "lm_head.input", TEXT, BERT),
    hugging("T5ForConditionalGeneration", 5, "encoder.block.0", "decoder.block.1", "lm_head.input",
            PAIR, {**WORDS, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 3,
                   "num_decoder_layers": 2}),
    hugging("BartForSequenceClassification", 5, "model.encoder.layers.0", "model.decoder.layers.1",
            "classification_head.dense.input", PAIR, SEQ2SEQ,
            scores="classification_head.out_proj"),
    # The layers of both towers, the image's first. No Linear sees both, and no module gives the
    # scores, which are products of the two embeddings: no head.
    hugging("CLIPModel", 5, "vision_model.encoder.layers.0", "text_model.encoder.layers.2", None,
            {**TEXT, **IMAGES}, {"text_config": BERT, "projection_dim": 4,
                                 "vision_config": {**PATCHES, "num_hidden_layers": 2}}),
    hugging("ViTForImageClassification", 3, "vit.layers.0", "vit.layers.2", "classifier.input",
            IMAGES, PATCHES, since=RENAMED),
    hugging("DeiTForImageClassificationWithTeacher", 3, "deit.layers.0", "deit.layers.2",
            "cls_classifier.input", IMAGES, PATCHES, since=RENAMED,
            scores="cls_classifier distillation_classifier"),
    hugging("SwinForImageClassification", 7, "swin.encoder.layers.0.blocks.0",
            "swin.encoder.layers.2.blocks.1", "classifier.input", IMAGES,
            {"image_size": 32, "patch_size": 2, "window_size": 2, "embed_dim": 8,
             "depths": [2, 3, 2], "num_heads": [1, 2, 2], "num_labels": CLASSES},
            transitions="swin.encoder.layers.0.downsample swin.encoder.layers.1.downsample"),
    # What stands between its stages are a norm and a convolution, called one by one.
    hugging("ConvNextForImageClassification", 8, "convnext.encoder.stages.0.layers.0",
            "convnext.encoder.stages.3.layers.1", "classifier.input", IMAGES, STAGES),
    hugging("ResNetForImageClassification", 8, "resnet.encoder.stages.0.layers.0",
            "resnet.encoder.stages.3.layers.1", "classifier.1.input", IMAGES,
            {**STAGES, "embedding_size": 8}),
    hugging("RegNetForImageClassification", 8, "regnet.encoder.stages.0.layers.0",
            "regnet.encoder.stages.3.layers.1", "classifier.1.input", IMAGES,
            {**STAGES, "embedding_size": 8, "groups_width": 4}),
    hugging("SegformerForImageClassification", 8, "segformer.stages.0.blocks.0",
            "segformer.stages.3.blocks.1", "classifier.input", IMAGES,
            {**STAGES, "num_attention_heads": [1, 1, 2, 2]}, since=RENAMED,
            transitions="segformer.stages.1.patch_embeddings segformer.stages.2.patch_embeddings "
            "segformer.stages.3.patch_embeddings"),
    # Attention and feed-forward are residual layers of one class, and no module holds a pair of
    # them: each is a block; so is the shrinking attention, which is numbered among them.
    hugging("LevitForImageClassificationWithTeacher", 12, "levit.encoder.stages.0.layers.0",
            "levit.encoder.stages.2.layers.1", "classifier.linear.input",
            {"pixel_values": torch.zeros(2, 3, 64, 64)},
            {"image_size": 64, "depths": [1, 2, 1], "hidden_sizes": [8, 12, 16], "key_dim": [4] * 3,
             "num_attention_heads": [2] * 3, "num_labels": CLASSES},
            scores="classifier.linear classifier_distill.linear"),
    # The convolutions of the feature encoder, none of which keeps the shape, are a stem here.
    hugging("Wav2Vec2ForSequenceClassification", 3, "wav2vec2.encoder.layers.0",
            "wav2vec2.encoder.layers.2", "projector.input", SOUND,
            {**ENCODER, "conv_dim": [4] * 7, "num_conv_pos_embeddings": 4,
             "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8},
            scores="classifier", stands="wav2vec2.encoder.layers.2"),
    hugging("WhisperForAudioClassification", 3, "encoder.layers.0", "encoder.layers.2",
            "projector.input", MELS, {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8,
                                      "classifier_proj_size": 8}, scores="classifier"),
]
# fmt: on

BY_HAND = [
    # Each tower ends in a Linear of its own: the head is the one that sees both.
    Architecture(
        "own-two_streams",
        lambda: (TwoStreams(), torch.zeros(2, 3, 32, 32)),
        blocks=16,
        first="rgb.layer1.0",
        last="depth.layer4.1",
        head="fc.input",
    ),
    Architecture(
        "own-two_heads",
        lambda: (TwoHeads(), torch.zeros(2, 3, 16, 16)),
        blocks=0,
        first=None,
        last=None,
        head="species.fc.input",  # of two heads, the one that is called first
        scores="species.fc sex.fc",
    ),
]

ARCHITECTURES = [*TORCHVISION, *TIMM, *TRANSFORMERS, *BY_HAND]
