"""Predicted and measured peak memory of the process that trains, for every model of the zoo.

Each measurement is a fresh process: it opens the bundle, trains a few steps on drawn rows, and
reads its own high-water mark. The prediction is ``fedge.artifacts.estimate``'s, from the manifest.

Run: python benchmarks/memory.py [--models lenet,gpt-1m] [--bundles DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
os.environ.update(QUIET)

import numpy as np  # noqa: E402
from zoo import SMALL, ZOO, Model  # noqa: E402

import fedge  # noqa: E402
from fedge.artifacts.bundle import Bundle  # noqa: E402
from fedge.artifacts.estimate import MB, Frugal, estimate  # noqa: E402
from fedge.artifacts.manifest import RECOMPUTED, STEP  # noqa: E402
from fedge.config import TrainConfig  # noqa: E402
from fedge.engines import open_in_process  # noqa: E402
from fedge.engines.files import reopen_bundle  # noqa: E402
from fedge.pipe import Child, Frame, serve  # noqa: E402
from fedge.types import Examples  # noqa: E402

_DEEP = Model(("mlp", "mlp"), {"x": (128,)}, {"widths": (*[128] * 24, 10)})
MODELS = {**SMALL, **ZOO, "deep": _DEEP}
BATCHES = {"mlp-4.8k": 8, "mobilenetv2-96": 8, "mobilenetv3-96": 8, "gpt-1m": 8, "llama-1m": 8}
STEPS = 3


def train(header: dict[str, Any], _: list[bytes]) -> Frame:
    """In the measured process: a few steps."""
    bundle = reopen_bundle(Path(header["folder"]), header["digest"])
    engine = open_in_process(bundle, "ort", frugal=Frugal(**header["frugal"]))
    model, rows = MODELS[header["model"]], 2 * header["batch"]
    drawn = Examples(model.inputs(rows), model.targets(rows))
    config = TrainConfig(lr=1e-3, batch_size=header["batch"], steps=STEPS)
    engine.train(drawn, config, 0)  # loads the graphs
    began = time.process_time()
    engine.train(drawn, config, 1)
    took = (time.process_time() - began) / STEPS
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak": int(peak.split()[1]) * 1024, "step_s": took}, []


def measured(bundle: Bundle, model: str, batch: int, frugal: Frugal) -> dict[str, Any]:
    """Peak bytes and seconds per step, in a fresh process."""
    here = [str(Path(__file__).parent), *(p for p in sys.path if p)]
    environ = {**QUIET, "PYTHONPATH": os.pathsep.join(here)}
    with Child("memory", args=["--worker"], environ=environ) as child:
        how = {"recompute": frugal.recompute, "pieces": frugal.pieces}
        header = {"folder": str(bundle.path), "digest": bundle.digest, "frugal": how}
        return child.call("train", {**header, "model": model, "batch": batch})[0]


def bundle_of(model: str, folder: Path) -> Bundle:
    """The model's bundle, with both forms of its steps."""
    path = folder / model
    if path.exists():
        return Bundle.open(path, admit=False)
    how = MODELS[model]
    sample = {n: np.asarray(v) for n, v in how.inputs(2).items()}
    module = how.build()
    made: Bundle = fedge.build(
        module, loss=how.loss, optimizer="adamw", sample=sample, recompute="auto", out=path
    )
    return made


def rows_of(model: str, folder: Path) -> list[dict[str, Any]]:
    """Prediction and measurement, plain, with recomputation, and in two pieces."""
    bundle, batch = bundle_of(model, folder), BATCHES.get(model, 32)
    ways = {"": Frugal(), " pieces": Frugal(pieces=2)}
    if RECOMPUTED[STEP] in bundle.manifest.files:
        ways[" recompute"] = Frugal(recompute=True)
    rows = []
    for name, frugal in ways.items():
        said = estimate(bundle.manifest, batch, frugal)
        found = measured(bundle, model, batch, frugal)
        ratio = said.peak_bytes / found["peak"]
        row = {"name": f"{model}{name}", "batch": batch, "predicted_mb": said.peak_bytes / MB}
        row |= {"measured_mb": found["peak"] / MB, "ratio": ratio, "parts": said.parts}
        rows.append({**row, "step_ms": said.step_s * 1e3, "measured_ms": found["step_s"] * 1e3})
    return rows


def main() -> int:
    """Print a table, then one JSON object per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(ZOO), help="names, with commas between")
    parser.add_argument("--bundles", type=Path, help="keep bundles here, use those that are there")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'row':28}{'batch':>6}{'predicted':>11}{'measured':>10}{'ratio':>7}{'ms':>9}{'ms':>9}")
    with tempfile.TemporaryDirectory() as spare:
        for model in args.models.split(","):
            for row in rows_of(model, args.bundles or Path(spare)):
                rows.append(row)
                print(
                    f"{row['name']:28}{row['batch']:6}{row['predicted_mb']:8.1f} MB"
                    f"{row['measured_mb']:7.1f} MB{row['ratio']:7.2f}"
                    f"{row['step_ms']:9.2f}{row['measured_ms']:9.2f}",
                    flush=True,
                )
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(serve({"train": train}) if "--worker" in sys.argv else main())
