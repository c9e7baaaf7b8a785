"""Which operator is differentiated by which rule.

A rule takes ``(op, node, dy)``: where to write nodes, the forward node, and the gradient of the
loss by the node's output (one more argument per further output, None where nothing flows). It
returns the gradients by the node's inputs in their order: one value, or a tuple in which None
stands for "no gradient". It may compute what nobody wants; unused nodes are removed afterwards.
Shapes may be asked of forward values only (:func:`fedge.autodiff.ops.shape_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import onnx_ir as ir

from fedge.errors import UnsupportedOperatorError

Gradients: TypeAlias = "ir.Value | Sequence[ir.Value | None] | None"
Rule: TypeAlias = Callable[..., Gradients]
_AnyRule = TypeVar("_AnyRule", bound=Callable[..., Any])
_RULES: dict[str, Rule] = {}

# No gradient flows through these: their outputs are integers, booleans or constants.
CONSTANT = frozenset(
    {
        "And",
        "ArgMax",
        "ArgMin",
        "Bernoulli",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "Ceil",
        "Constant",
        "ConstantOfShape",
        "Equal",
        "EyeLike",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Hardmax",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "Multinomial",
        "NonMaxSuppression",
        "NonZero",
        "Not",
        "OneHot",
        "Or",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Round",
        "Shape",
        "Sign",
        "Size",
        "Xor",
    }
)


def vjp_rule(*op_types: str) -> Callable[[_AnyRule], _AnyRule]:
    """Register the decorated function as the rule for these standard operators."""

    def register(rule: _AnyRule) -> _AnyRule:
        for op_type in op_types:
            if op_type in _RULES:
                raise ValueError(f"{op_type} has a rule already: {_RULES[op_type].__name__}")
            _RULES[op_type] = rule
        return rule

    return register


def has_rule(op_type: str, domain: str = "") -> bool:
    """Whether gradients can flow through (or stop at) this operator."""
    return domain in ("", "ai.onnx") and (op_type in _RULES or op_type in CONSTANT)


def supported() -> tuple[str, ...]:
    """The operators with a rule, sorted."""
    return tuple(sorted(_RULES))


def apply_rule(op: Any, node: ir.Node, grads: Sequence[ir.Value | None]) -> Sequence[Any]:  # noqa: ANN401 - Ops
    """The gradients by the node's inputs.

    Raises:
        UnsupportedOperatorError: If the operator has no rule.
    """
    if not has_rule(node.op_type, node.domain):
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise UnsupportedOperatorError(
            f"node {node.name or node.outputs[0].name!r} is a {name}, which fedge cannot "
            f"differentiate; replace it, or freeze the params before it. "
            f"Differentiable: {', '.join(supported())}"
        )
    if node.op_type in CONSTANT:
        return ()
    result = _RULES[node.op_type](op, node, *grads)
    return (result,) if isinstance(result, ir.Value) or result is None else result
