"""The memory of a strategy as tensors, so that a run survives its server.

Flower's strategies keep their moments as attributes and nowhere else. An adapter here knows which
attributes those are. A strategy of your own takes part by having two methods::

    def save_state(self) -> dict[str, np.ndarray]: ...
    def load_state(self, tensors: dict[str, np.ndarray]) -> None: ...

One with neither adapter nor methods works, but starts with a warning: after a crash its run goes
on with an empty memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedge import tensors
from fedge.strategies.fedavg import FedAvg
from fedge.types import Params


@dataclass(frozen=True)
class StrategyState:
    """How the state of one class of strategies becomes tensors and back.

    Attributes:
        save: The state of a strategy.
        load: Put it back; no tensors at all mean the state of a new strategy.
        own: Whether these are the strategy's own methods, which need not know the empty state.
    """

    save: Callable[[Any], Params]
    load: Callable[[Any, Params], None]
    own: bool = False

    def dump(self, strategy: Strategy) -> bytes:
        """The state as a tensor file; empty bytes where there is nothing to keep."""
        state = self.save(strategy)
        return tensors.dump(state) if state else b""

    def restore(self, strategy: Strategy, data: bytes) -> None:
        """Bring a strategy back to what :meth:`dump` saw.

        Raises:
            ArtifactError: If the bytes are no tensor file.
        """
        self.load(strategy, tensors.load(data)[0] if data else {})

    def reset(self, strategy: Strategy) -> None:
        """Make a strategy that served another run like new."""
        if not self.own:
            self.load(strategy, {})


def state_of(strategy: Strategy) -> StrategyState | None:
    """The adapter for a strategy, or None if its state cannot be kept."""
    if hasattr(strategy, "save_state") and hasattr(strategy, "load_state"):
        return StrategyState(lambda s: s.save_state(), lambda s, t: s.load_state(t), own=True)
    return _ADAPTERS.get(type(strategy))


def _save_moments(strategy: Any) -> Params:  # noqa: ANN401 - any of Flower's FedOpt family
    state: Params = {}
    for moment in ("m_t", "v_t"):
        for name, value in (getattr(strategy, moment) or {}).items():
            state[f"{moment}/{name}"] = np.asarray(value)
    return state


def _load_moments(strategy: Any, state: Params) -> None:  # noqa: ANN401
    for moment in ("m_t", "v_t"):
        kept = _with_prefix(state, f"{moment}/")
        setattr(strategy, moment, kept or None)


def _save_momentum(strategy: Any) -> Params:  # noqa: ANN401
    current = strategy.current_arrays or {}
    state = {f"current/{name}": array.numpy() for name, array in current.items()}
    for index, value in enumerate(strategy.momentum_vector or []):
        state[f"momentum/{index}"] = np.asarray(value)
    return state


def _load_momentum(strategy: Any, state: Params) -> None:  # noqa: ANN401
    current = _with_prefix(state, "current/")
    record = ArrayRecord({n: FlowerArray(np.array(v)) for n, v in current.items()})
    strategy.current_arrays = record if current else None
    momentum = _with_prefix(state, "momentum/")
    strategy.momentum_vector = list(momentum.values()) or None


def _with_prefix(state: Params, prefix: str) -> Params:
    return {n.removeprefix(prefix): np.array(v) for n, v in state.items() if n.startswith(prefix)}


def _nothing(_: Strategy) -> Params:
    return {}


def _forget(_: Strategy, __: Params) -> None:
    return None


_STATELESS = StrategyState(_nothing, _forget)
_MOMENTS = StrategyState(_save_moments, _load_moments)
_ADAPTERS: dict[type[Strategy], StrategyState] = {
    FedAvg: _STATELESS,
    flower.FedAvg: _STATELESS,
    flower.FedMedian: _STATELESS,
    flower.FedTrimmedAvg: _STATELESS,
    flower.Krum: _STATELESS,
    flower.MultiKrum: _STATELESS,
    flower.Bulyan: _STATELESS,
    flower.QFedAvg: _STATELESS,
    flower.FedProx: _STATELESS,
    flower.FedAdam: _MOMENTS,
    flower.FedAdagrad: _MOMENTS,
    flower.FedYogi: _MOMENTS,
    flower.FedAvgM: StrategyState(_save_momentum, _load_momentum),
}
