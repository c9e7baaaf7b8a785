"""Shapes in which the batch may grow."""

from __future__ import annotations

import pytest
from onnx import parser

from fedge.autodiff.shapes import infer_shapes
from fedge.errors import ArtifactError


def shapes(text: str) -> dict[str, tuple[int | str, ...]]:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    return {name: shape for name, (_, shape) in infer_shapes(model).items()}


def test_the_batch_survives_reshape_and_shape_arithmetic() -> None:
    found = shapes(
        "g (float[rows,3,4] x) => (float[rows,12] y)"
        "{k = Constant<value_ints=[-1,12]>() y = Reshape(x, k) m = Constant<value_ints=[-1,4]>()"
        " long = Reshape(x, m) s = Shape(x) back = Reshape(long, s)}"
    )
    assert found["x"] == ("N", 3, 4)
    assert found["y"] == ("N", 12)
    assert found["long"] == ("3*N", 4)
    assert found["back"] == ("N", 3, 4)


def test_sizes_that_grow_otherwise_are_equal_only_to_themselves() -> None:
    found = shapes(
        "g (float[N,2] x) => (float[M,2] y)"
        "{k = Constant<value_ints=[1,0,0,0]>() y = Pad(x, k) z = Concat<axis=0>(x, x)}"
    )
    assert isinstance(found["y"][0], str)
    assert found["y"][0] not in ("N", found["z"][0])
    assert found["z"] == ("2*N", 2)


def test_other_sizes_may_grow_too() -> None:
    found = shapes(
        "g (float[rows,T,4] x) => (float[rows,T,T] y)"
        "{t = Transpose<perm=[0,2,1]>(x) y = MatMul(x, t) n = Shape(x)"
        " z = Constant<value_ints=[0]>()"
        " r = Gather(n, z) k = Constant<value_ints=[-1]>() s = Concat<axis=0>(r, k)"
        " flat = Reshape(x, s) m = Constant<value_ints=[-1,4]>() long = Reshape(x, m)}"
    )
    assert found["y"] == ("N", "T", "T")
    assert found["flat"] == ("N", "4*T")
    assert found["long"] == ("N*T", 4)


def test_a_size_may_have_a_bound_or_must_be_even() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,T] x) => (float[N,T] y)'
        "{b = Constant<value_floats=[1.0,2.0,3.0,4.0]>() z = Constant<value_ints=[0]>()"
        " one = Constant<value_ints=[1]>() n = Shape<start=1,end=2>(x) c = Slice(b, z, n, z)"
        " y = Add(x, c)}"
    )
    assert infer_shapes(model, {"T": 4})["y"][1] == ("N", "T")
    with pytest.raises(ArtifactError, match=r"do not fit each other at node 'y' \(Add\)"):
        infer_shapes(model)


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("float[2,4] x", "first dimension must be the batch"),
        ("float x", "first dimension must be the batch"),
        ("float[N,N] x", "a name of their own"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(signature: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        shapes(f"g ({signature}) => (float[N,4] y) {{y = Exp(x)}}")
