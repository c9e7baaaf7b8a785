"""What depends on constants and sizes alone is computed while building."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from fedge.autodiff.simplify import simplify


def parse(text: str) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')


def test_shape_arithmetic_becomes_constants_and_values_stay() -> None:
    model = parse(
        "g (float[N,3,4] x) => (float[N,12] y)"
        "{s = Shape(x) zero = Constant<value_ints=[0]>() rows = Gather(s, zero)"
        " tail = Shape<start=1>(x) all = ReduceProd<keepdims=1>(tail)"
        " target = Concat<axis=0>(rows, all) y = Reshape(x, target)}"
    )
    small = simplify(model)
    assert [n.op_type for n in small.graph.node] == ["Constant", "Reshape"]
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
    (got,) = ReferenceEvaluator(small).run(None, {"x": x})
    np.testing.assert_array_equal(got, wanted)


def test_params_and_random_numbers_are_not_folded() -> None:
    model = parse(
        "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1.0, 2.0}>"
        "{c = Constant<value_float=2.0>() v = Mul(w, c) k = Constant<value_ints=[2]>()"
        " r = RandomUniform<shape=[2]>() h = Mul(x, v) y = Add(h, r)}"
    )
    kinds = [n.op_type for n in simplify(model).graph.node]
    assert kinds == ["Constant", "Mul", "RandomUniform", "Mul", "Add"]


def test_a_graph_output_that_is_constant_stays_an_output() -> None:
    model = parse("g (float[N,2] x) => (int64[1] n) {n = Shape<start=1>(x)}")
    (node,) = simplify(model).graph.node
    assert node.op_type == "Constant"
    assert numpy_helper.to_array(helper.get_attribute_value(node.attribute[0])) == [2]


def test_large_constants_are_left_to_the_runtime() -> None:
    model = parse(
        "g (float[N,2] x) => (float[N,2] y)"
        "{k = Constant<value_ints=[1000,1000]>() big = ConstantOfShape(k)"
        " total = ReduceSum<keepdims=0>(big) y = Add(x, total)}"
    )
    assert "ConstantOfShape" in [n.op_type for n in simplify(model).graph.node]
