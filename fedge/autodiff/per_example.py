"""Per-example gradients, clipped and summed, for privacy of single records.

Abadi et al. 2016, "Deep learning with differential privacy" (arXiv 1607.00133): every example's
whole gradient is scaled to a norm of at most ``clip_norm``, then they are added up. One backward
pass finds what flows into every operator that reads a param. From it follow the examples' squared
norms, mostly without their gradients: that of a matrix product is a product of Gram matrices
(Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679, "ghost clipping"). As the
cotangents of one example are linear in its own loss, scaling them row by row and applying each
rule once more gives the clipped sum: no second pass.

Departure from the papers: no noise here; it comes from the operating system, not from the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from fedge.artifacts.manifest import BATCH
from fedge.autodiff.losses import write_loss
from fedge.autodiff.ops import Dim, Ops, Value, attribute, shape_of, static_shape
from fedge.autodiff.prepare import Forward, finish, load, normalize
from fedge.autodiff.registry import CONSTANT, apply_rule
from fedge.autodiff.reverse import backward
from fedge.autodiff.rewrite import relu_after_pooling
from fedge.autodiff.rules.conv import weight_by_row
from fedge.autodiff.rules.windows import windows_of
from fedge.autodiff.shapes import Sizes
from fedge.errors import ConfigError, UnsupportedOperatorError
from fedge.losses import L1, BceWithLogits, CrossEntropy, Huber, LossLike, Mse, find_loss

_MOVING = ("Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
# Their rules end in a sum over all but the param's own axes, which _ByRow stops at the rows.
_SUMMED = (
    *("Add", "BatchNormalization", "Div", "GroupNormalization", "InstanceNormalization"),
    *("LayerNormalization", "Mul", "PRelu", "RMSNormalization", "Sub", "Sum"),
)
_ALONG_AXIS = ("CumSum", "Hardmax", "LogSoftmax", "LpNormalization", "Softmax", "TopK")


@dataclass(frozen=True)
class _Use:
    """A node that reads what came of params (``weights``), and the cotangents of its outputs."""

    node: ir.Node
    weights: tuple[Value, ...]
    cotangents: tuple[Value | None, ...]


Square: TypeAlias = Callable[[Ops, _Use, Value], Value]


def per_example_gradients(
    model: onnx.ModelProto,
    *,
    params: Sequence[str],
    trainable: Sequence[str],
    loss: LossLike,
    sizes: Sizes | None = None,
) -> onnx.ModelProto:
    """A graph that clips every example's gradient and adds them up.

    Args:
        model: As for :func:`~fedge.autodiff.training_graphs`. Its rows must not know of each other.
        params: Initializers that become graph inputs.
        trainable: Those of ``params`` to differentiate by.
        loss: A mean over examples in which each counts the same.
        sizes: For symbolic dimensions other than the batch, a size that the model accepts.

    Returns:
        A model with inputs as ``grad.onnx`` has (model inputs, labels, params) and ``clip_norm``
        (float32, rank 0, above 0), whose outputs are ``loss``, ``example@norms`` (float32 [N], of
        every example's whole gradient before clipping) and one ``X@grad`` per trainable param:
        the sum over examples of gradients of norm at most ``clip_norm``.

    Raises:
        ArtifactError: If the model does not fit.
        ConfigError: If the loss does not treat examples alike.
        UnsupportedOperatorError: If rows mix, or an operator with a param has no per-example form.
    """
    forward = load(normalize(model, sizes), params, sizes)
    relu_after_pooling(forward)
    op, weights = forward.op, [forward.params[n] for n in trainable]
    nodes = list(forward.graph)
    held = _refuse_mixing(forward, nodes, weights)
    written = write_loss(forward, _plain(loss))
    rows = op.Cast(op.Gather(op.Shape(forward.graph.outputs[0]), op.scalar(0)), to=1)
    uses = _uses(op, nodes, written.seeds(rows), held)
    squares = [_square(op, use, weight) for use in uses for weight in use.weights]
    norms = op.Sqrt(squares[0] if len(squares) == 1 else op.Sum(*squares))
    norms.shape, norms.dtype = ir.Shape([BATCH]), ir.DataType.FLOAT
    clip = ir.val("clip_norm", dtype=ir.DataType.FLOAT, shape=ir.Shape(()))
    factor = op.Min(op.Div(clip, op.Max(norms, 1e-12)), 1.0)
    found = _clipped(op, nodes, (uses, held), (factor, weights))
    for grad, weight in zip(found, weights, strict=True):
        grad.shape, grad.dtype = weight.shape, weight.dtype
    grads = {f"{n}@grad": g for n, g in zip(trainable, found, strict=True)}
    inputs = [*forward.inputs, *written.inputs, *forward.params.values(), clip]
    return finish(forward, inputs, {"loss": written.value, "example@norms": norms, **grads})


def _plain(loss: LossLike) -> CrossEntropy | BceWithLogits | Mse | L1 | Huber:
    found = find_loss(loss)
    alike = isinstance(found, (BceWithLogits, CrossEntropy, Huber, L1, Mse))
    if isinstance(found, CrossEntropy):
        alike = found.ignore_index is None and not found.class_weights
    if not alike:
        raise ConfigError(
            f"per-example gradients need a loss in which every example counts the same; "
            f"{found.name} here does not: use cross_entropy without ignore_index and class "
            "weights, bce_with_logits, mse, l1 or huber"
        )
    return found  # type: ignore[return-value]


def _refuse_mixing(
    forward: Forward, nodes: Sequence[ir.Node], weights: Sequence[Value]
) -> frozenset[Value]:
    """The values that come of trainable params alone.

    Raises:
        UnsupportedOperatorError: If a row of some value may depend on other rows.
    """
    data = set(forward.inputs)
    held = set(weights)
    for node in nodes:
        if node.op_type in CONSTANT:
            continue
        if data.intersection(node.inputs):
            data.update(node.outputs)
            _refuse_one(node, data, held)
        elif held.intersection(node.inputs):
            if not _moves(node):
                raise _refusal(node, "computes with params alone")
            held.update(node.outputs)
    return frozenset(held)


def _moves(node: ir.Node) -> bool:
    """Whether every element arrives at most once, so that the norm of a gradient stays."""
    if node.op_type == "Gather":
        picked = ir.convenience.get_const_tensor(node.inputs[1])
        return picked is not None and np.unique(picked.numpy()).size == picked.size
    return node.op_type in _MOVING


def _refuse_one(node: ir.Node, data: set[Value], held: set[Value]) -> None:
    rows = [v for v in node.inputs if v in data and v.dtype == ir.DataType.FLOAT]
    if not rows and not held.intersection(node.inputs):
        return  # token ids and the like on their way
    for value in (*rows, node.outputs[0]):
        if not shape_of(value) or shape_of(value)[0] != BATCH:
            raise _refusal(node, f"has {value.name!r} of shape {list(shape_of(value))}")
    if node.op_type == "BatchNormalization" and attribute(node, "training_mode", 0):
        raise _refusal(node, "averages over the batch")
    axis = attribute(node, "axis", -1)
    along = node.op_type in _ALONG_AXIS or (node.op_type == "Gather" and node.inputs[0] in data)
    if along and axis % len(shape_of(node.outputs[0])) == 0:
        raise _refusal(node, "works along the batch")


def _uses(
    op: Ops, nodes: Sequence[ir.Node], seeds: dict[Value, Value], held: frozenset[Value]
) -> list[_Use]:
    """The reverse pass, down to the operators that read params.

    Raises:
        UnsupportedOperatorError: If one of them reads a param that another one reads as well.
    """
    active, grads, uses = _reached(nodes, held), dict(seeds), []
    for node in reversed(nodes):
        cotangents = tuple(grads.get(v) for v in node.outputs)
        reads = tuple(v for v in node.inputs if v in held)
        if node.outputs[0] in held or not any(cotangents) or not active & set(node.inputs):
            continue
        if reads:
            uses.append(_Use(node, reads, cotangents))
        for value, grad in zip(node.inputs, apply_rule(op, node, cotangents), strict=False):
            if grad is not None and value in active and value not in held:
                grads[value] = op.Add(grads[value], grad) if value in grads else grad
    _refuse_sharing(uses)
    return uses


def _reached(nodes: Sequence[ir.Node], held: frozenset[Value]) -> set[Value]:
    reached = set(held)
    for node in nodes:
        if node.op_type not in CONSTANT and reached.intersection(node.inputs):
            reached.update(node.outputs)
    return reached


def _refuse_sharing(uses: Sequence[_Use]) -> None:
    """Two uses of one param would add up before the norm is taken."""
    seen: dict[Value, ir.Node] = {}
    for use in uses:
        for weight in use.weights:
            origin = weight
            while origin.producer() is not None:
                origin = origin.producer().inputs[0]
            if origin in seen:
                raise _refusal(use.node, f"shares the param {origin.name!r} with another operator")
            seen[origin] = use.node


def _clipped(
    op: Ops,
    nodes: Sequence[ir.Node],
    found: tuple[Sequence[_Use], frozenset[Value]],
    wanted: tuple[Value, Sequence[Value]],
) -> list[Value]:
    """The params' gradients with every row's cotangents scaled by its own factor."""
    (uses, held), (factor, weights) = found, wanted
    seeds: dict[Value, Value] = {}
    for use in uses:
        scaled = [
            None if c is None else op.Mul(c, _over(op, factor, len(shape_of(v))))
            for c, v in zip(use.cotangents, use.node.outputs, strict=False)
        ]
        grads = zip(use.node.inputs, apply_rule(op, use.node, scaled), strict=False)
        seeds |= {v: g for v, g in grads if v in use.weights and g is not None}
    movers = [n for n in nodes if n.outputs[0] in held]
    return backward(op, movers, seeds, weights)


def _over(op: Ops, rows: Value, rank: int) -> Value:
    """[N] -> [N, 1, …] of this rank."""
    return op.reshape(rows, (-1, *[1] * (rank - 1)))


def _square(op: Ops, use: _Use, weight: Value) -> Value:
    """[N]: every row's squared norm of the gradient by this weight.

    Raises:
        UnsupportedOperatorError: If the operator has no per-example form.
    """
    place = list(use.node.inputs).index(weight)
    rule = _SQUARES.get((use.node.op_type, place))
    if rule is not None:
        return rule(op, use, weight)
    bias = (use.node.op_type, place) in (("Conv", 2), ("Gemm", 2))
    if use.node.op_type not in _SUMMED and not bias:
        raise _refusal(use.node, f"reads the param {weight.name!r}")
    by_row = apply_rule(_ByRow(op), use.node, use.cotangents)[place]
    return _total(op, by_row)


class _ByRow(Ops):
    """Writes into another's graph, but stops sums over the batch at the rows: [N, …]."""

    def __init__(self, op: Ops) -> None:
        self.__dict__.update(op.__dict__)
        self._inner = op

    def _name(self, op_type: str) -> str:
        return self._inner._name(op_type)  # one counter for both

    def sum(self, x: Value, axes: Sequence[int], keepdims: bool = False) -> Value:
        """Sum over all of ``axes`` but the batch."""
        return super().sum(x, [a for a in axes if a], keepdims and 0 not in axes)

    def sum_to(self, grad: Value, have: Sequence[Dim], want: Sequence[Dim]) -> Value:
        """Sum down to [N, *want]."""
        lead = len(have) - len(want)
        inner = [lead + i for i, d in enumerate(want) if d == 1 and have[lead + i] != 1]
        axes = [a for a in (*range(lead), *inner) if a]
        return self.reshape(super().sum(grad, axes), (-1, *want))


def _total(op: Ops, by_row: Value) -> Value:
    """[N, …] -> [N], the sum of the squares of each row's elements."""
    flat = op.Reshape(by_row, op.ints([0, -1]))
    return op.sum(op.Mul(flat, flat), [1])


def _gemm(op: Ops, use: _Use, _weight: Value) -> Value:
    """‖xᵢ‖² ‖dyᵢ‖²: the gradient is their outer product."""
    x, dy = use.node.inputs[0], use.cotangents[0]
    if attribute(use.node, "transA", 0) or dy is None:
        raise _refusal(use.node, "multiplies the transposed input")
    alpha = attribute(use.node, "alpha", 1.0)
    return op.Mul(op.Mul(_total(op, x), _total(op, dy)), alpha * alpha)


def _matmul(op: Ops, use: _Use, weight: Value) -> Value:
    """Of Σₜ xₜ dyₜᵀ: by its Gram matrices where that is less than the gradient itself."""
    x, dy = use.node.inputs[0], use.cotangents[0]
    shape = shape_of(x)
    if len(shape) < 2 or len(shape_of(weight)) != 2 or dy is None:
        raise _refusal(use.node, f"multiplies by a param of rank {len(shape_of(weight))}")
    rows, columns = static_shape(weight)
    if len(shape) == 2:
        return op.Mul(_total(op, x), _total(op, dy))
    x3, dy3 = (op.Reshape(v, op.ints([0, -1, d])) for v, d in ((x, rows), (dy, columns)))
    length = int(np.prod([d if isinstance(d, int) else rows * columns for d in shape[1:-1]]))
    if length * length > rows * columns:
        return _total(op, op.MatMul(op.Transpose(x3, perm=[0, 2, 1]), dy3))
    grams = (op.MatMul(v, op.Transpose(v, perm=[0, 2, 1])) for v in (x3, dy3))
    return op.sum(op.Mul(*grams), [1, 2])


def _conv(op: Ops, use: _Use, weight: Value) -> Value:
    x, dy = use.node.inputs[0], use.cotangents[0]
    windows, group = windows_of(use.node, static_shape(weight)[2:]), attribute(use.node, "group", 1)
    if dy is None:
        raise _refusal(use.node, "has no output")
    return _total(op, weight_by_row(op, (x, dy, weight), windows, group))


def _gather(op: Ops, use: _Use, weight: Value) -> Value:
    """Of a table whose rows were picked: Σ ⟨dyₛ, dyₜ⟩ over places s, t that picked the same."""
    if attribute(use.node, "axis", 0) != 0 or len(shape_of(weight)) != 2:
        raise _refusal(use.node, "does not pick rows of a table")
    width = static_shape(weight)[1]
    dy = op.Reshape(use.cotangents[0], op.ints([0, -1, width]))
    across, down = (op.Reshape(use.node.inputs[1], op.ints(s)) for s in ([0, 1, -1], [0, -1, 1]))
    gram = op.MatMul(dy, op.Transpose(dy, perm=[0, 2, 1]))
    return op.sum(op.Where(op.Equal(across, down), gram, 0.0), [1, 2])


_SQUARES: dict[tuple[str, int], Square] = {
    ("Conv", 1): _conv,
    ("Gather", 0): _gather,
    ("Gemm", 1): _gemm,
    ("MatMul", 1): _matmul,
}


def _refusal(node: ir.Node, what: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"node {node.name or node.outputs[0].name!r} ({node.op_type}) {what}; fedge has no "
        "per-example gradients for that"
    )
