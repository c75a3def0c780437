"""Linear probe: how well a linear classifier of one layer's features does on samples held out."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from geomkd.common.checks import check_number
from geomkd.geometry.draws import held_out
from geomkd.geometry.precision import inverse
from geomkd.geometry.principal import Principal
from geomkd.measures.measure import Measure
from geomkd.measures.null import WithNull, principal_against_null

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

_ITERATIONS = 100  # of Newton's method; a fit takes about ten
_GRADIENT = 1e-6  # largest entry at which a fit ends


def linear_probe(
    features: Any,
    labels: Any,
    *,
    test_share: float = 0.3,
    C: float = 10.0,
    null: int = 0,
    seed: int = 0,
) -> Tensor | WithNull:
    """Held-out accuracy of multinomial logistic regression with an L2 penalty.

    ``features`` (n, ...), ``labels`` (n,) or (n, C), ``null``, ``seed`` (of the split too) and
    errors as in `geomkd.knowledge_quality`.

    Parameters
    ----------
    test_share : float
        Share of each class that is held out, 0 < test_share < 1.
    C : float
        Inverse strength of the penalty, as in scikit-learn; above 0.

    Returns
    -------
    Tensor, shape (), or WithNull
        Share of the held-out rows classified rightly, float64, on the features' device.

    Warns
    -----
    UserWarning
        A fit ended away from its optimum.

    Notes
    -----
    Minimises ``sum_w |w|^2 / 2 + C sum_i loss_i`` over the training rows z (intercepts are free;
    two classes: one weight vector, as in scikit-learn) for z = (x - m) / s: m their mean and s the
    root mean square of |x - m|, not of single features. So one C means the same penalty at any
    scale and width, and shift, rotation and scale leave the accuracy as it is. The default C was
    the best power of ten on average over 16 layers, pooled and flat, of a small network trained on
    CIFAR-10 (n = 1,000; at n = 300 0.002 below the best); another gains up to 0.05 on single ones.

    Not the training accuracy, which is 1 even on pure noise (n = 500, d = 512, ten classes; held
    out: chance). With few samples it says as much of n and C as of the layer: compare layers at
    equal n, and by no less than the standard error, sqrt(a (1 - a) / (test_share n)). Features that
    are constant over the training rows give the share of the largest class.

    Cost: `principal`, and for each fit (one, and one a permutation) about ten Newton steps of
    some tens of products n r C, on the CPU: with n = 1,000 and r = 700 on one thread 0.3 to 0.6 s
    for 10 classes, 0.7 to 1.2 s for 100.

    References
    ----------
    Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016.

    Examples
    --------
    >>> import torch
    >>> from geomkd.measures.probe import linear_probe
    >>> y = torch.arange(40) % 2
    >>> x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    >>> x[:, 0] += 8.0 * y
    >>> linear_probe(x, y)
    tensor(1., dtype=torch.float64)
    """
    share = check_number(test_share, "test_share", above=0, below=1)
    strength = check_number(C, "C", above=0)
    score = partial(linear_probe_from, test_share=share, C=strength, seed=seed)
    return principal_against_null(score, features, labels, null, seed)


def linear_probe_from(
    principal: Principal,
    index: Tensor,
    n_classes: int,
    *,
    test_share: float = 0.3,
    C: float = 10.0,
    seed: int = 0,
) -> Tensor:
    """`linear_probe` of principal coordinates and class indices, both of any subset of rows.

    The penalty is the same on any orthonormal axes, so the fit on the r principal coordinates is
    the fit on the d features.
    """
    train, test = held_out(index, n_classes, test_share, seed)
    z = standardised(principal.coordinates, train).cpu().numpy()
    z = z if z.shape[1] else np.zeros((len(z), 1))  # of no variance: scikit-learn wants a feature
    y, train, test = index.cpu().numpy(), train.cpu().numpy(), test.cpu().numpy()
    right = _fitted(z[train], y[train], C).predict(z[test]) == y[test]
    return principal.coordinates.new_tensor(right.mean())


def standardised(coordinates: Tensor, train: Tensor) -> Tensor:
    """Rows minus the training rows' mean, over their root mean square distance from it."""
    share = train.double() / train.sum()
    centred = coordinates - share @ coordinates
    sq_norms = centred.square().sum(dim=1)
    mean_sq = share @ sq_norms
    floor = len(coordinates) * torch.finfo(torch.float64).eps * sq_norms.mean()
    # Training rows that are equal differ by the rounding of their coordinates.
    return centred * torch.where(mean_sq > floor, inverse(mean_sq.sqrt()), 0.0)


def _fitted(z: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    """Logistic regression of training rows; warns where it ended away from its optimum."""
    from sklearn.linear_model import LogisticRegression  # slow to import

    model = LogisticRegression(C=C, solver="newton-cg", tol=_GRADIENT, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # worded by solver and version; the gradient says it all
        model.fit(z, y)
    gradient = _largest_gradient(model, z, y)
    if not gradient <= 10 * _GRADIENT:  # a line search may end on rounding a little earlier
        warnings.warn(
            f"a linear probe with C = {C:g} ended away from its optimum, after "
            f"{model.n_iter_.max()} iterations: the largest entry of its gradient is "
            f"{gradient:.1e}, not {_GRADIENT:.0e}; a smaller C converges sooner",
            stacklevel=3,
        )
    return model


def _largest_gradient(model: LogisticRegression, z: np.ndarray, y: np.ndarray) -> float:
    """Of ``mean_i loss_i + sum_w |w|^2 / (2 C n)``, intercepts included."""
    slopes = model.coef_  # (1, r) for two classes: the second's
    error = (model.predict_proba(z) - (y[:, None] == model.classes_))[:, -len(slopes) :]
    of_slopes = error.T @ z / len(z) + slopes / (model.C * len(z))
    return max(np.abs(of_slopes).max(), np.abs(error.mean(axis=0)).max())


ROWS = (Measure("linear_probe", "spectrum", linear_probe_from, supervised=True, seeded=True),)
