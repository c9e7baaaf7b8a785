"""Operators that move elements without changing them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fedge.autodiff.ops import (
    Ops,
    Value,
    attribute,
    attributes,
    constant,
    shape_of,
    static_dims,
)
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.autodiff.rules.positions import picked_from
from fedge.autodiff.rules.windows import Windows, tap_slices


@vjp_rule("Flatten", "Reshape", "Squeeze", "Unsqueeze")
def reshape(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Same elements in the same order: reshape back."""
    return op.reshape_like(dy, node.inputs[0])


@vjp_rule("Transpose")
def transpose(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """The inverse permutation (by default, the reversal)."""
    perm = attribute(node, "perm") or range(len(shape_of(node.inputs[0])))[::-1]
    return op.transpose(dy, [int(i) for i in np.argsort(perm)])


@vjp_rule("Concat")
def concat(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """The piece of dy each input filled."""
    axis = attribute(node, "axis") % len(shape_of(node.outputs[0]))
    sizes = [op.Gather(op.Shape(x), op.ints([axis])) for x in node.inputs]
    if all(isinstance(shape_of(x)[axis], int) for x in node.inputs):
        lengths = op.ints([int(shape_of(x)[axis]) for x in node.inputs])
    else:
        lengths = op.Concat(*sizes, axis=0)
    if len(node.inputs) == 1:
        return dy
    return tuple(op.Split(dy, lengths, axis=axis, outputs=len(node.inputs)))


@vjp_rule("Split")
def split(op: Ops, node: ir.Node, *dys: Value | None) -> Gradients:
    """The pieces joined; zeros for a piece nobody used."""
    parts = [op.Mul(y, 0.0) if d is None else d for d, y in zip(dys, node.outputs, strict=True)]
    return op.Concat(*parts, axis=attribute(node, "axis", 0))


@vjp_rule("Expand")
def expand(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Sum over what was repeated."""
    return op.unbroadcast(dy, node.outputs[0], node.inputs[0])


@vjp_rule("Range")
def range_(op: Ops, _node: ir.Node, dy: Value) -> Gradients:
    """y[i] = start + i · delta; the limit only says how many."""
    places = op.Range(0.0, op.size(dy), 1.0)
    return op.ReduceSum(dy, keepdims=0), None, op.ReduceSum(op.Mul(dy, places), keepdims=0)


@vjp_rule("Tile")
def tile(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Sum over the copies."""
    shape = shape_of(node.inputs[0])
    if sum(isinstance(d, str) for d in shape) > 1 or node.inputs[1].const_value is None:
        return picked_from(op, node, dy)
    copies = constant(node, 1).tolist()
    split = op.reshape(dy, [size for pair in zip(copies, shape, strict=True) for size in pair])
    return op.sum(split, range(0, 2 * len(shape), 2))


@vjp_rule("Trilu")
def trilu(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """The same triangle of dy."""
    return op.call("Trilu", dy, *node.inputs[1:], **attributes(node))


@vjp_rule("ReverseSequence")
def reverse_sequence(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Reversed again."""
    return op.call("ReverseSequence", dy, node.inputs[1], **attributes(node))


@vjp_rule("SpaceToDepth")
def space_to_depth(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """DepthToSpace."""
    return op.DepthToSpace(dy, blocksize=attribute(node, "blocksize"))


@vjp_rule("DepthToSpace")
def depth_to_space(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """SpaceToDepth; in mode CRD, which that does not know, written out."""
    size = attribute(node, "blocksize")
    if attribute(node, "mode", "DCR") == "DCR":
        return op.SpaceToDepth(dy, blocksize=size)
    x = node.inputs[0]
    channels, height, width = static_dims(x, slice(1, None))
    blocks = op.reshape(dy, (-1, channels // size**2, height, size, width, size))
    return op.reshape_like(op.Transpose(blocks, perm=[0, 1, 3, 5, 2, 4]), x)


@vjp_rule("CenterCropPad")
def center_crop_pad(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Cropped where it was padded and padded where it was cropped."""
    shape = op.Shape(node.inputs[0])
    axes = attribute(node, "axes")
    if axes is None:
        return op.CenterCropPad(dy, shape)
    rank = len(shape_of(node.inputs[0]))
    return op.CenterCropPad(dy, op.Gather(shape, op.ints([a % rank for a in axes])), axes=axes)


@vjp_rule("Col2Im")
def col2im(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """Columns of dy: every block's elements, taken where they were added."""
    x, image = node.inputs[0], static_dims(node.outputs[0], slice(2, None))
    windows = _blocks(node, image, constant(node, 2).tolist())
    taps = [op.Unsqueeze(t, op.ints([2])) for t in tap_slices(op, dy, windows, 2)]
    return op.reshape_like(op.Concat(*taps, axis=2) if len(taps) > 1 else taps[0], x)


def _blocks(node: ir.Node, image: tuple[int, ...], kernel: list[int]) -> Windows:
    rank = len(image)
    stride, dilation = (attribute(node, n) or [1] * rank for n in ("strides", "dilations"))
    pads = attribute(node, "pads") or [0] * 2 * rank
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    begin, after = pads[:rank], pads[rank:]
    padded = [n + b + a for n, b, a in zip(image, begin, after, strict=True)]
    count = [(n - r) // s + 1 for n, r, s in zip(padded, reach, stride, strict=True)]
    last = [(n - 1) * s + r for n, s, r in zip(count, stride, reach, strict=True)]
    end = [last[i] - begin[i] - image[i] for i in range(rank)]
    fields = (image, count, kernel, stride, dilation, begin, end)
    return Windows(*(tuple(int(v) for v in field) for field in fields))
