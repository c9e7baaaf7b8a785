"""LSTM, GRU and RNN against torch's, over drawn shapes, directions, initial states and outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fedge.autodiff import vjp
from fedge.errors import UnsupportedOperatorError
from fedge.types import Array, Params

Run = Callable[[onnx.ModelProto, Params], Params]
MODULES = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
# Where torch keeps the gates that ONNX wants in its own order.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
FEATURES, UNITS = 3, 4


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operator(
    kind: str, steps: int, direction: str, states: bool, bias: bool, **attributes: object
) -> onnx.ModelProto:
    """Inputs x [N, T, features] (and h0, c0 [N, D, H] where ``states``); weights are constants."""
    d = 2 if direction == "bidirectional" else 1
    gates = len(ORDER[kind])
    weights: dict[str, tuple[int, ...]] = {
        "w": (d, gates * UNITS, FEATURES),
        "r": (d, gates * UNITS, UNITS),
    }
    weights |= {"b": (d, 2 * gates * UNITS)} if bias else {}
    extra = (["h0", "c0"] if kind == "LSTM" else ["h0"]) if states else []
    outputs = ["y", "yh", "yc"] if kind == "LSTM" else ["y", "yh"]
    inputs = ["xt", "w", "r", "b" if bias else "", "", *(f"{e}t" for e in extra)]
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        *(helper.make_node("Transpose", [e], [f"{e}t"], perm=[1, 0, 2]) for e in extra),
        helper.make_node(
            kind, inputs, outputs, "the node", hidden_size=UNITS, direction=direction, **attributes
        ),
    ]
    values = [helper.make_tensor_value_info("x", 1, ["N", steps, FEATURES])]
    values += [helper.make_tensor_value_info(e, 1, ["N", d, UNITS]) for e in extra]
    found = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    given = [numpy_helper.from_array(normal(i, *s), n) for i, (n, s) in enumerate(weights.items())]
    graph = helper.make_graph(nodes, "g", values, found, given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def as_torch(kind: str, direction: str, weights: Params, relu: bool) -> nn.RNNBase:
    """torch's module with the same weights; "reverse" keeps the second direction's."""
    both = direction == "bidirectional"
    options = {"nonlinearity": "relu"} if relu else {}
    module = MODULES[kind](FEATURES, UNITS, bidirectional=both, **options).double()
    for index, suffix in enumerate(["", "_reverse"][: 1 + both]):
        w, r = (torch_order(kind, weights[n][index]) for n in "wr")
        bias = weights.get("b", np.zeros((2, 2 * w.shape[0]), np.float32))[index]
        halves = [torch_order(kind, h) for h in np.split(bias, 2)]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for name, value in zip(names, (w, r, *halves), strict=True):
            getattr(module, f"{name}_l0{suffix}").data = torch.tensor(value).double()
    return module


def torch_order(kind: str, gates: Array) -> Array:
    blocks = np.split(gates, len(ORDER[kind]))
    return np.concatenate([blocks[ORDER[kind].index(i)] for i in range(len(blocks))])


def onnx_order(kind: str, gates: Array) -> Array:
    blocks = np.split(gates, len(ORDER[kind]))
    return np.concatenate([blocks[i] for i in ORDER[kind]])


def reference(
    kind: str, module: nn.RNNBase, direction: str, feeds: Params, cotangents: Params
) -> Params:
    """Outputs and gradients as the operator lays them out."""
    t = {n: torch.tensor(a).double().requires_grad_() for n, a in feeds.items()}
    x = t["x"].transpose(0, 1)
    x = x.flip(0) if direction == "reverse" else x
    states = [t[n].transpose(0, 1).contiguous() for n in ("h0", "c0") if n in t]
    start = (tuple(states) if kind == "LSTM" else states[0]) if states else None
    y, last = module(x, start)
    y = y.flip(0) if direction == "reverse" else y
    directions = 2 if direction == "bidirectional" else 1
    values = {"y": y.reshape(*y.shape[:2], directions, UNITS).transpose(1, 2)}
    values |= dict(zip(("yh", "yc"), last if kind == "LSTM" else (last,), strict=False))
    total = sum((values[n] * torch.tensor(c)).sum() for n, c in cotangents.items())
    total.backward()
    found = {n: values[n].detach().numpy() for n in cotangents}
    found |= {f"{n}@grad": v.grad.numpy() for n, v in t.items()}
    suffixes = ["", "_reverse"][:directions]
    for name, parts in (("w", ["weight_ih"]), ("r", ["weight_hh"]), ("b", ["bias_ih", "bias_hh"])):
        stacked = [
            np.concatenate(
                [onnx_order(kind, getattr(module, f"{p}_l0{s}").grad.numpy()) for p in parts]
            )
            for s in suffixes
        ]
        found[f"{name}@grad"] = np.stack(stacked)
    return found


@given(
    kind=st.sampled_from(list(MODULES)),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    rows=st.integers(1, 3),
    steps=st.integers(1, 5),
    states=st.booleans(),
    bias=st.booleans(),
    relu=st.booleans(),
    ends=st.sampled_from([("y",), ("yh",), ("y", "yh"), ("yc",), ("y", "yh", "yc")]),
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_recurrent(
    run_model: Run,
    kind: str,
    direction: str,
    rows: int,
    steps: int,
    states: bool,
    bias: bool,
    relu: bool,
    ends: tuple[str, ...],
) -> None:
    directions = 2 if direction == "bidirectional" else 1
    attributes: dict[str, object] = {"linear_before_reset": 1} if kind == "GRU" else {}
    if kind == "RNN" and relu:
        attributes["activations"] = ["Relu"] * directions
    ends = tuple(e for e in ends if kind == "LSTM" or e != "yc") or ("y",)
    model = operator(kind, steps, direction, states, bias, **attributes)
    feeds = {"x": normal(7, rows, steps, FEATURES)}
    for i, name in enumerate(v.name for v in model.graph.input[1:]):
        feeds[name] = normal(8 + i, rows, directions, UNITS)
    shapes = {"y": (steps, directions, rows, UNITS), "yh": (directions, rows, UNITS)}
    cotangents = {n: normal(20, *shapes["yh" if n == "yc" else n]) for n in ends}
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    found = run_model(
        vjp(model, outputs=list(ends), wrt=[*feeds, *weights]),
        feeds | {f"{n}@cotangent": c for n, c in cotangents.items()},
    )
    module = as_torch(kind, direction, weights, relu and kind == "RNN")
    wanted = reference(kind, module, direction, feeds, cotangents)
    for name, value in found.items():
        norm = max(float(np.linalg.norm(wanted[name])), 1e-3)
        assert value.shape == wanted[name].shape, name
        assert np.linalg.norm(value - wanted[name]) <= 1e-4 * norm, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("states", [True, False])
def test_gru_that_resets_before_it_multiplies(run_model: Run, bias: bool, states: bool) -> None:
    """ONNX's default, which torch does not have."""
    model = operator("GRU", 4, "forward", states, bias)
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    feeds = {"x": normal(7, 3, 4, FEATURES)}
    feeds |= {"h0": normal(8, 3, 1, UNITS)} if states else {}
    tensors = {n: torch.tensor(a).double().requires_grad_() for n, a in (feeds | weights).items()}
    h = tensors["h0"][:, 0] if states else torch.zeros(3, UNITS).double()
    w, r = (tensors[n][0].chunk(3) for n in "wr")
    b = tensors["b"][0].chunk(6) if bias else [torch.zeros(UNITS).double()] * 6
    outputs = []
    for x in tensors["x"].unbind(1):
        z, reset = (torch.sigmoid(x @ w[i].T + b[i] + h @ r[i].T + b[i + 3]) for i in (0, 1))
        new = torch.tanh(x @ w[2].T + b[2] + (reset * h) @ r[2].T + b[5])
        h = (1 - z) * new + z * h
        outputs.append(h)
    wanted = torch.stack(outputs)[:, None]
    c = normal(20, *wanted.shape)
    wanted.backward(torch.tensor(c).double())
    found = run_model(vjp(model, outputs=["y"], wrt=list(tensors)), feeds | {"y@cotangent": c})
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        np.testing.assert_allclose(found[f"{name}@grad"], tensor.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("LSTM", {"clip": 3.0}, "LSTM 'the node': it has clip"),
        ("LSTM", {"input_forget": 1}, "input_forget"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, "other activations"),
        ("RNN", {"activations": ["Affine"]}, "other activations"),
    ],
)
def test_forms_that_are_refused(kind: str, attributes: dict[str, object], reason: str) -> None:
    model = operator(kind, 3, "forward", states=False, bias=True, **attributes)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        vjp(model, outputs=["y"], wrt=["w"])
