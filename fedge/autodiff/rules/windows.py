"""The geometry that convolution and pooling share: where a window lies over its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import onnx_ir as ir

from fedge.autodiff.ops import Ops, Value, attribute, static_dims


@dataclass(frozen=True)
class Windows:
    """Sliding windows over the spatial axes; every field has one entry per axis.

    Attributes:
        size: Input length.
        count: Output length, i.e. the number of windows.
        kernel: Window length in taps.
        stride: Step between windows.
        dilation: Step between taps.
        begin: Padding before.
        end: Padding after, as far as windows reach; negative where they leave a rest unread.
    """

    size: tuple[int, ...]
    count: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def tiling(self) -> bool:
        """Whether windows lie side by side, without gaps, from the first element on."""
        plain = self.kernel == self.stride and not any(self.begin) and set(self.dilation) == {1}
        return plain and all(e <= 0 for e in self.end)

    @property
    def padding(self) -> tuple[int, ...]:
        """ONNX's ``pads``: all beginnings, then all ends (not negative)."""
        return (*self.begin, *(max(e, 0) for e in self.end))

    @property
    def rest(self) -> tuple[int, ...]:
        """Elements after the last window, ConvTranspose's ``output_padding``."""
        return tuple(max(-e, 0) for e in self.end)

    def taps(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Per tap of the kernel: where in the padded input its elements start and end."""
        return [(start, self._stop(start)) for start in self.starts()]

    def starts(self, axis: int = 0) -> list[tuple[int, ...]]:
        """Per tap of the axes from ``axis`` on: where in the padded input its elements start."""
        sides = zip(self.kernel[axis:], self.dilation[axis:], strict=True)
        return list(product(*(range(0, k * d, d) for k, d in sides)))

    def first_axis_moves(self) -> dict[int, dict[int, int]]:
        """The first axis' taps by their offset modulo the stride: tap -> offset over stride."""
        found: dict[int, dict[int, int]] = {}
        for tap in range(self.kernel[0]):
            windows, rest = divmod(tap * self.dilation[0], self.stride[0])
            found.setdefault(rest, {})[tap] = windows
        return found

    def _stop(self, start: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            b + (n - 1) * s + 1 for b, n, s in zip(start, self.count, self.stride, strict=True)
        )


def windows_of(node: ir.Node, kernel: Sequence[int]) -> Windows:
    """Read a Conv's or pool's attributes, whatever way its padding was given."""
    size, count = (static_dims(v, slice(2, None)) for v in (node.inputs[0], node.outputs[0]))
    return _windows(node, kernel, size, count)


def transposed_windows_of(node: ir.Node, kernel: Sequence[int]) -> Windows:
    """Read a ConvTranspose's: windows slide over its output, one per element of its input."""
    count, size = (static_dims(v, slice(2, None)) for v in (node.inputs[0], node.outputs[0]))
    return _windows(node, kernel, size, count)


def _windows(
    node: ir.Node, kernel: Sequence[int], size: Sequence[int], count: Sequence[int]
) -> Windows:
    ones = [1] * len(size)
    stride = attribute(node, "strides") or ones
    dilation = attribute(node, "dilations") or ones
    reach = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(count, stride, dilation, kernel, strict=True)
    ]
    spare = [r - n for r, n in zip(reach, size, strict=True)]
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        begin = [(max(p, 0) + (auto == "SAME_LOWER")) // 2 for p in spare]
    else:
        begin = list(attribute(node, "pads") or [0] * 2 * len(size))[: len(size)]
    end = [p - b for p, b in zip(spare, begin, strict=True)]
    fields = (size, count, kernel, stride, dilation, begin, end)
    return Windows(*(tuple(int(v) for v in field) for field in fields))


def pad(op: Ops, x: Value, windows: Windows, lead: int) -> Value:
    """Zeros around the spatial axes, which follow ``lead`` others."""
    if not any(windows.padding):
        return x
    rank = len(windows.size)
    none = [0] * lead
    pads = [*none, *windows.padding[:rank], *none, *windows.padding[rank:]]
    return op.Pad(x, op.ints(pads))


def tap_slices(op: Ops, x: Value, windows: Windows, lead: int) -> list[Value]:
    """Per tap of the kernel, the elements under it: spatial shape ``count``."""
    axes = op.ints(range(lead, lead + len(windows.size)))
    steps = op.ints(windows.stride)
    whole = windows.count == windows.size and set(windows.stride) == {1}
    if whole and not any(windows.padding) and set(windows.kernel) == {1}:
        return [x]
    padded = pad(op, x, windows, lead)
    return [
        op.Slice(padded, op.ints(start), op.ints(stop), axes, steps)
        for start, stop in windows.taps()
    ]


def window_slice(
    op: Ops, padded: Value, windows: Windows, start: Sequence[int], lines: int
) -> Value:
    """From ``start`` on, every stride-th element: ``lines`` along the first axis, else ``count``.

    ``padded`` has two axes before the spatial ones.
    """
    count = (lines, *windows.count[1:])
    ends = [b + (n - 1) * s + 1 for b, n, s in zip(start, count, windows.stride, strict=True)]
    rank = len(ends)
    size = [n + p for n, p in zip(windows.size, _padding_sums(windows), strict=True)]
    if set(windows.stride) == {1} and not any(start) and ends == size:
        return padded
    axes, steps = op.ints(range(2, 2 + rank)), op.ints(windows.stride)
    return op.Slice(padded, op.ints(start), op.ints(ends), axes, steps)


def _padding_sums(windows: Windows) -> list[int]:
    rank = len(windows.size)
    return [a + b for a, b in zip(windows.padding[:rank], windows.padding[rank:], strict=True)]
