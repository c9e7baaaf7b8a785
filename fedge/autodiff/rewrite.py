"""Rewrites that keep the values: what a graph says is unchanged, it only costs less."""

from __future__ import annotations

import onnx_ir as ir

from fedge.autodiff.ops import Value, attribute
from fedge.autodiff.prepare import Forward


def inference_mode(forward: Forward) -> None:
    """Dropout passes its input on."""
    for node in list(forward.graph):
        if node.op_type == "Dropout":
            _replace(node, node.inputs[0])


def relu_after_pooling(forward: Forward) -> None:
    """MaxPool(Relu(x)) = Relu(MaxPool(x)), with fewer elements for Relu and its gradient."""
    op = forward.op
    for pool in [n for n in forward.graph if n.op_type == "MaxPool" and len(n.outputs) == 1]:
        relu = pool.inputs[0].producer()
        if relu is None or relu.op_type != "Relu" or not _only_use(relu.outputs[0]):
            continue
        pooled = op.MaxPool(relu.inputs[0], **{n: attribute(pool, n) for n in pool.attributes})
        out = op.Relu(pooled)
        for value in (pooled, out):
            value.shape, value.dtype = pool.outputs[0].shape, pool.outputs[0].dtype
        forward.graph.remove([out.producer(), pooled.producer()])
        forward.graph.insert_after(pool, [pooled.producer(), out.producer()])
        _replace(pool, out)
        forward.graph.remove(relu)


def _only_use(value: Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _replace(node: ir.Node, value: Value) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    node.graph.remove(node)
