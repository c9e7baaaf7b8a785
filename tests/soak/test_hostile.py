"""A few hundred hostile bundles through real workers; ``make soak`` takes thousands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
import torch
from arena import DIED, ERROR, LIMIT_S, RAN, REFUSED, STOPPED, Arena
from hostile import MEMORY_BYTES, run_row
from mutations import HIDING, hidden_tensor
from torch import nn

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.engines import find_training_python

SHORT = {
    "mlp ort models": 150,
    "mlp ort manifests": 60,
    "mlp ort tensors": 40,
    "mlp ort-training models": 60,
    "mlp ort-training tensors": 30,
}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return fedge.build(
        model, loss="cross_entropy", sample=torch.zeros(1, 5), optimizer="adamw", name="small"
    )


@pytest.mark.parametrize("row", SHORT)
def test_hostile_bundles_end_as_errors(row: str, bundle: Bundle) -> None:
    _, engine, _ = row.split()
    if engine == "ort-training" and find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training-cpu is installed")
    report = run_row(row, bundle, SHORT[row], seed=2)
    assert report.broken == []
    assert sum(report.verdicts.values()) == report.cases
    assert len(report.verdicts) > 1, "the mutations are all alike"


@pytest.fixture
def arena(bundle: Bundle, tmp_path: Path) -> Iterator[Arena]:
    made = Arena(bundle, "ort", tmp_path, MEMORY_BYTES)
    yield made
    made.close()


def test_a_tensor_outside_the_bundle_is_refused_wherever_it_hides_and_whatever_it_is_called(
    arena: Arena,
) -> None:
    good = arena.good.read("step.onnx")
    for hide, where, honest in itertools.product(HIDING, arena.canary.locations, (True, False)):
        model = onnx.ModelProto.FromString(good)
        hide(model, hidden_tensor(where, honest), Random(where))
        verdict, why = arena.file("step.onnx", model.SerializeToString())
        assert verdict == REFUSED, (hide.__name__, where)
        assert "model refused: it holds" in why
        assert not arena.canary.touched()
    assert arena.file("step.onnx", good) == (RAN, "")


def test_the_canary_sings(arena: Arena, tmp_path: Path) -> None:
    for name in ("soft.bin", "hard.bin"):
        (tmp_path / "case" / name).read_bytes()
        assert arena.canary.touched()
        assert not arena.canary.touched()


def test_a_worker_that_dies_is_counted_and_replaced(arena: Arena) -> None:
    good = arena.good.read("step.onnx")
    assert arena.file("step.onnx", good) == (RAN, "")
    assert arena._worker is not None
    arena._worker._process.kill()
    verdict, why = arena.file("step.onnx", good)
    assert (verdict, "killed by SIGKILL" in why) == (DIED, True)
    assert arena.file("step.onnx", good) == (RAN, "")


def test_a_worker_that_computes_for_ever_is_ended_in_time(arena: Arena) -> None:
    good = arena.good.read("step.onnx")
    arena.limit_s = 1.0
    verdict, why = arena.file("step.onnx", endless(good))
    assert (verdict, "did not answer" in why) == (STOPPED, True)
    assert arena.last_s < 3
    arena.limit_s = LIMIT_S
    assert arena.file("step.onnx", good) == (RAN, "")


def test_a_model_that_wants_all_memory_is_an_error(arena: Arena) -> None:
    good = arena.good.read("step.onnx")
    for size in (1 << 14, 1 << 16, 1 << 20):  # squared: 1 GiB and more
        verdict, _ = arena.file("step.onnx", endless(good, size, 1))
        assert verdict in (ERROR, DIED)
    assert arena.worst_rss < MEMORY_BYTES
    assert arena.file("step.onnx", good) == (RAN, "")


def endless(data: bytes, size: int = 3000, times: int = 400) -> bytes:
    """A model whose loss waits for products of large matrices; a few hundred bytes more."""
    model = onnx.ModelProto.FromString(data)
    nodes = model.graph.node
    for node in nodes:
        for index, name in enumerate(node.output):
            if name == "loss":
                node.output[index] = "true/loss"
    shape = onnx.numpy_helper.from_array(np.array([size, size]), "wide/shape")
    model.graph.initializer.append(shape)
    make = onnx.helper.make_node
    nodes.append(make("ConstantOfShape", ["wide/shape"], ["wide/0"]))
    for k in range(times):
        nodes.append(make("MatMul", [f"wide/{k}", "wide/0"], [f"wide/{k + 1}"]))
    nodes.append(make("ReduceMax", [f"wide/{times}"], ["wide/loss"], keepdims=0))
    nodes.append(make("Add", ["true/loss", "wide/loss"], ["loss"]))
    return model.SerializeToString()
