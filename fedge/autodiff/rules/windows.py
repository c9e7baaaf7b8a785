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
    def padded(self) -> tuple[int, ...]:
        """Input length with its padding."""
        rank = len(self.size)
        sides = zip(self.size, self.padding[:rank], self.padding[rank:], strict=True)
        return tuple(sum(side) for side in sides)

    @property
    def pointwise(self) -> bool:
        """Whether every window is one element and every element has one."""
        ones = {*self.kernel, *self.stride} == {1}
        return ones and not any(self.padding) and self.count == self.size

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


def pad(op: Ops, x: Value, windows: Windows, lead: int, more: Sequence[int] = ()) -> Value:
    """Zeros around the spatial axes, which follow ``lead`` others, and ``more`` after them."""
    rank = len(windows.size)
    after = [a + b for a, b in zip(windows.padding[rank:], more or [0] * rank, strict=True)]
    pads = [*[0] * lead, *windows.padding[:rank], *[0] * lead, *after]
    return op.Pad(x, op.ints(pads)) if any(pads) else x


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


class Cutter:
    """Cuts what lies under a tap from the padded input of windows, for many taps.

    Slicing with steps is slow in ONNX Runtime. Where 2-D windows step alike on both axes,
    SpaceToDepth puts the elements one step apart side by side, once for all taps.

    Args:
        op: Where to write.
        x: What the windows slide over, [N, C, ...].
        channels: C.
        windows: Their geometry.
        rows_behind: Cut [C, N, ...] from it.
    """

    def __init__(
        self, op: Ops, x: Value, channels: int, windows: Windows, *, rows_behind: bool = False
    ) -> None:
        step = windows.stride[0]
        self._op, self._windows, self._channels = op, windows, channels
        self._apart = windows.stride == (step, step) and step > 1 and max(windows.kernel) > 1
        self._size = list(windows.padded)
        if self._apart:
            self._size = [-(-n // step) * step for n in self._size]
        more = [n - m for n, m in zip(self._size, windows.padded, strict=True)]
        padded = pad(op, x, windows, 2, more)
        self._x = op.SpaceToDepth(padded, blocksize=step) if self._apart else padded
        if rows_behind:
            self._x = op.Transpose(self._x, perm=[1, 0, *range(2, 2 + len(self._size))])
        self._channel_axis = 0 if rows_behind else 1

    def __call__(self, start: Sequence[int], lines: int) -> Value:
        """Every stride-th element from ``start`` on: ``lines`` on the first axis, else count."""
        op, stride = self._op, self._windows.stride
        count = (lines, *self._windows.count[1:])
        if self._apart:
            return self._from_planes(start, count)
        ends = [b + (n - 1) * s + 1 for b, n, s in zip(start, count, stride, strict=True)]
        if set(stride) == {1} and not any(start) and ends == self._size:
            return self._x
        axes = op.ints(range(2, 2 + len(ends)))
        return op.Slice(self._x, op.ints(start), op.ints(ends), axes, op.ints(stride))

    def _from_planes(self, start: Sequence[int], count: Sequence[int]) -> Value:
        """Out of [N, step · step · C, H / step, W / step]."""
        op, step, channels = self._op, self._windows.stride[0], self._channels
        (row, plane_row), (column, plane_column) = (divmod(b, step) for b in start)
        first = (plane_row * step + plane_column) * channels
        begin = [first, row, column]
        end = [first + channels, row + count[0], column + count[1]]
        axes = op.ints([self._channel_axis, 2, 3])
        return op.Slice(self._x, op.ints(begin), op.ints(end), axes)
