"""Dropout becomes a comparison with numbers that come from outside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from fedge.autodiff.dropout import explicit_dropout
from fedge.errors import UnsupportedOperatorError

ON = "r = Constant<value_float=0.25>() t = Constant<value=bool {1}>()"


def parse(text: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ("y = Dropout(x, r, t)", ("N", 3, 4)),
        ("k = Constant<value_ints=[-1,4]>() h = Reshape(x, k) y = Dropout(h, r, t)", ("N", 12)),
        ("h = Transpose<perm=[1,0,2]>(x) y = Dropout(h, r, t)", ("N", 12)),
    ],
)
def test_a_row_has_its_numbers_whatever_the_shape(nodes: str, shape: tuple[int | str]) -> None:
    model, (noise,) = explicit_dropout(
        parse(f"g (float[N,3,4] x) => (float[M] y) {{{ON} {nodes}}}")
    )
    assert (noise.name, noise.shape) == ("noise/1", shape)
    sizes = [2 if isinstance(d, str) else d for d in shape]
    drawn = np.random.default_rng(0).random(sizes, np.float32)
    x = np.ones((2, 3, 4), np.float32)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "noise/1": drawn})
    np.testing.assert_allclose(y.ravel(), np.where(drawn >= 0.25, 1 / 0.75, 0).ravel(), rtol=1e-6)


def test_dropout_that_is_off_disappears() -> None:
    text = (
        "g (float[N,4] x) => (float[N,4] z) {r = Constant<value_float=0.0>()"
        " t = Constant<value=bool {1}>() f = Constant<value=bool {0}>()"
        " y = Dropout(x, r, t) u = Dropout(y) z = Dropout(u, r, f)}"
    )
    model, noise = explicit_dropout(parse(text))
    assert noise == ()
    assert {n.op_type for n in model.graph.node} == {"Constant", "Identity"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("m = Constant<value_ints=[0,1]>() r = ReduceMean<axes=[0,1],keepdims=0>(x)", "computed"),
        ("w = Constant<value_floats=[1.0]>() r = Constant<value_float=0.5>()", "each row"),
    ],
)
def test_what_cannot_be_made_explicit_is_named(nodes: str, message: str) -> None:
    dropped = "w" if "w =" in nodes else "x"
    text = (
        f"g (float[N,4] x) => (float[N,4] y) {{{nodes} t = Constant<value=bool {{1}}>()"
        f" d = Dropout({dropped}, r, t) y = Add(x, d)}}"
    )
    with pytest.raises(UnsupportedOperatorError, match=message):
        explicit_dropout(parse(text))
