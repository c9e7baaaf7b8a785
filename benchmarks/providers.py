"""Execution providers against the CPU: what the probe says of each, and what it would choose.

    python benchmarks/providers.py                  what this onnxruntime was compiled with
    python benchmarks/providers.py --python PATH    another one's: one with onnxruntime-gpu
    python benchmarks/providers.py cuda tensorrt    these, whether found or not

Rows: model, engine, relative L2 error of the worst gradient, µs per step, verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fedge
from fedge.artifacts.bundle import Bundle

PROBE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from fedge.artifacts.bundle import Bundle
from fedge.engines import probe_engines
report = probe_engines(Bundle.open(Path(sys.argv[1])), engine="ort", providers=sys.argv[2:])
print(json.dumps(asdict(report)))
"""


def models() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, module, shape of one row: small to large."""
    relu, tanh = nn.ReLU, nn.Tanh
    yield "tanh-1.7k", nn.Sequential(nn.Linear(16, 64), tanh(), nn.Linear(64, 10)), (16,)
    yield "mlp-4.8k", nn.Sequential(nn.Linear(64, 64), relu(), nn.Linear(64, 10)), (64,)
    wide = [nn.Linear(784, 1024), relu(), nn.Linear(1024, 256), relu(), nn.Linear(256, 10)]
    yield "mlp-1.1M", nn.Sequential(*wide), (784,)
    convs = [nn.Conv2d(1, 16, 5), relu(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), relu()]
    yield "cnn28", nn.Sequential(*convs, nn.Flatten(), nn.Linear(2048, 10)), (1, 28, 28)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("providers", nargs="*", help="short names; those that are found if none")
    parser.add_argument("--python", default=sys.executable, help="interpreter to probe in")
    args = parser.parse_args()
    root = Path(fedge.__file__).parents[1]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, net, shape in models():
            sample = torch.zeros(1, *shape)
            out = Path(folder) / name
            bundle = fedge.build(net, loss="cross_entropy", sample=sample, out=out)
            _report(name, bundle, args.python, args.providers, root)


def _report(name: str, bundle: Bundle, python: str, providers: list[str], root: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(root)}
    command = [python, "-c", PROBE, str(bundle.path), *providers]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    report = json.loads(told.stdout)
    for engine, probe in report["per_engine"].items():
        verdict = probe["problem"] or ("chosen" if engine == report["engine"] else "agrees")
        numbers = f"{probe['gradient_error']:.1e} {probe['step_s'] * 1e6:8.0f} µs"
        print(f"{name:<10} {engine:<13} {numbers}  {verdict}", flush=True)


if __name__ == "__main__":
    main()
