"""Measures of a layer's features: plain functions of tensors.

What their names do not tell of them as they are by default: ``effective_rank`` and
``spectral_entropy`` are centred, of singular values; ``participation_ratio`` is the plain one, and
``debiased=True`` corrects it for the number of rows alone; ``logme`` is not centred; ``h_score``
has a shrunk covariance, ``gbc`` diagonal ones; ``cka`` is debiased.
"""

from geomkd.measures.collapse import NeuralCollapse, fisher_ratio, neural_collapse
from geomkd.measures.dimension import mle_dimension, two_nn
from geomkd.measures.null import WithNull
from geomkd.measures.probe import linear_probe
from geomkd.measures.quality import (
    KnowledgeQuality,
    efficiency,
    information,
    knowledge_quality,
    separation,
)
from geomkd.measures.separability import knn_accuracy, nearest_class_mean, silhouette
from geomkd.measures.similarity import cka, procrustes_distance
from geomkd.measures.spectrum import (
    effective_rank,
    isotropy,
    participation_ratio,
    pca_dimension,
    power_law_alpha,
    spectral_entropy,
)
from geomkd.measures.transfer import gbc, h_score, logme

__all__ = [
    "KnowledgeQuality",
    "NeuralCollapse",
    "WithNull",
    "cka",
    "effective_rank",
    "efficiency",
    "fisher_ratio",
    "gbc",
    "h_score",
    "information",
    "isotropy",
    "knn_accuracy",
    "knowledge_quality",
    "linear_probe",
    "logme",
    "mle_dimension",
    "nearest_class_mean",
    "neural_collapse",
    "participation_ratio",
    "pca_dimension",
    "power_law_alpha",
    "procrustes_distance",
    "separation",
    "silhouette",
    "spectral_entropy",
    "two_nn",
]
