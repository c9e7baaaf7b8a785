"""The rules, one small function per operator. Importing this package registers them all."""

from fedge.autodiff.rules import conv, elementwise, linear, pooling, reduce, shape

__all__ = ["conv", "elementwise", "linear", "pooling", "reduce", "shape"]
