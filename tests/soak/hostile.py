"""Hostile bundles by the thousand: ``make soak``, or ``python tests/soak/hostile.py --cases 400``.

One JSON line per row: how many cases, how each ended, the slowest and the largest. Exit code 1 if
one case broke this process, took longer than allowed, read a file outside its bundle or passed the
memory that was declared; such cases are kept in ``--keep``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]

import torch
from arena import LIMIT_S, Arena
from mutations import (
    mutated_bytes,
    mutated_json,
    mutated_model,
    mutated_tensors,
    smuggled_model,
)
from zoo import SMALL

import fedge
from fedge.artifacts.admission import kind_of
from fedge.artifacts.bundle import Bundle
from fedge.artifacts.manifest import COMMON_FILES, ENGINE_FILES, PARAMS, REFERENCE
from fedge.engines import find_training_python

MEMORY_BYTES = 1 << 30
GRACE_S = 1.0  # to end a worker that was stopped at LIMIT_S

# Row -> share of all cases. Small models first: more cases in the same time.
ROWS = {
    "mlp ort models": 9000,
    "lenet ort models": 3000,
    "lstm ort models": 1500,
    "resnet8 ort models": 1000,
    "gpt ort models": 1000,
    "mlp ort-training models": 3500,
    "lenet ort-training models": 1000,
    "mlp ort manifests": 2500,
    "mlp ort tensors": 1500,
    "mlp ort-training tensors": 1000,
}


@dataclass
class Report:
    """What came of one row."""

    row: str
    cases: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0
    worst_s: float = 0.0
    worst_worker_bytes: int = 0
    parent_bytes: int = 0

    def line(self) -> str:
        """As JSON."""
        values = {
            "row": self.row,
            "cases": self.cases,
            **dict(self.verdicts),
            "deaths": dict(self.deaths),
            "seconds": round(self.seconds, 1),
            "worst_s": round(self.worst_s, 2),
            "worst_worker_mb": self.worst_worker_bytes >> 20,
            "declared_mb": MEMORY_BYTES >> 20,
            "parent_mb": self.parent_bytes >> 20,
            "broken": self.broken,
        }
        return json.dumps(values)


def bundle_of(name: str) -> Bundle:
    """One model of the zoo's small ones, as a bundle for both engines."""
    torch.manual_seed(0)
    model = SMALL[name]
    return fedge.build(
        model.build(), loss=model.loss, sample=model.inputs(2), optimizer="adamw", name=name
    )


def cases_of(kind: str, engine: str, arena: Arena, seed: str) -> Iterator[tuple[str, bytes]]:
    """(file, bytes) without end; the manifest under the name ``manifest.json``."""
    held = arena.good.manifest.files
    files = [n for n in (*ENGINE_FILES[engine], *COMMON_FILES) if n in held]
    tensors = [PARAMS, REFERENCE] + (["checkpoint"] if "checkpoint" in files else [])
    models = [n for n in files if n.endswith(".onnx") and n != "eval_model.onnx"]
    if engine == "ort-training":
        models = ["training_model.onnx", "optimizer_model.onnx"]
    number = 0
    while True:
        number += 1
        r = Random(f"{seed}/{number}")
        if kind == "manifests":
            data = arena.manifest()
            yield "manifest.json", (mutated_json if r.random() < 0.9 else mutated_bytes)(data, r)
        elif kind == "tensors":
            name = r.choice(tensors)
            change = mutated_bytes if name == "checkpoint" else mutated_tensors
            yield name, change(arena.good.read(name), r)
        else:
            name = models[0] if r.random() < 0.5 else r.choice(models)
            yield name, _model(arena.good.read(name), r, name, arena)


def _model(data: bytes, r: Random, name: str, arena: Arena) -> bytes:
    draw = r.random()
    if draw < 0.2:
        return mutated_bytes(data, r)
    if draw < 0.3:
        return smuggled_model(data, r, arena.canary.locations)
    return mutated_model(data, r, kind_of(name))


def run_row(row: str, bundle: Bundle, cases: int, seed: int, keep: Path | None = None) -> Report:
    """Put ``cases`` mutants of one bundle through the arena."""
    _, engine, kind = row.split()
    report = Report(row)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedge-soak-") as root:
        arena = Arena(bundle, engine, Path(root), MEMORY_BYTES)
        try:
            drawn = cases_of(kind, engine, arena, f"{seed}/{row}")
            for number, (name, data) in zip(range(cases), drawn, strict=False):
                _one(arena, report, f"{number}-{name}", data, keep)
        finally:
            arena.close()
    report.seconds = time.monotonic() - began
    report.worst_s, report.worst_worker_bytes = arena.worst_s, arena.worst_rss
    report.parent_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if report.worst_worker_bytes > MEMORY_BYTES:
        report.broken.append("a worker passed the memory declared")
    return report


def _one(arena: Arena, report: Report, case: str, data: bytes, keep: Path | None) -> None:
    name = case.partition("-")[2]
    problem = ""
    try:
        verdict, why = arena.document(data) if name == "manifest.json" else arena.file(name, data)
    except Exception as exc:  # noqa: BLE001 - the resident's death is what we look for
        verdict, why, problem = "broke", "", f"{type(exc).__name__}: {exc}"
    report.cases += 1
    report.verdicts[verdict] += 1
    if verdict == "died":
        report.deaths[why.rpartition(": ")[2]] += 1
    if arena.last_s > LIMIT_S + GRACE_S:
        problem = problem or f"took {arena.last_s:.1f} s"
    if arena.canary.touched():
        problem = problem or "read a file outside the bundle"
    if problem:
        report.broken.append(f"{case}: {problem}")
    if keep is not None and (problem or verdict in ("died", "stopped")):
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{report.row.replace(' ', '-')}-{case}").write_bytes(data)


def _silence_workers() -> None:
    """ONNX Runtime tells standard error of each graph it cannot run; errors here go to a copy."""
    sys.stderr = os.fdopen(os.dup(2), "w")
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run rows and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", type=int, default=sum(ROWS.values()), help="in all rows together"
    )
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for cases that ended a worker or broke")
    args = parser.parse_args(argv)
    _silence_workers()
    bundles: dict[str, Bundle] = {}
    broken = False
    for row in args.rows:
        model, engine, _ = row.split()
        if engine == "ort-training" and find_training_python() is None:
            print(json.dumps({"row": row, "skipped": "no interpreter with the training wheel"}))
            continue
        if model not in bundles:
            bundles[model] = bundle_of(model)
        cases = max(1, ROWS[row] * args.cases // sum(ROWS.values()))
        report = run_row(row, bundles[model], cases, args.seed, args.keep)
        print(report.line(), flush=True)
        broken |= bool(report.broken)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
