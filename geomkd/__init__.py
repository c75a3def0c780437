"""geomkd: which layers of a network hold knowledge worth teaching, and how sure are we."""

from geomkd.comparing import similarity_matrix
from geomkd.distillation import DistillationResult, distill
from geomkd.layers import Layer, candidate_layers, capture
from geomkd.measures import (
    KnowledgeQuality,
    efficiency,
    information,
    knowledge_quality,
    separation,
)
from geomkd.pairing import choose_layers, pair_layers
from geomkd.scores import LayerScores
from geomkd.scoring import score_layers

__all__ = [
    "DistillationResult",
    "KnowledgeQuality",
    "Layer",
    "LayerScores",
    "candidate_layers",
    "capture",
    "choose_layers",
    "distill",
    "efficiency",
    "information",
    "knowledge_quality",
    "pair_layers",
    "score_layers",
    "separation",
    "similarity_matrix",
]
__version__ = "0.1.0"
