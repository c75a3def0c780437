"""What knowledge quality must be: stored cases, and the definitions written down row by row."""

import json
import math
from pathlib import Path

import numpy as np

CASES = json.loads((Path(__file__).parent / "files" / "knowledge_quality.json").read_text())
DEFINITIONS = ("published", "robust")


def make_input(case):
    """Features (n, *shape), float32, and labels (n,) of a stored case."""
    rng = np.random.default_rng(case["seed"])
    n, classes, d = case["n"], case["classes"], math.prod(case["shape"])
    mu = rng.standard_normal((classes, d))
    y = np.arange(n) % classes
    x = case["sep"] * mu[y] + case["noise"] * rng.standard_normal((n, d))
    if "rank" in case:
        basis = rng.standard_normal((case["rank"], d)) / np.sqrt(d)
        within = rng.standard_normal((n, case["rank"])) @ basis
        floor = case["floor"] * rng.standard_normal((n, d))
        x = case["sep"] * mu[y] + case["noise"] * within + floor
    x = np.maximum(x, 0) if case["relu"] else x
    x = ((x + case["offset"]) * case["scale"]).astype(np.float32)
    return x.reshape(n, *case["shape"]), y


def clusters(n=120, d=24, classes=4, *, seed=0, sep=1.0, noise=1.0, relu=False):
    """Gaussian classes: float32 features (n, d) and labels (n,)."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = sep * rng.standard_normal((classes, d))[y] + noise * rng.standard_normal((n, d))
    return np.maximum(x, 0).astype(np.float32) if relu else x.astype(np.float32), y


def values_of(q):
    """Everything in a result, by name."""
    terms = {name: getattr(q, name) for name in TERMS}
    return terms | q.details


TERMS = ("quality", "separation", "information", "efficiency")


def reference(x, y, dataset_size=None, definition="published"):
    """Every statistic in float64, by loops over classes and rows; no sharing, no Gram tricks."""
    x = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    of = [np.flatnonzero(y == name) for name in np.unique(y)]
    statistics = {"published": _published, "robust": _robust}[definition]
    out = statistics(x, y, of, dataset_size or len(x))
    out["quality"] = out["separation"] + math.sqrt(max(0.0, out["information"] * out["efficiency"]))
    return out


def _published(x, y, of, dataset_size):
    n, d = x.shape
    cosine = np.abs(_cosines(x))
    within = np.mean([cosine[np.ix_(a, a)].mean() for a in of])
    between = np.mean(
        [cosine[np.ix_(a, b)].mean() for i, a in enumerate(of) for j, b in enumerate(of) if i != j]
    )
    least = np.mean([cosine[np.ix_(a, a)].min() for a in of])
    spectra = [_spectrum(x[a]) for a in of]
    most = max(len(a) for a in of) - 1
    k = [min(most, 1 + int(np.sum(np.cumsum(p) < 0.95))) if p.any() else 1 for p in spectra]
    kept = [p[: sum(k)] for p in spectra]
    entropy = np.mean([_entropy(p / p.sum() if p.any() else p) for p in kept])
    nearest = _nearest_other(x, y)
    delta = np.mean([nearest[a].min() for a in of])
    nu = np.mean([np.linalg.norm(x[a], axis=1).mean() for a in of])
    factor = (dataset_size / math.pi) ** (1 / min(n, d))
    return {
        "separation": within - between,
        "information": (1 - least) * entropy / math.log(5),
        "efficiency": 2 * delta / nu * factor if nu else 0.0,
        "mean_within_cosine": within,
        "mean_between_cosine": between,
        "min_within_cosine": least,
        "class_entropy": entropy,
        "class_dimension_95": np.mean(k),
        "nearest_other_class_distance": delta,
        "mean_norm": nu,
        "size_factor": factor,
    }


def _robust(x, y, of, dataset_size):
    d = x.shape[1]
    largest = np.abs(x).max()
    centred = x - x.mean(axis=0)
    centred[np.abs(centred).max(axis=1) <= 1e-14 * largest] = 0  # what rounding the mean leaves
    cosine = _cosines(centred)
    pairs = [cosine[np.ix_(a, a)][np.triu_indices(len(a), 1)] for a in of]
    within = np.mean([p.mean() for p in pairs])
    between = np.mean(
        [cosine[np.ix_(a, b)].mean() for i, a in enumerate(of) for j, b in enumerate(of) if i != j]
    )
    low = np.mean([np.quantile(p, 0.05) for p in pairs])
    most = [math.log(min(len(a) - 1, d)) for a in of]
    entropy = np.mean(
        [_entropy(_spectrum(x[a])) / m if m else 0.0 for a, m in zip(of, most, strict=True)]
    )
    nearest = _nearest_other(x, y)
    delta = np.mean([np.median(nearest[a]) for a in of])
    rms = math.sqrt(np.mean(np.sum(centred**2, axis=1)))
    return {
        "separation": within - between,
        "information": (1 - low) / 2 * entropy,
        "efficiency": 2 * delta / rms if rms else 0.0,
        "mean_within_cosine": within,
        "mean_between_cosine": between,
        "low_within_cosine": low,
        "class_entropy": entropy,
        "nearest_other_class_distance": delta,
        "rms_norm": rms,
    }


def _cosines(x):
    norm = np.linalg.norm(x, axis=1)
    unit = x / np.where(norm > 0, norm, 1)[:, None]
    return unit @ unit.T


def _spectrum(block):
    """Squared singular values about the mean over their sum, falling; zeros without variance."""
    scale = np.abs(block).max()
    p = np.linalg.svd(block - block.mean(axis=0), compute_uv=False) ** 2
    return p / p.sum() if p.sum() > (1e-14 * scale) ** 2 * block.size else np.zeros_like(p)


def _entropy(p):
    p = p[p > 0]
    return -np.sum(p * np.log(p))


def _nearest_other(x, y):
    return np.array(
        [np.linalg.norm(x[y != label] - row, axis=1).min() for row, label in zip(x, y, strict=True)]
    )
