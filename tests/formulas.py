"""The losses of distillation in plain numpy, and small examples to compute them on."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from geomkd.distillation.objectives import StepTensors, projectors_of
from geomkd.distillation.projectors import Meeting
from geomkd.network.layers import Layer

# ---- formulas ----


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy(z, y):
    return -log_softmax(z)[np.arange(len(y)), y].mean()


def kd(z, teacher_z, temperature):
    ours, theirs = log_softmax(z / temperature), log_softmax(teacher_z / temperature)
    return temperature**2 * (np.exp(theirs) * (theirs - ours)).sum(axis=1).mean()


def mse(a, b):
    return ((a - b) ** 2).mean()


def huber(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, d**2 / 2, d - 0.5).mean()


def unit_rows(x):
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True))


def cosine_distance(a, b):
    return (1 - (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))).mean()


def standardized_channels(t):
    axes = (0, *range(2, t.ndim))
    return (t - t.mean(axes, keepdims=True)) / t.std(axes, keepdims=True)


def pooled(x, side):
    """Mean over the cells of a grid of side x side, which overlap where they have to."""
    n = x.shape[2]
    cells = [slice(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    return np.stack([np.stack([x[:, :, a, b].mean((2, 3)) for b in cells], -1) for a in cells], 2)


def on_one_grid(s, t):
    side = min(s.shape[2], t.shape[2])
    return pooled(s, side), pooled(t, side)


def convolved(x, weight):
    """Convolution of stride 1, zeros outside, no bias."""
    size, (h, w) = weight.shape[2], x.shape[2:]
    edge = size // 2
    x = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    return sum(
        np.einsum("oc,bchw->bohw", weight[:, :, i, j], x[:, :, i : i + h, j : j + w])
        for i in range(size)
        for j in range(size)
    )


def normalized_relu(x):
    """ReLU of fresh batch normalisation in training mode."""
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    return np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0)


def projected(x, kind, weights):
    if kind == "none":
        return x
    if kind in ("linear", "hint"):
        x = convolved(x, weights[0])
        return normalized_relu(x) if kind == "hint" else x
    x = normalized_relu(convolved(x, weights[0]))
    x = convolved(normalized_relu(convolved(x, weights[1])), weights[2])
    return normalized_relu(x) if kind == "bottleneck" else x


def distances(x):
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(axis=2))
    return d / d[d > 0].mean()


def triples(x):
    n = range(len(x))
    edges = [[x[j] - x[i] for j in n] for i in n]
    edges = [[e / max(np.sqrt(e @ e), 1e-12) for e in row] for row in edges]
    return np.array([[[edges[i][j] @ edges[i][k] for k in n] for j in n] for i in n])


def attention(students, teachers, module):
    """Softmax over teacher layers of query times key, of rows of the batch's Gram matrices."""

    def embedded(networks, features):
        vectors = []
        for network, x in zip(networks, features, strict=True):
            a, b, c, d = (p.detach().numpy() for p in network.parameters())
            gram = x.reshape(len(x), -1) @ x.reshape(len(x), -1).T
            vectors.append(unit_rows(np.maximum(gram @ a.T + b, 0) @ c.T + d))
        return np.stack(vectors, axis=1)

    ours, theirs = embedded(module.queries, students), embedded(module.keys, teachers)
    e = np.exp(np.einsum("bsd,btd->bst", ours, theirs))
    return e / e.sum(axis=2, keepdims=True)


# ---- examples ----


def layer(kind, *shape, name="x"):
    return Layer(name, kind, shape)


def maps(channels, side, name="x"):
    return layer("map", channels, side, side, name=name)


# Teacher layer and student layer; the larger grid is once the one's, once the other's.
PAIRS = [
    (maps(6, 6, "t0"), maps(4, 4, "s0")),
    (maps(5, 3, "t1"), maps(4, 4, "s1")),
    (maps(5, 3, "t2"), maps(3, 3, "s2")),
]


def meeting_of(pairs, n=8, seed=0, features=None):
    return Meeting(pairs, n, torch.Generator().manual_seed(seed), lambda: features)


def weights_of(module):
    """Weights of a module's convolutions, in order."""
    found = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in found)
    return [m.weight.detach().numpy() for m in found]


def worked(objective, pairs=(), n=8):
    """Loss and parts of an objective on random float64 features and logits, and these as arrays."""
    rng = np.random.default_rng(0)
    arrays = SimpleNamespace(
        y=rng.integers(3, size=n),
        z=rng.normal(size=(n, 3)),
        teacher_z=3 * rng.normal(size=(n, 3)),
        s=[rng.normal(size=(n, *student.shape)) for _, student in pairs],
        t=[rng.normal(size=(n, *teacher.shape)) + 0.5 for teacher, _ in pairs],
    )
    theirs = [torch.tensor(x) for x in arrays.t]
    projectors = nn.ModuleList()
    if pairs:
        projectors = projectors_of(objective, meeting_of(pairs, n, features=theirs)).double()
    step = StepTensors(
        torch.tensor(arrays.y),
        torch.tensor(arrays.z),
        torch.tensor(arrays.teacher_z) if objective.uses_teacher_logits else None,
        [torch.tensor(x) for x in arrays.s],
        theirs,
        projectors,
    )
    loss, parts = objective(step)
    assert loss.dtype == torch.float64 and loss.shape == ()
    arrays.loss, arrays.parts = loss.item(), {name: part.item() for name, part in parts.items()}
    arrays.ce, arrays.projectors = cross_entropy(arrays.z, arrays.y), projectors
    return arrays
