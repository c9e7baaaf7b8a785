"""Peak memory from the manifest alone, plans and advice; the zoo's measured peaks are elsewhere."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import fedge
from fedge.artifacts import advice
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.costs import Step, cost
from fedge.artifacts.estimate import MB, Frugal, Rate, estimate, largest_batch, plan
from fedge.artifacts.manifest import GRAD, RECOMPUTED, STEP, GraphCost, Manifest
from fedge.errors import ArtifactError, ConfigError, EngineError

LAYERS, WIDTH = 8, 32


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A chain of layers, with both forms of its steps."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(LAYERS):
        size = (WIDTH, WIDTH if i < LAYERS - 1 else 2)
        weights.append(numpy_helper.from_array(rng.normal(size=size).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Tanh", [f"h{i}"], [f"t{i}"]))
        last = f"t{i}"
    float32 = TensorProto.FLOAT
    ends = [
        helper.make_tensor_value_info(n, float32, ["N", s]) for n, s in (("x", WIDTH), (last, 2))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return fedge.build(model, loss="mse", recompute="auto")


@pytest.fixture
def heavy(bundle: Bundle) -> Manifest:
    """Steps that hold a megabyte per row, a quarter of it when they recompute."""
    heights = {STEP: MB, RECOMPUTED[STEP]: MB // 4}
    costs = [
        dataclasses.replace(c, peaks=((heights.get(c.file, 1000), 0),))
        for c in bundle.manifest.costs
    ]
    return dataclasses.replace(bundle.manifest, costs=tuple(costs))


def test_memory_is_followed_from_node_to_node() -> None:
    def steps(rows: int) -> list[Step]:
        size = 100 * rows
        return [
            Step("Conv", ("x",), (("a", size),), 7 * rows),
            Step("Relu", ("a",), (("b", size),), rows),  # takes a's place
            Step("Reshape", ("b", "shape"), (("c", size),), 0),  # is b
            Step("Conv", ("c",), (("d", 10 * rows),), 7 * rows),
            Step("Conv", ("d",), (("e", 10 * rows),), 7 * rows),  # b is gone
        ]

    found = cost("step.onnx", steps(2), steps(4), (2, 4))
    assert found.peaks == ((110, 0),)
    assert found.flops == (22, 0)
    assert found.nodes == 5


def test_recomputing_holds_less_and_computes_more(bundle: Bundle) -> None:
    plain, lean = (estimate(bundle.manifest, 4096, Frugal(recompute=r)) for r in (False, True))
    assert lean.parts["activations"] < plain.parts["activations"]
    assert lean.step_s > plain.step_s
    assert set(bundle.manifest.files) > set(RECOMPUTED.values())


@pytest.mark.parametrize("given", [True, 4])
def test_a_bundle_may_have_recomputing_steps_alone(given: bool | int, bundle: Bundle) -> None:
    made = fedge.build(bundle_model(), loss="mse", recompute=given)
    plain = fedge.build(bundle_model(), loss="mse")
    assert RECOMPUTED[GRAD] not in made.manifest.files
    assert made.manifest.files[STEP] != plain.manifest.files[STEP]
    for name, grad in plain.reference().grads.items():
        np.testing.assert_array_equal(made.reference().grads[name], grad)


def bundle_model() -> bytes:
    weights = [np.full((4, 4), 0.1 * i, np.float32) for i in range(1, 5)]
    nodes, last = [], "x"
    for i in range(4):
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Sigmoid", [f"h{i}"], [f"t{i}"]))
        last = f"t{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in ("x", last)]
    named = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "m", ends[:1], ends[1:], named)
    opsets = [helper.make_opsetid("", 17)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return data


@pytest.mark.parametrize("given", ["yes", -1])
def test_recompute_is_checked(given: str | int) -> None:
    with pytest.raises(ConfigError, match="recompute"):
        fedge.build(bundle_model(), loss="mse", recompute=given)


@pytest.mark.parametrize(
    ("memory_mb", "expected"),
    [(200, Frugal()), (84, Frugal(recompute=True)), (76, Frugal(recompute=True, pieces=2))],
)
def test_the_fastest_way_that_fits(heavy: Manifest, memory_mb: int, expected: Frugal) -> None:
    made = plan(heavy, memory_mb * MB, 32)
    assert dataclasses.replace(made.frugal, score_rows=256) == expected
    assert made.peak_bytes <= memory_mb * MB


def test_what_does_not_fit_is_refused_with_advice(heavy: Manifest) -> None:
    with pytest.raises(EngineError, match="even batch size 1"):
        plan(heavy, 60 * MB, 32)
    alone = dataclasses.replace(
        heavy, files={n: f for n, f in heavy.files.items() if "recompute" not in n}
    )
    most = largest_batch(alone, 90 * MB)
    assert 0 < most < 32
    assert estimate(alone, most).peak_bytes <= 90 * MB < estimate(alone, most + 1).peak_bytes
    found = advice.report(alone, 70 * MB, 32)
    assert not found["fits"]
    assert any('recompute="auto"' in a for a in found["advice"])


def test_a_report_is_a_table_and_a_verdict(heavy: Manifest) -> None:
    text = "\n".join(advice.lines(advice.report(heavy, 84 * MB, 32)))
    assert "recomputing" in text
    assert "fits 84 MB" in text
    assert "activations made again" in text
    assert "fits" not in "\n".join(advice.lines(advice.report(heavy)))


def test_a_measured_step_sets_the_rate(bundle: Bundle) -> None:
    found = bundle.manifest.cost(STEP)
    assert found is not None
    assert Rate.measured(found, 4, 0.5).seconds(found, 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256 * MB), ("1.5 GiB", 1536 * MB), ("2k", 2048), ("77", 77)]
)
def test_sizes(text: str, size: int) -> None:
    assert advice.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "256 apples", "1e3", "9" * 40])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="256MB"):
        advice.parse_size(text)


@pytest.mark.parametrize(
    "change", [{"peaks": []}, {"flops": [1]}, {"moved": [-1, 0]}, {"nodes": -1}, {"nodes": "many"}]
)
def test_costs_that_make_no_sense_are_refused(change: dict[str, object]) -> None:
    row = {"file": "x", "peaks": [[1, 2]], "flops": [1, 2], "moved": [1, 2], "nodes": 1}
    assert GraphCost.from_json(row).peaks == ((1, 2),)
    with pytest.raises((ArtifactError, ConfigError)):
        GraphCost.from_json({**row, **change})
