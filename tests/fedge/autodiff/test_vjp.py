"""The pass itself: which values get a gradient, through which paths, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import parser

from fedge.autodiff import vjp, vjp_rule
from fedge.errors import ArtifactError, UnsupportedOperatorError
from fedge.types import Array, Params

Run = Callable[[onnx.ModelProto, Params], Params]
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)


def model(body: str, opset: int = 17) -> onnx.ModelProto:
    """``(signature) {nodes}`` in ONNX's text form, with the initializer ``w`` set to ``W``."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> '
    found = parser.parse_model(head + body)
    if any("w" in n.input for n in found.graph.node):
        found.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    return found


def gradients(
    run: Run, graph: onnx.ModelProto, cotangents: Params, wrt: list[str], **kwargs: Any
) -> Params:
    found = vjp(graph, outputs=list(cotangents), wrt=wrt, **kwargs)
    feeds = {"x": X, **{f"{n}@cotangent": c for n, c in cotangents.items()}}
    names = {i.name for i in found.graph.input}
    return run(found, {n: a for n, a in feeds.items() if n in names})


def close(found: Array, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_a_value_with_several_consumers_gets_the_sum(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {h = Tanh(x) a = Mul(h, h) y = Add(a, h)}")
    c = np.ones((3, 4), np.float32)
    found = gradients(run_model, graph, {"y": c}, ["x"])
    x = torch.tensor(X, requires_grad=True)
    h = torch.tanh(x)
    (wanted,) = torch.autograd.grad((h * h + h).sum(), x)
    close(found["x@grad"], wanted)


def test_a_node_that_takes_one_value_twice(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {y = Mul(x, x)}")
    found = gradients(run_model, graph, {"y": np.ones((3, 4), np.float32)}, ["x"])
    close(found["x@grad"], torch.tensor(2 * X))


def test_several_outputs_add_up(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) {y = Exp(x) z = MatMul(x, w)}")
    rng = np.random.default_rng(2)
    cy, cz = (rng.standard_normal((3, 4)).astype(np.float32) for _ in "yz")
    found = gradients(run_model, graph, {"y": cy, "z": cz}, ["x", "w"])
    close(found["x@grad"], torch.tensor(cy * np.exp(X) + cz @ W.T))
    close(found["w@grad"], torch.tensor(X.T @ cz))


def test_by_an_intermediate_value_and_of_one(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {h = MatMul(x, w) y = Exp(h)}")
    ones = np.ones((3, 4), np.float32)
    close(gradients(run_model, graph, {"y": ones}, ["h"])["h@grad"], torch.tensor(np.exp(X @ W)))
    close(gradients(run_model, graph, {"h": ones}, ["x"])["x@grad"], torch.tensor(ones @ W.T))


def test_unreached_values_get_zeros(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y, float[N,4] z) {y = Exp(x) z = MatMul(x, w)}")
    found = gradients(run_model, graph, {"y": np.ones((3, 4), np.float32)}, ["w"])
    assert found["w@grad"].shape == (4, 4)
    assert not found["w@grad"].any()


def test_params_become_inputs_and_batches_may_be_of_any_size(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {y = MatMul(x, w)}")
    found = vjp(graph, outputs=["y"], wrt=["w", "x"], params=["w"])
    assert [i.name for i in found.graph.input] == ["x", "w", "y@cotangent"]
    for rows in (1, 5):
        x, c = (np.full((rows, 4), v, np.float32) for v in (0.5, 2.0))
        out = run_model(found, {"x": x, "w": 3 * W, "y@cotangent": c})
        np.testing.assert_allclose(out["x@grad"], c @ (3 * W).T, rtol=1e-5)


def test_no_gradient_flows_through_integers_and_comparisons(run_model: Run) -> None:
    graph = model(
        "g (float[N,4] x) => (float[N,4] y)"
        "{b = Greater(x, x) c = Cast<to=1>(b) i = Cast<to=7>(x) f = Cast<to=1>(i)"
        " s = Add(c, f) y = Mul(s, x)}"
    )
    found = gradients(run_model, graph, {"y": np.ones((3, 4), np.float32)}, ["x"])
    close(found["x@grad"], torch.tensor(np.trunc(X)))


def test_split_with_an_unused_piece(run_model: Run) -> None:
    graph = model(
        "g (float[N,4] x) => (float[N,2] y)"
        "{k = Constant<value_ints=[1,2,1]>() a, y, b = Split<axis=1>(x, k)}"
    )
    found = gradients(run_model, graph, {"y": np.ones((3, 2), np.float32)}, ["x"])
    close(found["x@grad"], torch.tensor([[0.0, 1, 1, 0]] * 3))


def test_concat_sum_and_shape_arithmetic(run_model: Run) -> None:
    graph = model(
        "g (float[N,4] x) => (float[N,8] y)"
        "{a = Exp(x) b = Sum(x, a, x) c = Concat<axis=1>(a, b) s = Shape(c) y = Reshape(c, s)}"
    )
    c = np.random.default_rng(3).standard_normal((3, 8)).astype(np.float32)
    found = gradients(run_model, graph, {"y": c}, ["x"])
    wanted = c[:, :4] * np.exp(X) + c[:, 4:] * (2 + np.exp(X))
    close(found["x@grad"], torch.tensor(wanted))


def test_cast_like_passes_gradients_to_its_first_input_only(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {h = Exp(x) y = CastLike(x, h)}")
    c = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    close(gradients(run_model, graph, {"y": c}, ["x"])["x@grad"], torch.tensor(c))


@pytest.mark.parametrize("outputs", ["y", "y, mask"])
def test_dropout_in_training_mode_uses_its_own_mask(run_model: Run, outputs: str) -> None:
    graph = model(
        "g (float[N,4] x) => (float[N,4] y)"
        "{r = Constant<value_float=0.5>() t = Constant<value=bool {1}>() "
        f"{outputs} = Dropout<seed=7>(x, r, t)}}"
    )
    c = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    found = gradients(run_model, graph, {"y": c}, ["x"])
    assert (found["y"] == 0).any()
    close(found["x@grad"], torch.tensor(np.where(found["y"] != 0, 2 * c, 0)))


def test_dropout_in_inference_mode_passes_gradients_on(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {y = Dropout(x)}")
    c = np.ones((3, 4), np.float32)
    close(gradients(run_model, graph, {"y": c}, ["x"])["x@grad"], torch.tensor(c))


def test_local_functions_are_inlined(run_model: Run) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>'
        "g (float[N,4] x) => (float[N,4] y) {y = mine.Square(x)}"
        '<domain: "mine", opset_import: ["" : 17]> Square (a) => (b) {b = Mul(a, a)}'
    )
    c = np.ones((3, 4), np.float32)
    found = gradients(run_model, parser.parse_model(text), {"y": c}, ["x"])
    close(found["x@grad"], torch.tensor(2 * X))


@pytest.mark.parametrize("opset", range(13, 25))
def test_every_opset(run_model: Run, opset: int) -> None:
    graph = model(
        "g (float[N,4] x) => (float[N,1] y)"
        "{h = MatMul(x, w) r = Relu(h) s = Softmax(r) a = Constant<value_ints=[1]>()"
        " p = ReduceSum(s, a) q = Mul(p, h) y = ReduceSum(q, a)}",
        opset,
    )
    c = np.ones((3, 1), np.float32)
    close(gradients(run_model, graph, {"y": c}, ["x"])["x@grad"], torch.tensor((c + 0 * X) @ W.T))


def test_the_model_given_is_not_changed() -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {h = Gelu(x) y = MatMul(h, w)}", 20)
    before = graph.SerializeToString()
    vjp(graph, outputs=["y"], wrt=["x"])
    assert graph.SerializeToString() == before


def test_an_operator_without_a_rule_is_named_with_its_node() -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {y = Unique<axis=0>(x)}")
    graph.graph.node[0].name = "the set"
    with pytest.raises(UnsupportedOperatorError, match=r"'the set' is a Unique\b"):
        vjp(graph, outputs=["y"], wrt=["x"])


def test_a_foreign_operator_is_named_with_its_domain() -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {y = Exp(x)}")
    graph.graph.node[0].domain = "their.ops"
    graph.opset_import.add(domain="their.ops", version=1)
    with pytest.raises(UnsupportedOperatorError, match=r"'y' is a their\.ops\.Exp"):
        vjp(graph, outputs=["y"], wrt=["x"])


def test_an_operator_without_a_rule_off_the_path_does_not_matter(run_model: Run) -> None:
    graph = model(
        "g (float[N,4] x) => (float[N,4] y)"
        "{k = Constant<value_ints=[2]>() u = Unsqueeze(x, k) f = DFT<axis=1>(u)"
        " h = ReduceSum<keepdims=0>(f, k) p = MatMul(h, w) y = Exp(p)}"
    )
    found = gradients(run_model, graph, {"y": np.ones((3, 4), np.float32)}, ["w"])
    waves = np.fft.fft(X)
    rows = waves.real + waves.imag
    np.testing.assert_allclose(found["w@grad"], rows.T @ np.exp(rows @ W), rtol=1e-4)


LOOP = """
h = Exp(x) e = Constant<value=bool {1}>() t = Constant<value=int64 {2}>()
v, y = Loop(t, e, x)
<body = b (int64 i, bool c, float[N,4] s) => (bool k, float[N,4] n, float[N,4] z)
{k = Identity(c) n = Add(s, h) z = Identity(n)}>
"""


def test_what_a_carried_graph_takes_from_outside_counts() -> None:
    graph = model(f"g (float[N,4] x) => (float[M,N,4] y) {{{LOOP}}}")
    with pytest.raises(UnsupportedOperatorError, match="is a Loop"):
        vjp(graph, outputs=["y"], wrt=["h"])


def test_sequences_are_refused_by_operator() -> None:
    graph = model(
        "g (seq(float[N,4]) x) => (float[N,4] y)"
        "{i = Constant<value=int64 {0}>() y = SequenceAt(x, i)}"
    )
    with pytest.raises(UnsupportedOperatorError, match="'y' is a SequenceAt on 'x', a sequence"):
        vjp(graph, outputs=["y"], wrt=["x"])


def test_numbers_may_be_trained(run_model: Run) -> None:
    """Float initializers of rank 0 are no constants to fold."""
    graph = model(
        "g (float[N,4] x) => (float[N,4] y)"
        "{f = Constant<value_float=5.9>() r = Range(a, f, b) e = Exp(r) y = Mul(x, e)}"
    )
    for name, value in {"a": 0.5, "b": 1.5}.items():
        array = np.array(value, np.float32)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    c = np.random.default_rng(6).standard_normal((3, 4)).astype(np.float32)
    found = gradients(run_model, graph, {"y": c}, ["a", "b"])
    by_range = (c * X).sum(0) * np.exp(0.5 + 1.5 * np.arange(4))
    np.testing.assert_allclose(found["a@grad"], by_range.sum(), rtol=1e-4)
    np.testing.assert_allclose(found["b@grad"], (by_range * np.arange(4)).sum(), rtol=1e-4)


def test_two_inputs_with_the_same_gradient_get_one_each(run_model: Run) -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {h = Exp(x) s = Add(x, h) y = Tanh(s)}")
    found = gradients(run_model, graph, {"y": np.ones((3, 4), np.float32)}, ["h", "s", "x"])
    slope = 1 - np.tanh(X + np.exp(X)) ** 2
    close(found["s@grad"], torch.tensor(slope))
    close(found["h@grad"], torch.tensor(slope))
    close(found["x@grad"], torch.tensor(slope * (1 + np.exp(X))))


def test_pads_and_bounds_may_be_computed(run_model: Run) -> None:
    graph = model(
        "g (float[N,4] x) => (float[M,4] y)"
        "{o = Constant<value_ints=[1]>() z = Constant<value_ints=[0]>() n = Shape<end=1>(x)"
        " m = Sub(n, o) s = Slice(x, o, n) c = Concat<axis=0>(z, z, m, z) y = Pad(s, c)}"
    )
    c = np.random.default_rng(5).standard_normal((4, 4)).astype(np.float32)
    found = gradients(run_model, graph, {"y": c}, ["x"])
    close(found["x@grad"], torch.tensor(np.concatenate([np.zeros((1, 4), np.float32), c[:2]])))


def test_unknown_values_are_refused() -> None:
    graph = model("g (float[N,4] x) => (float[N,4] y) {y = Exp(x)}")
    with pytest.raises(ArtifactError, match="no value 'z'"):
        vjp(graph, outputs=["z"], wrt=["x"])
    with pytest.raises(ArtifactError, match="'v' is no initializer"):
        vjp(graph, outputs=["y"], wrt=["x"], params=["v"])


def test_a_rule_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Relu has a rule already"):
        vjp_rule("Relu")(lambda op, node, dy: dy)
