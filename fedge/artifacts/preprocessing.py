"""What turns a site's raw columns into the model's inputs, as a graph inside the bundle.

Every input ``X`` of ``preprocess.onnx`` gives an output ``X@pre``. Scaling by the site's own
statistics takes them as two further inputs, ``site_mean`` and ``site_std``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedge.artifacts.manifest import BATCH, TensorSpec
from fedge.artifacts.model import normalize, specs
from fedge.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

SITE_MEAN, SITE_STD = "site_mean", "site_std"
SITE_EPSILON = 1e-9  # FLamby's protocol for heart disease
_OPSET = helper.make_opsetid("", 17)


@dataclass(frozen=True)
class Standardize:
    """(x − mean) / std with constants, the same at every site.

    Attributes:
        mean: Per element of one row; a scalar, or of the input's trailing shape.
        std: Likewise; where it is 0 (a constant column) only the mean is subtracted.
        input: Which input; the only one by default.
    """

    mean: ArrayLike
    std: ArrayLike
    input: str | None = None


@dataclass(frozen=True)
class SiteStandardize:
    """(x − site_mean) / (site_std + 1e-9), with statistics of each site's own training rows."""

    input: str | None = None


Preprocessing: TypeAlias = Standardize | SiteStandardize | onnx.ModelProto | str | None


@dataclass(frozen=True)
class Preprocessor:
    """The built graph.

    Attributes:
        model: ``preprocess.onnx``.
        raw_inputs: What a site's data must look like.
        scaling: As in the manifest.
    """

    model: onnx.ModelProto
    raw_inputs: tuple[TensorSpec, ...]
    scaling: str


def build_preprocessor(how: Preprocessing, inputs: Sequence[TensorSpec]) -> Preprocessor:
    """The graph for model inputs ``inputs``.

    Raises:
        ConfigError: If statistics or a custom graph do not fit the inputs.
    """
    if isinstance(how, onnx.ModelProto):
        return _custom(how, inputs)
    if isinstance(how, str):
        if how not in ("none", "site"):
            raise ConfigError(f"preprocessing {how!r} is unknown; known: none, site")
        how = SiteStandardize() if how == "site" else None
    if not isinstance(how, Standardize | SiteStandardize | None):
        raise ConfigError(
            f"preprocessing is a {type(how).__name__}; give Standardize, SiteStandardize, 'site', "
            "an ONNX ModelProto or None"
        )
    if how is None:
        return Preprocessor(_assemble(inputs, {}, []), tuple(inputs), "none")
    target = _target(how.input, inputs)
    if isinstance(how, Standardize):
        nodes, constants = _standardize(target, how)
        return Preprocessor(
            _assemble(inputs, {target.name: nodes}, constants), tuple(inputs), "global"
        )
    model = _assemble(
        inputs, {target.name: _site_nodes(target.name)}, [_constant("site@eps", SITE_EPSILON)]
    )
    shape = target.shape[1:]
    for name in (SITE_MEAN, SITE_STD):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return Preprocessor(model, tuple(inputs), "site")


def _site_nodes(name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Sub", [name, SITE_MEAN], ["site@centered"]),
        helper.make_node("Add", [SITE_STD, "site@eps"], ["site@scale"]),
        helper.make_node("Div", ["site@centered", "site@scale"], [f"{name}@pre"]),
    ]


def _standardize(
    target: TensorSpec, how: Standardize
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    mean, std = (_statistic(target, n, getattr(how, n)) for n in ("mean", "std"))
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        raise ConfigError("Standardize: mean and std must be finite, and std not negative")
    std = np.where(std == 0, np.float32(1), std)
    nodes = [
        helper.make_node("Sub", [target.name, "global@mean"], ["global@centered"]),
        helper.make_node("Div", ["global@centered", "global@std"], [f"{target.name}@pre"]),
    ]
    return nodes, [_constant("global@mean", mean), _constant("global@std", std)]


def _statistic(target: TensorSpec, name: str, value: ArrayLike) -> np.ndarray:
    array = np.asarray(value, np.float32)
    wanted = tuple(int(d) for d in target.shape[1:])
    if array.shape not in ((), wanted):
        raise ConfigError(
            f"Standardize: {name} has shape {array.shape}; input {target.name!r} wants {wanted}"
        )
    return array


def _target(name: str | None, inputs: Sequence[TensorSpec]) -> TensorSpec:
    found = [s for s in inputs if s.dtype == "float32" and name in (None, s.name)]
    if len(found) != 1:
        names = ", ".join(s.name for s in inputs if s.dtype == "float32")
        raise ConfigError(f"standardize which input? float32 inputs: {names or 'none'}; name one")
    return found[0]


def _assemble(
    inputs: Sequence[TensorSpec],
    nodes: dict[str, list[onnx.NodeProto]],
    constants: list[TensorProto],
) -> onnx.ModelProto:
    """A model with the given nodes for some inputs and Identity for the others."""
    body = []
    for spec in inputs:
        plain = [helper.make_node("Identity", [spec.name], [f"{spec.name}@pre"])]
        body += nodes.get(spec.name, plain)
    infos = [_info(s.name, s) for s in inputs]
    outputs = [_info(f"{s.name}@pre", s) for s in inputs]
    graph = helper.make_graph(body, "preprocess", infos, outputs, constants)
    return helper.make_model(graph, opset_imports=[_OPSET], ir_version=8)


def _custom(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> Preprocessor:
    model = normalize(model)
    raw, found = specs(model.graph.input), specs(model.graph.output)
    wanted = [(s.dtype, s.shape) for s in inputs]
    if [(s.dtype, s.shape) for s in found] != wanted:
        raise ConfigError(
            f"the preprocessing graph gives {[(s.name, s.dtype, s.shape) for s in found]}; the "
            f"model takes {[(s.name, s.dtype, s.shape) for s in inputs]}, in this order"
        )
    for output, spec in zip(found, inputs, strict=True):
        target = f"{spec.name}@pre"
        model.graph.node.append(helper.make_node("Identity", [output.name], [target]))
    del model.graph.output[:]
    model.graph.output.extend(_info(f"{s.name}@pre", s) for s in inputs)
    return Preprocessor(model, raw, "custom")


def _info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(name, dtype, [BATCH, *spec.shape[1:]])


def _constant(name: str, value: ArrayLike) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value, np.float32), name)
