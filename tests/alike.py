"""Centred kernel alignment in plain numpy, and two layers that share something."""

import numpy as np
import torch


def pair(n=120, dx=200, dy=90, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(n, dx, generator=generator, dtype=torch.float64) + 0.4 * shared
    y = torch.randn(n, dy, generator=generator, dtype=torch.float64) - 0.4 * shared
    return x.to(dtype), y.to(dtype)


def hsic(k, l, debiased):  # noqa: E741
    """HSIC as Song et al. and Gretton et al. write it, on whole (n, n) arrays."""
    n = len(k)
    if not debiased:
        h = np.eye(n) - 1 / n
        return np.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    second = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + second - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def plain_cka(x, y, debiased=True):
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l, debiased) / np.sqrt(hsic(k, k, debiased) * hsic(l, l, debiased))
