"""Every node case of ONNX's own backend tests: our gradient against central differences.

A case is one operator with example inputs. It gets one verdict, with its reason: **checked** (the
gradient by every floating-point input agrees), **refused** (fedge says which operator it does not
differentiate, or ONNX Runtime has no kernel for it), **discrete** (no gradient by nature: nothing
floating-point goes in, or none comes out) or **wrong**, which is a bug.

The gradient graph runs in float32 on ONNX Runtime. The differences are taken in float64 by
``onnx.reference``, where it computes in float64; else by it on the operator's body, else by ONNX
Runtime's own float64 kernels. Examples are moved a little, for many stand exactly on a kink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
from node_cases import Case, retyped, with_initializers
from onnx import ModelProto, TensorProto, defs, helper, inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from fedge.autodiff import vjp
from fedge.errors import ArtifactError, UnsupportedOperatorError
from fedge.types import Array, Params

Forward: TypeAlias = Callable[[Params], list[Array]]
Differentiate: TypeAlias = Callable[[Case], Callable[[Params, Params], Params]]

CHECKED, REFUSED, DISCRETE, WRONG = "checked", "refused", "discrete", "wrong"
_OFF = "its"  # how a disagreement begins
TOLERANCE = 1e-4  # ‖ours − differences‖ / ‖ours‖ per tensor
_RUNTIME_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    onnx.checker.ValidationError,
)
_LARGE = 20_000  # elements, for which the reference is slow
_DIRECTIONS, _ATTEMPTS = 3, 24


@dataclass(frozen=True)
class Verdict:
    """What became of a case, and why."""

    kind: str
    reason: str = ""


def fedge_gradient(case: Case) -> Callable[[Params, Params], Params]:
    """Our gradient graph on ONNX Runtime: (feeds, cotangents) -> gradients and outputs."""
    model = with_initializers(case)
    graph = vjp(model, outputs=case.of, wrt=case.by, params=case.by)
    onnx.checker.check_model(graph)
    names = [o.name for o in graph.graph.output]
    session = open_session(graph)
    wanted = {i.name for i in session.get_inputs()}

    def run(feeds: Params, cotangents: Params) -> Params:
        given = {**feeds, **{f"{n}@cotangent": c for n, c in cotangents.items()}}
        values = session.run(names, {n: a for n, a in given.items() if n in wanted})
        return dict(zip(names, values, strict=True))

    return run


def judge(case: Case, differentiate: Differentiate = fedge_gradient, draws: int = 1) -> Verdict:
    """Check one case at ``draws`` points; ``differentiate`` may be another tool's."""
    if case.discrete:
        return Verdict(DISCRETE, case.discrete)
    try:
        # A new gradient each: an operator that draws random numbers draws the same ones again.
        verdicts = [_judge(case, differentiate(case), draw * _ATTEMPTS) for draw in range(draws)]
    except (ArtifactError, UnsupportedOperatorError) as exc:
        return Verdict(REFUSED, str(exc))
    except _RUNTIME_ERRORS as exc:
        failed = _forward_failure(case)
        return Verdict(REFUSED, failed) if failed else Verdict(WRONG, str(exc))
    return next((v for v in verdicts if v.kind != CHECKED), verdicts[0])


def _forward_failure(case: Case) -> str:
    """What ONNX Runtime says against the case itself, without any gradient; empty if nothing."""
    try:
        open_session(case.model).run(None, case.feeds)
    except _RUNTIME_ERRORS as exc:
        return f"ONNX Runtime does not run it: {exc}"
    return ""


def _judge(case: Case, gradient: Callable[[Params, Params], Params], seed: int) -> Verdict:
    if set(case.feeds) != set(case.by):
        return Verdict(REFUSED, "it works on sequences or optionals")
    verdict = Verdict(WRONG, "nothing to compare with")
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng(seed + attempt)
        feeds = {n: _moved(rng, a, attempt % 2 == 1) for n, a in case.feeds.items()}
        for way in _ways(case):
            try:
                outputs = way.run(feeds)
                _same_sizes(case, outputs)
                cotangents = [_cotangent(rng, o) for o in outputs]
                slopes = _slopes(way, feeds, cotangents, rng)
            except _Kink as exc:
                verdict = Verdict(WRONG, str(exc)) if attempt == 0 else verdict
                continue
            found = gradient(feeds, dict(zip(case.of, cotangents, strict=True)))
            verdict = _compare(case, found, (outputs, slopes), _size(cotangents))
            if verdict.kind == CHECKED:
                return verdict
        if verdict.reason.startswith(_OFF):
            return verdict
    failed = _forward_failure(case)
    return Verdict(REFUSED, failed) if failed else verdict


class _Kink(Exception):
    """This example, or this way to compute it, has no differences to compare with."""


def _same_sizes(case: Case, outputs: Sequence[Array]) -> None:
    """Range has more elements where its limit moved over one."""
    declared = {o.name: o.type.tensor_type.shape.dim for o in case.model.graph.output}
    for name, output in zip(case.of, outputs, strict=True):
        if any(
            d.dim_value not in (0, n) for d, n in zip(declared[name], output.shape, strict=False)
        ):
            raise _Kink(f"output {name} has another shape than the example's")


_Slopes: TypeAlias = dict[str, list[tuple[Array, float]]]


def _slopes(
    way: _Way, feeds: Params, cotangents: Sequence[Array], rng: np.random.Generator
) -> _Slopes:
    """Per input, directions and the slope of ⟨cotangents, outputs⟩ along each."""
    return {
        name: [
            (v, _slope(way, feeds, cotangents, (name, v)))
            for v in rng.standard_normal((1 if x.size > _LARGE else _DIRECTIONS, *x.shape))
        ]
        for name, x in feeds.items()
    }


def _slope(
    way: _Way, feeds: Params, cotangents: Sequence[Array], along: tuple[str, Array]
) -> float:
    name, direction = along

    def at(step: float) -> float:
        moved = feeds[name].astype(np.float64) + step * direction
        outputs = way.run({**feeds, name: moved})
        pairs = zip(cotangents, outputs, strict=True)
        return sum(float(c[c != 0].astype(np.float64) @ o[c != 0]) for c, o in pairs)

    near, far = ((at(h) - at(-h)) / (2 * h) for h in (way.step, 3 * way.step))
    size = _size(cotangents)
    if not np.isfinite(near) or abs(near - far) > 1e-5 * max(abs(near), size, 1e-3):
        raise _Kink(f"differences by {name} disagree: {near} and {far}")
    return near


def _size(cotangents: Sequence[Array]) -> float:
    return float(np.sqrt(sum(np.vdot(c, c) for c in cotangents)))


def _compare(
    case: Case, found: Params, wanted: tuple[list[Array], _Slopes], size: float
) -> Verdict:
    outputs, slopes = wanted
    for name, value in zip(case.of, outputs if not case.smooth else [], strict=not case.smooth):
        finite = np.isfinite(value)
        error = float(np.linalg.norm((found[name].astype(np.float64) - value)[finite]))
        if not error <= TOLERANCE * max(float(np.linalg.norm(value[finite])), 1e-3):
            return Verdict(WRONG, f"{_OFF} output {name} is off by {error:.2g}")
    for name, along in slopes.items():
        grad = found[f"{name}@grad"].astype(np.float64)
        if grad.shape != case.feeds[name].shape:
            return Verdict(WRONG, f"{_OFF} gradient by {name} has shape {grad.shape}")
        errors = [float(np.vdot(grad, v)) - slope for v, slope in along]
        error = float(np.sqrt(np.mean(np.square(errors))))  # estimates ‖ours − theirs‖
        if not error <= TOLERANCE * max(float(np.linalg.norm(grad)), 1e-1 * size):
            return Verdict(WRONG, f"{_OFF} gradient by {name} is off by {error:.2g}")
    return Verdict(CHECKED)


@dataclass(frozen=True)
class _Way:
    """A way to compute the case, and the step for differences of it."""

    run: Forward
    step: float = 1e-6


def _ways(case: Case) -> list[_Way]:
    """In float64, best first; last, in float32, ONNX Runtime itself, good for linear operators."""
    single = ModelProto()
    single.CopyFrom(case.smooth or case.model)
    del single.graph.output[:]
    single.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in case.of
    )
    double = retyped(single, TensorProto.DOUBLE)
    reference = _Way(_guarded(lambda: _reference(double)))
    body = _Way(_guarded(lambda: _reference(retyped(_body(single), TensorProto.DOUBLE))))
    kernel = _Way(_guarded(lambda: _onnxruntime(double, np.float64)))
    last = _Way(_guarded(lambda: _onnxruntime(single, np.float32)), 0.1)
    if case.operator == "Dropout":  # only ONNX Runtime draws the mask it draws
        return [kernel]
    if sum(x.size for x in case.feeds.values()) > _LARGE:
        return [kernel, last, reference]
    return [reference, body, kernel, last]


def _body(model: ModelProto) -> ModelProto:
    """The model with its operators replaced by their bodies."""
    typed = onnx.shape_inference.infer_shapes(model)
    for node in typed.graph.node:
        given = {a.name for a in node.attribute}
        for name, attribute in defs.get_schema(node.op_type).attributes.items():
            if name not in given and attribute.default_value.name:
                node.attribute.append(attribute.default_value)
    names = sorted({("", n.op_type) for n in typed.graph.node})
    return inliner.inline_selected_functions(typed, names, inline_schema_functions=True)


def _guarded(make: Callable[[], Forward]) -> Forward:
    """Whatever a reference raises, it is no reference for this case."""
    made: list[Forward] = []

    def run(feeds: Params) -> list[Array]:
        try:
            if not made:
                made.append(make())
            outputs = made[0]({n: a.astype(np.float64) for n, a in feeds.items()})
        except Exception as exc:
            raise _Kink(f"{type(exc).__name__}: {exc}") from exc
        if any(o.dtype != np.float64 or np.isnan(o).any() for o in outputs):
            raise _Kink("the reference does not compute in float64")
        return outputs

    return run


def _reference(model: ModelProto) -> Forward:
    evaluator = ReferenceEvaluator(model, new_ops=[Erf, GlobalLpPool])
    return lambda feeds: [np.asarray(o) for o in evaluator.run(None, feeds)]


class Erf(OpRun):
    """ONNX's own rounds to float32."""

    def _run(self, x: Array) -> tuple[Array]:  # type: ignore[override]
        return (np.vectorize(math.erf, otypes="d")(x),)


class GlobalLpPool(OpRun):
    """ONNX has none."""

    def _run(self, x: Array, p: int = 2) -> tuple[Array]:  # type: ignore[override]
        axes = tuple(range(2, x.ndim))
        return ((np.abs(x) ** p).sum(axes, keepdims=True) ** (1 / p),)


def _onnxruntime(model: ModelProto, dtype: type[np.floating[Any]]) -> Forward:
    data = model.SerializeToString()

    def run(feeds: Params) -> list[Array]:
        # A session each: an operator that draws random numbers draws the same ones again.
        outputs = open_session(data).run(None, {n: a.astype(dtype) for n, a in feeds.items()})
        return [o.astype(np.float64) if o.dtype == dtype else o for o in outputs]

    return run


def open_session(model: ModelProto | bytes) -> ort.InferenceSession:
    """On one thread of the CPU, without warnings."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _cotangent(rng: np.random.Generator, output: Array) -> Array:
    """Between 0.5 and 1.5 in size, of either sign; 0 where the output is infinite."""
    drawn = rng.choice([-1, 1], output.shape) * rng.uniform(0.5, 1.5, output.shape)
    return np.asarray(np.where(np.isfinite(output), drawn, 0), np.float32)


def _moved(rng: np.random.Generator, x: Array, relative: bool) -> Array:
    """A little noise, which leaves no two elements equal; relative noise keeps signs."""
    size = np.abs(x) if relative else max(float(np.abs(x).mean()) if x.size else 0.0, 0.1)
    return np.asarray(x + 0.01 * size * rng.standard_normal(x.shape), np.float32)
