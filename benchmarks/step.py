"""One training step, fedge's engines beside PyTorch eager: CPU seconds, one thread, interleaved.

Three processes, each with its own interpreter and library: torch, the ``ort`` engine, the
``ort-training`` engine. They take turns, a slice of steps each, so that whatever else the machine
does hits all alike; a slice is timed by the process's own CPU clock, and the figure is the median
over slices. Each step takes a fresh batch from rows that lie in memory, in shuffled order.

Run: python benchmarks/step.py [--slices 15]
     python benchmarks/step.py --zoo [--threads 2] [MODEL ...]   (see step_zoo.py)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ.update(THREADS)

import numpy as np  # noqa: E402

import fedge  # noqa: E402
from fedge.engines import available_engines, open_in_process  # noqa: E402
from fedge.engines.files import reopen_bundle  # noqa: E402
from fedge.engines.interpreters import interpreter_for  # noqa: E402
from fedge.pipe import Child, Frame, serve  # noqa: E402
from fedge.types import Examples  # noqa: E402

ROWS = 2048
MODELS: dict[str, dict[str, Any]] = {
    "mlp-4.8k": {"shape": [64], "batch": 8, "optimizer": "sgd", "lr": 0.01, "steps": 2000},
    "lenet": {"shape": [1, 28, 28], "batch": 32, "optimizer": "adamw", "lr": 0.001, "steps": 40},
}


def data(model: str) -> Examples:
    """Drawn rows and labels, the same for every process."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, *MODELS[model]["shape"])).astype(np.float32)
    return Examples({"x": x}, rng.integers(0, 10, ROWS))


def torch_model(model: str) -> Any:  # noqa: ANN401 - nn.Module
    """The network as torch writes it: 64-64-10, and LeNet-5 for 28×28 images."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if model == "mlp-4.8k":
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class EngineSide:
    """A worker that trains with one of fedge's engines."""

    def open(self, header: dict[str, Any], _: list[bytes]) -> None:
        """Load the bundle."""
        bundle = reopen_bundle(Path(header["folder"]), header["digest"])
        self._engine = open_in_process(bundle, header["engine"])
        self._data, self._seed = data(header["model"]), 0

    def slice(self, header: dict[str, Any], _: list[bytes]) -> Frame:
        """Time some steps."""
        from fedge.config import TrainConfig

        config = TrainConfig(lr=header["lr"], batch_size=header["batch"], steps=header["steps"])
        self._seed += 1
        began = time.process_time()
        result = self._engine.train(self._data, config, self._seed)
        took = time.process_time() - began
        return {"s": took / result.steps, "loss": result.loss}, []


class TorchSide:
    """A worker that trains with torch eager, written as its users write it."""

    def open(self, header: dict[str, Any], _: list[bytes]) -> None:
        """Make the model."""
        import torch

        torch.set_num_threads(1)
        self._model = torch_model(header["model"])
        optimizers = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        kind = optimizers[MODELS[header["model"]]["optimizer"]]
        self._optimizer = kind(self._model.parameters(), lr=header["lr"])
        rows = data(header["model"])
        self._x, self._y = torch.from_numpy(rows.inputs["x"]), torch.from_numpy(rows.labels)

    def slice(self, header: dict[str, Any], _: list[bytes]) -> Frame:
        """Time some steps."""
        import torch
        from torch.nn.functional import cross_entropy

        began, total, done = time.process_time(), 0.0, 0
        while done < header["steps"]:
            order = torch.randperm(ROWS)
            for start in range(0, ROWS, header["batch"])[: header["steps"] - done]:
                chosen = order[start : start + header["batch"]]
                self._optimizer.zero_grad()
                loss = cross_entropy(self._model(self._x[chosen]), self._y[chosen])
                loss.backward()
                self._optimizer.step()
                total += loss.item()
                done += 1
        took = time.process_time() - began
        return {"s": took / done, "loss": total / done}, []


def compare(model: str, slices: int) -> list[dict[str, Any]]:
    """Interleaved slices of torch and of every engine that is installed."""
    how = MODELS[model]
    bundle = fedge.build(
        torch_model(model), loss="cross_entropy", optimizer=how["optimizer"], sample=_sample(model)
    )
    header = {**how, "model": model, "folder": str(bundle.path), "digest": bundle.digest}
    usable = [e for e, reason in available_engines(bundle).items() if not reason]
    sides = {e: _start("engine", interpreter_for(e), {**header, "engine": e}) for e in usable}
    sides["torch"] = _start("torch", Path(sys.executable), header)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(slices + 1):
        for name, side in sides.items():
            answer, _ = side.call("slice", header)
            if number:  # the first slice warms up
                times[name].append(answer["s"])
    for side in sides.values():
        side.close()
    return [_row(model, engine, times) for engine in usable]


def _row(model: str, engine: str, times: dict[str, list[float]]) -> dict[str, Any]:
    ours, peer = (statistics.median(times[n]) for n in (engine, "torch"))
    row = {"name": f"{model} {engine}", "ours": ours, "peer": peer, "ratio": peer / ours}
    return {**row, "unit": "s"}


def _sample(model: str) -> Any:  # noqa: ANN401 - a torch tensor
    import torch

    return torch.zeros(1, *MODELS[model]["shape"])


def _start(side: str, python: Path, header: dict[str, Any]) -> Child:
    here = str(Path(__file__).parent)
    paths = [here, *(p for p in sys.path if p)] if python == Path(sys.executable) else [here]
    child = Child(
        "step", python, ["--side", side], {**THREADS, "PYTHONPATH": os.pathsep.join(paths)}
    )
    child.call("open", header)
    return child


def show_zoo(models: list[str], slices: int, threads: int) -> int:
    """The table of the zoo; with several threads only networks of convolutions by default."""
    from step_zoo import CASES, CNNS, show

    return show(models or (CASES if threads == 1 else CNNS), slices, threads)


def main() -> int:
    """Print a table, then one JSON object per row."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--slices", type=int, default=15, help="timed turns of each side")
    parser.add_argument("--zoo", action="store_true", help="every model of the zoo, with memory")
    parser.add_argument("--threads", type=int, default=1, help="with --zoo: of both sides")
    parser.add_argument("models", nargs="*", help="with --zoo: only these")
    args = parser.parse_args()
    if args.zoo:
        return show_zoo(args.models, args.slices, args.threads)
    slices = args.slices
    rows = [row for model in MODELS for row in compare(model, slices)]
    print(f"{'row':24}{'fedge µs':>10}{'torch µs':>10}{'ratio':>8}   CPU per step, one thread")
    for row in rows:
        print(
            f"{row['name']:24}{row['ours'] * 1e6:10.1f}{row['peer'] * 1e6:10.1f}{row['ratio']:8.2f}"
        )
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    if "--pipe-fd" in sys.argv:
        worker = (TorchSide if "torch" in sys.argv else EngineSide)()
        sys.exit(serve({"open": worker.open, "slice": worker.slice}))
    sys.exit(main())
