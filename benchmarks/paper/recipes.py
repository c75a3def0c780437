"""What is trained, after the paper: pairs of networks, their layers, rates, methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from geomkd.distillation.rivals import OBJECTIVES

# Largest rates of the one-cycle schedule, for teachers and students alike.
LARGEST_RATE = {
    "vgg19_bn": 0.005,
    "vgg11_bn": 0.005,
    "resnet34": 0.0075,
    "resnet9": 0.0075,
    "mobilenet_v2": 0.0075,
    "vit_b": 1e-4,
    "vit_et": 1e-3,
}
PRETRAINED_RATE = 0.01  # factor on the rate of weights that come from ImageNet

PAIRS = [
    ("vgg19_bn", "vgg11_bn"),
    ("resnet34", "resnet9"),
    ("resnet34", "mobilenet_v2"),
    ("vit_b", "vit_et"),
]
# Layers as the paper numbers them, from 0; `layer_indices` tells which of our candidates they are.
# The first of a dict are CIFAR-10's, which other data take; CIFAR-100 and Tiny ImageNet where they
# differ. Chosen by Q, and by S, I, E and sqrt(I E) alone.
PAPER = {
    "paper_q": {
        "vgg19_bn": {"cifar10": (11, 12, 13, 15), "tiny_imagenet": (11, 12, 13, 16)},
        "resnet34": {"cifar10": (12, 13, 14, 15)},
        "vit_b": {
            "cifar10": (9, 10, 11, 12),
            "cifar100": (7, 10, 11, 12),
            "tiny_imagenet": (7, 8, 11, 12),
        },
    },
    "paper_s": {
        "vgg19_bn": {"cifar10": (15, 16, 17, 18)},
        "resnet34": {"cifar10": (14, 15, 16, 17)},
        "vit_b": {"cifar10": (9, 10, 11, 12)},
    },
    "paper_i": {
        "vgg19_bn": {"cifar10": (8, 9, 10, 11), "tiny_imagenet": (9, 10, 11, 12)},
        "resnet34": {"cifar10": (11, 12, 13, 14)},
        "vit_b": {
            "cifar10": (9, 10, 11, 12),
            "cifar100": (7, 10, 11, 12),
            "tiny_imagenet": (7, 8, 10, 11),
        },
    },
    "paper_e": {
        "vgg19_bn": {
            "cifar10": (7, 8, 9, 10),
            "cifar100": (7, 8, 9, 11),
            "tiny_imagenet": (8, 9, 10, 11),
        },
        "resnet34": {"cifar10": (11, 12, 13, 14), "cifar100": (12, 13, 14, 15)},
        "vit_b": {
            "cifar10": (7, 8, 10, 11),
            "cifar100": (7, 10, 11, 12),
            "tiny_imagenet": (6, 7, 8, 11),
        },
    },
    "paper_ie": {
        "vgg19_bn": {"cifar10": (7, 8, 9, 11), "tiny_imagenet": (8, 9, 10, 11)},
        "resnet34": {"cifar10": (11, 12, 13, 14), "tiny_imagenet": (12, 13, 14, 15)},
        "vit_b": {
            "cifar10": (9, 10, 11, 12),
            "cifar100": (7, 10, 11, 12),
            "tiny_imagenet": (7, 8, 9, 11),
        },
    },
    "paper_even": {
        "vgg19_bn": {"cifar10": (3, 7, 11, 15)},
        "resnet34": {"cifar10": (3, 7, 13, 16)},
        "vit_b": {"cifar10": (2, 4, 8, 10)},
    },
}
TEACHERS = tuple(PAPER["paper_even"])
STUDENT_LAYERS = {
    "vgg11_bn": (1, 3, 5, 7),
    "resnet9": (1, 2, 3, 4),
    "mobilenet_v2": (3, 6, 13, 17),
    "vit_et": (1, 3, 5, 7),
}
# The paper's index 0 of a transformer is the embedding, which is no candidate: l is block l - 1.
BEFORE_FIRST = {"vit_b": 1, "vit_et": 1}
CHOICES = (*PAPER, "auto")  # auto: the four of highest Q by our own scores
NEEDS_MAPS = ("attention_transfer", "simkd")


@dataclass(frozen=True)
class Recipe:
    """Options of a run that its results depend on; the defaults are the paper's.

    ``imagenet`` is the beginning of the SHA-256 of the file that the teacher's body came from.
    """

    epochs: int = 50
    batch_size: int = 128
    weight_decay: float = 0.01
    augment: bool = False
    validation: bool = False
    subset: int | None = None
    precision: str = "fp32"
    imagenet: str | None = None

    @property
    def suffix(self) -> str:
        """Options that are not the paper's, for names of files.

        Examples
        --------
        >>> Recipe(epochs=1, augment=True).suffix
        '-epochs=1-augment=True'
        """
        return "".join(
            f"-{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )


@dataclass(frozen=True)
class Combination:
    """A student's training, up to its seed."""

    dataset: str
    teacher: str
    student: str
    method: str
    layers: str | None  # one of `CHOICES`; None for methods that use no features
    recipe: Recipe = Recipe()

    @property
    def name(self) -> str:
        """For names of files, the data set left out."""
        parts = [self.teacher, self.student, self.method, self.layers]
        return "-".join(filter(None, parts)) + self.recipe.suffix

    @property
    def obstacle(self) -> str | None:
        """Why the method cannot be used here, if it cannot."""
        if self.method in NEEDS_MAPS and "vit" in self.teacher + self.student:
            return "needs maps, and transformers have tokens"
        return None


def combination(
    dataset: str, teacher: str, student: str, method: str, layers: str, recipe: Recipe
) -> Combination:
    """Checked combination; ``layers`` is dropped where the method uses no features.

    Raises
    ------
    ValueError
        A name that is not one of those known.
    """
    for what, name, known in (
        ("teacher", teacher, TEACHERS),
        ("student", student, STUDENT_LAYERS),
        ("method", method, OBJECTIVES),
        ("layers", layers, CHOICES),
    ):
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}; got {name!r}")
    chosen = layers if OBJECTIVES[method]().uses_features else None
    return Combination(dataset, teacher, student, method, chosen, recipe)


def all_combinations(
    datasets: list[str], recipe: Recipe, imagenet: dict[str, str] | None = None
) -> Iterator[Combination]:
    """The grid in order: every method on evenly spaced layers, ours also on the other choices.

    ``imagenet`` has the hash of the weights' file for the teachers that start from one.
    """
    for dataset in datasets:
        for teacher, student in PAIRS:
            own = replace(recipe, imagenet=(imagenet or {}).get(teacher))
            for method in OBJECTIVES:
                for layers in CHOICES if method == "features" else ["paper_even"]:
                    yield combination(dataset, teacher, student, method, layers, own)


def layer_indices(combination: Combination) -> list[tuple[int, int]]:
    """Teacher's and student's layer of each pair among `geomkd.candidate_layers`, from 0.

    Of the choices that are the paper's.
    """
    picked = PAPER[combination.layers][combination.teacher]
    chosen = picked.get(combination.dataset, picked["cifar10"])
    shift = BEFORE_FIRST.get(combination.teacher, 0)
    return [(t - shift, s) for t, s in zip(chosen, student_layers(combination), strict=True)]


def student_layers(combination: Combination) -> list[int]:
    """Student's paired layers among `geomkd.candidate_layers`, from 0."""
    shift = BEFORE_FIRST.get(combination.student, 0)
    return [i - shift for i in STUDENT_LAYERS[combination.student]]
