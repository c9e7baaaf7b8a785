"""The step benchmark runs, and ends in the rows its README names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fedge.engines import find_training_python

ROOT = Path(__file__).parents[1]


def test_rows_are_those_of_the_readme() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "step.py", "--slices", "1"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    engines = ["ort"] if find_training_python() is None else ["ort", "ort-training"]
    assert [r["name"] for r in rows] == [f"{m} {e}" for m in ("mlp-4.8k", "lenet") for e in engines]
    assert all(r["unit"] == "s" and r["ratio"] == r["peer"] / r["ours"] for r in rows)
    assert all(f"`{r['name']}`" in (ROOT / "benchmarks" / "README.md").read_text() for r in rows)
