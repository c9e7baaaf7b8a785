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


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("float[2,4] x", "first dimension must be the batch"),
        ("float x", "first dimension must be the batch"),
        ("float[N,M] x", "only the first dimension may be symbolic"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(signature: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        shapes(f"g ({signature}) => (float[N,4] y) {{y = Exp(x)}}")
