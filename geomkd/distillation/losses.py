"""Losses as functions of tensors, at least in float32: what the objectives are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

NORMALIZATIONS = ("none", "channel")
DISTANCES = ("mse", "cosine", "huber")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision widened for a loss; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, C) against class indices (B,) or rows of probabilities (B, C).

    Averaged over the batch.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, labels if labels.ndim == 1 else labels.to(logits.dtype))


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit is the label's, or at the largest of its probabilities: (B,)."""
    return logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))


def softened_divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Parameters
    ----------
    logits, teacher_logits : Tensor, shape (B, n_classes)
        Student's and teacher's.
    temperature : float
        T; the factor T^2 keeps the gradient's size independent of it.
    """
    student = F.log_softmax(at_least_float32(logits) / temperature, dim=1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=1)
    divergence = F.kl_div(
        student, teacher.to(student.dtype), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence


def standardized_rows(logits: Tensor) -> Tensor:
    """``(z - mean) / (std + 1e-7)`` of every row, the deviation with n - 1.

    Parameters
    ----------
    logits : Tensor, shape (B, n_classes)
        Student's or teacher's.
    """
    z = at_least_float32(logits)
    return (z - z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 1e-7)


def standardize_channels(target: Tensor) -> Tensor:
    """Each channel, the second axis, with mean 0 and variance 1 over all other axes.

    Parameters
    ----------
    target : Tensor, shape (B, C, ...)
        A channel that is constant becomes 0.
    """
    axes = [axis for axis in range(target.ndim) if axis != 1]
    variance, mean = torch.var_mean(target, dim=axes, correction=0, keepdim=True)
    # Relative to the mean, so that rounding in a constant channel is not blown up to noise.
    return (target - mean) / (variance.sqrt() + 1e-5 * mean.abs() + 1e-12)


def feature_error(
    projected: Tensor, target: Tensor, *, distance: str = "mse", normalize: str = "none"
) -> Tensor:
    """Error of each sample's projected features, shape (B,).

    Parameters
    ----------
    projected, target : Tensor, shape (B, C, ...)
        Student's and teacher's.
    distance : {"mse", "cosine", "huber"}
        Mean of the squares over channels and positions; 1 - cosine over the channels, averaged over
        positions; mean of the Huber loss, quadratic within 1.
    normalize : {"none", "channel"}
        ``"channel"`` standardises the targets first.
    """
    projected, target = at_least_float32(projected), at_least_float32(target)
    if normalize == "channel":
        target = standardize_channels(target)
    target = target.to(projected.dtype)
    if distance == "cosine":
        error = 1 - F.cosine_similarity(projected, target, dim=1)
    elif distance == "huber":
        error = F.smooth_l1_loss(projected, target, reduction="none")
    else:
        error = F.mse_loss(projected, target, reduction="none")
    return error.flatten(1).mean(dim=1) if error.ndim > 1 else error


def attention_map(features: Tensor) -> Tensor:
    """Mean over channels of the squares, flattened and L2-normalised: (B, H W) of (B, C, H, W)."""
    return F.normalize(at_least_float32(features).square().mean(dim=1).flatten(1), dim=1)


def batch_similarity(features: Tensor) -> Tensor:
    """G = F F^T of the flattened features of a batch, every row L2-normalised: (B, B)."""
    rows = at_least_float32(features).flatten(1)
    return F.normalize(rows @ rows.T, dim=1)


def relative_distances(features: Tensor) -> Tensor:
    """Euclidean distances between the rows of a batch (B, C), over the mean of those above 0."""
    x = at_least_float32(features)
    # Not by way of the Gram matrix, in which the distances of close rows cancel.
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=torch.finfo(x.dtype).tiny)


def angles(features: Tensor) -> Tensor:
    """Cosine of the angle at row i between rows j and k of a batch (B, C): (B, B, B)."""
    x = at_least_float32(features)
    edges = F.normalize(x[None, :] - x[:, None], dim=2)
    return edges @ edges.transpose(1, 2)
