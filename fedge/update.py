"""What a client sends after training: delta = local − base, and what is needed to weigh it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedge import params as algebra
from fedge import tensors
from fedge.errors import ArtifactError, UpdateError
from fedge.types import ClientId, Metrics, Params, RoundNum

MAX_EXAMPLES = 1 << 40


@dataclass(frozen=True)
class Update:
    """One client's result of one round.

    Attributes:
        client_id: Who trained.
        round_num: In which round, from 1.
        delta: local − base, float32, shared params only.
        num_examples: Rows trained on; the weight of this update.
        metrics: Named training metrics, finite.
        provenance: What it was made from: bundle digest, engine, versions.
    """

    client_id: ClientId
    round_num: RoundNum
    delta: Params
    num_examples: int
    metrics: Metrics = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The update as one tensor file."""
        meta = {
            "kind": "update",
            "client_id": self.client_id,
            "round_num": self.round_num,
            "num_examples": self.num_examples,
            "metrics": self.metrics,
            "provenance": self.provenance,
        }
        return tensors.dump(self.delta, meta)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Update:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ArtifactError: If the bytes are not an update.
        """
        delta, meta = tensors.load(data)
        try:
            if meta.pop("kind") != "update":
                raise KeyError("kind")
            _check_meta(meta)
            return cls(delta=delta, **meta)
        except (KeyError, TypeError) as exc:
            raise ArtifactError(f"not an update file: {exc}") from exc


def compute_delta(local: Params, base: Params) -> Params:
    """delta = local − base in float32, for the names of ``base``."""
    return {n: np.subtract(local[n], base[n], dtype=np.float32, casting="same_kind") for n in base}


def apply_delta(base: Params, delta: Params) -> Params:
    """base + delta in the dtypes of ``base``; names without a delta stay as they are."""
    return {n: (v + delta[n]).astype(v.dtype) if n in delta else v for n, v in base.items()}


def check_update(update: Update, shapes: dict[str, tuple[int, ...]], max_norm: float) -> None:
    """The gate: refuse an update that a strategy must never see.

    Args:
        update: What a client sent.
        shapes: Every shared tensor's shape, from the manifest.
        max_norm: Largest accepted ‖delta‖₂.

    Raises:
        UpdateError: For missing or foreign tensors, wrong shape or dtype, NaN or infinity, a norm
            above ``max_norm``, or a weight outside 1 … 2^40.
    """
    missing, foreign = shapes.keys() - update.delta.keys(), update.delta.keys() - shapes.keys()
    _want(not missing, f"lacks {sorted(missing)}")
    _want(not foreign, f"holds {sorted(foreign)}, which may not leave the device")
    for name, shape in shapes.items():
        got = update.delta[name]
        _want(got.dtype == np.float32, f"{name} is {got.dtype}, wanted float32")
        _want(got.shape == tuple(shape), f"{name} has shape {got.shape}, wanted {tuple(shape)}")
    _want(algebra.all_finite(update.delta), "holds NaN or infinity")
    norm = algebra.l2_norm(update.delta)
    _want(norm <= max_norm, f"has norm {norm:.4g}, above {max_norm:.4g}")
    _want(
        0 < update.num_examples <= MAX_EXAMPLES,
        f"claims {update.num_examples} examples, wanted 1 … {MAX_EXAMPLES}",
    )
    # A comparison, since math.isfinite raises for an integer beyond float's range.
    finite = all(abs(v) <= sys.float_info.max for v in update.metrics.values())
    _want(finite, "holds a metric that is not finite")


def _check_meta(meta: dict[str, Any]) -> None:
    wanted: dict[str, type] = {
        "client_id": str,
        "round_num": int,
        "num_examples": int,
        "metrics": dict,
        "provenance": dict,
    }
    for name, kind in wanted.items():
        if type(meta[name]) is not kind:
            raise TypeError(f"{name} is {type(meta[name]).__name__}, wanted {kind.__name__}")
    if not all(type(v) in (int, float) for v in meta["metrics"].values()):
        raise TypeError("metrics must be numbers")
    if not all(type(v) is str for v in meta["provenance"].values()):
        raise TypeError("provenance must be text")


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise UpdateError(f"update refused: it {message}")
