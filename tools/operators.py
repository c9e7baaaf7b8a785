"""Write docs/operators.md: which operators are differentiated, as measured (make operators).

Every node case of ONNX's backend tests is judged by ``gradients.py``, for fedge and, where its
environment is there, for onnx-ad; without it the column of the present document is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from gradients import CHECKED, DISCRETE, REFUSED, WRONG, Verdict, judge, open_session
from node_cases import Case, differentiable_operators, node_cases

from fedge.autodiff.prepare import OPSETS
from fedge.errors import UnsupportedOperatorError
from fedge.types import Params

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "operators.md"
ONNX_AD = ROOT / ".cache" / "onnx-ad" / "bin" / "python"
# Their schemas do not say "differentiable", yet models are trained through them.
ALSO = (
    "Attention",
    "DequantizeLinear",
    "LayerNormalization",
    "QuantizeLinear",
    "RMSNormalization",
    "RotaryEmbedding",
)
_OUTSIDE = ("the model uses opset", "ONNX Runtime does not run it")
_YES, _PART, _NO = "yes", "in part", "no"

Verdicts = Mapping[str, Verdict]  # case -> verdict


def measure(workers: int = 1, draws: int = 1) -> dict[str, Verdict]:
    """Judge all cases, each at ``draws`` points."""
    if workers == 1:
        return _judge_part((0, 1, draws))
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(_judge_part, [(first, workers, draws) for first in range(workers)])
        return {name: verdict for part in parts for name, verdict in part.items()}


def _judge_part(part: tuple[int, int, int]) -> dict[str, Verdict]:
    first, step, draws = part
    return {case.name: judge(case, draws=draws) for case in node_cases()[first::step]}


def measure_onnx_ad(python: Path, cases: Sequence[Case]) -> tuple[str, dict[str, Verdict]]:
    """onnx-ad's version, and its verdicts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            (folder / f"{case.name}.onnx").write_bytes(case.model.SerializeToString())
            asked = json.dumps({"by": case.by, "of": case.of})
            (folder / f"{case.name}.json").write_text(asked)
        command = [python, Path(__file__).with_name("onnx_ad_adjoints.py"), folder]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        asked = (_as_answered(c, folder) for c in cases)
        return found, {c.name: judge(c, lambda c: adjoint(c, folder)) for c in asked}


def _as_answered(case: Case, folder: Path) -> Case:
    first = (folder / f"{case.name}.first").exists()
    return dataclasses.replace(case, of=case.of[:1]) if first else case


def adjoint(case: Case, folder: Path) -> Callable[[Params, Params], Params]:
    """onnx-ad's gradient of the case, as ``gradients.py`` wants it.

    Raises:
        UnsupportedOperatorError: If onnx-ad refused it.
    """
    made = [p for p in (folder / f"{case.name}{s}" for s in (".adj", ".first")) if p.exists()]
    if not made:
        raise UnsupportedOperatorError((folder / f"{case.name}.txt").read_text())
    session = open_session(onnx.load_model_from_string(made[0].read_bytes()))
    names = [o.name for o in session.get_outputs()]

    def run(feeds: Params, cotangents: Params) -> Params:
        seeds = {f"adj_{n}": c[..., None] for n, c in cotangents.items()}
        found = dict(zip(names, session.run(names, {**feeds, **seeds}), strict=True))
        return {n: found[n] for n in case.of} | {
            f"{n}@grad": np.asarray(found[f"adj_{n}"][..., 0]) for n in case.by
        }

    return run


def outside(verdict: Verdict) -> bool:
    """Whether the case is of an opset fedge does not read, or ONNX Runtime cannot run it at all."""
    return verdict.kind == REFUSED and verdict.reason.startswith(_OUTSIDE)


def status(operator: str, verdicts: Verdicts) -> str:
    """``yes``: all that can run is checked; ``in part``: some forms are refused; ``no``; ``wrong``.

    An operator's body (``…_expanded``) alone does not make it differentiable.
    """
    names = [c.name for c in node_cases() if c.operator == operator]
    given = [(n, verdicts[n]) for n in names if n in verdicts]
    kinds = Counter(v.kind for _, v in given if not outside(v))
    checked = any(v.kind == CHECKED for n, v in given if "_expanded" not in n)
    if kinds[WRONG]:
        return f"wrong in {kinds[WRONG]} of {kinds.total() - kinds[DISCRETE]}"
    if not checked:
        return _NO
    return (
        f"{_PART} ({kinds[CHECKED]} of {kinds[CHECKED] + kinds[REFUSED]})"
        if kinds[REFUSED]
        else _YES
    )


def figures(verdicts: Verdicts) -> dict[str, int]:
    """How many cases got which verdict, and how many operators are differentiated how far."""
    kinds = Counter(v.kind for v in verdicts.values())
    wanted = [status(o, verdicts) for o in differentiable_operators()]
    return {
        "cases": len(verdicts),
        **{kind: kinds[kind] for kind in (CHECKED, REFUSED, DISCRETE, WRONG)},
        "operators": len(wanted),
        "complete": wanted.count(_YES),
        "in part": sum(s.startswith(_PART) for s in wanted),
        "also": sum(status(o, verdicts).startswith((_YES, _PART)) for o in ALSO),
    }


def document(verdicts: Verdicts, theirs: Mapping[str, str], their_version: str) -> str:
    """The document's text; ``theirs`` is onnx-ad's status per operator."""
    wanted = [*differentiable_operators(), *ALSO]
    names = {c.operator for c in node_cases()}
    rest = sorted(o for o in names - set(wanted) if _differentiable_cases(o, verdicts))
    number = figures(verdicts)
    share = 100 * number["complete"] / number["operators"]
    head = _HEAD.format(
        **{k.replace(" ", "_"): v for k, v in number.items()},
        share=f"{share:.1f}",
        some=number["complete"] + number["in part"],
        low=OPSETS[0],
        high=OPSETS[-1],
        onnx=version("onnx"),
        onnxruntime=version("onnxruntime"),
        onnx_ad=their_version,
        also_count=len(ALSO),
        also_names=", ".join(ALSO),
    )
    columns = f"| Operator | fedge | onnx-ad {their_version} | What is not, and why |\n"
    columns += "|---|---|---|---|\n"
    tables = [
        columns + "".join(_row(o, verdicts, theirs) for o in operators)
        for operators in (sorted(wanted), rest)
    ]
    return f"{head}\n{tables[0]}\n{_REST}\n{tables[1]}"


def committed() -> tuple[dict[str, str], str]:
    """onnx-ad's column, and its version, in the present document."""
    text = DOCUMENT.read_text("utf-8")
    rows = re.findall(r"^\| (\S+) \| [^|]* \| ([^|]*) \|", text, re.MULTILINE)
    found = re.search(r"\| onnx-ad (\S+) \|", text)
    return dict(rows[1:]), found[1] if found else "?"


def _differentiable_cases(operator: str, verdicts: Verdicts) -> bool:
    cases = [c.name for c in node_cases() if c.operator == operator]
    return any(verdicts[n].kind != DISCRETE for n in cases if n in verdicts)


def _row(operator: str, verdicts: Verdicts, theirs: Mapping[str, str]) -> str:
    ours = status(operator, verdicts)
    return f"| {operator} | {ours} | {theirs.get(operator, '–')} | {_why(operator, verdicts)} |\n"


def _why(operator: str, verdicts: Verdicts) -> str:
    """The reasons, each once, without the names of nodes."""
    reasons: dict[str, int] = defaultdict(int)
    for case in node_cases():
        verdict = verdicts.get(case.name)
        if case.operator == operator and verdict and verdict.kind in (REFUSED, WRONG):
            reasons[_short(operator, verdict.reason)] += 1
    return "; ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))


def _short(operator: str, reason: str) -> str:
    """What of a message tells a reader something."""
    if reason.startswith("ONNX Runtime"):
        return "ONNX Runtime has no kernel"
    if found := re.match(r"the model uses (opset \d+)", reason):
        return found[1]
    if found := re.search(r"is a (\S+), which fedge cannot", reason):
        return "no rule" if found[1] == operator else f"its body holds {found[1]}"
    reason = re.sub(r"^.* is an? (.*?), which fedge does not.*$", r"\1", reason)
    reason = re.sub(r"^node '[^']*' is an? \S+ on '[^']*', an? (\w+);.*", r"on a \1", reason)
    reason = re.sub(
        r"^fedge does not differentiate the \S+ '[^']*'( \(\S+\))?: it has ", "", reason
    )
    reason = re.sub(r"shape inference finds no shape.*", "a shape in its body is unknown", reason)
    return re.sub(r"\s+", " ", re.sub(r"'[^']*'", "…", reason)).replace("|", "/")[:90]


_HEAD = """\
# Operators

<!-- Written by tools/operators.py (make operators). Do not edit. -->

Which ONNX operators fedge differentiates, as measured: each of ONNX's own examples of each operator
(the node cases of `onnx.backend.test`, onnx {onnx}; a few of our own where it has none with
floating-point numbers) is differentiated by all its floating-point inputs, the gradient is run on
ONNX Runtime {onnxruntime} in float32 and compared with central differences in float64, which
`onnx.reference` computes. Per tensor, ‖difference‖ / ‖gradient‖ is at most 1e-4. None is skipped:

| {cases} cases | |
|---|---|
| {checked} | checked |
| {refused} | refused: an error names the operator (or the opset; fedge reads {low} to {high}) |
| {discrete} | without a gradient by nature: nothing floating-point goes in, or none comes out |
| {wrong} | wrong |

Of the {operators} operators whose schema says "differentiable", **{complete} ({share} %) are
differentiated in every form that stock ONNX Runtime runs**, {in_part} more in some forms, {some} in
all. Of the {also_count} others that models are trained through
({also_names}), {also} are.

A model with an operator that is not differentiated can still be trained where no trainable param
lies before it. To differentiate one more, see `fedge.autodiff.vjp_rule`.

*yes*: every example; *in part (c of n)*: c of n examples, the others are refused; *no*: refused.
The column for onnx-ad {onnx_ad} is from the same examples, *wrong in w of n* where its gradients
differ from the central differences. The last column is about fedge, with the number of examples.
QuantizeLinear moves in steps: its gradient passes straight through and is compared with Clip's.
"""
_REST = """\
## Others

Operators whose schema does not say that they are differentiable, where an example has
floating-point inputs and outputs.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write; prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--onnx-ad", type=Path, default=ONNX_AD, help="Python that has onnx-ad")
    asked = parser.parse_args(arguments)
    verdicts = measure(asked.workers)
    if asked.onnx_ad.exists():
        their_version, found = measure_onnx_ad(
            asked.onnx_ad, [c for c in node_cases() if not (c.discrete or c.smooth)]
        )
        operators: Iterable[str] = {c.operator for c in node_cases() if c.name in found}
        theirs = {o: status(o, found) for o in operators}
    else:
        theirs, their_version = committed()
    DOCUMENT.write_text(document(verdicts, theirs, their_version), "utf-8")
    print(json.dumps(figures(verdicts)))


if __name__ == "__main__":
    main()
