"""Optimizers in standard operators, with PyTorch's arithmetic.

An optimizer asks for gradients through a function of the seed, the loss's own cotangent. Gradients
are linear in it, so a constant factor on all of them costs one multiplication instead of one per
param: plain SGD asks for lr·g, AdamW for (1 − β₁)·g.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from fedge.artifacts.manifest import Optimizer
from fedge.autodiff.ops import Ops, Value, attribute
from fedge.errors import ConfigError

GradientsBySeed: TypeAlias = Callable[[Value], Mapping[str, Value]]
Settings: TypeAlias = Mapping[str, float]


class Updates:
    """What a step writes: the graph inputs it reads as memory, and the next value of each input.

    Attributes:
        op: Where to write nodes.
        params: Trainable param name -> its graph input.
        lr: The learning rate input, rank 0.
        state: Memory input name -> its graph input, zero at the start.
        next: Input name -> the value it has after the step.
    """

    def __init__(self, op: Ops, params: Mapping[str, Value], lr: Value) -> None:
        self.op = op
        self.params = params
        self.lr = lr
        self.state: dict[str, Value] = {}
        self.next: dict[str, Value] = {}

    def slot(self, owner: str, slot: str) -> Value:
        """A new memory input ``owner@slot`` of the shape of param ``owner`` (else rank 0)."""
        name = f"{owner}@{slot}"
        shape = self.params[owner].shape if owner in self.params else ir.Shape(())
        self.state[name] = ir.val(name, dtype=ir.DataType.FLOAT, shape=shape)
        return self.state[name]

    def outputs(self) -> dict[str, Value]:
        """What a step gives: ``X@next`` for every input that changes, with its shape."""
        for name, value in self.next.items():
            value.shape, value.dtype = {**self.state, **self.params}[name].shape, ir.DataType.FLOAT
        return {f"{n}@next": v for n, v in self.next.items()}


class GivenGradients:
    """Gradients that come as graph inputs, with a proximal term added, then clipped together.

    g ← g + μ·(p − p₀) for the params held back (FedProx), then g ← g·min(1, c/(‖g‖ + 1e-6)) over
    all of them, as ``torch.nn.utils.clip_grad_norm_`` has it; c = ∞ leaves g as it is.

    Attributes:
        inputs: The graph inputs this takes: ``optimizer@proximal_mu`` and ``optimizer@clip_norm``
            (rank 0), ``X@grad``, and ``X@base`` (p₀) for each param held back.
    """

    def __init__(self, up: Updates, proximal: Sequence[str]) -> None:
        self._op = up.op
        mu, limit = (_input(f"optimizer@{n}", ir.Shape(())) for n in ("proximal_mu", "clip_norm"))
        grads = {n: _input(f"{n}@grad", p.shape) for n, p in up.params.items()}
        bases = {n: _input(f"{n}@base", up.params[n].shape) for n in proximal}
        self.inputs = [mu, limit, *grads.values(), *bases.values()]
        for name, base in bases.items():
            grads[name] = up.op.Add(grads[name], up.op.Mul(up.op.Sub(up.params[name], base), mu))
        self._grads, self._limit = grads, limit

    def __call__(self, seed: Value) -> Mapping[str, Value]:
        """The gradients times ``seed``."""
        op = self._op
        squares = [op.ReduceSumSquare(g, keepdims=0) for g in self._grads.values()]
        norm = op.Sqrt(op.Sum(*squares))
        factor = op.Min(op.Div(self._limit, op.Add(norm, 1e-6)), 1.0)
        factor = op.Mul(factor, seed)
        return {n: op.Mul(g, factor) for n, g in self._grads.items()}


def _input(name: str, shape: ir.Shape | None) -> Value:
    return ir.val(name, dtype=ir.DataType.FLOAT, shape=shape)


def _sgd(up: Updates, gradients: GradientsBySeed, s: Settings) -> None:
    """p ← p − lr·(g + λp), which is p(1 − lr·λ) − lr·g."""
    if s["momentum"]:
        return _momentum_sgd(up, gradients, s)
    op = up.op
    scaled = gradients(up.lr)
    keep = op.Sub(1.0, op.Mul(up.lr, s["weight_decay"])) if s["weight_decay"] else None
    for name, p in up.params.items():
        up.next[name] = _minus(op, p if keep is None else op.Mul(p, keep), scaled[name])
    return None


def _minus(op: Ops, p: Value, move: Value) -> Value:
    """p − move; where the move is a matrix product, one Gemm does both."""
    gemm = move.producer()
    if gemm is None or gemm.op_type != "Gemm" or len(gemm.inputs) != 2:
        return op.Sub(p, move)
    trans = {n: attribute(gemm, n, 0) for n in ("transA", "transB")}
    return op.Gemm(*gemm.inputs, p, alpha=-attribute(gemm, "alpha", 1.0), **trans)


def _momentum_sgd(up: Updates, gradients: GradientsBySeed, s: Settings) -> None:
    """b ← μb + u with u = g + λp, then p ← p − lr·b (Nesterov: p − lr·(u + μb)); no dampening."""
    op, mu = up.op, s["momentum"]
    for name, g in gradients(op.value(1.0)).items():
        p, b = up.params[name], up.slot(name, "momentum")
        u = op.Add(g, op.Mul(p, s["weight_decay"])) if s["weight_decay"] else g
        b_next = op.Add(op.Mul(b, mu), u)
        up.next[b.name] = b_next
        direction = op.Add(u, op.Mul(b_next, mu)) if s["nesterov"] else b_next
        up.next[name] = op.Sub(p, op.Mul(direction, up.lr))


def _adamw(up: Updates, gradients: GradientsBySeed, s: Settings) -> None:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), as torch.optim.AdamW computes it.

    m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g²,
    p ← p(1 − lr·λ) − lr/c₁ · m / (√v/√c₂ + ε), with cᵢ = 1 − βᵢᵗ.
    """
    op, beta1, beta2 = up.op, s["beta1"], s["beta2"]
    steps = up.slot("optimizer", "steps")
    up.next[steps.name] = op.Add(steps, 1.0)
    c1, root_c2 = _corrections(op, up.next[steps.name], beta1, beta2)
    size = op.Div(op.Mul(up.lr, root_c2), c1)
    floor = op.Mul(root_c2, s["eps"])
    keep = op.Sub(1.0, op.Mul(up.lr, s["weight_decay"])) if s["weight_decay"] else None
    for name, g in gradients(op.value(1 - beta1)).items():
        p, m, v = up.params[name], up.slot(name, "exp_avg"), up.slot(name, "exp_avg_sq")
        square = op.Mul(op.Mul(g, g), (1 - beta2) / (1 - beta1) ** 2)
        up.next[m.name] = m_next = op.Add(op.Mul(m, beta1), g)
        up.next[v.name] = v_next = op.Add(op.Mul(v, beta2), square)
        move = op.Mul(op.Div(m_next, op.Add(op.Sqrt(v_next), floor)), size)
        up.next[name] = op.Sub(p if keep is None else op.Mul(p, keep), move)


def _corrections(op: Ops, steps: Value, beta1: float, beta2: float) -> tuple[Value, Value]:
    """1 − β₁ᵗ and √(1 − β₂ᵗ), in float64: 1 − 0.999 in float32 is off by 3e-5."""
    t = op.Cast(steps, to=int(ir.DataType.DOUBLE))
    one, b1, b2 = (np.asarray(v, np.float64) for v in (1.0, beta1, beta2))
    c1, c2 = (op.Sub(one, op.Pow(b, t)) for b in (b1, b2))
    to = int(ir.DataType.FLOAT)
    return op.Cast(c1, to=to), op.Cast(op.Sqrt(c2), to=to)


_DEFAULTS: dict[str, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "sgd": {"momentum": 0.0, "nesterov": 0.0, "weight_decay": 0.0},
}
_RULES = {"adamw": _adamw, "sgd": _sgd}


def settings_of(optimizer: Optimizer) -> dict[str, float]:
    """Its settings with torch's defaults filled in.

    Raises:
        ConfigError: If the optimizer or a setting is unknown or out of range.
    """
    if optimizer.name not in _DEFAULTS:
        raise ConfigError(f"optimizer {optimizer.name!r} is unknown; known: {', '.join(_DEFAULTS)}")
    defaults = _DEFAULTS[optimizer.name]
    unknown = sorted(set(optimizer.settings) - set(defaults))
    if unknown:
        raise ConfigError(
            f"{optimizer.name} has no setting {unknown[0]!r}; known: {', '.join(defaults)}"
        )
    settings = {**defaults, **optimizer.settings}
    for name, value in settings.items():
        _check(name, value)
    if settings.get("nesterov") and not settings["momentum"]:
        raise ConfigError("sgd with nesterov needs a momentum above 0")
    return settings


def _check(name: str, value: float) -> None:
    top = 1.0 if name in ("beta1", "beta2", "momentum") else float("inf")
    if not 0 <= value < top:
        raise ConfigError(f"optimizer setting {name} is {value}; wanted 0 <= {name} < {top}")


def apply_optimizer(up: Updates, optimizer: Optimizer, gradients: GradientsBySeed) -> None:
    """Write one step of ``optimizer`` into ``up``."""
    _RULES[optimizer.name](up, gradients, settings_of(optimizer))
