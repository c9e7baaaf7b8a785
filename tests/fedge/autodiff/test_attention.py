"""Attention and RotaryEmbedding, which are differentiated through their ONNX bodies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from torch.nn import functional as F

from fedge.autodiff import vjp
from fedge.types import Array, Params

Run = Callable[[onnx.ModelProto, Params], Params]
Reference = Callable[..., torch.Tensor]
ROWS, HEADS, LENGTH, WIDTH = 3, 2, 5, 4


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def agree(run: Run, model: onnx.ModelProto, feeds: Params, reference: Reference) -> Params:
    """Value and gradients by all float inputs are torch's."""
    tensors = [
        torch.tensor(a, dtype=torch.float64, requires_grad=True)
        if a.dtype == np.float32
        else torch.tensor(a)
        for a in feeds.values()
    ]
    wanted = reference(*tensors)
    c = normal(99, *wanted.shape)
    floats = {n: t for n, t in zip(feeds, tensors, strict=True) if t.requires_grad}
    grads = torch.autograd.grad(wanted, list(floats.values()), torch.tensor(c).double())
    found = run(vjp(model, outputs=["y"], wrt=list(floats)), {**feeds, "y@cotangent": c})
    np.testing.assert_allclose(found["y"], wanted.detach().numpy(), atol=1e-5)
    for name, grad in zip(floats, grads, strict=True):
        norm = np.linalg.norm(grad.numpy())
        assert np.linalg.norm(found[f"{name}@grad"] - grad.numpy()) <= 1e-4 * norm, name
    return found


def attention(
    signature: str, attributes: str = "is_causal=0", operands: str = "q, k, v", opset: int = 23
) -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g ({signature}) => (float[a,b,c,d] y)'
        f"{{y = Attention<{attributes}>({operands})}}"
    )


def four(name: str, heads: int = HEADS, length: int = LENGTH) -> str:
    return f"float[N,{heads},{length},{WIDTH}] {name}"


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_scaled_dot_product(run_model: Run, opset: int, causal: int, kv_heads: int) -> None:
    signature = ", ".join([four("q", 4), four("k", kv_heads), four("v", kv_heads)])
    model = attention(signature, f"is_causal={causal}, scale=0.7", opset=opset)
    feeds = {
        "q": normal(0, ROWS, 4, LENGTH, WIDTH),
        "k": normal(1, ROWS, kv_heads, LENGTH, WIDTH),
        "v": normal(2, ROWS, kv_heads, LENGTH, WIDTH),
    }

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=bool(causal), scale=0.7, enable_gqa=kv_heads < 4
        )

    agree(run_model, model, feeds, reference)


def test_heads_side_by_side(run_model: Run) -> None:
    signature = ", ".join(f"float[N,{LENGTH},8] {n}" for n in "qkv")
    model = attention(signature, "q_num_heads=2, kv_num_heads=2, softcap=2.0")
    del model.graph.output[0].type.tensor_type.shape.dim[3]
    feeds = {n: normal(i, ROWS, LENGTH, 8) for i, n in enumerate("qkv")}

    def reference(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(ROWS, LENGTH, 2, 4).transpose(1, 2) for t in tensors)
        scores = 2 * torch.tanh(q @ k.transpose(2, 3) / 2 / 2)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(ROWS, LENGTH, 8)

    agree(run_model, model, feeds, reference)


def test_a_row_that_may_look_at_nothing(run_model: Run) -> None:
    """Its output and its gradients are zero, not NaN."""
    signature = ", ".join([four("q"), four("k"), four("v"), f"bool[N,1,{LENGTH},{LENGTH}] mask"])
    mask = np.random.default_rng(3).random((ROWS, 1, LENGTH, LENGTH)) < 0.7
    mask[..., 0] = True
    mask[1, :, 2] = False
    feeds = {n: normal(i, ROWS, HEADS, LENGTH, WIDTH) for i, n in enumerate("qkv")}

    def reference(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        seen = mask.any(-1, keepdim=True)
        shown = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~seen)
        return shown * seen

    model = attention(signature, operands="q, k, v, mask")
    found = agree(run_model, model, {**feeds, "mask": mask}, reference)
    assert not found["q@grad"][1, :, 2].any()


def test_keys_and_values_from_before(run_model: Run) -> None:
    """Inputs left out in the middle, as a cache needs it."""
    names = ["q", "k", "v", "past_k", "past_v"]
    signature = ", ".join(four(n, length=3 if n.startswith("past") else LENGTH) for n in names)
    model = attention(signature, operands="q, k, v, past_k, past_v")
    model.graph.node[0].input.insert(3, "")
    model.graph.node[0].output.extend(["present_k", "present_v"])
    shapes = [(ROWS, HEADS, 3 if n.startswith("past") else LENGTH, WIDTH) for n in names]
    feeds = {n: normal(i, *s) for i, (n, s) in enumerate(zip(names, shapes, strict=True))}

    def reference(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, past_k, past_v = tensors
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, k, v)

    agree(run_model, model, feeds, reference)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(run_model: Run, interleaved: int) -> None:
    signature = f"{four('x')}, float[N,{LENGTH},2] cosine, float[N,{LENGTH},2] sine"
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23]> g ({signature}) => ({four("y")})'
        f"{{y = RotaryEmbedding<interleaved={interleaved}>(x, cosine, sine)}}"
    )
    feeds = {
        "x": normal(0, ROWS, HEADS, LENGTH, WIDTH),
        "cosine": normal(1, ROWS, LENGTH, 2),
        "sine": normal(2, ROWS, LENGTH, 2),
    }

    def reference(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        c, s = c[:, None], s[:, None]
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        turned = (a * c - b * s, a * s + b * c)
        return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)

    agree(run_model, model, feeds, reference)
