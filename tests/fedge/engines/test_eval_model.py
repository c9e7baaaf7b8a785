"""ORT's own evaluation graph says what ``evaluate.onnx`` says; engines score with the latter."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge import tensors
from fedge.engines import find_training_python, open_engine
from fedge.platform import silence_telemetry

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from fedge import tensors
from fedge.artifacts.ort_import import import_training
api = import_training("api")
import onnxruntime as ort
folder = Path(sys.argv[1])
rows, params = (tensors.load(Path(p).read_bytes())[0] for p in sys.argv[2:4])
state = api.CheckpointState.load_checkpoint(folder / "checkpoint")
module = api.Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
zeros = np.zeros(module.get_parameters_size(False), np.float32)
module.copy_buffer_to_parameters(ort.OrtValue.ortvalue_from_numpy(zeros)._ortvalue, False)
for name, value in params.items():
    state.parameters[name] = np.array(value)
module.eval()
loss, output = module(np.array(rows["x"]), np.array(rows["labels"]))
Path(sys.argv[4]).write_bytes(tensors.dump({"output": output}, {"loss": float(loss)}))
"""


@pytest.mark.parametrize("family", ["mlp", "lenet"])
def test_both_evaluation_graphs_agree(
    families: dict[str, Any], family: str, tmp_path: Path
) -> None:
    python = find_training_python()
    if python is None:
        pytest.skip("no interpreter with onnxruntime-training-cpu is installed")
    one = families[family]
    bundle, data = one.bundle("sgd"), one.data(12)
    rows, params, out = (tmp_path / n for n in ("rows", "params", "out"))
    rows.write_bytes(tensors.dump({"x": data.inputs["x"], "labels": data.labels}))
    params.write_bytes(tensors.dump(bundle.initial_params()))
    environ: dict[str, str] = {}
    silence_telemetry(environ)
    command = [str(python), "-c", SCRIPT, str(bundle.path), str(rows), str(params), str(out)]
    subprocess.run(command, check=True, env=environ, stderr=subprocess.DEVNULL)
    found, meta = tensors.load(out.read_bytes())
    engine = open_engine(bundle, "ort-training")
    wanted = engine.evaluate(data)
    engine.close()
    assert meta["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    (output,) = wanted.outputs.values()
    assert np.allclose(found["output"], output, rtol=1e-5, atol=1e-6)
