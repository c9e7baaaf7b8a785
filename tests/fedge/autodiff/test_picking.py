"""Operators that pick, place, repeat and add up elements, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser
from torch.nn import functional as F

from fedge.autodiff import vjp
from fedge.errors import UnsupportedOperatorError
from fedge.types import Array, Params

Check = Callable[..., None]
Run = Callable[[onnx.ModelProto, Params], Params]
few = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
sizes = st.integers(1, 4)
seeds = st.integers(0, 999)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def indices(seed: int, below: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(-below, below, shape)


@pytest.mark.parametrize(
    ("place", "bounds"),
    [
        (np.s_[:, ::2], ((0,), (9,), (1,), (2,))),
        (np.s_[:, 1::3], ((1,), (99,), (1,), (3,))),
        (np.s_[:, ::-1], ((-1,), (-99,), (1,), (-1,))),
        (np.s_[:, 5:1:-2, 1:], ((5, 1), (1, 9), (1, 2), (-2, 1))),
        (np.s_[1:], ((1,), (10**9,), (0,), (1,))),
        (np.s_[::-1], ((-1,), (-(10**9),), (0,), (-1,))),
    ],
)
def test_slices(check: Check, place: Any, bounds: tuple[tuple[int, ...], ...]) -> None:
    def reference(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        where = torch.tensor(np.arange(x.numel()).reshape(x.shape)[place].copy())
        return x.flatten()[where]

    check("Slice", reference, [normal(0, 3, 7, 2), *(ints(*b) for b in bounds)])


@pytest.mark.parametrize(("mode", "theirs"), [("reflect", "reflect"), ("edge", "replicate")])
@pytest.mark.parametrize("opset", [17, 21])
def test_pad_copies(check: Check, mode: str, theirs: str, opset: int) -> None:
    def reference(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (1, 2, 2, 0), mode=theirs)

    pads = ints(0, 0, 2, 1, 0, 0, 0, 2)
    check("Pad", reference, [normal(0, 2, 3, 4, 5), pads], opset, mode=mode)


def test_pad_wraps_and_names_axes(check: Check) -> None:
    def wrap(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (1, 2), mode="circular")

    def zeros(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (1, 2))

    x = normal(0, 2, 3, 5)
    check("Pad", wrap, [x, ints(1, 2), None, ints(2)], 19, mode="wrap")
    check("Pad", zeros, [x, ints(1, 2), None, ints(-1)], 18)


@given(n=sizes, seed=seeds, axis=st.sampled_from([0, 1, -1]))
@few
def test_gathering(check: Check, n: int, seed: int, axis: int) -> None:
    x = normal(seed, n, 3, 4)
    shape = [n, 3, 4]
    shape[axis] += 2
    at = indices(seed, x.shape[axis], *shape)

    def reference(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return torch.gather(x, axis, i % x.shape[axis])

    check("GatherElements", reference, [x, at], axis=axis)


@given(n=sizes, seed=seeds)
@few
def test_gathering_slices(check: Check, n: int, seed: int) -> None:
    table, x = normal(seed, 4, 3, 2), normal(seed, n, 5, 2)
    at = indices(seed, 3, n, 6, 2) % 3
    check("GatherND", lambda t, i: t[i[..., 0], i[..., 1]], [table, at], data=1)
    per_row = indices(seed, 5, n, 1) % 5
    check("GatherND", lambda t, i: t[torch.arange(n), i[:, 0]], [x, per_row], data=9, batch_dims=1)
    computed = indices(seed, 3, n, 2) % 3
    check("Gather", lambda t, i: t[:, i], [table, computed], data=1, axis=1)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
@given(n=sizes, seed=seeds, zeros=st.booleans())
@few
def test_scattering(check: Check, reduction: str, n: int, seed: int, zeros: bool) -> None:
    """Every place is written once at most where the order would matter; zeros stop no product."""
    x, updates = normal(seed, n, 6), normal(seed + 1, n, 3)
    if zeros and reduction == "mul":
        updates[:, 0], x[:, 1] = 0, 0
    rng = np.random.default_rng(seed)
    at = np.stack([rng.permutation(6)[:3] for _ in range(n)])
    if reduction in ("add", "mul"):
        at[:, 2] = at[:, 1]
    theirs = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}

    def reference(x: torch.Tensor, i: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if reduction == "none":
            return x.scatter(1, i, u)
        return x.scatter_reduce(1, i, u, theirs[reduction])

    check("ScatterElements", reference, [x, at, updates], 18, axis=1, reduction=reduction)

    def flat(x: torch.Tensor, i: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return reference(x[None], i[None, :, 0], u[None])[0]

    first = [x[0], at[0, :, None], updates[0]]
    check("ScatterND", flat, first, 18, data=9, reduction=reduction)


@given(n=sizes, seed=seeds)
@few
def test_repeating_and_triangles(check: Check, n: int, seed: int) -> None:
    x = normal(seed, n, 2, 3)
    check("Tile", lambda t, _: t.repeat(1, 3, 2), [x, ints(1, 3, 2)])
    check("Tile", lambda t, _: t.repeat(2, 1, 1), [x, ints(2, 1, 1)])
    check("Trilu", lambda t: t.triu(), [normal(seed, n, 4, 3)])
    below = np.array(-1, np.int64)
    check("Trilu", lambda t, _: t.tril(-1), [normal(seed, n, 4, 3), below], upper=0)
    lengths = np.full(n, 2, np.int64)

    def reverse(t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.cat([t[:, :2].flip(1), t[:, 2:]], 1)

    operands = [normal(seed, n, 5), lengths]
    check("ReverseSequence", reverse, operands, batch_axis=0, time_axis=1)


@given(n=sizes, size=st.integers(1, 3), seed=seeds)
@few
def test_depth_and_space(check: Check, n: int, size: int, seed: int) -> None:
    deep, wide = normal(seed, n, 2 * size**2, 2, 3), normal(seed, n, 2, 2 * size, 3 * size)

    def to_space(t: torch.Tensor) -> torch.Tensor:
        blocks = t.reshape(n, size, size, 2, 2, 3)
        return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, 2, 2 * size, 3 * size)

    def to_depth(t: torch.Tensor) -> torch.Tensor:
        blocks = t.reshape(n, 2, 2, size, 3, size)
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, 2 * size**2, 2, 3)

    check("DepthToSpace", to_space, [deep], blocksize=size)
    check("DepthToSpace", lambda t: F.pixel_shuffle(t, size), [deep], blocksize=size, mode="CRD")
    check("SpaceToDepth", to_depth, [wide], blocksize=size)


@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 0), (2, 1, 1), (1, 2, 2)])
def test_columns_to_images(check: Check, stride: int, dilation: int, padding: int) -> None:
    settings_ = {"stride": stride, "dilation": dilation, "padding": padding}
    columns = F.unfold(torch.zeros(2, 3, 6, 5), (3, 2), **settings_).shape

    def reference(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return F.fold(x, (6, 5), (3, 2), **settings_)

    check(
        "Col2Im",
        reference,
        [normal(0, *columns), ints(6, 5), ints(3, 2)],
        18,
        strides=[stride] * 2,
        dilations=[dilation] * 2,
        pads=[padding] * 4,
    )


@pytest.mark.parametrize(("height", "width"), [(3, 9), (8, 4), (5, 7)])
def test_center_crop_and_pad(check: Check, height: int, width: int) -> None:
    def reference(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        cuts = []
        for have, want in ((7, width), (5, height)):
            spare = want - have
            before = spare // 2 if spare > 0 else -(-spare // 2)
            cuts += [before, spare - before]
        return F.pad(x, cuts)

    check("CenterCropPad", reference, [normal(0, 2, 5, 7), ints(height, width)], 18, axes=[1, 2])


@given(n=sizes, seed=seeds, exclusive=st.booleans(), reverse=st.booleans())
@few
def test_cumulative_sums(check: Check, n: int, seed: int, exclusive: bool, reverse: bool) -> None:
    def reference(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        x = x.flip(1) if reverse else x
        y = x.cumsum(1) - (x if exclusive else 0)
        return y.flip(1) if reverse else y

    axis = np.array(1, np.int64)
    flags = {"exclusive": int(exclusive), "reverse": int(reverse)}
    check("CumSum", reference, [normal(seed, n, 5), axis], **flags)


@pytest.mark.parametrize(("axis", "rest"), [("<axis=1>", "N,3"), ("", "3")])
def test_compress(run_model: Run, axis: str, rest: str) -> None:
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[{rest}] y)
        {{c = Constant<value=bool[4] {{1,0,1,1}}>() y = Compress{axis}(x, c)}}"""
    )
    x = normal(0, 3, 4)
    keep = np.array([True, False, True, True])
    c = normal(1, *((3, 3) if axis else (3,)))
    wanted = np.zeros_like(x)
    if axis:
        wanted[:, keep] = c
    else:
        wanted[0, keep] = c
    found = run_model(vjp(model, outputs=["y"], wrt=["x"]), {"x": x, "y@cotangent": c})
    np.testing.assert_array_equal(found["x@grad"], wanted)


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k_and_max_unpool(run_model: Run, largest: int) -> None:
    """Through the indices other nodes computed, MaxPool's among them."""
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]> g (float[N,2,4,4] x) => (float[N,2,3,2] y)
    {{k = Constant<value_ints=[3]>()
      p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
      u = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(p, i) s = Add(u, x)
      v, j = TopK<axis=2, largest={largest}>(s, k) y = Slice(v, a, b, c)}}
    """
    model = parser.parse_model(text)
    for name, values in {"a": [0], "b": [2], "c": [3]}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(ints(*values), name))
    x, c = normal(0, 3, 2, 4, 4), normal(1, 3, 2, 3, 2)
    found = run_model(vjp(model, outputs=["y"], wrt=["x"]), {"x": x, "y@cotangent": c})
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    pooled, at = F.max_pool2d(t, 2, return_indices=True)
    values = (F.max_unpool2d(pooled, at, 2) + t).topk(3, 2, bool(largest)).values[..., :2]
    (wanted,) = torch.autograd.grad(values, t, torch.tensor(c).double())
    np.testing.assert_allclose(found["x@grad"], wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_tensor_scatter(check: Check) -> None:
    def reference(cache: torch.Tensor, update: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        rows = [
            torch.cat([c[:i], u, c[i + len(u) :]])
            for c, u, i in zip(cache, update, at.tolist(), strict=True)
        ]
        return torch.stack(rows)

    cache, update = normal(0, 3, 5, 2), normal(1, 3, 2, 2)
    check("TensorScatter", reference, [cache, update, ints(0, 3, 1)], 24, data=9, axis=1)


def test_max_unpool_with_a_shape_of_its_own_is_refused() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]> g (float[N,1,2,2] x, int64[N,1,2,2] i)
    => (float[N,1,5,5] y) {s = Constant<value_ints=[1,1,5,5]>()
      y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(x, i, s)}
    """
    with pytest.raises(UnsupportedOperatorError, match="MaxUnpool with output_shape"):
        vjp(parser.parse_model(text), outputs=["y"], wrt=["x"])
