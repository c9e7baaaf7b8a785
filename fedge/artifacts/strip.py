"""Models without what nothing reads: texts, metadata, operator sets. Needs onnx alone."""

from __future__ import annotations

import onnx
from onnx import TensorProto


def strip(model: onnx.ModelProto) -> None:
    """Remove, in place, what nothing reads: texts, metadata, unused operator sets."""
    graph = model.graph
    for holder in [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        holder.doc_string = ""
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("overload")
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            if attribute.HasField("t"):
                _strip_tensor(attribute.t)
    for tensor in graph.initializer:
        _strip_tensor(tensor)
    for info in graph.value_info:
        info.ClearField("doc_string")
        info.ClearField("metadata_props")
    for info in [*graph.input, *graph.output, *graph.value_info]:
        info.type.ClearField("denotation")
        for dim in info.type.tensor_type.shape.dim:
            dim.ClearField("denotation")
    graph.ClearField("quantization_annotation")
    _keep_used_opsets(model)


def _strip_tensor(tensor: TensorProto) -> None:
    tensor.ClearField("doc_string")
    tensor.ClearField("metadata_props")
    if tensor.data_location == TensorProto.DEFAULT:
        tensor.ClearField("data_location")


def _keep_used_opsets(model: onnx.ModelProto) -> None:
    used = {"", *("" if n.domain == "ai.onnx" else n.domain for n in model.graph.node)}
    kept = [o for o in model.opset_import if o.domain in used or o.domain == "ai.onnx"]
    del model.opset_import[:]
    model.opset_import.extend(kept)
