"""Algebra of named tensors; every rule of the framework reads like its formula because of it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from fedge.errors import ArtifactError
from fedge.types import Params


def subtract(a: Params, b: Params) -> Params:
    """a − b, name by name."""
    _same_names(a, b)
    return {n: a[n] - b[n] for n in a}


def add(a: Params, b: Params) -> Params:
    """a + b, name by name."""
    _same_names(a, b)
    return {n: a[n] + b[n] for n in a}


def scale(a: Params, factor: float) -> Params:
    """factor · a."""
    return {n: v * np.asarray(factor, v.dtype) for n, v in a.items()}


def l2_norm(a: Params) -> float:
    """The Euclidean norm over all tensors together, accumulated in float64."""
    return math.sqrt(sum(float(np.sum(np.square(v, dtype=np.float64))) for v in a.values()))


def relative_distance(a: Params, reference: Params, floor: float = 0.0) -> dict[str, float]:
    """Per tensor ‖a − reference‖₂ / ‖reference‖₂ (0/0 = 0): what "to 1e-5" means everywhere.

    No tensor of ``reference`` counts as smaller than ``floor``.
    """
    _same_names(a, reference)
    out = {}
    for name, ref in reference.items():
        ref64 = np.asarray(ref, np.float64)
        gap = float(np.linalg.norm((np.asarray(a[name], np.float64) - ref64).ravel()))
        size = max(float(np.linalg.norm(ref64.ravel())), floor)
        out[name] = gap / size if size > 0 else (0.0 if gap == 0 else math.inf)
    return out


def gradient_distance(a: Params, reference: Params) -> dict[str, float]:
    """:func:`relative_distance` of one gradient computed in two ways.

    A tensor's gradient may cancel to almost nothing and then holds only float32's rounding of
    terms as large as the others. So none counts as smaller than a hundredth of the whole: 1e-5 of
    that is 1e-7 of the gradient.
    """
    return relative_distance(a, reference, floor=0.01 * l2_norm(reference))


def select(a: Params, names: Iterable[str]) -> Params:
    """The named tensors, in the order of ``names``."""
    return {n: a[n] for n in names}


def copy(a: Params) -> Params:
    """Writable copies that share no memory with ``a``."""
    return {n: np.array(v) for n, v in a.items()}


def all_finite(a: Params) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(np.isfinite(v).all()) for v in a.values())


def _same_names(a: Params, b: Params) -> None:
    if a.keys() != b.keys():
        raise ArtifactError(
            f"tensors differ: only left {sorted(a.keys() - b.keys())}, "
            f"only right {sorted(b.keys() - a.keys())}"
        )
