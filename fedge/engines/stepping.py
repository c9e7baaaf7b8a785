"""Training as a sequence of steps, and what a step may do to a gradient, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fedge.artifacts.estimate import Frugal
from fedge.config import TrainConfig
from fedge.engines.base import TrainResult
from fedge.errors import EngineError
from fedge.params import l2_norm
from fedge.types import Array, Indices, Params

Step = Callable[[Indices, float], float]  # rows of the batch, learning rate -> the loss before it
_CLIP_FLOOR = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def run_steps(
    step: Step, batches: Iterator[Indices], rates: Iterator[float] | None, lr: float
) -> TrainResult:
    """One step per batch, at ``lr`` or at the next of ``rates``.

    Raises:
        EngineError: If training diverged.
    """
    total, steps, seen = 0.0, 0, 0
    for chosen in batches:
        total += step(chosen, lr if rates is None else next(rates)) * len(chosen)
        seen += len(chosen)
        steps += 1
    return TrainResult(finite_loss(total / seen, steps), steps, seen)


def in_pieces(config: TrainConfig, frugal: Frugal) -> TrainConfig:
    """The same training with batches cut in as many pieces as memory asks for."""
    if frugal.pieces <= config.accumulate:
        return config
    return config.replace(accumulate=frugal.pieces)


def finite_loss(loss: float, steps: int) -> float:
    """The loss, if it is a number.

    Raises:
        EngineError: If training diverged.
    """
    if not math.isfinite(loss):
        raise EngineError(f"training diverged: the loss is {loss} after {steps} steps; lower lr")
    return loss


class Shaper:
    """Gradients of a batch in pieces, with a proximal term, clipped; what ``update.onnx`` does.

    Args:
        config: Clipping, pieces, proximal term.
        gradients: Trained param -> its gradient, where each piece leaves it and the optimizer
            reads it; written to.
        params: Trained param -> its value.
        held: Those a proximal term holds to the values they have now.
    """

    def __init__(
        self,
        config: TrainConfig,
        gradients: Mapping[str, Array],
        params: Mapping[str, Array],
        held: tuple[str, ...],
    ) -> None:
        self._config, self._gradients, self._params = config, gradients, params
        self._bases = {n: np.array(params[n]) for n in held if config.proximal_mu}

    def gather(self, piece: Callable[[Indices], float], chosen: Indices) -> float:
        """Run ``piece`` on each piece of the batch, then shape what they found; gives the loss."""
        parts = np.array_split(chosen, min(self._config.accumulate, len(chosen)))
        sums: Params = {}
        loss = 0.0
        for part in parts:
            share = len(part) / len(chosen)
            loss += piece(part) * share
            if len(parts) > 1:
                sums = add_piece(self._gradients, sums, share)
        self._shape()
        return loss

    def _shape(self) -> None:
        grads = self._gradients
        for name, base in self._bases.items():
            grads[name][...] += np.float32(self._config.proximal_mu) * (self._params[name] - base)
        if self._config.clip_norm is not None:
            factor = self._config.clip_norm / (l2_norm(dict(grads)) + _CLIP_FLOOR)
            for grad in grads.values():
                np.multiply(grad, np.float32(min(factor, 1.0)), out=grad)


def add_piece(gradients: Mapping[str, Array], sums: Params, share: float) -> Params:
    """Leave ``sums`` + share·gradient in ``gradients``, and give a copy of it."""
    for name, grad in gradients.items():
        np.multiply(grad, np.float32(share), out=grad)
        if sums:
            np.add(grad, sums[name], out=grad)
    return {n: g.copy() for n, g in gradients.items()}
