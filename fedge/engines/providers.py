"""Execution providers: hardware that ONNX Runtime may compute a training step on.

An engine with a provider is named ``ort:cuda``. A provider is never taken at its word: what a wheel
lists was true when the wheel was compiled, the kernels may be for another GPU, and some compute in
16 bits. The probe (:mod:`fedge.engines.probe`) decides. Preprocessing, scores and export stay on
the CPU. Imports nothing large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedge.errors import ConfigError, EngineUnavailableError

CPU = "cpu"


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: ONNX Runtime's.
        options: What keeps it at float32, and other settings of ours.
        wheel: The package on PyPI that has it; empty where it takes a build of one's own.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)
    wheel: str = ""


KNOWN = {
    CPU: Provider("CPUExecutionProvider", wheel="onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", {"use_tf32": "0"}, "onnxruntime-gpu"),
    "tensorrt": Provider("TensorrtExecutionProvider", wheel="onnxruntime-gpu"),
    "coreml": Provider("CoreMLExecutionProvider", wheel="onnxruntime"),
    "openvino": Provider(
        "OpenVINOExecutionProvider", {"precision": "ACCURACY"}, "onnxruntime-openvino"
    ),
    "qnn": Provider("QNNExecutionProvider", wheel="onnxruntime-qnn"),
    "migraphx": Provider("MIGraphXExecutionProvider", wheel="onnxruntime-migraphx"),
    "rocm": Provider("ROCMExecutionProvider", wheel="onnxruntime-rocm"),
    "xnnpack": Provider("XnnpackExecutionProvider"),
    "acl": Provider("ACLExecutionProvider"),
    "dnnl": Provider("DnnlExecutionProvider"),
    "webgpu": Provider("WebGpuExecutionProvider"),
}
_SHORT = {p.name.lower(): short for short, p in KNOWN.items()}


def parse(name: str) -> str:
    """The short name of a provider given by that or by ONNX Runtime's name.

    Raises:
        ConfigError: If fedge does not know it, or must not use it.
    """
    low = name.lower()
    if low in ("azure", "azureexecutionprovider"):
        raise ConfigError(
            "AzureExecutionProvider sends a model's inputs to a web service; rows stay here"
        )
    short = _SHORT.get(low, low)
    if short not in KNOWN:
        raise ConfigError(f"provider {name!r}; known: {', '.join(KNOWN)}")
    return short


def split(engine: str) -> tuple[str, str]:
    """An engine's name without its provider, and the provider's short name (``cpu`` if none).

    Raises:
        EngineUnavailableError: If the engine cannot have one.
    """
    base, colon, provider = engine.partition(":")
    if not colon:
        return base, CPU
    if base != "ort" or provider not in KNOWN or provider == CPU:
        raise EngineUnavailableError(
            f"engine {engine!r}; with a provider it is one of "
            + ", ".join(f"ort:{p}" for p in KNOWN if p != CPU)
        )
    return base, provider


def candidates(wanted: Sequence[str], offered: Sequence[str]) -> dict[str, str]:
    """Engines with a provider that are worth a probe.

    Args:
        wanted: Short names in order of preference, ``cpu`` among them or not; empty takes
            every known one that is offered.
        offered: What this onnxruntime was compiled with, by its own names.

    Returns:
        Engine name -> "" where it may be probed, else why it is not there.
    """
    here = {_SHORT[n.lower()] for n in offered if n.lower() in _SHORT}
    chosen = wanted or [p for p in KNOWN if p in here]
    return {f"ort:{p}": "" if p in here else _absent(p, offered) for p in chosen if p != CPU}


def _absent(short: str, offered: Sequence[str]) -> str:
    wheel = KNOWN[short].wheel
    how = f"{wheel} in place of onnxruntime has it" if wheel else "no wheel on PyPI has it"
    return f"this onnxruntime has no {KNOWN[short].name}, only {', '.join(offered)}; {how}"
