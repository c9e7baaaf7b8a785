"""The demo's result as data, as a table and as a picture."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

MODELS = ("local_only", "global", "personal")
_TITLES = {"local_only": "own rows only", "global": "global", "personal": "personal"}


def collect(note: str, rounds: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything the demo measured, as plain values.

    Args:
        note: Which engines took part, and why.
        rounds: The server's round events.
        tuned: One result of ``fedge-client personalize --json`` per hospital, with ``bytes_sent``.
    """
    hospitals = [
        {
            "hospital": t["client_id"],
            "rows_train": t["rows"]["train"],
            "rows_test": t["rows"]["test"],
            "engine": t["engine"],
            "bytes_sent": t["bytes_sent"],
            **{m: t["metrics"][m] for m in (*MODELS, "majority")},
        }
        for t in tuned
    ]
    return {"engines": note, "rounds": rounds, "hospitals": hospitals}


def table(report: dict[str, Any], out: Path) -> str:
    """The report for people: three lines per hospital, one per model."""
    head = f"{'hospital':<10}{'rows':>8}  {'engine':<14}{'model':<15}"
    head += f"{'accuracy [95 %]':<22}{'AUC [95 %]':<22}{'bytes sent':>10}"
    lines = [head, "─" * len(head)]
    for hospital in report["hospitals"]:
        lines += _hospital_lines(hospital)
    lines += [
        "",
        "Scores are on rows that took no part in training. Answering with the more frequent class:",
        f"  {_majority(report)}",
        f"{report['seconds']} s in all. In {out}/:",
        "  demo.png, report.json, global.onnx and, per hospital, personal.onnx",
    ]
    return "\n".join(lines)


def _hospital_lines(h: dict[str, Any]) -> list[str]:
    rows = f"{h['rows_train']}/{h['rows_test']}"
    who = f"{h['hospital']:<10}{rows:>8}  {h['engine']:<14}"
    sent = f"{h['bytes_sent']:>10,}"
    return [
        f"{who if first else '':<34}{_TITLES[m]:<15}"
        f"{_score(h[m], 'accuracy'):<22}{_score(h[m], 'auc'):<22}{sent if first else ''}".rstrip()
        for m, first in zip(MODELS, (True, False, False), strict=True)
    ]


def _score(metrics: dict[str, Any], name: str) -> str:
    value = metrics.get(name)
    if value is None:
        return "one class only"
    return f"{value:.3f} [{metrics[f'{name}_low']:.3f}–{metrics[f'{name}_high']:.3f}]"


def _majority(report: dict[str, Any]) -> str:
    rows = report["hospitals"]
    return ", ".join(f"{h['hospital']} {h['majority']['accuracy']:.3f}" for h in rows)


def draw(report: dict[str, Any], path: Path) -> None:
    """Accuracy of the global model per round, and what each hospital gains, as PNG."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MPLCONFIGDIR", cache)
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        _curves(left, report["rounds"])
        _gains(right, report["hospitals"])
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _curves(axes: Any, rounds: list[dict[str, Any]]) -> None:  # noqa: ANN401 - matplotlib
    numbers = [r["round"] for r in rounds]
    for client in sorted({c["client_id"] for r in rounds for c in r["clients"]}):
        scores = [
            next((c["accuracy"] for c in r["clients"] if c["client_id"] == client), None)
            for r in rounds
        ]
        axes.plot(numbers, scores, marker=".", label=client)
    axes.plot(numbers, [r["accuracy"] for r in rounds], "k--", lw=2, label="all (weighted)")
    axes.set(xlabel="round", ylabel="accuracy on held-out rows", title="Global model, per round")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _gains(axes: Any, hospitals: list[dict[str, Any]]) -> None:  # noqa: ANN401 - matplotlib
    for i, model in enumerate(MODELS):
        known = [(k, h[model]) for k, h in enumerate(hospitals) if h[model].get("auc") is not None]
        at = [k + (i - 1) * 0.2 for k, _ in known]
        auc = [m["auc"] for _, m in known]
        spread = [
            [m["auc"] - m["auc_low"] for _, m in known],
            [m["auc_high"] - m["auc"] for _, m in known],
        ]
        axes.errorbar(at, auc, spread, fmt="o", capsize=4, label=_TITLES[model])
    axes.set_xticks(range(len(hospitals)), [h["hospital"] for h in hospitals])
    axes.set(ylabel="AUC on held-out rows, 95 % interval", title="Three models at each hospital")
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3, axis="y")
