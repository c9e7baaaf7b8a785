"""Which of a model's tensors are params, which are trained, and which may leave a device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias

import onnx
from onnx import TensorProto

from fedge.artifacts.manifest import ParamSpec
from fedge.errors import ArtifactError, ConfigError
from fedge.types import Params

Patterns: TypeAlias = str | Sequence[str] | None
_FLOATS = {TensorProto.DOUBLE: "float64", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True)
class Source:
    """A model as read, in the builder's form, and what its origin says about its tensors.

    Attributes:
        model: Params are initializers.
        params: Their names, in order; other initializers stay constants.
        trainable: Those trained where the user does not say.
        sample: Rows of input by name, where there are some.
        sizes: Of symbolic dimensions but the batch: sizes the model accepts.
        name: Of the file or class.
        provenance: Digest of the original and versions of what read it.
    """

    model: onnx.ModelProto
    params: tuple[str, ...]
    trainable: tuple[str, ...]
    sample: Params
    name: str
    provenance: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What the user said about a model's tensors; glob patterns over their names.

    Attributes:
        trainable: Those trained; all but running statistics by default.
        shared: Those trained, and running statistics, that may leave the device; the others stay.
        personal: Likewise those that stay; the others may leave. Exclusive with ``shared``.
    """

    trainable: Patterns = None
    shared: Patterns = None
    personal: Patterns = None


def param_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Float initializers of rank ≥ 1 that the graph uses; all others stay constants.

    Raises:
        ArtifactError: If one is float16 or float64.
    """
    used = {name for node in model.graph.node for name in node.input}
    names = []
    for tensor in model.graph.initializer:
        if tensor.name not in used or not tensor.dims:
            continue
        if tensor.data_type in _FLOATS:
            raise ArtifactError(
                f"tensor {tensor.name!r} is {_FLOATS[tensor.data_type]}; params are trained in "
                f"float32: export the model in float32"
            )
        if tensor.data_type == TensorProto.FLOAT:
            names.append(tensor.name)
    return tuple(names)


def choose(source: Source, choice: Choice) -> tuple[ParamSpec, ...]:
    """Apply the user's choice to a model's params.

    Raises:
        ConfigError: If a pattern matches nothing, nothing is trained, or both ``shared`` and
            ``personal`` are given.
    """
    params, running = source.params, running_statistics(source.model)
    if choice.shared is not None and choice.personal is not None:
        raise ConfigError("shared and personal are both given; give one, the rest is the other")
    trained = list(source.trainable)
    if choice.trainable is not None:
        trained = _match("trainable", choice.trainable, [n for n in params if n not in running])
    if not trained:
        raise ConfigError(f"no tensor is trained; choose some of: {', '.join(params) or 'none'}")
    changed = [n for n in params if n in running or n in trained]
    stay: set[str] = set()
    if choice.personal is not None:
        stay = set(_match("personal", choice.personal, changed))
    elif choice.shared is not None:
        stay = set(changed) - set(_match("shared", choice.shared, changed))
    shapes = {t.name: tuple(t.dims) for t in source.model.graph.initializer}
    return tuple(
        ParamSpec(n, "float32", shapes[n], n in trained, n not in stay, n in running)
        for n in params
    )


def running_statistics(model: onnx.ModelProto) -> set[str]:
    """Means and variances that BatchNormalization keeps while it trains, without a gradient."""
    return {n for node in _batch_norms(model) if _trains(node) for n in node.input[3:5]}


def untrained_statistics(model: onnx.ModelProto) -> set[str]:
    """All means and variances of BatchNormalization, frozen ones too: never trained by default."""
    return {n for node in _batch_norms(model) for n in node.input[3:5]}


def _batch_norms(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "BatchNormalization"]


def _trains(node: onnx.NodeProto) -> bool:
    return any(a.name == "training_mode" and a.i for a in node.attribute)


def _match(option: str, patterns: str | Sequence[str], names: Sequence[str]) -> list[str]:
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, Collection) or not all(isinstance(p, str) for p in listed):
        raise ConfigError(f"{option} is {patterns!r}; wanted a pattern of names, or a list of them")
    for pattern in listed:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ConfigError(f"{option}: {pattern!r} matches none of: {', '.join(names)}")
    return [n for n in names if any(fnmatchcase(n, p) for p in listed)]
