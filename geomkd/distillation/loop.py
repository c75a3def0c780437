"""The distillation loop, from top to bottom: run, epoch, step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geomkd.common.distributed import summed, take_from_first, world
from geomkd.common.progress import Bar, bar_of
from geomkd.common.randomness import seed_of, seeded
from geomkd.distillation.losses import right
from geomkd.distillation.result import DistillationResult
from geomkd.distillation.running.batches import Batch, Batches, masks_of, part_of
from geomkd.distillation.running.checkpoint import Checkpoints
from geomkd.distillation.running.recipe import Recipe
from geomkd.distillation.running.run_state import Progress, Run, config_of, restore, state_of
from geomkd.distillation.running.setup import as_objective, join, placed
from geomkd.distillation.running.student_step import gradients_averaged, student_step
from geomkd.distillation.running.teacher import teacher_of
from geomkd.distillation.running.tracking import Means, scalars, told, warn_at_chance
from geomkd.geometry.precision import one_thread
from geomkd.network.forward import Forward, call, evaluating, first_tensor, multiplications

if TYPE_CHECKING:
    from pandas import DataFrame

# Multiplications of a step's forward passes. In a trial on two cores, two threads were as fast as
# one up to a third of that, 1.3 times at 1.3 times as many, 1.9 times at five times as many.
SMALL_STEP = 5e8
STEPS_BETWEEN_READINGS = 20  # of the losses: each reading waits for the device


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Any,
    *,
    pairs: list[tuple[str, str]] | None = None,
    objective: Any = "features",
    val: Any = None,
    epochs: int = 50,
    batch_size: int = 128,
    accumulate: int = 1,
    lr: float = 0.0075,
    lr_scale: Mapping[str, float] | None = None,
    weight_decay: float = 0.01,
    optimizer: Callable[[list[nn.Parameter]], Any] | None = None,
    schedule: Callable[[Any, int], Any] | None = None,
    clip_norm: float | None = None,
    head_clip_norm: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    compile: bool = False,
    channels_last: bool = False,
    augment: Callable[[Any], Any] | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_steps: int | None = None,
    resume: bool = True,
    cache_dir: str | os.PathLike | None = None,
    cache_dtype: str | None = None,
    log_dir: str | os.PathLike | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    forward: Forward | None = None,
    input_key: str | None = None,
    label_key: str | None = None,
    progress: bool = True,
) -> DistillationResult:
    """Train a student, in place, on a frozen teacher's features and on labels.

    Parameters
    ----------
    student : nn.Module
        Returns logits (B, n_classes), as many tensors of them in training as in evaluation mode.
        Parameters without ``requires_grad`` are not trained. A module without any others that is in
        evaluation mode stays in it, its parts too: what was frozen keeps its statistics.
    teacher : nn.Module or None
        Run in evaluation mode and left bit for bit as it is, but for its device. None will do for
        objectives without a teacher.
    train : pair of tensors, map-style Dataset, or DataLoader
        Inputs (or a mapping of them, such as a tokenizer's) and labels: class indices
        0 ... n_classes - 1, or rows (B, n_classes) of probabilities (>= 0, of sum 1), which the
        cross entropy takes as they are. A list of samples is a Dataset. Of a DataLoader the data
        set, ``collate_fn``, ``num_workers`` and ``worker_init_fn`` are used, and the samples of its
        sampler (each, or each of a subset, once); batches and their order are made here. Tokens
        that an ``attention_mask`` among the inputs marks as padding count in no loss. Inputs of
        batches with the keys "student" and "teacher" are each network's own, such as those of two
        tokenizers; how tokens meet is told in `geomkd.distillation.projectors.Alignment`.
    pairs : list of (str, str), optional
        Teacher layer and student layer, such as :func:`geomkd.pair_layers` gives; required by
        objectives that use features, ignored by the others.
    objective : str or object
        A name, with its published definition and weights: ``"features"`` (this method: error of the
        pairs for the backbone, cross entropy for the head), ``"ce"``, ``"kd"``,
        ``"kd_standardized"``, ``"fitnet"``, ``"attention_transfer"``, ``"similarity_preserving"``,
        ``"relational"``, ``"feature_kd"``, ``"semckd"`` or ``"simkd"``. Or an object of
        :mod:`geomkd.distillation.objectives` or :mod:`geomkd.distillation.rivals` with other
        options, a sum of such, or one of your own.
    val : optional
        Validation data in any form that ``train`` may have; no validation without it.
    epochs, batch_size : int
        Length of the run, and samples of a step over all processes. A last training batch of fewer
        than two samples a process is left out.
    accumulate : int
        Parts in which a process takes its share of a batch, where the whole does not fit.
    lr, weight_decay : float
        Of AdamW; ``lr`` is the largest rate of a one-cycle schedule with 30 % warm-up.
    lr_scale : mapping of str to float, optional
        Factors of the rate for the student's parameters whose names begin so; the longest prefix
        counts: ``{"": 0.01, "fc": 1.0}``.
    optimizer : callable, optional
        ``optimizer(parameters)`` makes what trains them in place of AdamW, with a rate of its own.
        It is called for backbone and projectors, and again for a head that is detached.
    schedule : callable, optional
        ``schedule(optimizer, steps_per_epoch)`` makes an `LRScheduler` in place of the one cycle;
        it is stepped after every step, not every epoch.
    clip_norm, head_clip_norm : float, optional
        Largest norm of the gradient of backbone and projectors, and apart from it of the head
        (``clip_norm`` by default), so that logit gradients cannot change the backbone's step.
    seed : int
        Seeds the order of the samples, the projectors, and the draws of layers and data sets.
    device : torch.device or str, optional
        Where to train; the student's own by default. Both models are moved there and stay.
    precision : {"fp32", "bf16", "fp16"}
        Type of the networks' products (autocast); losses and projectors are at least float32.
    compile : bool
        Run the student by ``torch.compile``.
    channels_last : bool
        Hold images and convolutions in the channels-last memory format.
    augment : callable, optional
        ``augment(inputs)`` on the device, for training batches; what it draws should be torch's.
    checkpoint_dir : path, optional
        Folder of this run alone: its state after every epoch, and after every ``checkpoint_steps``
        steps if given. The same call goes on where a killed one was, or returns its result; with
        ``resume=False`` it refuses a folder that has checkpoints.
    cache_dir : path, optional
        Folder where the teacher's answers are kept for all samples and read from in training; only
        without augmentation, and of texts of one width. ``cache_dtype="float16"`` halves the files.
    log_dir : path, optional
        Folder for TensorBoard's scalars (needs the extra ``geomkd[tensorboard]``).
    callbacks : sequence of callable, optional
        Called with each epoch's row of the history, a dict, in the first process, once the epoch's
        checkpoint is written. If one returns True the run ends, ``stopped``, in all processes. A
        run that goes on from the end of an epoch tells that epoch's row again. Weights & Biases:
        ``[wandb.log]``; MLflow: ``[lambda row: mlflow.log_metrics(row, step=row["epoch"])]``.
    forward : callable, optional
        ``forward(model, inputs)`` for models that are not simply called.
    input_key, label_key : str, optional
        Where inputs and labels are in batches that are mappings. Without ``input_key`` everything
        but the labels goes to the model as keyword arguments.
    progress : bool
        Show a progress bar.

    Returns
    -------
    DistillationResult
        With ``student``, the module that was given, in evaluation mode (after ``"simkd"`` a
        `WithTeacherHead` around it).

    Raises
    ------
    TypeError
        An argument of another type than these.
    ValueError
        Before any training: data, labels, pairs or models that do not fit together; a student in
        which a path from backbone to logits avoids the last paired layer (in evaluation mode, where
        it is looked for); train and val with classes of other names; a checkpoint of another
        run (the message names what differs).
    RuntimeError
        During training: a loss that is NaN or infinite.

    Warns
    -----
    UserWarning
        A damaged checkpoint (the one before is used), or one that could not be written; padding
        that no mask tells from tokens. A head that has learned nothing: its training accuracy in
        the last epoch is not two standard errors above the share of the commonest label (of
        1 / n_classes where only the samples tell it).

    Notes
    -----
    With an objective that detaches the head (``"features"``), no logit loss reaches the backbone:
    behind the last paired student layer the student goes on with a detached copy of its features.
    Parameters that neither the paired features nor the logits behind them reach are left alone.

    Under ``torchrun`` every process makes the same call, takes its share of each batch and returns
    the same history; the first one writes and shows the bar. Gradients are averaged over processes,
    so the run is that of one process but for what looks at a batch as a whole: batch normalisation
    (each process normalises its own share; running statistics are the first one's), losses between
    samples, channel standardisation, attention.

    Networks so small that threads would wait for each other train on one. The global random state
    is afterwards what it was before, also after an error or Ctrl-C.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geomkd.distillation import distill
    >>> def network(width):
    ...     return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0).long()
    >>> result = distill(network(8), network(16), (x, y), pairs=[("1", "1")], epochs=2,
    ...                  progress=False)
    >>> list(result.history)[:5]
    ['epoch', 'loss', 'features', 'cross_entropy', 'train_accuracy']

    SGD with steps at epochs 150, 180 and 210: ``distill(..., optimizer=sgd, schedule=steps)``

    >>> sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4)
    >>> steps = lambda o, n: torch.optim.lr_scheduler.MultiStepLR(o, [150 * n, 180 * n, 210 * n])
    """
    numbers = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "seed": seed}
    numbers |= {"lr": lr, "lr_scale": lr_scale, "weight_decay": weight_decay}
    numbers |= {"clip_norm": clip_norm, "head_clip_norm": head_clip_norm, "precision": precision}
    recipe = Recipe(**numbers, optimizer=optimizer, schedule=schedule)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks must be a list of functions of a row; got {callbacks!r}")
    objective = as_objective(objective)
    device = placed(student, teacher, device, channels_last=channels_last)
    autocast = recipe.autocast(device)
    keys = {"device": device, "input_key": input_key, "label_key": label_key}
    own_seed = seed if world().is_first else seed_of(seed, world().rank)
    with seeded(own_seed, device), ExitStack() as stack:
        train = Batches(train, recipe.training_order(objective), name="train", **keys)
        val = None if val is None else Batches(val, recipe.validation_order, name="val", **keys)
        options = {"batch_size": recipe.part_size, "seed": seed, "forward": forward}
        options["samples"] = partial(train.spread, recipe.part_size)
        asked = objective.uses_features or objective.uses_teacher_logits
        with one_thread():
            both = zip((student, teacher if asked else None), ("student", "teacher"), strict=True)
            parts = ((x, part_of(train.example(), name)) for x, name in both if x is not None)
            each = sum(multiplications(*part, forward) for part in parts)
        stack.enter_context(one_thread(recipe.part_size * each < SMALL_STEP))
        networks = join(student, teacher, objective, pairs, train.example(), **options)
        for batches in filter(None, (train, val)):
            batches.check_labels(networks.n_classes)
            batches.check_numbered_as(train)
        options = {"cache_dir": cache_dir, "cache_dtype": cache_dtype, "augment": augment}
        options |= {"autocast": autocast, "precision": precision, "progress": progress}
        ask_teacher = teacher_of(networks, train, **options)
        optimisers, schedules = recipe.optimisers(student, networks.groups, len(train.order))
        trains = {"optimisers": optimisers, "schedules": schedules, "scaler": recipe.scaler(device)}
        trains["model"] = stack.enter_context(student_step(networks, autocast, compile=compile))
        trains["callbacks"] = [*stack.enter_context(scalars(log_dir)), *callbacks]
        trains |= {"ask_teacher": ask_teacher, "augment": augment, "channels_last": channels_last}
        run = Run(networks, train, val, recipe, device, **trains)
        if checkpoint_dir is not None:
            run.checkpoints = Checkpoints(
                checkpoint_dir, config_of(run), every=checkpoint_steps, resume=resume
            )
        history = fit(run, progress)
    reached, known = history["train_accuracy"].iloc[-1], train.source.known_labels()
    warn_at_chance(reached, known, networks.n_classes, train.order.n_samples)
    what = (networks.projectors, history, networks.pairs, objective.name, len(history) < epochs)
    return DistillationResult(networks.student.eval(), *what)


def fit(run: Run, progress: bool) -> DataFrame:
    """Train for the epochs that are left; a row of the history for each epoch."""
    import pandas

    at = Progress()
    if run.checkpoints is not None and (state := run.checkpoints.load()) is not None:
        restore(run, at, state)
        if not at.step:  # it may have been killed before its callbacks were told
            at.stopped = told(run.callbacks, at.rows[-1])
    n = run.train.order.n_samples
    done = (at.epoch - 1) * n + at.step * run.recipe.batch_size
    options = {"show": progress, "unit": " samples", "initial": done, "leave": True}
    try:
        with bar_of(run.recipe.epochs * n, "distill", **options) as bar:
            while at.epoch <= run.recipe.epochs and not at.stopped:
                train_epoch(run, at, bar)
    finally:
        for optimiser in run.optimisers:
            optimiser.zero_grad(set_to_none=True)
    return pandas.DataFrame(at.rows)


def train_epoch(run: Run, at: Progress, bar: Bar) -> None:
    """Train on every batch once, or on those that are left; then validate and take notes."""
    run.networks.student.train()
    for module in run.networks.frozen:
        module.training = False
    n_steps = len(run.train.order)
    started = time.perf_counter() - at.seconds
    for parts in run.train.steps(at.epoch, at.step):
        for n_samples, values in train_step(run, parts):
            at.means.add(n_samples, **values)
        at.step += 1
        bar.update(run.train.order.size_of_step(at.step))
        total = (at.epoch - 1) * n_steps + at.step
        due = run.checkpoints is not None and at.step < n_steps and run.checkpoints.due(total)
        if at.step % STEPS_BETWEEN_READINGS == 0 or at.step == n_steps or due:
            now = at.means.read(at.epoch)
            shown = f"epoch={at.epoch}, loss={now['loss']:.4g}"
            bar.set_postfix_str(f"{shown}, accuracy={now['train_accuracy']:.3f}", refresh=False)
        if due:
            at.seconds = time.perf_counter() - started
            run.checkpoints.save(total, state_of(run, at))
    take_from_first(run.networks.student.buffers())  # such as batch normalisation's statistics
    row = {"epoch": at.epoch, **at.means.of_all_processes(at.epoch, run.device)}
    if run.val is not None:
        row["val_accuracy"] = accuracy(run)
    row |= {"lr": run.lr, "seconds": time.perf_counter() - started}
    at.rows.append(row)
    at.epoch, at.step, at.means, at.seconds = at.epoch + 1, 0, Means(), 0.0
    if run.checkpoints is not None:
        run.checkpoints.save((at.epoch - 1) * n_steps, state_of(run, at))
    at.stopped = told(run.callbacks, row)


def train_step(run: Run, parts: list[Batch]) -> list[tuple[int, dict[str, Tensor]]]:
    """One step on one batch, in one or more parts.

    Returns
    -------
    list of (int, dict of str to Tensor)
        Of each part the number of samples; loss, its parts and accuracy, still on the device.
    """
    done = []
    for optimiser in run.optimisers:
        optimiser.zero_grad(set_to_none=True)
    for batch in parts:
        inputs = run.prepared(batch.inputs, augment=True)
        teacher_features, teacher_logits = run.ask_teacher(inputs, batch.index)
        with gradients_averaged(run.model, now=batch is parts[-1]):
            loss, losses, logits = run.model(
                inputs, batch.labels, teacher_features, teacher_logits, masks_of(inputs)
            )  # behind the cut, if there is one, the logits have no way back to the backbone
            run.scaler.scale(loss * batch.share).backward()
        hits = right(logits, batch.labels).to(loss.dtype).mean()
        done.append((len(batch.labels), {"loss": loss, **losses, "train_accuracy": hits}))
    groups = zip(run.optimisers, run.networks.groups, run.recipe.clip_norms, strict=False)
    for optimiser, parameters, norm in groups:
        if norm is not None:
            run.scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(parameters, norm)
        run.scaler.step(optimiser)  # under fp16 left out where this group's gradient overflowed
    run.scaler.update()
    run.advance()
    return done


def accuracy(run: Run) -> float:
    """Share of the validation samples whose largest logit is their label's, in evaluation mode."""
    student, forward = run.networks.student, run.networks.forward
    correct = torch.zeros((), dtype=torch.int64, device=run.device)
    with evaluating(student), run.recipe.autocast(run.device)():
        for (batch,) in run.val.steps(epoch=0):
            inputs = part_of(run.prepared(batch.inputs), "student")
            logits = first_tensor(call(student, inputs, forward))
            correct += right(logits, batch.labels).sum()
    return int(summed(correct)) / run.val.order.n_samples
