"""The arithmetic over updates: streaming, one file per rule, no Flower."""

from fedge.aggregation.mean import WeightedMean

__all__ = ["WeightedMean"]
