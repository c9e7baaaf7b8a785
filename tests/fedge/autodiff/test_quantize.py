"""Straight through quantization, against torch's fake quantization and learned step sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser

from fedge.autodiff import vjp
from fedge.errors import UnsupportedOperatorError
from fedge.types import Array, Params

Run = Callable[[onnx.ModelProto, Params], Params]
X = (3 * np.random.default_rng(0).standard_normal((5, 4, 6))).astype(np.float32)
C = np.random.default_rng(1).standard_normal((5, 4, 6)).astype(np.float32)


def fake_quantized(scale: Array, zero: Array, opset: int, attributes: str) -> onnx.ModelProto:
    found = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]>'
        "g (float[N,4,6] x) => (float[N,4,6] y)"
        f"{{q = QuantizeLinear<{attributes}>(x, s, z)"
        f" y = DequantizeLinear<{attributes}>(q, s, z)}}"
    )
    found.graph.initializer.extend(
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")]
    )
    return found


def learned_step(scale: torch.Tensor, zero: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Esser et al. 2020: rounding is the identity; beyond the range only the scale learns."""
    code = torch.clamp(x / scale, -128 - zero, 127 - zero)
    return (code + (torch.round(code) - code).detach()) * scale


Spread = Callable[[torch.Tensor], torch.Tensor]
SCALES: dict[str, tuple[tuple[int, ...], str, Spread]] = {
    "one": ((), "axis=1", lambda s: s),
    "per channel": ((4,), "axis=1", lambda s: s[:, None]),
    "per last": ((6,), "axis=-1", lambda s: s),
    "blocks": ((5, 4, 2), "axis=2, block_size=3", lambda s: torch.repeat_interleave(s, 3, 2)),
}


@pytest.mark.parametrize("kind", SCALES)
def test_straight_through(run_model: Run, kind: str) -> None:
    shape, attributes, spread = SCALES[kind]
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.01, 0.06, shape).astype(np.float32)
    zero = rng.integers(-20, 20, shape).astype(np.int8)
    model = fake_quantized(scale, zero, 21, attributes)
    found = vjp(model, outputs=["y"], wrt=["x", "s"])
    result = run_model(found, {"x": X, "y@cotangent": C})
    x, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (X, scale))
    wanted = learned_step(spread(s), spread(torch.tensor(zero).double()), x)
    dx, ds = torch.autograd.grad(wanted, [x, s], torch.tensor(C).double())
    np.testing.assert_allclose(result["y"], wanted.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(result["x@grad"], dx.numpy(), atol=1e-5)
    np.testing.assert_allclose(result["s@grad"], ds.numpy(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 23])
def test_as_torch_exports_it(run_model: Run, opset: int) -> None:
    scale, zero = np.float32(0.03), np.int8(3)
    model = fake_quantized(np.array(scale), np.array(zero), opset, "axis=1")
    result = run_model(vjp(model, outputs=["y"], wrt=["x"]), {"x": X, "y@cotangent": C})
    x = torch.tensor(X, requires_grad=True)
    y = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), -128, 127)
    (dx,) = torch.autograd.grad(y, x, torch.tensor(C))
    np.testing.assert_allclose(result["y"], y.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(result["x@grad"], dx.numpy(), atol=1e-6)


def test_codes_that_are_stored_learn_through_their_scale(run_model: Run) -> None:
    """As in QLoRA: the frozen weight is int8, gradients pass it on the way to what is before."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>'
        "g (float[N,4] x) => (float[N,2] y) <float[2] s = {0.1, 0.2}>"
        "{w = DequantizeLinear<axis=1>(codes, s) h = Tanh(x) y = MatMul(h, w)}"
    )
    codes = np.arange(-4, 4, dtype=np.int8).reshape(4, 2)
    model.graph.initializer.append(numpy_helper.from_array(codes, "codes"))
    c = C[:, 0, :2].copy()
    feeds = {"x": X[:, 0, :4].copy(), "y@cotangent": c}
    result = run_model(vjp(model, outputs=["y"], wrt=["x", "s"]), feeds)
    x = torch.tensor(feeds["x"], requires_grad=True)
    s = torch.tensor([0.1, 0.2], requires_grad=True)
    y = torch.tanh(x) @ (torch.tensor(codes).float() * s)
    dx, ds = torch.autograd.grad(y, [x, s], torch.tensor(c))
    np.testing.assert_allclose(result["x@grad"], dx.numpy(), atol=1e-5)
    np.testing.assert_allclose(result["s@grad"], ds.numpy(), rtol=1e-4)


def test_what_is_refused() -> None:
    odd = fake_quantized(np.ones((5, 4, 2), np.float32), np.zeros((5, 4, 2), np.int8), 21, "axis=2")
    for node in odd.graph.node:
        node.attribute.append(onnx.helper.make_attribute("block_size", 4))
    with pytest.raises(UnsupportedOperatorError, match="blocks of 4 along 6"):
        vjp(odd, outputs=["y"], wrt=["x"])
    text = (
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N,4] x) => (float[N,4] y)'
        "<float s = {1}> {q = QuantizeLinear<output_dtype=17>(x, s) y = DequantizeLinear(q, s)}"
    )
    with pytest.raises(UnsupportedOperatorError, match="integers of 4, 8 and 16 bits"):
        vjp(parser.parse_model(text), outputs=["y"], wrt=["x"])
