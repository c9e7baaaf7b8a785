"""What may reach ONNX Runtime: a model is parsed with our own schema and checked, or refused.

ONNX Runtime follows paths of external data out of the model's folder and has no allow-list of
operators, so both are decided here. The schema (``proto/fedge/onnx/v1``) lacks every field in
which something could hide; bytes with a field outside it are refused, and ONNX Runtime is given
the re-serialised message, never the bytes that came.

Run as ``python -m fedge.artifacts.admission`` this module is the worker that :func:`admit_files`
starts: a file made to crash or exhaust the parser ends that worker, under its own limits on memory
and CPU time, and is an :class:`~fedge.errors.AdmissionError` here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from fedge.artifacts.bundle import read_file
from fedge.artifacts.manifest import ORT_FILES, FileEntry
from fedge.artifacts.onnx_v1 import onnx_pb2
from fedge.artifacts.operators import BY_KIND
from fedge.errors import AdmissionError, EngineError
from fedge.pipe import Child, Frame, serve
from fedge.platform import limit_process

MAX_IR_VERSION = 10  # what onnxruntime 1.19 (training) and 1.22 (oldest supported) both read
MAX_OPSETS = {"": 24, "com.microsoft": 1}
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_TYPED = {
    "float_data": (1,),
    "int32_data": (2, 3, 4, 5, 6, 9, 10, 16),
    "int64_data": (7,),
    "double_data": (11,),
    "uint64_data": (12, 13),
}
# Names for fields of ONNX's schema that ours lacks, so that a refusal says what it found.
_REFUSED_FIELDS = {
    "ModelProto": {20: "training_info", 25: "functions", 6: "doc_string", 14: "metadata_props"},
    "GraphProto": {15: "sparse_initializer", 10: "doc_string", 16: "metadata_props"},
    "NodeProto": {6: "doc_string", 8: "overload", 9: "metadata_props"},
    "AttributeProto": {
        6: "g (a subgraph)",
        11: "graphs (subgraphs)",
        10: "tensors",
        22: "sparse_tensor",
        23: "sparse_tensors",
        21: "ref_attr_name",
    },
    "TensorProto": {13: "external_data", 14: "data_location", 6: "string_data", 3: "segment"},
}


@dataclass(frozen=True)
class Limits:
    """Sizes above which a model is refused.

    Attributes:
        file_bytes: Of the serialised model.
        nodes: Operators in the graph.
        tensors: Initializers, inputs, outputs and value infos together.
        rank: Dimensions of one tensor.
        memory_bytes: Address space of the worker that parses; grows with the file.
        cpu_s: Its CPU time.
        timeout_s: Wall time for one bundle.
    """

    file_bytes: int = (2 << 30) - 1
    nodes: int = 200_000
    tensors: int = 400_000
    rank: int = 16
    memory_bytes: int = 2 << 30
    cpu_s: int = 120
    timeout_s: float = 300.0


LIMITS = Limits()


def admit_model(data: bytes, kind: str = "standard", limits: Limits = LIMITS) -> bytes:
    """Check one model.

    Args:
        data: A serialised ONNX ModelProto.
        kind: "standard" for what stock ONNX Runtime runs, "ort-training" for the files of its
            training API.
        limits: Sizes above which it is refused.

    Returns:
        The bytes to give to ONNX Runtime: what was understood, serialised anew.

    Raises:
        AdmissionError: Naming what was found and where.
    """
    return parse_model(data, kind, limits).SerializeToString(deterministic=True)


def parse_model(
    data: bytes, kind: str = "standard", limits: Limits = LIMITS
) -> onnx_pb2.ModelProto:
    """Like :func:`admit_model`, but returns the message of our schema.

    Raises:
        AdmissionError: Naming what was found and where.
    """
    _want(len(data) <= limits.file_bytes, f"{len(data)} bytes; at most {limits.file_bytes}")
    model = onnx_pb2.ModelProto()
    try:
        model.ParseFromString(data)
        _refuse_unknown(model)
        _check_model(model, limits)
        _check_operators(model, kind)
    except (DecodeError, UnicodeDecodeError, RecursionError, MemoryError) as exc:
        raise AdmissionError(
            f"model refused: no ONNX model, or one too large to parse ({type(exc).__name__})"
        ) from exc
    return model


def admit_files(folder: Path, files: Mapping[str, FileEntry], limits: Limits = LIMITS) -> None:
    """Check models of a bundle in a worker process.

    Args:
        folder: Where the files lie.
        files: File name -> the size and digest it must have.
        limits: Sizes, memory, CPU and wall time allowed.

    Raises:
        AdmissionError: For the first file that is refused, or that killed the worker.
        ArtifactError: If a file is missing or damaged.
    """
    largest = max((e.bytes for e in files.values()), default=0)
    memory = limits.memory_bytes + 4 * largest
    args = ("--memory-bytes", str(memory), "--cpu-s", str(limits.cpu_s))
    with Child("fedge.artifacts.admission", args=args) as child:
        for name, entry in files.items():
            header = {
                "folder": str(folder.resolve()),
                "name": name,
                "entry": asdict(entry),
                "limits": asdict(limits),
            }
            try:
                child.call("admit", header, timeout_s=limits.timeout_s)
            except EngineError as exc:  # the worker died, or ran out of memory
                raise AdmissionError(f"{name} refused: parsing it failed: {exc}") from exc


def kind_of(file_name: str) -> str:
    """Which allow-list a bundle's model file is held to."""
    return "ort-training" if file_name in ORT_FILES else "standard"


def _check_model(model: onnx_pb2.ModelProto, limits: Limits) -> None:
    _want(0 < model.ir_version <= MAX_IR_VERSION, f"IR version {model.ir_version}")
    for opset in model.opset_import:
        most = MAX_OPSETS.get(opset.domain)
        _want(most is not None, f"operator set {opset.domain!r}; known: {sorted(MAX_OPSETS)}")
        _want(0 < opset.version <= (most or 0), f"{opset.domain!r} opset {opset.version}")
    graph = model.graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    tensors = len(infos) + len(graph.initializer)
    _want(len(graph.node) <= limits.nodes, f"{len(graph.node)} nodes; at most {limits.nodes}")
    _want(tensors <= limits.tensors, f"{tensors} tensors; at most {limits.tensors}")
    for tensor in graph.initializer:
        _check_tensor(tensor, f"initializer {tensor.name!r:.80}", limits)
    for info in infos:
        for kind in (info.type.tensor_type, info.type.sequence_type.elem_type.tensor_type):
            _check_dims([d.dim_value for d in kind.shape.dim], f"{info.name!r:.80}", limits)
    for node in graph.node:
        for attribute in node.attribute:
            where = f"node {node.name!r:.80}, attribute {attribute.name!r:.80}"
            if attribute.HasField("t"):
                _check_tensor(attribute.t, where, limits)


def _check_operators(model: onnx_pb2.ModelProto, kind: str) -> None:
    allowed = BY_KIND[kind]
    imported = {"" if o.domain == "ai.onnx" else o.domain for o in model.opset_import}
    for node in model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        name = f"{domain}:{node.op_type}" if domain else node.op_type
        _want((domain, node.op_type) in allowed, f"operator {name!r:.80} is not on the list")
        _want(domain in imported, f"operator {name!r:.80} of a set it does not import")


def _check_tensor(tensor: onnx_pb2.TensorProto, where: str, limits: Limits) -> None:
    item = ITEM_BYTES.get(tensor.data_type)
    _want(item is not None, f"{where} has data type {tensor.data_type}")
    _check_dims(tensor.dims, where, limits)
    count = math.prod(tensor.dims)
    typed = {f: len(getattr(tensor, f)) for f in _TYPED if len(getattr(tensor, f))}
    if not typed:
        size = count * (item or 0)
        _want(len(tensor.raw_data) == size, f"{where}: {len(tensor.raw_data)} bytes, wanted {size}")
        return
    _want(len(typed) == 1 and not tensor.raw_data, f"{where} holds its values twice")
    ((field, found),) = typed.items()
    _want(tensor.data_type in _TYPED[field], f"{where} holds {field} of type {tensor.data_type}")
    _want(found == count, f"{where} has {found} values, wanted {count}")


def _check_dims(dims: Iterable[int], where: str, limits: Limits) -> None:
    sizes = list(dims)
    _want(len(sizes) <= limits.rank, f"{where} has rank {len(sizes)}; at most {limits.rank}")
    _want(all(0 <= d < 1 << 40 for d in sizes), f"{where} has shape {sizes}")


def _refuse_unknown(model: onnx_pb2.ModelProto) -> None:
    """Unknown fields anywhere: if discarding them shrinks the message, find one to name."""
    before = model.ByteSize()
    known = onnx_pb2.ModelProto()
    known.CopyFrom(model)
    known.DiscardUnknownFields()
    if known.ByteSize() == before:
        return
    raise AdmissionError(f"model refused: it holds {_first_unknown(model) or 'an unknown field'}")


def _first_unknown(message: Message) -> str | None:
    from google.protobuf.unknown_fields import UnknownFieldSet

    kind = message.DESCRIPTOR.name
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        name = _REFUSED_FIELDS.get(kind, {}).get(number, f"field {number}")
        return f"{name} in a {kind}"
    for _, value in message.ListFields():
        for child in [value] if isinstance(value, Message) else _messages(value):
            if found := _first_unknown(child):
                return found
    return None


def _messages(value: Any) -> list[Message]:  # noqa: ANN401 - a field's value: anything
    if isinstance(value, (str, bytes, int, float, bool)):
        return []
    return [v for v in value if isinstance(v, Message)]


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise AdmissionError(f"model refused: {message}")


def _handle_admit(header: dict[str, Any], _: list[bytes]) -> Frame | None:
    name = header["name"]
    entry, limits = FileEntry(**header["entry"]), Limits(**header["limits"])
    try:
        parse_model(read_file(Path(header["folder"]), name, entry), kind_of(name), limits)
    except AdmissionError as exc:
        raise AdmissionError(f"{name}: {exc}") from exc
    return None


def main() -> int:
    """The worker: limit this process, then check files until the parent closes the pipe."""
    args = sys.argv[1:]
    options = dict(zip(args[::2], args[1::2], strict=True))
    limit_process(memory_bytes=int(options["--memory-bytes"]), cpu_s=int(options["--cpu-s"]))
    return serve({"admit": _handle_admit})


if __name__ == "__main__":
    sys.exit(main())
