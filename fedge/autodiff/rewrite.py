"""Rewrites that keep the values: what a graph says is unchanged, it only costs less."""

from __future__ import annotations

import math

import onnx_ir as ir

from fedge.autodiff.ops import Value, attribute, shape_of
from fedge.autodiff.prepare import Forward


def inference_mode(forward: Forward) -> None:
    """Dropout passes its input on, BatchNormalization uses its running statistics."""
    for node in list(forward.graph):
        if node.op_type == "Dropout":
            _replace(node, node.inputs[0])
        if node.op_type == "BatchNormalization":
            node.attributes.pop("training_mode", None)
            node.resize_outputs(1)


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


def batch_statistics(forward: Forward) -> dict[str, Value]:
    """Make BatchNormalization in training mode keep running statistics as torch does.

    ONNX blends in the batch's variance as it is, torch n/(n − 1) of it. With momentum 0 the node
    puts out the batch's own statistics, which its gradient needs too. ONNX Runtime writes them
    over the node's inputs 3 and 4, even where others read those later: it gets buffers of its own.

    Returns:
        Name of each running mean and variance -> its value after this batch.
    """
    after: dict[str, Value] = {}
    for node in [n for n in forward.graph if n.op_type == "BatchNormalization"]:
        if attribute(node, "training_mode", 0):
            _keep_statistics(forward, node, after)
    return after


def _keep_statistics(forward: Forward, node: ir.Node, after: dict[str, Value]) -> None:
    op, x, momentum = forward.op, node.inputs[0], attribute(node, "momentum", 0.9)
    attributes = {"training_mode": 1, "epsilon": attribute(node, "epsilon", 1e-5), "momentum": 0.0}
    running = [after.get(v.name, v) for v in node.inputs[3:5]]
    buffers = [op.Mul(v, 0.0) for v in running]
    outputs = op.BatchNormalization(*node.inputs[:3], *buffers, outputs=3, **attributes)
    new = [v.producer() for v in (*buffers, outputs[0])]
    forward.graph.remove(new)
    forward.graph.insert_after(node, new)
    outputs[0].shape, outputs[0].dtype = node.outputs[0].shape, x.dtype
    count = _per_channel(forward, x)
    unbiased = op.Mul(outputs[2], op.Div(count, op.Max(op.Sub(count, 1.0), 1.0)))
    replaced = [outputs[0]]
    for old, before, batch in zip(node.inputs[3:5], running, (outputs[1], unbiased), strict=True):
        value = op.Add(op.Mul(before, momentum), op.Mul(batch, 1 - momentum))
        value.shape, value.dtype = old.shape, old.dtype
        after[old.name] = value
        replaced.append(value)
    ir.convenience.replace_all_uses_with(
        node.outputs, replaced[: len(node.outputs)], replace_graph_outputs=True
    )
    forward.graph.remove(node)


def _per_channel(forward: Forward, x: Value) -> Value:
    """Elements of each channel (axis 1), from the batch's size: asking x would keep it alive."""
    op, (rows, channels, *rest) = forward.op, shape_of(x)
    given = next((v for v in forward.inputs if shape_of(v)[0] == rows), None)
    if given is None or not all(isinstance(d, int) for d in rest):
        return op.Div(op.size(x), float(channels))
    batch = op.Cast(op.Gather(op.Shape(given), op.scalar(0)), to=int(ir.DataType.FLOAT))
    return op.Mul(batch, float(math.prod(int(d) for d in rest)))


def _only_use(value: Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _replace(node: ir.Node, value: Value) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    node.graph.remove(node)
