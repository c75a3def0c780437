"""Distillation: train a student on the features of chosen teacher layers."""

from geomkd.distillation.loop import distill
from geomkd.distillation.result import DistillationResult

__all__ = ["DistillationResult", "distill"]
