"""``estimate`` as both commands show it: what training takes on a device, and what would fit."""

from __future__ import annotations

import math
import re
from typing import Any

from fedge.artifacts.estimate import (
    MB,
    SERVER,
    Estimate,
    Frugal,
    Rate,
    advice,
    estimate,
    forms,
    largest_batch,
    plan,
)
from fedge.artifacts.manifest import Manifest
from fedge.errors import ConfigError, EngineError

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from ``256MB``, ``1.5G``, ``500000``; K, M and G are powers of 1024.

    Raises:
        ConfigError: If it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    if not 0 < size < 1 << 62:
        raise ConfigError(f"size {text!r}; wanted a number of bytes such as 256MB")
    return round(size)


def report(
    manifest: Manifest,
    memory_bytes: int | None = None,
    batch_size: int | None = None,
    rate: Rate = SERVER,
) -> dict[str, Any]:
    """What training takes in each form the bundle has, and how it fits a budget, as plain values.

    Args:
        manifest: The bundle's.
        memory_bytes: For the worker; None: nothing is said about fitting.
        batch_size: Rows per step; the bundle's own by default.
        rate: Of the device.

    Raises:
        ConfigError: If ``batch_size`` is below 1.
        ArtifactError: If the bundle does not say what its graphs take.
    """
    ways = [estimate(manifest, batch_size, Frugal(recompute=r), rate) for r in forms(manifest)]
    found: dict[str, Any] = {
        "name": manifest.name,
        "digest": manifest.digest,
        "batch_size": ways[0].batch_size,
        "forms": [_row(e) for e in ways],
    }
    if memory_bytes is None:
        return found
    for row, way in zip(found["forms"], ways, strict=True):
        row["largest_batch"] = largest_batch(manifest, memory_bytes, way.frugal)
    found |= {"memory_bytes": memory_bytes, "fits": True, "plan": None, "advice": [], "problem": ""}
    try:
        found["plan"] = _row(plan(manifest, memory_bytes, batch_size, rate))
    except EngineError as exc:
        found |= {"fits": False, "problem": str(exc)}
        found["advice"] = advice(manifest, memory_bytes, batch_size)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """A report as a table and a sentence."""
    text = [f"{found['name']} {found['digest'][:12]}…, batch size {found['batch_size']}"]
    heading = f"  {'steps':<12}{'peak':>9}{'params':>9}{'results':>9}{'step':>11}"
    limited = "memory_bytes" in found
    text.append(heading + (f"{'largest batch':>15}" if limited else ""))
    for row in found["forms"]:
        parts = row["parts"]
        sizes = (row["peak_bytes"], parts["params"], parts["activations"])
        line = f"  {'recomputing' if row['recompute'] else 'plain':<12}"
        line += "".join(f"{math.ceil(s / MB):>6} MB" for s in sizes)
        line += f"{row['step_s'] * 1e3:>8.2f} ms"
        text.append(line + (f"{row['largest_batch']:>15}" if limited else ""))
    if limited:
        text += _verdict(found)
    return text


def _verdict(found: dict[str, Any]) -> list[str]:
    limit = found["memory_bytes"] // MB
    if not found["fits"]:
        return [f"does not fit {limit} MB", *(f"  - {a}" for a in found["advice"])]
    chosen = found["plan"]
    how = Frugal(chosen["recompute"], chosen["pieces"]).changes
    peak = math.ceil(chosen["peak_bytes"] / MB)
    return [f"fits {limit} MB: about {peak} MB" + (f", with {how}" if how else "")]


def _row(made: Estimate) -> dict[str, Any]:
    return {
        "recompute": made.frugal.recompute,
        "pieces": made.frugal.pieces,
        "score_rows": made.frugal.score_rows,
        "peak_bytes": made.peak_bytes,
        "parts": made.parts,
        "step_s": made.step_s,
    }
