"""What every loss gives: what its labels look like, its value, and where its gradient starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir

from fedge.artifacts.manifest import LabelSpec
from fedge.autodiff.ops import Ops, Value
from fedge.errors import ConfigError

LABELS = "labels"
TINY = 1e-30  # below any sum of weights that counts; 0/TINY = 0 where nothing does
Inputs: TypeAlias = Mapping[str, Value]
Pullback: TypeAlias = Callable[[Value], Value]  # cotangent of the loss -> of the model's output


@dataclass(frozen=True)
class Rule:
    """One loss of the model's first output.

    Attributes:
        labels: (settings, output) -> what its label input looks like.
        write: (op, settings, output, training inputs by name) -> the value, rank 0, and its
            pullback in closed form.
    """

    labels: Callable[[Any, Value], LabelSpec]
    write: Callable[[Ops, Any, Value, Inputs], tuple[Value, Pullback]]


def want(ok: bool, message: str) -> None:
    """Refuse settings that do not fit the model.

    Raises:
        ConfigError: With the message, unless ``ok``.
    """
    if not ok:
        raise ConfigError(message)


def graph_input(name: str, dtype: str, shape: tuple[int | str, ...]) -> Value:
    """A graph input that training needs beside the model's own."""
    types = {"int64": ir.DataType.INT64, "float32": ir.DataType.FLOAT}
    return ir.val(name, dtype=types[dtype], shape=ir.Shape(shape))
