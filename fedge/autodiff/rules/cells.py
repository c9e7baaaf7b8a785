"""Back through the steps of one direction: LSTM, GRU and the plain recurrent cell."""

from __future__ import annotations

from collections.abc import Sequence

from fedge.autodiff.ops import Ops, Value, attribute
from fedge.autodiff.rules.direction import (
    Cotangents,
    Direction,
    Found,
    activations,
    back,
    delayed,
    plus,
    preactivation,
    products,
    steps_of,
)


def lstm(op: Ops, d: Direction, dy: Cotangents) -> Found:
    """c = f c₋ + i g, h = o tanh c; gates in the order i, o, f, g.

    dc = dh · o(1 − tanh² c) + f₊ dc₊; by the gates before activation: dc · g i(1 − i),
    dh · tanh c · o(1 − o), dc · c₋ f(1 − f), dc · i(1 − g²).
    """
    sizes = op.ints([3 * d.units, d.units])
    sigmoids, g = op.Split(preactivation(op, d), sizes, axis=1, outputs=2)
    i, o, f = op.pieces(op.Sigmoid(sigmoids), 3, axis=1)
    g = op.Tanh(g)
    new = op.Mul(i, g)
    c = _cells(op, d, f, new)
    tanh_c, cells = op.Tanh(c), op.reshape(c, (d.steps, -1, d.units))
    before = op.reshape(delayed(op, cells, d.c0), (-1, d.units))
    slopes = (
        op.Sub(new, op.Mul(new, i)),
        op.Sub(d.y, op.Mul(d.y, o)),
        op.Mul(before, op.Sub(f, op.Mul(f, f))),
        op.Sub(i, op.Mul(new, g)),
    )
    from_h = op.Sub(o, op.Mul(d.y, tanh_c))
    factors = (op.Concat(*slopes, axis=1), from_h, f)
    return _lstm_steps(
        op, d, dy, [steps_of(op, d, v, width) for v, width in zip(factors, (4, 1, 1), strict=True)]
    )


def _lstm_steps(op: Ops, d: Direction, dy: Cotangents, factors: Sequence[Sequence[Value]]) -> Found:
    """Back through the steps; ``factors`` per step: by the gates, of dh in dc, f."""
    by_gates: list[Value] = []
    dh, dc = dy.h, dy.c
    for t in reversed(range(d.steps)):
        slope, from_h, f = (v[t] for v in factors)
        dh = plus(op, dh, dy.steps[t]) if not by_gates else back(op, by_gates[0], d.r, dy.steps[t])
        dc = plus(op, op.Mul(dh, from_h), dc)
        by_gates.insert(0, op.Mul(op.Concat(dc, dh, dc, dc, axis=1), slope))
        dc = op.Mul(dc, f)
    whole = op.Concat(*by_gates, axis=0)
    return Found(whole, whole, back(op, by_gates[0], d.r), dc)


def _cells(op: Ops, d: Direction, f: Value, new: Value) -> Value:
    """All cells, c = f c₋ + new."""
    cells: list[Value] = []
    c = d.c0
    for keep, add in zip(steps_of(op, d, f), steps_of(op, d, new), strict=True):
        c = add if c is None else op.Add(op.Mul(keep, c), add)
        cells.append(c)
    return op.Concat(*cells, axis=0)


def rnn(op: Ops, d: Direction, dy: Cotangents) -> Found:
    """h = tanh(Wx + Rh₋ + b), or relu of it; the slope can be read off h."""
    if activations(d.node, ["Tanh"])[0] == "Relu":
        slope = op.Sign(d.y)
    else:
        slope = op.Sub(1.0, op.Mul(d.y, d.y))
    slopes = steps_of(op, d, slope)
    by_gates: list[Value] = []
    for t in reversed(range(d.steps)):
        last = not by_gates
        dh = plus(op, dy.h, dy.steps[t]) if last else back(op, by_gates[0], d.r, dy.steps[t])
        by_gates.insert(0, op.Mul(dh, slopes[t]))
    whole = op.Concat(*by_gates, axis=0)
    return Found(whole, whole, back(op, by_gates[0], d.r))


def gru(op: Ops, d: Direction, dy: Cotangents) -> Found:
    """h = (1 − z) n + z h₋; gates in the order z, r, n.

    With linear_before_reset (torch) n = tanh(Wx + b + r (R h₋ + b′)), else
    n = tanh(Wx + b + R(r h₋) + b′).
    """
    if not attribute(d.node, "linear_before_reset", 0):
        return _gru_reset_first(op, d, dy)
    of_x, of_h = products(op, d)
    (x_gates, x_n), (h_gates, h_n) = (_gates_and_n(op, d, v) for v in (of_x, of_h))
    z, r = op.pieces(op.Sigmoid(op.Add(x_gates, h_gates)), 2, axis=1)
    n = op.Tanh(op.Add(x_n, op.Mul(r, h_n)))
    by_z, by_n = _gru_slopes(op, d, z, n)
    by_r = op.Mul(op.Mul(by_n, h_n), op.Sub(r, op.Mul(r, r)))
    slopes = steps_of(op, d, op.Concat(by_z, by_r, op.Mul(by_n, r), axis=1), 3)
    grads: list[Value] = []
    by_gates: list[Value] = []
    dh, keep = dy.h, steps_of(op, d, z)
    for t in reversed(range(d.steps)):
        dh = plus(op, dh, dy.steps[t])
        grads.insert(0, dh)
        by_gates.insert(0, op.Mul(op.Concat(dh, dh, dh, axis=1), slopes[t]))
        dh = op.Gemm(by_gates[0], d.r, op.Mul(dh, keep[t]))
    by_h = op.Concat(*by_gates, axis=0)
    gates = _gates_and_n(op, d, by_h)[0]
    by_x = op.Concat(gates, op.Mul(op.Concat(*grads, axis=0), by_n), axis=1)
    return Found(by_x, by_h, dh)


def _gru_reset_first(op: Ops, d: Direction, dy: Cotangents) -> Found:
    """R's last block multiplies r h₋ instead of h₋."""
    of_x, of_h = products(op, d)
    x_gates, x_n = _gates_and_n(op, d, of_x)
    z, r = op.pieces(op.Sigmoid(op.Add(x_gates, _gates_and_n(op, d, of_h)[0])), 2, axis=1)
    r_gates, r_n = op.Split(d.r, op.ints([2 * d.units, d.units]), axis=0, outputs=2)
    reset = op.Mul(r, d.before)
    bias = op.Split(d.bias[1], op.ints([2 * d.units, d.units]), axis=0, outputs=2) if d.bias else []
    n = op.Tanh(op.Add(x_n, op.Gemm(reset, r_n, *bias[1:], transB=1)))
    by_z, by_n = _gru_slopes(op, d, z, n)
    by_r = op.Mul(reset, op.Sub(1.0, r))
    per_step = [steps_of(op, d, v) for v in (by_z, by_r, by_n, z, r)]
    found: list[tuple[Value, Value]] = []
    dh = dy.h
    for t in reversed(range(d.steps)):
        s_z, s_r, s_n, keep, open_ = (v[t] for v in per_step)
        dh = plus(op, dh, dy.steps[t])
        dn = op.Mul(dh, s_n)
        d_reset = op.Gemm(dn, r_n)
        gates = op.Concat(op.Mul(dh, s_z), op.Mul(d_reset, s_r), axis=1)
        found.insert(0, (gates, dn))
        direct = op.Add(op.Mul(dh, keep), op.Mul(d_reset, open_))
        dh = op.Gemm(gates, r_gates, direct)
    d_gates, d_n = (op.Concat(*v, axis=0) for v in zip(*found, strict=True))
    dr = (op.Gemm(d_gates, d.before, transA=1), op.Gemm(d_n, reset, transA=1))
    by_both = op.Concat(d_gates, d_n, axis=1)
    return Found(by_both, by_both, dh, dr=op.Concat(*dr, axis=0))


def _gates_and_n(op: Ops, d: Direction, v: Value) -> tuple[Value, Value]:
    """The blocks of z and r, and that of n."""
    gates, n = op.Split(v, op.ints([2 * d.units, d.units]), axis=1, outputs=2)
    return gates, n


def _gru_slopes(op: Ops, d: Direction, z: Value, n: Value) -> tuple[Value, Value]:
    """∂h by z and by n before their activation."""
    rest = op.Sub(1.0, z)
    by_z = op.Mul(op.Sub(d.before, n), op.Mul(z, rest))
    return by_z, op.Mul(rest, op.Sub(1.0, op.Mul(n, n)))
