"""The reference step of a bundle: a small batch, its loss and gradients at the initial params.

``python -m fedge.artifacts.reference`` is the worker that runs ``grad.onnx`` for it in stock ONNX
Runtime; :func:`record` is the builder's side. Engines are later compared with what it found.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedge import tensors
from fedge.artifacts.bundle import Reference
from fedge.artifacts.manifest import BATCH, LabelSpec, TensorSpec
from fedge.errors import ArtifactError, EngineError
from fedge.pipe import Child, Frame, serve
from fedge.platform import silence_telemetry
from fedge.seeds import derive_seed
from fedge.types import Array, Examples, Params

ROWS = 4
_TIMEOUT_S = 300.0


def draw_examples(
    inputs: tuple[TensorSpec, ...],
    labels: LabelSpec,
    sample: Params | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Examples:
    """A small batch that repeats: the same for the same specifications.

    Args:
        inputs: Model inputs; floats are drawn from a standard normal distribution.
        labels: Drawn from their range, if it has one.
        sample: Rows of real inputs; integer inputs are taken from them, since only the model
            knows which integers are valid. Without one they are 0 or 1.
        sizes: Of symbolic dimensions but the batch.
    """
    rng = np.random.Generator(np.random.Philox(derive_seed(0, "reference")))
    sizes = {**(sizes or {}), BATCH: ROWS}
    values: Params = {}
    for spec in inputs:
        shape = _shape(spec.shape, sizes)
        if spec.dtype.startswith("float"):
            values[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif sample is not None and spec.name in sample:
            values[spec.name] = np.resize(sample[spec.name], shape).astype(spec.dtype)
        else:
            values[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
    return Examples(values, _draw_labels(labels, sizes, rng))


def _draw_labels(spec: LabelSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
    """Whole numbers from the range, the lowest two where it has no end; normal without one."""
    shape = _shape(spec.shape, sizes)
    if spec.low is None and spec.dtype == "float32":
        return rng.standard_normal(shape).astype(spec.dtype)
    low = 0 if spec.low is None else int(spec.low)
    high = low + 1 if spec.high is None else int(spec.high)
    return rng.integers(low, high + 1, shape).astype(spec.dtype)


def record(grad_model: bytes, examples: Examples, labels: str, params: Params) -> Reference:
    """Run ``grad.onnx`` once, in a worker.

    Args:
        grad_model: Admitted bytes.
        examples: The batch.
        labels: Name of the label input.
        params: Every param, at its initial value.

    Raises:
        ArtifactError: If it fails, or gives NaN or infinity.
    """
    feeds = {**examples.inputs, labels: examples.labels, **params}
    with Child("fedge.artifacts.reference") as child:
        try:
            _, blobs = child.call("run", {}, [grad_model, tensors.dump(feeds)], _TIMEOUT_S)
        except EngineError as exc:
            raise ArtifactError(f"the model's gradient graph does not run: {exc}") from exc
    outputs, _ = tensors.load(blobs[0])
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise ArtifactError(f"{name} is not finite at the initial params; check the model")
    loss = float(outputs.pop("loss"))
    grads = {n.removesuffix("@grad"): a for n, a in outputs.items() if n.endswith("@grad")}
    return Reference(examples, loss, grads)


def dump(recorded: Reference) -> bytes:
    """``reference.safetensors``, as :meth:`fedge.artifacts.bundle.Bundle.reference` reads it."""
    named = {f"input/{n}": a for n, a in recorded.examples.inputs.items()}
    named["labels"] = recorded.examples.labels
    named |= {f"grad/{n}": a for n, a in recorded.grads.items()}
    return tensors.dump(named, {"kind": "reference", "loss": recorded.loss})


def draw_noise(noise: tuple[TensorSpec, ...], sizes: Mapping[str, int] | None = None) -> Params:
    """Uniform random numbers for the recorded step, the same for the same specifications."""
    rng = np.random.Generator(np.random.Philox(derive_seed(0, "reference noise")))
    sizes = {**(sizes or {}), BATCH: ROWS}
    return {s.name: rng.random(_shape(s.shape, sizes), np.float32) for s in noise}


def _shape(dims: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[d] if isinstance(d, str) else d for d in dims)


def _handle_run(_: dict[str, Any], blobs: list[bytes]) -> Frame:
    silence_telemetry()
    import onnxruntime

    feeds, _meta = tensors.load(blobs[1])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(blobs[0], options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    fed = {n: a for n, a in feeds.items() if n in wanted}
    outputs, again = session.run(names, fed), session.run(names, fed)
    if any(a.tobytes() != b.tobytes() for a, b in zip(outputs, again, strict=True)):
        raise ArtifactError(
            "the model is random in training (Dropout?), so engines cannot be compared on it; "
            "remove what draws random numbers, set its ratio to 0, or switch it off with .eval()"
        )
    return {"onnxruntime": onnxruntime.__version__}, [
        tensors.dump(dict(zip(names, outputs, strict=True)))
    ]


def main() -> int:
    """The worker: answer until the parent closes the pipe."""
    return serve({"run": _handle_run})


if __name__ == "__main__":
    sys.exit(main())
