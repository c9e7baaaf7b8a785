"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], dropout: float = 0.0) -> nn.Module:
    """Linear layers of ``widths`` with ReLU (and Dropout) between them."""
    layers: list[nn.Module] = []
    for inside, out in pairwise(widths):
        layers += [nn.Linear(inside, out), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers[: -2 if dropout else -1])
