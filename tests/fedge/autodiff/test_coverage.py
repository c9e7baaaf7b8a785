"""Which operators are differentiated, measured over ONNX's own examples (tools/operators.py)."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fedge.autodiff import supported

TOOLS = Path(__file__).parents[3] / "tools"
LONG = bool(os.environ.get("FEDGE_SOAK"))


@pytest.fixture(scope="module")
def operators() -> Iterator[Any]:
    """tools/operators.py, which finds its siblings as a script does."""
    sys.path.insert(0, str(TOOLS))
    try:
        import operators

        yield operators
    finally:
        sys.path.remove(str(TOOLS))


def test_every_node_case_is_checked_or_refused_by_name(operators: Any) -> None:
    """One test, for the measurement takes half a minute: verdicts, the figure, the document."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdicts = operators.measure(draws=10 if LONG else 1)
    logging.disable(logging.NOTSET)
    assert not {n: v.reason for n, v in verdicts.items() if v.kind == operators.WRONG}
    assert len(verdicts) == len(operators.node_cases()) > 1000
    for case in operators.node_cases():
        verdict = verdicts[case.name]
        if verdict.kind == operators.REFUSED and "_expanded" not in case.name:
            name = case.operator.rpartition(".")[2]
            assert any(word in verdict.reason for word in (name, "opset", "ONNX Runtime")), verdict
    found = operators.figures(verdicts)
    print(found)
    assert found["complete"] >= 0.85 * found["operators"]
    assert found["also"] == len(operators.ALSO)
    text = operators.DOCUMENT.read_text("utf-8")
    if f"onnx {version('onnx')}" in text and f"Runtime {version('onnxruntime')}" in text:
        assert operators.document(verdicts, *operators.committed()) == text, "run: make operators"


def test_every_rule_is_in_the_document(operators: Any) -> None:
    """Quick to see; what the document says of each is compared above."""
    text = operators.DOCUMENT.read_text("utf-8")
    examples = {c.operator for c in operators.node_cases() if not c.discrete}
    assert not [o for o in examples.intersection(supported()) if f"| {o} |" not in text]


def test_onnx_ad_agrees(operators: Any) -> None:
    """A second oracle: where onnx-ad's gradients pass the same comparison, so do ours."""
    if not operators.ONNX_AD.exists():
        pytest.skip("no onnx-ad: python3 -m venv .cache/onnx-ad, then its pip install onnx-ad")
    cases = [c for c in operators.node_cases() if not c.discrete and "_expanded" not in c.name]
    chosen = cases if LONG else cases[::20]
    _, theirs = operators.measure_onnx_ad(operators.ONNX_AD, chosen)
    passed = [c for c in chosen if theirs[c.name].kind == operators.CHECKED]
    ours = [operators.judge(c) for c in passed]
    assert len(passed) >= len(chosen) // 2
    assert not [v for v in ours if v.kind == operators.WRONG]
    assert sum(v.kind == operators.CHECKED for v in ours) >= 0.9 * len(passed)
