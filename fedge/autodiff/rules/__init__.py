"""The rules, one small function per operator. Importing this package registers them all."""

from fedge.autodiff.rules import (
    conv,
    elementwise,
    linear,
    norm,
    pooling,
    recurrent,
    reduce,
    select,
    shape,
)

__all__ = [
    "conv",
    "elementwise",
    "linear",
    "norm",
    "pooling",
    "recurrent",
    "reduce",
    "select",
    "shape",
]
