"""What one run of a training graph takes: memory at its worst moments, and arithmetic.

ONNX Runtime is asked, in a worker, in which order it runs which nodes and how large each result
is, for two batch sizes; :func:`measure` follows what is alive from node to node. So fused nodes,
the order of execution and sizes that vary are ONNX Runtime's own, not a guess. Python -m of this
module is that worker.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedge import tensors
from fedge.artifacts.manifest import GraphCost
from fedge.artifacts.onnx_v1 import onnx_pb2
from fedge.errors import ArtifactError, EngineError
from fedge.pipe import Child, Frame, serve
from fedge.platform import silence_telemetry
from fedge.types import Params

_TIMEOUT_S = 300.0
_RAN = "_kernel_time"  # how a profile calls the time a node took
_BYTES = {"bool": 1, "int8": 1, "uint8": 1, "float16": 2, "int32": 4, "int64": 8, "double": 8}
# Results that are views of the first input, and those that may take its place.
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_IN_PLACE_NAMES = """
Abs Add BatchNormalization BiasGelu Cast Clip Div Erf Exp LeakyRelu Log Mul Neg Not Pow QuickGelu
Reciprocal Relu Sigmoid Softmax Sqrt Sub Sum Tanh
"""
_IN_PLACE = frozenset(_IN_PLACE_NAMES.split())


@dataclass(frozen=True)
class Step:
    """One node as it ran: its operator, what it read and made, with sizes in bytes."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, int], ...]
    flops: int


def measure(models: Mapping[str, bytes], feeds: Params, batched: Sequence[str]) -> list[GraphCost]:
    """The costs of graphs, found in a worker.

    Args:
        models: File name -> admitted bytes.
        feeds: Every input of the graphs by name; rows for a small batch.
        batched: Those whose first axis is the batch.

    Raises:
        ArtifactError: If a graph does not run.
    """
    blobs = [tensors.dump(feeds), *models.values()]
    with Child("fedge.artifacts.costs") as child:
        header = {"names": list(models), "batched": list(batched)}
        try:
            answer, _ = child.call("measure", header, blobs, _TIMEOUT_S)
        except EngineError as exc:
            raise ArtifactError(f"a training graph does not run: {exc}") from exc
    return [GraphCost.from_json(c) for c in answer["costs"]]


def cost(
    name: str, small: Sequence[Step], large: Sequence[Step], rows: tuple[int, int]
) -> GraphCost:
    """Moments that may be the worst, as lines over the number of rows, from two runs.

    Raises:
        ArtifactError: If the two runs did not run the same nodes.
    """
    if [s.op_type for s in small] != [s.op_type for s in large]:
        raise ArtifactError(f"{name} runs other nodes for other batch sizes")
    spread = rows[1] - rows[0]

    def line(a: int, b: int) -> tuple[int, int]:
        slope = max((b - a) / spread, 0.0)
        return round(slope), max(round(a - slope * rows[0]), 0)

    alive = [line(a, b) for a, b in zip(_alive(small), _alive(large), strict=True)]
    work = line(sum(s.flops for s in small), sum(s.flops for s in large))
    moved = line(_moved(small), _moved(large))
    return GraphCost(name, _hull(alive), work, moved, len(small))


def _alive(steps: Sequence[Step]) -> list[int]:
    """Bytes of results that are held while each node runs."""
    size = {n: b for s in steps for n, b in s.outputs}
    home = _homes(steps, size)
    last = {home[n]: i for i, s in enumerate(steps) for n in s.inputs if n in home}
    held, total, found = dict[str, int](), 0, list[int]()
    for i, step in enumerate(steps):
        for name, nbytes in step.outputs:
            if home[name] == name:
                held[name] = nbytes
                total += nbytes
        found.append(total)
        for name in {home[n] for n in (*step.inputs, *(o for o, _ in step.outputs)) if n in home}:
            if last.get(name, i) <= i:
                total -= held.pop(name, 0)
    return found


def _homes(steps: Sequence[Step], size: Mapping[str, int]) -> dict[str, str]:
    """Result -> the result whose memory it lies in."""
    reads = dict[str, int]()
    for step in steps:
        for name in step.inputs:
            reads[name] = reads.get(name, 0) + 1
    home, alone = dict[str, str](), set[str]()  # alone: nobody else reads this memory
    for step in steps:
        view = step.op_type in _VIEWS
        for name, nbytes in step.outputs:
            home[name] = name
            source = None
            for given in step.inputs[:1] if view else step.inputs:
                fits = given in home and size[given] == nbytes and name == step.outputs[0][0]
                if fits and (view or (step.op_type in _IN_PLACE and given in alone)):
                    home[name], source = home[given], given
                    break
            if reads.get(name, 0) == 1 and (source is None or source in alone):
                alone.add(name)
    return home


def _moved(steps: Sequence[Step]) -> int:
    return sum(b for s in steps for _, b in s.outputs if s.op_type not in _VIEWS)


def _hull(lines: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Those lines that are the highest for some number of rows from 1 on."""
    kept: list[tuple[int, int]] = []
    for slope, base in sorted(set(lines), key=lambda c: (-c[0] - c[1], -c[0])):
        if all(slope > s or (slope == s and base > b) for s, b in kept):
            kept.append((slope, base))
    return tuple(kept)


def _handle_measure(header: dict[str, Any], blobs: list[bytes]) -> Frame:
    silence_telemetry()
    feeds, _ = tensors.load(blobs[0])
    batched = set(header["batched"])
    rows = len(next(feeds[n] for n in feeds if n in batched))
    double = {n: np.concatenate([a, a]) if n in batched else a for n, a in feeds.items()}
    costs = []
    for name, model in zip(header["names"], blobs[1:], strict=True):
        small, large = _runs(model, (feeds, double))
        costs.append(asdict(cost(name, small, large, (rows, 2 * rows))))
    return {"costs": costs}, []


def _runs(model: bytes, feeds: Sequence[Params]) -> list[list[Step]]:
    """Run once with each of ``feeds``, profiled, and read what ran."""
    from fedge.artifacts.ort_import import prepare_onnxruntime

    prepare_onnxruntime()
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="fedge-costs-") as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        options.optimized_model_filepath = str(Path(folder, "model.onnx"))
        session = onnxruntime.InferenceSession(
            _named(model), options, providers=["CPUExecutionProvider"]
        )
        asked = [i.name for i in session.get_inputs()]
        for fed in feeds:
            session.run(None, {n: fed[n] for n in asked})
        events = json.loads(Path(session.end_profiling()).read_text())
        optimized = onnx_pb2.ModelProto()
        optimized.ParseFromString(Path(folder, "model.onnx").read_bytes())
    nodes = {n.name: n for n in optimized.graph.node}
    ran = [e for e in events if e["name"].removesuffix(_RAN) in nodes and e["name"].endswith(_RAN)]
    each = len(ran) // len(feeds)
    return [[_step(nodes, e) for e in ran[i * each : (i + 1) * each]] for i in range(len(feeds))]


def _named(model: bytes) -> bytes:
    """Every node with a name of its own, by which the profile tells them apart."""
    proto = onnx_pb2.ModelProto()
    proto.ParseFromString(model)
    for i, node in enumerate(proto.graph.node):
        node.name = f"node{i}"
    return proto.SerializeToString()


def _step(nodes: Mapping[str, Any], event: Mapping[str, Any]) -> Step:
    node, args = nodes[event["name"].removesuffix(_RAN)], event["args"]
    made = [n for n in node.output if n]
    sizes = [_nbytes(t) for t in args["output_type_shape"]]
    outputs = tuple(zip(made, sizes, strict=False))
    return Step(node.op_type, tuple(node.input), outputs, _flops(node, args))


def _nbytes(tensor: Mapping[str, Sequence[int]]) -> int:
    ((kind, shape),) = tensor.items()
    return _BYTES.get(kind, 4) * math.prod(shape)


def _flops(node: Any, args: Mapping[str, Any]) -> int:  # noqa: ANN401 - a NodeProto
    """Multiplications and additions; one per element where the operator is no product."""
    shapes = [next(iter(t.values())) for t in args["input_type_shape"]]
    out = math.prod(next(iter(args["output_type_shape"][0].values())))
    if node.op_type in ("Gemm", "MatMul", "FusedMatMul", "FusedGemm"):
        flip = any(a.name in ("transA",) and a.i for a in node.attribute)
        return int(2 * out * (shapes[0][-2] if flip else shapes[0][-1]))
    if node.op_type in ("Conv", "FusedConv"):
        return int(2 * out * math.prod(shapes[1][1:]))
    if node.op_type == "ConvTranspose":
        return int(2 * math.prod(shapes[0]) * math.prod(shapes[1][1:]))
    if node.op_type in ("LSTM", "GRU", "RNN"):
        steps, rows = shapes[0][:2]
        return int(2 * steps * rows * (math.prod(shapes[1]) + math.prod(shapes[2])))
    return int(out)


def main() -> int:
    """The worker: answer until the parent closes the pipe."""
    return serve({"measure": _handle_measure})


if __name__ == "__main__":
    sys.exit(main())
