"""Steps of the ``ort`` engine that do more to a gradient than take it.

Such a step is two runs: ``grad.onnx``, once per piece of the batch, and ``update.onnx``, which
adds the proximal term, clips, and is the optimizer. Plain steps are one run of ``step.onnx``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fedge.artifacts.manifest import Manifest
from fedge.config import TrainConfig
from fedge.engines.feed import Feed
from fedge.engines.memory import NEXT, Memory
from fedge.engines.runtime import Session
from fedge.engines.stepping import add_piece
from fedge.types import Array, Indices, Params

GRAD_OF, BASE_OF = "@grad", "@base"
KEPT_SIZES = 4  # batch sizes whose buffers are kept
_Bound = tuple[Params, tuple[Any, Any]]


class ShapedSteps:
    """Takes such steps, one per call, with the settings of one training call.

    Args:
        sessions: Of ``grad.onnx`` and ``update.onnx``.
        memory: What they read and write.
        manifest: The bundle's.
        config: Clipping, pieces, proximal term; its base is what ``memory`` holds now.
    """

    def __init__(
        self,
        sessions: tuple[Session, Session],
        memory: Memory,
        manifest: Manifest,
        config: TrainConfig,
    ) -> None:
        self._grad, update = sessions
        self._memory, self._manifest, self._pieces = memory, manifest, config.accumulate
        memory.share_all_but([*self._grad.outputs, *update.outputs])
        self._lr, self._loss = np.zeros((), np.float32), np.zeros((), np.float32)
        self._gradients = _buffers(self._grad.outputs, GRAD_OF, memory.now)
        self._changed = _buffers(self._grad.outputs, NEXT, memory.now)
        self._bound: dict[Hashable, _Bound] = {}
        self._update, self._updates = update.raw, self._bind_update(update, config)

    def step(self, feed: Feed, chosen: Indices, lr: float) -> float:
        """One step on the chosen rows; returns the loss before it, without the proximal term."""
        memory = self._memory
        loss, sums = 0.0, dict[str, Array]()
        parts = np.array_split(chosen, min(self._pieces, len(chosen)))
        for part in parts:
            share = len(part) / len(chosen)
            loss += self._piece(feed, part) * share
            if len(parts) > 1:
                sums = add_piece(self._gradients, sums, share)
        self._lr[...] = lr
        self._update.run_with_iobinding(self._updates[memory.current])
        memory.current ^= 1
        return loss

    def _piece(self, feed: Feed, chosen: Indices) -> float:
        """Gradients of one piece, and what it changes without gradient, in both sets."""
        memory = self._memory
        size = len(chosen)
        buffers, bindings = self._bound.get(feed.key(size)) or self._bind(feed, size)
        feed.fill(buffers, chosen)
        self._grad.raw.run_with_iobinding(bindings[memory.current])
        for name, value in self._changed.items():
            for one in memory.sets:
                one[name.removesuffix(NEXT)][...] = value
        loss: float = self._loss.item()
        return loss

    def _bind(self, feed: Feed, size: int) -> _Bound:
        if len(self._bound) >= KEPT_SIZES:
            self._bound.pop(next(iter(self._bound)))
        rows = feed.buffers(size)
        targets = {**self._gradients, **self._changed, "loss": self._loss}
        first, second = (self._memory.binding(self._grad.raw, i, rows, targets) for i in (0, 1))
        self._bound[feed.key(size)] = rows, (first, second)
        return rows, (first, second)

    def _bind_update(self, session: Session, config: TrainConfig) -> tuple[Any, Any]:
        limit = math.inf if config.clip_norm is None else config.clip_norm
        given: Params = {
            "lr": self._lr,
            "optimizer@proximal_mu": np.array(config.proximal_mu, np.float32),
            "optimizer@clip_norm": np.array(limit, np.float32),
            **self._gradients,
        }
        held = [n for n in session.inputs if n.endswith(BASE_OF)]
        bases = {n: self._memory.now[n.removesuffix(BASE_OF)].copy() for n in held}

        def bound(source: int) -> Any:  # noqa: ANN401 - onnxruntime's
            now = self._memory.sets[source]  # p − p = 0 where nothing is held back
            own = {n: now[n.removesuffix(BASE_OF)] for n in held}
            base = bases if config.proximal_mu else own
            return self._memory.binding(session.raw, source, {**given, **base}, {})

        return bound(0), bound(1)


def _buffers(outputs: Sequence[str], suffix: str, like: Params) -> Params:
    """One per output ``X<suffix>``, as large as X."""
    return {n: np.zeros_like(like[n.removesuffix(suffix)]) for n in outputs if n.endswith(suffix)}
