"""Mean and standard deviation: a site's own, or the federation's from sums alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedge.errors import DataError
from fedge.losses import TEACHER
from fedge.types import Array, Examples, Params

MIN_ROWS = 10  # the sums of fewer rows say too much about a single one
_CONSTANT = 1e-6  # a spread below this share of the mean is float32 rounding


class Standard(NamedTuple):
    """What to subtract and what to divide by: float32, one value per column."""

    mean: Array
    std: Array


@dataclass(frozen=True)
class Moments:
    """What a site tells about its columns so that a common scale can be made.

    Attributes:
        count: Rows.
        sum: Of each column, float64 [d].
        sumsq: Of each column's squares, float64 [d].
    """

    count: int
    sum: Array
    sumsq: Array

    def standardize(self) -> Standard:
        """Mean and standard deviation (n − 1 in the denominator) per column.

        A column that does not vary gets std 1: it is centred and stays 0, instead of blowing up
        at the first site where it does vary.

        Raises:
            DataError: If fewer than two rows are counted.
        """
        if self.count < 2:
            raise DataError(f"statistics of {self.count} rows; wanted at least 2 to have a spread")
        mean = self.sum / self.count
        spread = np.maximum(self.sumsq - self.count * np.square(mean), 0.0)
        return _standard(mean, np.sqrt(spread / (self.count - 1)))


def moments(raw: Examples) -> Moments:
    """Count, sums and sums of squares of a site's raw training rows.

    Args:
        raw: One input, [N, d], any number type.

    Raises:
        DataError: If there is not exactly one input of rank 2, or a value is not finite.
    """
    rows = _columns(raw)
    return Moments(len(rows), rows.sum(axis=0), np.square(rows).sum(axis=0))


def combine(sites: Iterable[Moments], min_rows: int = MIN_ROWS) -> Moments:
    """Add up what the sites told, leaving out sites with fewer than ``min_rows`` rows.

    Raises:
        DataError: If no site is left, or sites differ in columns.
    """
    seen = list(sites)
    kept = [m for m in seen if m.count >= min_rows]
    if not kept:
        counts = ", ".join(str(m.count) for m in seen) or "none"
        raise DataError(f"no site has {min_rows} rows (rows per site: {counts})")
    columns = sorted({len(m.sum) for m in kept})
    if len(columns) != 1:
        raise DataError(f"sites differ in columns: {columns}; wanted the same everywhere")
    return Moments(
        sum(m.count for m in kept),
        np.sum([m.sum for m in kept], axis=0),
        np.sum([m.sumsq for m in kept], axis=0),
    )


def site_stats(raw: Examples) -> Params:
    """A site's own scale, as ``preprocess.onnx`` takes it where scaling is per site.

    Args:
        raw: The site's training rows: one input, [N, d].

    Returns:
        ``site_mean`` and ``site_std``, float32 [d]; n − 1 in the denominator, as FLamby does. A
        column that does not vary gets std 1.

    Raises:
        DataError: As :func:`moments`, and if there are fewer than two rows.
    """
    rows = _columns(raw)
    if len(rows) < 2:
        raise DataError(f"{len(rows)} training rows; wanted at least 2 to have a spread")
    mean, std = _standard(rows.mean(axis=0), rows.std(axis=0, ddof=1))
    return {"site_mean": mean, "site_std": std}


def _columns(raw: Examples) -> Array:
    arrays = {name: a for name, a in raw.inputs.items() if name != TEACHER}
    shapes = {name: a.shape for name, a in arrays.items()}
    if len(shapes) != 1 or len(next(iter(shapes.values()))) != 2:
        raise DataError(f"inputs {shapes}; scaling wants a single one of shape [rows, columns]")
    rows = np.asarray(next(iter(arrays.values())), np.float64)
    bad = ~np.isfinite(rows)
    if bad.any():
        raise DataError(f"{int(bad.sum())} values are NaN or infinite; fill in or drop their rows")
    return rows


def _standard(mean: Array, std: Array) -> Standard:
    constant = std <= _CONSTANT * np.abs(mean)
    return Standard(mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32))
