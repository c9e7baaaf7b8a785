"""Engines train and evaluate a bundle's params on local rows."""

from fedge.engines.base import EvalResult, TrainingEngine, TrainResult

__all__ = ["EvalResult", "TrainResult", "TrainingEngine"]
