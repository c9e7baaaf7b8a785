"""The built-in example: a logistic regression over 30 columns, as an ONNX model made by hand.

It fits scikit-learn's breast-cancer table (30 measurements per tumour; label 1 = malignant), and
any other table with 30 numeric columns and a 0/1 label.
"""

from __future__ import annotations

from fedge.artifacts.onnx_v1 import onnx_pb2 as onnx

NAME = "breast-cancer"
COLUMNS = 30
_FLOAT = 1  # TensorProto.DataType


def model() -> bytes:
    """``logit = x · weightᵀ + bias`` from zeros: input ``x`` [N, 30], output ``logit`` [N, 1]."""
    graph = onnx.GraphProto(name=NAME)
    graph.input.append(_value("x", COLUMNS))
    graph.output.append(_value("logit", 1))
    graph.initializer.append(_zeros("weight", 1, COLUMNS))
    graph.initializer.append(_zeros("bias", 1))
    node = graph.node.add(op_type="Gemm", name="linear", output=["logit"])
    node.input.extend(["x", "weight", "bias"])
    node.attribute.add(name="transB", type=2, i=1)
    proto = onnx.ModelProto(ir_version=8, producer_name="fedge", graph=graph)
    proto.opset_import.add(domain="", version=17)
    return proto.SerializeToString(deterministic=True)


def _value(name: str, width: int) -> onnx.ValueInfoProto:
    info = onnx.ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = _FLOAT
    info.type.tensor_type.shape.dim.add(dim_param="N")
    info.type.tensor_type.shape.dim.add(dim_value=width)
    return info


def _zeros(name: str, *shape: int) -> onnx.TensorProto:
    count = 1
    for size in shape:
        count *= size
    return onnx.TensorProto(name=name, dims=shape, data_type=_FLOAT, raw_data=bytes(4 * count))
