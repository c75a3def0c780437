"""Measures of a layer's features: plain functions of tensors."""

from geomkd.measures.quality import (
    KnowledgeQuality,
    efficiency,
    information,
    knowledge_quality,
    separation,
)

__all__ = ["KnowledgeQuality", "efficiency", "information", "knowledge_quality", "separation"]
