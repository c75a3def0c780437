"""A student that ends in its teacher's head."""

import copy
from typing import Any, Self

import torch
from torch import Generator, Tensor, fx, nn

from geomkd.distillation.projectors import Projector, check_map, pooled_to, to_grid
from geomkd.network.forward import Forward, call, evaluating, first_tensor, modules_by_name, unwrap
from geomkd.network.hooks import features_of, target_of
from geomkd.network.layers import describe_layers


class WithTeacherHead(nn.Module):
    """A student up to one of its layers, a projector, and the frozen head of a teacher.

    Parameters
    ----------
    student, teacher : nn.Module
        The teacher's head is copied; the student is trained in place, its own head no longer used.
    pair : (str, str)
        Teacher layer behind which the head begins, and student layer; both must give maps.
    example : Tensor or whatever the models take
        A small batch.
    forward : callable, optional
        ``forward(model, inputs)`` for models that are not simply called.
    generator : torch.Generator, optional
        Source of the projector's initial weights.

    Raises
    ------
    ValueError
        Layers that are not maps, or a teacher whose head cannot be cut off there.

    Notes
    -----
    The projector is 1x1, 3x3 and 1x1 convolutions with half the teacher's channels between them. To
    use a saved student again, build it from student, teacher and pair and load its state.

    Examples
    --------
    >>> from torchvision.models import resnet18
    >>> images = torch.zeros(2, 3, 32, 32)
    >>> student = WithTeacherHead(
    ...     resnet18(num_classes=7), resnet18(num_classes=7), ("layer4.1", "layer3.1"), images)
    >>> student(images).shape
    torch.Size([2, 7])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pair: tuple[str, str],
        example: Any,
        *,
        forward: Forward | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        (theirs,) = describe_layers(teacher, [pair[0]], example, forward=forward)
        (ours,) = describe_layers(student, [pair[1]], example, forward=forward)
        for layer in (ours, theirs):
            check_map(layer, "a teacher's head is put on maps")
        sides = [x.shape[1:] if x.kind == "map" else x.shape[:2] for x in (ours, theirs)]
        self.layer, self.kind, self.head_kind = ours.name, ours.kind, theirs.kind
        self.grid = tuple(map(min, *sides))
        self.student = student
        self.projector = Projector(ours, theirs, kind="bottleneck", generator=generator).project
        self.head = FrozenHead(head_behind(teacher, theirs.name, example, forward=forward))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of what the student takes."""
        features = features_of(
            self.student,
            None,
            [self.layer],
            forward=lambda model, _: model(*args, **kwargs),
            take=lambda name, tensor: tensor,
        )
        maps = pooled_to(to_grid(features[self.layer], self.kind), self.grid)
        projected = self.projector(maps)
        return self.head(projected.movedim(1, -1) if self.head_kind == "map_last" else projected)


class FrozenHead(nn.Module):
    """A module that is not trained and never in training mode."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits."""
        return first_tensor(self.head(features))


def head_behind(
    model: nn.Module, name: str, example: Any, *, forward: Forward | None = None
) -> nn.Module:
    """Copy what a model does behind a layer, as a module of its features; checked on an example.

    Raises
    ------
    ValueError
        A model that ``torch.fx`` cannot trace, a path around the layer, or a copy that gives other
        logits.
    """
    root = unwrap(model)
    module, is_input, _ = target_of(name, modules_by_name(root))
    try:
        with evaluating(root):
            head = _traced_head(root, module, is_input)
            features = features_of(root, example, [name], forward=forward)[name]
            expected = first_tensor(call(root, example, forward))
            same = torch.allclose(first_tensor(head(features)), expected, rtol=1e-4, atol=1e-5)
    except Exception as error:  # what tracing foreign code raises has no end
        raise ValueError(
            f"the teacher's head behind {name!r} cannot be cut off: {error}".splitlines()[0]
        ) from error
    if not same:
        raise ValueError(f"the teacher's head behind {name!r} gives other logits on its own")
    return head


def _traced_head(root: nn.Module, module: nn.Module, is_input: bool) -> nn.Module:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, path: str) -> bool:
            return m is module or super().is_leaf_module(m, path)

    traced = fx.GraphModule(root, Tracer().trace(root))
    graph = traced.graph
    calls = [n for n in graph.nodes if n.op == "call_module"]
    calls = [n for n in calls if root.get_submodule(n.target) is module]
    if len(calls) != 1:
        raise ValueError(f"its module is called {len(calls)} times")
    cut = calls[0].args[0] if is_input else calls[0]
    with graph.inserting_after(cut):
        features = graph.placeholder("features")
    cut.replace_all_uses_with(features)
    graph.eliminate_dead_code()
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" and node is not features:
            if node.users:
                raise ValueError(f"a path avoids it, through {next(iter(node.users))}")
            graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return copy.deepcopy(traced)
