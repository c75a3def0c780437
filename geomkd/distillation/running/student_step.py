"""The student's step as it is run: hooked, compiled, and shared by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from geomkd.common.distributed import world
from geomkd.distillation.detached_head import tapped
from geomkd.distillation.running.setup import Networks, StudentStep
from geomkd.network.forward import unwrap


@contextmanager
def student_step(
    networks: Networks, autocast: Callable[[], AbstractContextManager], *, compile: bool = False
) -> Iterator[nn.Module]:
    """Student, projectors and objective as one module, with hooks for as long as it is used.

    Parameters
    ----------
    networks : Networks
        What is trained.
    autocast : callable
        Makes the context that the student runs in.
    compile : bool
        Run it by ``torch.compile``.

    Yields
    ------
    nn.Module
        A `StudentStep`; in a wrapper that averages gradients where there are several processes.

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
    with tapped(student, networks.student_layers, cut=networks.cut) as features:
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
