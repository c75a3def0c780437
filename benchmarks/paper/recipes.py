"""What the paper trains and how: pairs of networks, their layers, rates, methods."""

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
# Indices into `geomkd.candidate_layers`, from 0. The paper's picks by Q, for CIFAR-10, CIFAR-100
# and Tiny ImageNet; other data take CIFAR-10's.
PAPER_Q = {
    "vgg19_bn": {"cifar10": (11, 12, 13, 15), "tiny_imagenet": (11, 12, 13, 16)},
    "resnet34": {"cifar10": (12, 13, 14, 15)},
    "vit_b": {
        "cifar10": (9, 10, 11, 12),
        "cifar100": (7, 10, 11, 12),
        "tiny_imagenet": (7, 8, 11, 12),
    },
}
PAPER_EVEN = {"vgg19_bn": (3, 7, 11, 15), "resnet34": (3, 7, 13, 16), "vit_b": (2, 4, 8, 10)}
STUDENT_LAYERS = {
    "vgg11_bn": (1, 3, 5, 7),
    "resnet9": (1, 2, 3, 4),
    "mobilenet_v2": (3, 6, 13, 17),
    "vit_et": (1, 3, 5, 7),
}
CHOICES = ("paper_q", "paper_even", "auto")  # auto: the four of highest Q by our own scores
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
        ("teacher", teacher, PAPER_EVEN),
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
    """Teacher's and student's layer of each pair, for the choices that are the paper's."""
    teacher, dataset = combination.teacher, combination.dataset
    if combination.layers == "paper_q":
        picked = PAPER_Q[teacher]
        chosen = picked.get(dataset, picked["cifar10"])
    else:
        chosen = PAPER_EVEN[teacher]
    return list(zip(chosen, STUDENT_LAYERS[combination.student], strict=True))
