"""Execution providers: what may be asked for, and that none is believed before a probe.

OpenVINO's wheel cannot share an environment with stock onnxruntime: ``make test-providers`` makes
one and names its interpreter in ``FEDGE_PROVIDER_PYTHON``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedge
from fedge.artifacts.bundle import Bundle
from fedge.engines import open_engine, open_in_process, probe_engines
from fedge.engines.probe import EngineProbe, choose
from fedge.engines.providers import KNOWN, candidates, parse, split
from fedge.errors import ConfigError, EngineUnavailableError

STOCK = ["AzureExecutionProvider", "CPUExecutionProvider"]
ELSEWHERE = os.environ.get("FEDGE_PROVIDER_PYTHON", "")
PROBE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from fedge.artifacts.bundle import Bundle
from fedge.engines import probe_engines
report = probe_engines(Bundle.open(Path(sys.argv[1])), engine="ort", providers=sys.argv[2:])
print(json.dumps(asdict(report)))
"""


@pytest.mark.parametrize("name", ["cuda", "CUDA", "CUDAExecutionProvider"])
def test_a_provider_has_two_names(name: str) -> None:
    assert parse(name) == "cuda"


def test_a_provider_that_sends_rows_away_is_not_used() -> None:
    with pytest.raises(ConfigError, match="web service"):
        parse("AzureExecutionProvider")
    assert candidates((), STOCK) == {}


def test_an_unknown_provider_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"provider 'cudda'; known: cpu, cuda"):
        parse("cudda")


@pytest.mark.parametrize("engine", ["ort:cpu", "ort:azure", "ort-training:cuda", "ort:"])
def test_an_engine_has_no_such_provider(engine: str) -> None:
    with pytest.raises(EngineUnavailableError, match="one of ort:cuda"):
        split(engine)


def test_candidates_are_what_is_found_or_what_is_wanted() -> None:
    offered = [KNOWN["openvino"].name, KNOWN["cuda"].name, *STOCK]
    assert list(candidates((), offered)) == ["ort:cuda", "ort:openvino"]
    assert list(candidates(("openvino", "cpu"), offered)) == ["ort:openvino"]
    assert candidates(("cpu",), offered) == {}
    assert "no wheel on PyPI" in candidates(("xnnpack",), offered)["ort:xnnpack"]


def test_a_preferred_provider_is_chosen_only_where_it_is_usable() -> None:
    tried = {"ort": EngineProbe("", 1.0), "ort:cuda": EngineProbe("", 2.0)}
    assert choose(tried).engine == "ort"
    assert choose(tried, ["ort:coreml", "ort:cuda"]).engine == "ort:cuda"
    tried["ort:cuda"] = EngineProbe("differs")
    assert choose(tried, ["ort:cuda"]).engine == "ort"
    assert choose({**tried, "ort:cuda": EngineProbe("", 0.95)}).engine == "ort"  # about as fast
    assert choose({**tried, "ort:cuda": EngineProbe("", 0.5)}).engine == "ort:cuda"


def test_a_provider_that_is_not_there_leaves_the_cpu_and_the_reason(mlp: Any) -> None:
    report = probe_engines(mlp.bundle("sgd"), engine="ort", providers=("cuda", "coreml"))
    assert report.engine == "ort"
    assert list(report.per_engine["ort"].offered) == STOCK
    for provider, wheel in (("cuda", "onnxruntime-gpu"), ("coreml", "onnxruntime")):
        problem = report.per_engine[f"ort:{provider}"].problem
        assert f"{KNOWN[provider].name}, only AzureExecutionProvider" in problem
        assert f"{wheel} in place of" in problem
        assert problem in report.reason


def test_a_session_that_would_silently_run_on_the_cpu_is_an_error(mlp: Any) -> None:
    engine = open_in_process(mlp.bundle("sgd"), "ort:cuda")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(EngineUnavailableError, match="could not load CUDAExecutionProvider"),
    ):
        engine.train_step(mlp.data(4), 0.1)


def test_asking_for_an_absent_provider_by_name_is_an_error(mlp: Any) -> None:
    with pytest.raises(EngineUnavailableError, match="no CUDAExecutionProvider"):
        open_engine(mlp.bundle("sgd"), "ort:cuda")


def elsewhere(bundle: Bundle, *providers: str) -> dict[str, Any]:
    """The probe in the interpreter that has OpenVINO."""
    command = [ELSEWHERE, "-c", PROBE, str(bundle.path), *providers]
    root = Path(fedge.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root}"}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


@pytest.mark.skipif(not ELSEWHERE, reason="run it with: make test-providers")
def test_a_provider_that_agrees_with_the_cpu_is_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    bundle = fedge.build(
        net, loss="cross_entropy", sample=torch.zeros(1, 16), out=tmp_path / "tanh"
    )
    report = elsewhere(bundle, "openvino")
    assert report["engine"] == "ort:openvino", report["reason"]
    assert report["per_engine"]["ort:openvino"]["step_s"] > 0
    found = elsewhere(bundle)  # found, not wanted: it must be faster too
    assert "ort:openvino" in found["per_engine"]
    assert elsewhere(bundle, "cpu")["per_engine"].keys() == {"ort"}


@pytest.mark.skipif(not ELSEWHERE, reason="run it with: make test-providers")
@pytest.mark.parametrize("family", ["mlp", "lenet"])
def test_a_provider_that_computes_something_else_is_not_used(
    families: dict[str, Any], family: str
) -> None:
    """OpenVINO 1.24.1 gets ReLU's gradient wrong; a later one that does not is taken."""
    report = elsewhere(families[family].bundle("adamw"), "openvino")
    probed = report["per_engine"]["ort:openvino"]
    assert (report["engine"] == "ort") == bool(probed["problem"])
    if probed["problem"]:
        assert "differs from" in report["reason"]
    else:
        assert probed["gradient_error"] <= 1e-4
