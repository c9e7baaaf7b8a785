"""Reverse-mode differentiation of ONNX graphs into ONNX graphs."""

from fedge.autodiff.graphs import TrainingGraphs, training_graphs
from fedge.autodiff.registry import supported, vjp_rule
from fedge.autodiff.vjp import vjp

__all__ = ["TrainingGraphs", "supported", "training_graphs", "vjp", "vjp_rule"]
