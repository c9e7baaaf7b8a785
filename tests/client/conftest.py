"""A small bundle and a site's rows, for what the worker computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import fedge
from fedge.artifacts.bundle import Bundle

COLUMNS = 3
LOSSES = {"bce_with_logits": 1, "cross_entropy": 3, "mse": 1}  # -> outputs


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Builds ``x·w + b`` once per loss and options; ``b`` can be personal."""
    made: dict[str, Bundle] = {}

    def build(loss: str = "bce_with_logits", **options: Any) -> Bundle:
        key = f"{loss} {sorted(options.items())}"
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "b"
            made[key] = fedge.build(_model(LOSSES[loss]), loss=loss, out=out, **options)
        return made[key]

    return build


def _model(outputs: int) -> Any:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(COLUMNS, outputs)), "b": np.zeros(outputs)}
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", outputs])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty rows of two classes, a quarter of them held out."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, COLUMNS))
    lines = ["a,b,c,sick,part"]
    for i, row in enumerate(x):
        cells = ",".join(repr(float(v)) for v in row)
        lines.append(f"{cells},{int(row[0] > 0)},{'test' if i % 4 == 0 else 'train'}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
