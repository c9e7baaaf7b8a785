"""The rules, one small function per operator. Importing this package registers them all."""

from fedge.autodiff.rules import (
    activations,
    conv,
    einsum,
    elementwise,
    linear,
    lp,
    norm,
    pooling,
    quantize,
    recurrent,
    reduce,
    resize,
    scatter,
    select,
    shape,
    trigonometric,
)

__all__ = [
    "activations",
    "conv",
    "einsum",
    "elementwise",
    "linear",
    "lp",
    "norm",
    "pooling",
    "quantize",
    "recurrent",
    "reduce",
    "resize",
    "scatter",
    "select",
    "shape",
    "trigonometric",
]
