"""A trained model as one standard ONNX file: raw columns in, predictions out.

Params, preprocessing and, where scaling is per site, the site's statistics are baked in. The file
counts only after ONNX Runtime has run it and agreed with the engine on sample rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedge import tensors
from fedge.artifacts.admission import admit_model, parse_model
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import INFER, PREPROCESS, TensorSpec
from fedge.artifacts.onnx_v1 import onnx_pb2
from fedge.errors import ArtifactError, DataError, EngineError
from fedge.params import relative_distance
from fedge.pipe import Child, Frame, serve
from fedge.platform import atomic_write
from fedge.types import Array, Examples, Params

TOLERANCE = 1e-5  # relative L2 per output
SAMPLE_ROWS = 8
SAMPLE_SIZE = 16  # of a dimension that may vary and that only raw inputs have
CHECK_TIMEOUT_S = 300.0
# What the output is scored as -> operator and name of the output a reader wants beside it.
_FINISH = {
    "bce_with_logits": ("Sigmoid", "probability"),
    "cross_entropy": ("Softmax", "probabilities"),
}
_ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7, "bool": 9}
_ONNX_TYPES |= {"float16": 10, "float64": 11}


def export(bundle: Bundle, params: Params, path: str | Path, *, site: Params | None = None) -> Path:
    """Write the model with the given params, ready for any ONNX Runtime.

    Inputs are named and shaped like the bundle's raw inputs. A classifier gets the output
    ``probability`` (sigmoid) or ``probabilities`` (softmax) beside the raw one.

    Args:
        bundle: What the params belong to.
        params: Every param of the bundle.
        path: File to write; it is replaced whole or not at all.
        site: ``site_mean`` and ``site_std``, where the bundle scales by site.

    Returns:
        The path.

    Raises:
        ArtifactError: If params are missing or do not fit.
        DataError: If the site's statistics are wanted and missing.
        EngineError: If ONNX Runtime's output differs from the engine's; nothing is written then.
    """
    model = export_model(bundle, params, site)
    header = {"folder": str(bundle.path.absolute()), "digest": bundle.digest}
    blobs = [model, tensors.dump(params), tensors.dump(site or {})]
    with Child("fedge.exporting") as child:
        child.call("check", header, blobs, timeout_s=CHECK_TIMEOUT_S)
    target = Path(path)
    try:
        atomic_write(target, model, mode=0o644)
    except OSError as exc:
        raise ArtifactError(f"cannot write {target}: {exc.strerror}") from exc
    return target


def export_model(bundle: Bundle, params: Params, site: Params | None = None) -> bytes:
    """The model that :func:`export` writes, unchecked."""
    manifest = bundle.manifest
    constants = {**_all_params(bundle, params), **_site_constants(bundle, site)}
    before, model = (parse_model(bundle.read(n)) for n in (PREPROCESS, INFER))
    _rename(before.graph, _preprocess_names(before.graph, manifest.raw_inputs, constants))
    _rename(model.graph, _model_names(before.graph, bundle))
    merged = _merge(before, model, constants, manifest.scaling == "custom")
    _add_finish(merged.graph, manifest.scored_as)
    merged.producer_name = "fedge"
    return admit_model(merged.SerializeToString(deterministic=True))


def _all_params(bundle: Bundle, params: Params) -> Params:
    missing = [p.name for p in bundle.manifest.params if p.name not in params]
    if missing:
        raise ArtifactError(f"params lack {', '.join(missing)}; export needs all of them")
    return {p.name: _fit(p.name, params[p.name], p.dtype, p.shape) for p in bundle.manifest.params}


def _site_constants(bundle: Bundle, site: Params | None) -> Params:
    if bundle.manifest.scaling != "site":
        return {}
    found = {n: (site or {}).get(n) for n in ("site_mean", "site_std")}
    constants = {n: np.asarray(v, np.float32) for n, v in found.items() if v is not None}
    if len(constants) < len(found):
        raise DataError(
            "this bundle scales by the site's own statistics; give site_mean and site_std "
            "of its training rows"
        )
    return constants


def _fit(name: str, value: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    array = np.asarray(value)
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ArtifactError(
            f"param {name} is {array.dtype}{list(array.shape)}; wanted {dtype}{list(shape)}"
        )
    return array


def _preprocess_names(
    graph: onnx_pb2.GraphProto, raw: Iterable[TensorSpec], constants: Mapping[str, Array]
) -> Callable[[str], str]:
    """Everything inside gets a prefix; what is seen from outside keeps its name."""
    outside = {s.name for s in raw} | {o.name for o in graph.output} | constants.keys()
    return lambda name: name if name in outside or not name else f"preprocess/{name}"


def _model_names(before: onnx_pb2.GraphProto, bundle: Bundle) -> Callable[[str], str]:
    """Model inputs become what preprocessing gives; other names step aside where they clash."""
    inputs = {s.name for s in bundle.manifest.inputs}
    taken = {i.name for i in before.input} | {o.name for o in before.output}

    def renamed(name: str) -> str:
        if name in inputs:
            return f"{name}@pre"
        return f"{name}@model" if name in taken else name

    return renamed


def _rename(graph: onnx_pb2.GraphProto, renamed: Callable[[str], str]) -> None:
    for node in graph.node:
        node.input[:] = [renamed(n) for n in node.input]
        node.output[:] = [renamed(n) for n in node.output]
        if node.name:
            node.name = renamed(node.name)
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for info in (*graph.input, *graph.output):
        info.name = renamed(info.name)


def _merge(
    before: onnx_pb2.ModelProto, model: onnx_pb2.ModelProto, constants: Params, custom: bool
) -> onnx_pb2.ModelProto:
    merged = onnx_pb2.ModelProto()
    merged.ir_version = max(before.ir_version, model.ir_version)
    merged.opset_import.extend(_opsets(before, model, custom))
    graph = merged.graph
    graph.name = model.graph.name or "model"
    graph.node.extend([*before.graph.node, *model.graph.node])
    graph.initializer.extend([*before.graph.initializer, *model.graph.initializer])
    graph.initializer.extend(_constant(n, v) for n, v in constants.items())
    graph.input.extend(i for i in before.graph.input if i.name not in constants)
    graph.output.extend(model.graph.output)
    return merged


def _opsets(
    before: onnx_pb2.ModelProto, model: onnx_pb2.ModelProto, custom: bool
) -> Iterable[onnx_pb2.OperatorSetIdProto]:
    """Imports of both; fedge's own preprocessing means the same in every operator set it meets."""
    versions: dict[str, int] = {}
    for part in (before, model):
        for opset in part.opset_import:
            known = versions.get(opset.domain, opset.version)
            if custom and known != opset.version:
                raise ArtifactError(
                    f"the preprocessing graph uses opset {known}, the model {opset.version}; "
                    "build the bundle with both in one opset"
                )
            versions[opset.domain] = max(opset.version, known)
    for domain, version in versions.items():
        yield onnx_pb2.OperatorSetIdProto(domain=domain, version=version)


def _constant(name: str, value: Array) -> onnx_pb2.TensorProto:
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return onnx_pb2.TensorProto(
        name=name,
        dims=value.shape,
        data_type=_ONNX_TYPES[str(value.dtype)],
        raw_data=little.tobytes(),
    )


def _add_finish(graph: onnx_pb2.GraphProto, scored_as: str) -> None:
    if scored_as not in _FINISH:
        return
    operator, name = _FINISH[scored_as]
    raw = graph.output[0]
    used = {n for node in graph.node for n in (*node.input, *node.output)}
    while name in used:
        name += "_"
    node = graph.node.add(op_type=operator, input=[raw.name], output=[name], name=name)
    if operator == "Softmax":
        node.attribute.add(name="axis", i=1, type=onnx_pb2.AttributeProto.INT)
    graph.output.add().CopyFrom(raw)
    graph.output[-1].name = name


def _check(header: dict[str, Any], blobs: list[bytes]) -> Frame | None:
    """In the worker: the exported model against the engine, on sample rows."""
    from fedge.engines.files import reopen_bundle
    from fedge.engines.inprocess import open_in_process
    from fedge.engines.runtime import Session

    bundle = reopen_bundle(Path(header["folder"]), header["digest"])
    params, site = (tensors.load(b)[0] for b in blobs[1:])
    rows = _sample(bundle, site)
    engine = open_in_process(bundle)
    engine.set_params(params)
    wanted = engine.predict(engine.preprocess(rows, site or None).inputs)
    got = Session(blobs[0]).run(rows.inputs)
    for (name, distance), spec in zip(
        relative_distance({n: got[n] for n in wanted}, wanted).items(),
        bundle.manifest.outputs,
        strict=True,
    ):
        if not distance <= TOLERANCE:
            raise EngineError(
                f"the exported model's {name} {list(spec.shape)} differs from the engine's by "
                f"{distance:.1e}; allowed {TOLERANCE:.0e}; nothing was written"
            )
    return None


def _sample(bundle: Bundle, site: Params) -> Examples:
    """Raw rows: the recorded step's where raw and ready rows look alike, else drawn ones."""
    from fedge.engines.checks import sizes_of, without_extras

    manifest, recorded = bundle.manifest, bundle.reference().examples
    if manifest.scaling != "custom":
        inputs = without_extras(manifest, recorded.inputs)
        if site and len(inputs) == 1:
            inputs = {n: v * site["site_std"] + site["site_mean"] for n, v in inputs.items()}
    else:
        sizes = sizes_of(manifest, {**recorded.inputs, manifest.labels.name: recorded.labels})
        inputs = {s.name: _drawn(s, sizes) for s in manifest.raw_inputs}
    rows = len(next(iter(inputs.values())))
    ready = {n: np.asarray(v, _dtype(manifest.raw_inputs, n)) for n, v in inputs.items()}
    return Examples(ready, np.zeros(rows))


def _drawn(spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    rest = (sizes.get(d, SAMPLE_SIZE) if isinstance(d, str) else d for d in spec.shape[1:])
    shape = (SAMPLE_ROWS, *rest)
    rng = np.random.default_rng(0)
    if spec.dtype.startswith("float"):
        return rng.normal(size=shape)
    return rng.integers(0, 2, shape)


def _dtype(specs: Iterable[TensorSpec], name: str) -> str:
    return next(s.dtype for s in specs if s.name == name)


if __name__ == "__main__":
    sys.exit(serve({"check": _check}))
