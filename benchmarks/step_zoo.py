"""``step.py --zoo``: one training step of every model of the zoo, beside PyTorch eager.

Per model one process for torch and one per engine that can train it, each with the same rows,
batches and optimizer. They take turns, a slice of steps each. With one thread the figure is the
median of the slices' CPU seconds per step; with more it is the shortest slice's wall seconds,
since what else the machine does stretches walls. Memory is the largest resident set of each
process, from its start to its last step: interpreter, libraries, model, rows.

The floor is arithmetic alone: the multiplications of the forward graph, as often as training needs
them (forward, by the weights, by the inputs unless these are data), at the rate at which torch
multiplies 512×512 matrices in the same run, between the slices.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import ZOO

from fedge.pipe import Child, Frame, serve
from fedge.types import Examples

BATCHES = 8  # different batches in memory
SIDE = 512  # of the matrices that measure the rate
WANTED_MEMORY = 0.5


@dataclass(frozen=True)
class Case:
    """How one model is trained, and what is wanted.

    Attributes:
        batch: Rows of a step.
        steps: Of one slice.
        ratio: torch's time over ours, at least; 0 where nothing is promised.
        memory: Our peak memory over torch's, at most.
        optimizer: As for ``fedge.build``.
    """

    batch: int
    steps: int
    ratio: float = 0.0
    memory: float = WANTED_MEMORY
    optimizer: str = "sgd"


THIRD = 1 / 3
CASES: dict[str, Case] = {
    "mlp-4.8k": Case(8, 2000, 8.0, THIRD),
    "mlp-1.1m": Case(8, 150, 1.3, THIRD),
    "lenet": Case(32, 40, 1.1, THIRD, "adamw"),
    "cnn28": Case(32, 25, 1.1, THIRD),
    "resnet8": Case(32, 4, 1.0, THIRD),
    "mobilenetv2-96": Case(8, 4, 1.0),
    "mobilenetv3-96": Case(8, 4),
    "ecg": Case(32, 30, memory=THIRD),
    "lstm": Case(32, 40, 1.0),
    "gru": Case(32, 40),
    "gpt-1m": Case(8, 4, 1.0, optimizer="adamw"),
    "llama-1m": Case(8, 4, 1.0, optimizer="adamw"),
    "unet": Case(8, 20),
}
CNNS = ("lenet", "cnn28", "resnet8", "mobilenetv2-96", "mobilenetv3-96")


class _Side:
    """What both kinds of worker share: the rows, the clock, and their peak memory."""

    def open(self, header: dict[str, Any], _: list[bytes]) -> None:
        """Load model and rows."""
        self.case, model = CASES[header["model"]], ZOO[header["model"]]
        rows = self.case.batch * BATCHES
        self.data = Examples(model.inputs(rows), model.targets(rows))
        self.clock = time.process_time if header["threads"] == 1 else time.perf_counter
        self.load(header)

    def load(self, header: dict[str, Any]) -> None:
        """Make what is timed."""
        raise NotImplementedError

    def run(self, steps: int) -> float:
        """Train; returns the loss."""
        raise NotImplementedError

    def rate(self) -> float:
        """Floating-point operations per second of a matrix product; 0 where not measured."""
        return 0.0

    def slice(self, _header: dict[str, Any], _: list[bytes]) -> Frame:
        """Time some steps."""
        began = self.clock()
        loss = self.run(self.case.steps)
        took = (self.clock() - began) / self.case.steps
        return {"s": took, "loss": loss, "rate": self.rate(), "peak_mb": _peak_mb()}, []


class EngineSide(_Side):
    """A worker that trains with one of fedge's engines."""

    def load(self, header: dict[str, Any]) -> None:
        """Open the bundle."""
        from fedge.engines import open_in_process
        from fedge.engines.files import reopen_bundle

        bundle = reopen_bundle(Path(header["folder"]), header["digest"])
        self._engine, self._seed = open_in_process(bundle, header["engine"], header["threads"]), 0

    def run(self, steps: int) -> float:
        """Train."""
        from fedge.config import TrainConfig

        self._seed += 1
        config = TrainConfig(lr=0.001, batch_size=self.case.batch, steps=steps)
        return self._engine.train(self.data, config, self._seed).loss


class TorchSide(_Side):
    """A worker that trains with torch eager, written as its users write it."""

    def load(self, header: dict[str, Any]) -> None:
        """Make the model."""
        import torch
        from torch.nn import functional

        torch.set_num_threads(header["threads"])
        model = ZOO[header["model"]]
        self._model = model.build()
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.case.optimizer]
        self._optimizer = kind(self._model.parameters(), lr=0.001)
        self._loss: Any = {
            "cross_entropy": functional.cross_entropy,
            "bce_with_logits": functional.binary_cross_entropy_with_logits,
        }[model.loss]
        self._x = [torch.from_numpy(v) for v in self.data.inputs.values()]
        self._y = torch.from_numpy(self.data.labels)
        self._square: Any = torch.rand(SIDE, SIDE)

    def run(self, steps: int) -> float:
        """Train."""
        import torch

        total, done, batch = 0.0, 0, self.case.batch
        while done < steps:
            order = torch.randperm(len(self._y))
            for start in range(0, len(order), batch)[: steps - done]:
                chosen = order[start : start + batch]
                self._optimizer.zero_grad()
                outputs = self._model(*(x[chosen] for x in self._x))
                loss = self._loss(outputs, self._y[chosen])
                loss.backward()
                self._optimizer.step()
                total += loss.item()
                done += 1
        return total / done

    def rate(self) -> float:
        """Of torch's own kernel; with several threads it says more about the machine's load."""
        if self.clock is not time.process_time:
            return 0.0
        began = self.clock()
        for _ in range(4):
            self._square.matmul(self._square)
        return 4 * 2 * SIDE**3 / (self.clock() - began)


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (v for v in status.splitlines() if v.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def compare(name: str, slices: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one model: per engine its time and its memory, beside torch's."""
    import torch

    import fedge
    from fedge.engines import available_engines
    from fedge.engines.interpreters import interpreter_for

    model, case = ZOO[name], CASES[name]
    sample = tuple(torch.from_numpy(v) for v in model.inputs(2).values())
    bundle = fedge.build(
        model.build(), loss=model.loss, optimizer=case.optimizer, sample=sample, name=name
    )
    header = {"model": name, "folder": str(bundle.path), "digest": bundle.digest}
    header |= {"threads": threads}
    engines = [e for e, reason in available_engines(bundle).items() if not reason]
    sides = {e: _start("engine", interpreter_for(e), {**header, "engine": e}) for e in engines}
    sides["torch"] = _start("torch", Path(sys.executable), header)
    found = _turns(sides, header, slices)
    figures = _figures(found, threads)
    flops = training_flops(bundle.path / "infer.onnx", case.batch)
    return [r for e in engines for r in _rows(f"{name} {e}", (e, case), figures, flops)]


def _turns(
    sides: Mapping[str, Child], header: dict[str, Any], slices: int
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(slices + 1):
        for name, side in sides.items():
            answer, _ = side.call("slice", header)
            if number:  # the first slice warms up
                found[name].append(answer)
    for side in sides.values():
        side.close()
    return found


def _figures(
    found: Mapping[str, list[dict[str, Any]]], threads: int
) -> dict[str, dict[str, float]]:
    best = statistics.median if threads == 1 else min
    return {
        name: {
            "s": best([a["s"] for a in answers]),
            "rate": statistics.median(a["rate"] for a in answers),
            "peak_mb": answers[-1]["peak_mb"],
        }
        for name, answers in found.items()
    }


def _rows(
    name: str, of: tuple[str, Case], figures: Mapping[str, Mapping[str, float]], flops: int
) -> list[dict[str, Any]]:
    (engine, case), peer = of, figures["torch"]
    ours = figures[engine]
    step = {"name": name, **_beside(ours["s"], peer["s"], "s"), "wanted": case.ratio}
    floor = flops / peer["rate"] if peer["rate"] else 0.0
    step |= {"floor_share": floor / ours["s"], "peer_floor_share": floor / peer["s"]}
    memory = _beside(ours["peak_mb"], peer["peak_mb"], "MB")
    return [step, {"name": f"{name} memory", **memory, "wanted": 1 / case.memory}]


def _beside(ours: float, peer: float, unit: str) -> dict[str, Any]:
    return {"ours": ours, "peer": peer, "ratio": peer / ours, "unit": unit}


def training_flops(model: Path, batch: int) -> int:
    """Floating-point operations of one step's products, from the forward graph.

    Args:
        model: ``infer.onnx`` of a bundle.
        batch: Rows.
    """
    import onnx

    proto = onnx.load(str(model))
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "N":
                dim.dim_value = batch
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    known = (*graph.input, *graph.value_info, *graph.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    params = {v.name for v in graph.input[1:]}
    data = {v.name for v in graph.input} - params
    return sum(_node_flops(n, shapes) * (2 if n.input[0] in data else 3) for n in graph.node)


def _node_flops(node: Any, shapes: Mapping[str, Sequence[int]]) -> int:  # noqa: ANN401 - NodeProto
    """Two per multiplication of one node's forward pass; 0 for all but products."""
    kind = node.op_type
    if kind in ("Conv", "ConvTranspose"):
        positions = shapes[node.output[0]] if kind == "Conv" else shapes[node.input[0]]
        return 2 * positions[0] * math.prod(positions[2:]) * math.prod(shapes[node.input[1]])
    if kind in ("MatMul", "Gemm"):
        swapped = any(a.name == "transA" and a.i for a in node.attribute)
        inner = shapes[node.input[0]][-2 if swapped else -1]
        return 2 * math.prod(shapes[node.output[0]]) * inner
    if kind in ("LSTM", "GRU", "RNN"):
        steps, rows, _ = shapes[node.input[0]]
        return 2 * steps * rows * sum(math.prod(shapes[node.input[i]]) for i in (1, 2))
    return 0


def _start(side: str, python: Path, header: dict[str, Any]) -> Child:
    here = str(Path(__file__).parent)
    paths = [here, *(p for p in sys.path if p)] if python == Path(sys.executable) else [here]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = dict.fromkeys(names, str(header["threads"]))
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    child = Child("step_zoo", python, ["--side", side], environment)
    child.call("open", header)
    return child


def show(names: Iterable[str], slices: int, threads: int) -> int:
    """Print a table, model after model, then one JSON object per row."""
    rows: list[dict[str, Any]] = []
    unit = "CPU ms" if threads == 1 else f"wall ms, {threads} threads"
    print(
        f"{'row':28}{'fedge':>9}{'torch':>9}{'ratio':>7}{'of floor':>9}{'torch':>7}"
        f"{'peak MB':>9}{'torch':>7}{'share':>7}   {unit}"
    )
    for name in names:
        found = compare(name, slices, threads)
        for step, memory in zip(found[::2], found[1::2], strict=True):
            print(
                f"{step['name']:28}{step['ours'] * 1e3:9.3f}{step['peer'] * 1e3:9.3f}"
                f"{step['ratio']:7.2f}{step['floor_share']:9.0%}{step['peer_floor_share']:7.0%}"
                f"{memory['ours']:9.0f}{memory['peer']:7.0f}{1 / memory['ratio']:7.2f}",
                flush=True,
            )
        rows += found if threads == 1 else found[::2]
    for row in rows:
        extra = {"name": f"{row['name']} {threads} threads"} if threads > 1 else {}
        print(json.dumps({**row, **extra}))
    return 0


if __name__ == "__main__":
    worker = (TorchSide if "torch" in sys.argv else EngineSide)()
    sys.exit(serve({"open": worker.open, "slice": worker.slice}))
