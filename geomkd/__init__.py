"""geomkd: which layers of a network hold knowledge worth teaching, and how sure are we."""

from geomkd.distillation import DistillationResult, distill
from geomkd.distillation.pairing import choose_layers, pair_layers
from geomkd.measures import KnowledgeQuality, efficiency, information, knowledge_quality, separation
from geomkd.network.hooks import capture
from geomkd.network.layers import Layer, candidate_layers
from geomkd.scoring.layer_scores import LayerScores
from geomkd.scoring.score_layers import score_layers
from geomkd.scoring.similarity_matrix import similarity_matrix

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
