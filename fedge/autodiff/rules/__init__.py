"""The rules, one small function per operator. Importing this package registers them all."""

from fedge.autodiff.rules import (
    activations,
    conv,
    elementwise,
    linear,
    lp,
    norm,
    pooling,
    recurrent,
    reduce,
    scatter,
    select,
    shape,
    trigonometric,
)

__all__ = [
    "activations",
    "conv",
    "elementwise",
    "linear",
    "lp",
    "norm",
    "pooling",
    "recurrent",
    "reduce",
    "scatter",
    "select",
    "shape",
    "trigonometric",
]
