"""Einsum of any number of operands."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from fedge.autodiff.ops import Dim, Ops, Value, attribute, shape_of
from fedge.autodiff.registry import Gradients, vjp_rule
from fedge.errors import UnsupportedOperatorError

_SPARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # for the axes an ellipsis stands for


@vjp_rule("Einsum")
def einsum(op: Ops, node: ir.Node, dy: Value) -> Gradients:
    """By each operand: the Einsum of dy and the other operands, with its letters as the output.

    Raises:
        UnsupportedOperatorError: If an operand has a letter twice, or an ellipsis broadcasts.
    """
    terms, out = _letters(node)
    _check(node, terms)
    found = []
    for i, term in enumerate(terms):
        others = [*terms[:i], *terms[i + 1 :]]
        values = [*node.inputs[:i], *node.inputs[i + 1 :]]
        kept = "".join(c for c in term if any(c in t for t in [out, *others]))
        part = op.Einsum(dy, *values, equation=f"{','.join([out, *others])}->{kept}")
        if kept != term:  # summed over letters that only this operand has
            missing = [j for j, c in enumerate(term) if c not in kept]
            part = op.Expand(op.Unsqueeze(part, op.ints(missing)), op.Shape(node.inputs[i]))
        found.append(part)
    return tuple(found)


def _letters(node: ir.Node) -> tuple[list[str], str]:
    """The letters of each operand and of the output; an ellipsis becomes capital letters."""
    equation = str(attribute(node, "equation")).replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(c for c in set(left) - set(",.") if left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(once)
    ranks = [len(shape_of(v)) for v in node.inputs]
    widths = [r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True)]
    spare = [c for c in _SPARE if c not in equation][: max(widths)]
    named = [
        t.replace("...", "".join(spare[len(spare) - w :]))
        for t, w in zip(terms, widths, strict=True)
    ]
    return named, out.replace("...", "".join(spare))


def _check(node: ir.Node, terms: Sequence[str]) -> None:
    """Every letter stands for one size.

    Raises:
        UnsupportedOperatorError: If a letter stands for two sizes, or twice in one operand.
    """
    sizes: dict[str, Dim] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        for letter, size in zip(term, shape_of(value), strict=True):
            if sizes.setdefault(letter, size) != size or term.count(letter) > 1:
                raise UnsupportedOperatorError(
                    f"fedge does not differentiate the Einsum {node.name or node.outputs[0].name!r}"
                    f" ({attribute(node, 'equation')!r}): it takes a diagonal or broadcasts"
                )
