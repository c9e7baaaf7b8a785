"""What every engine can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedge.config import TrainConfig
from fedge.types import Examples, Params


@dataclass(frozen=True)
class TrainResult:
    """What training a client's rows came to.

    Attributes:
        loss: Mean of the step losses, weighted by batch rows.
        steps: Optimizer steps taken.
        examples: Rows seen, repeats included.
    """

    loss: float
    steps: int
    examples: int


@dataclass(frozen=True)
class EvalResult:
    """What scoring rows came to.

    Attributes:
        loss: Mean loss over the rows.
        outputs: Model output name -> array, first axis the row.
    """

    loss: float
    outputs: Params


class TrainingEngine(Protocol):
    """One bundle's params, trained and scored.

    Inputs are *preprocessed* examples unless said otherwise; labels may be any integer or float
    dtype and are cast to the manifest's. Every method raises :class:`~fedge.errors.EngineError`
    when ONNX Runtime fails and :class:`~fedge.errors.DataError` when rows do not fit (no rows,
    shape, NaN, label range); neither harms the engine.
    """

    name: str

    def preprocess(self, raw: Examples, site: Params | None = None) -> Examples:
        """Run ``preprocess.onnx``; ``site`` holds its extra inputs where scaling is per site."""
        ...

    def get_params(self) -> Params:
        """Copies of all params, in manifest order."""
        ...

    def set_params(self, params: Params) -> None:
        """Overwrite the named params (any subset) and zero the optimizer's memory."""
        ...

    def train_step(self, batch: Examples, lr: float) -> float:
        """One optimizer step; returns the loss before it."""
        ...

    def train(self, data: Examples, config: TrainConfig, seed: int) -> TrainResult:
        """Steps over ``data`` in an order that depends on ``seed`` alone (see ``batches``)."""
        ...

    def gradients(self, batch: Examples) -> tuple[float, Params]:
        """Loss and gradients of the trainable params, without a step."""
        ...

    def evaluate(self, data: Examples, batch_size: int = 256) -> EvalResult:
        """Loss and outputs in inference mode."""
        ...

    def predict(self, inputs: Params, batch_size: int = 256) -> Params:
        """Outputs for preprocessed inputs, without labels."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the engine is unusable afterwards."""
        ...
