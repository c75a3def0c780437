"""The student's step as it is run: hooked, compiled, and shared by several processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from geomkd.common.distributed import world
from geomkd.distillation.detached_head import taken, tapped
from geomkd.distillation.losses import at_least_float32
from geomkd.distillation.objectives import StepTensors
from geomkd.distillation.running.batches import part_of
from geomkd.distillation.running.setup import Networks, n_alike
from geomkd.network.forward import call, first_tensor, unwrap
from geomkd.network.hooks import as_written
from geomkd.network.masks import Masks, of_both, without_padding


class StudentStep(nn.Module):
    """Student, projectors and objective as one module: what is compiled and made data-parallel.

    ``features`` are what `tapped` yields, read after the student has run; ``autocast`` makes the
    context that the student alone runs in.
    """

    def __init__(self, networks: Networks, features: dict[str, Tensor], autocast: Any) -> None:
        super().__init__()
        self.student, self.projectors = unwrap(networks.student), networks.projectors
        self.networks, self.features, self.autocast = networks, features, autocast

    def forward(
        self,
        inputs: Any,
        labels: Tensor,
        teacher_features: Sequence[Tensor],
        teacher_logits: Tensor | None,
        mask: Masks = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss, its named parts, and the student's logits."""
        networks = self.networks
        self.features.clear()  # forward= need not call the student itself, whose hook does so
        with self.autocast():
            output = call(self.student, part_of(inputs, "student"), networks.forward)
        logits = first_tensor(output)
        if logits.shape[1:] != (networks.n_classes,):
            raise ValueError(
                f"the student returns {tuple(logits.shape)} in training and (B, "
                f"{networks.n_classes}) in evaluation: give forward= that makes them alike"
            )
        if not isinstance(output, Tensor) and (n := n_alike(output)) > networks.n_heads:
            raise ValueError(
                f"the student returns {n} tensors of logits in training and {networks.n_heads} in "
                "evaluation; only the first would be trained: give forward= that makes one of them"
            )
        ours = zip(taken(self.features, networks.student_layers), networks.layers, strict=True)
        theirs = zip(teacher_features, networks.layers, strict=True)
        mine, its = of_both(mask)
        ours = [without_padding(at_least_float32(x), layer, mine) for x, (_, layer) in ours]
        theirs = [without_padding(at_least_float32(x), layer, its) for x, (layer, _) in theirs]
        given = labels, at_least_float32(logits), teacher_logits, ours, theirs
        loss, parts = networks.objective(StepTensors(*given, self.projectors, mask))
        return loss, parts, logits


@contextmanager
def student_step(
    networks: Networks, autocast: Callable[[], AbstractContextManager], *, compile: bool = False
) -> Iterator[nn.Module]:
    """`StudentStep` that is hooked for as long as it is used; processes average its gradients.

    Raises
    ------
    ValueError
        A student with its teacher's head cannot be compiled.
    """
    if compile and getattr(networks.objective, "uses_teacher_head", False):
        raise ValueError(
            f"compile=True does not go with objective {networks.objective.name!r}: its student is "
            "ended by an exception at the teacher's head"
        )
    student = unwrap(networks.student)
    trained = {id(parameter) for group in networks.groups for parameter in group}
    idle = [p for p in student.parameters() if p.requires_grad and id(p) not in trained]
    plain = nullcontext() if compile else as_written()
    with plain, tapped(student, networks.student_layers, cut=networks.cut) as features:
        step: nn.Module = StudentStep(networks, features, autocast)
        try:
            for parameter in idle:  # the wrapper would wait for their gradients
                parameter.requires_grad_(False)
            if compile:
                step = torch.compile(step)
            yield DistributedDataParallel(step) if world().size > 1 else step
        finally:
            for parameter in idle:
                parameter.requires_grad_(True)


def gradients_averaged(model: nn.Module, *, now: bool) -> AbstractContextManager:
    """Context of a backward pass: gradients meet those of other processes now, or are kept back."""
    if now or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
