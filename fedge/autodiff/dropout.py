"""Dropout with its random numbers as an input.

ONNX's Dropout draws numbers of its own, from a generator that no engine lets us set between steps
and that differs between them. Here each one is a comparison with a graph input that holds uniform
numbers of [0, 1): what fills it decides, so a resumed run repeats to the bit and engines agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedge.artifacts.manifest import BATCH, TensorSpec
from fedge.autodiff.shapes import Shape, Sizes, infer_shapes, trace_twice
from fedge.errors import UnsupportedOperatorError
from fedge.types import Array


def explicit_dropout(
    model: onnx.ModelProto, sizes: Sizes | None = None
) -> tuple[onnx.ModelProto, tuple[TensorSpec, ...]]:
    """A copy of ``model`` without Dropout, and the inputs it takes instead.

    y = x / (1 − ratio) where noise ≥ ratio, else 0. Dropout in inference mode is just removed.

    Args:
        model: Normalized.
        sizes: As for :func:`~fedge.autodiff.shapes.infer_shapes`.

    Returns:
        The model, and per Dropout an input ``noise/1``, ``noise/2`` … of float32: one row per row
        of the batch, with as many numbers as Dropout sees of it.

    Raises:
        UnsupportedOperatorError: If ratio or mode depend on the data, or the shape is unknown.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    if not any(_is_dropout(n) for n in graph.node):
        return copy, ()
    shapes, constants = infer_shapes(copy, sizes), trace_twice(copy, sizes)[0].values
    nodes: list[onnx.NodeProto] = []
    noise: list[TensorSpec] = []
    for node in graph.node:
        if not _is_dropout(node):
            nodes.append(node)
            continue
        ratio, active = _settings(node, constants)
        if not active:
            nodes.append(helper.make_node("Identity", [node.input[0]], [node.output[0]]))
            continue
        shape = shapes.get(node.input[0], (0, ()))[1]
        spec = TensorSpec(f"noise/{len(noise) + 1}", "float32", _rows(node, shape))
        noise.append(spec)
        nodes += _masking(node, spec, ratio, reshaped=spec.shape != shape)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.extend(
        helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in noise
    )
    return copy, tuple(noise)


def _is_dropout(node: onnx.NodeProto) -> bool:
    return node.op_type == "Dropout" and node.domain in ("", "ai.onnx")


def _settings(node: onnx.NodeProto, constants: Mapping[str, Array]) -> tuple[float, bool]:
    """Ratio, and whether it drops at all."""
    names = [*node.input[1:], "", ""][:2]
    if any(n and n not in constants for n in names):
        raise UnsupportedOperatorError(
            f"node {node.name or node.output[0]!r} is a Dropout whose ratio or mode is computed; "
            "give it constants"
        )
    ratio, training = (constants[n].item() if n else None for n in names)
    ratio = 0.5 if ratio is None else float(ratio)
    return ratio, bool(training) and ratio > 0


def _rows(node: onnx.NodeProto, shape: Shape) -> Shape:
    """[N, …] with as many numbers as ``shape``; as it is where the batch comes first."""
    factors = [f for d in shape for f in str(d).split("*")]
    symbols = [f for f in factors if not f.isdigit()]
    if symbols.count(BATCH) != 1 or any("?" in s for s in symbols):
        raise UnsupportedOperatorError(
            f"node {node.name or node.output[0]!r} is a Dropout of shape {list(shape)}; wanted "
            "so many numbers for each row of the batch"
        )
    if shape[0] == BATCH and all(str(d) in symbols or isinstance(d, int) for d in shape):
        return shape
    others = [s for s in symbols if s != BATCH]
    return (BATCH, *others, math.prod(int(f) for f in factors if f.isdigit()))


def _masking(
    node: onnx.NodeProto, noise: TensorSpec, ratio: float, *, reshaped: bool
) -> list[onnx.NodeProto]:
    x, y, at = node.input[0], node.output[0], f"{node.output[0]}/dropout"
    kept = node.output[1] if len(node.output) > 1 and node.output[1] else f"{at}/kept"
    scale = 1 / (1 - ratio) if ratio < 1 else 0.0
    make, drawn = helper.make_node, noise.name
    nodes = [
        make("Constant", [], [f"{at}/{n}"], value=numpy_helper.from_array(np.float32(v)))
        for n, v in (("ratio", ratio), ("scale", scale), ("zero", 0.0))
    ]
    if reshaped:
        drawn = f"{at}/noise"
        nodes.append(make("Shape", [x], [f"{at}/shape"]))
        nodes.append(make("Reshape", [noise.name, f"{at}/shape"], [drawn]))
    return [
        *nodes,
        make("GreaterOrEqual", [drawn, f"{at}/ratio"], [kept]),
        make("Mul", [x, f"{at}/scale"], [f"{at}/scaled"]),
        make("Where", [kept, f"{at}/scaled", f"{at}/zero"], [y]),
    ]
