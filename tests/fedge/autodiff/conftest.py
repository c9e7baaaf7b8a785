"""One operator as a model, its gradient by fedge on ONNX Runtime and by torch in float64."""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fedge.autodiff import vjp
from fedge.types import Array, Params

TOLERANCE = 1e-4
torch.set_num_threads(1)  # waiting threads cost more than such small tensors


def relative_error(found: Array, wanted: Array) -> float:
    """‖found − wanted‖ / ‖wanted‖, absolute where the wanted norm is tiny."""
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found.astype(np.float64) - wanted)) / (norm if norm > 1e-6 else 1.0)


def one_operator(
    op_type: str,
    operands: Sequence[Array | None],
    attributes: dict[str, Any],
    opset: int,
    data: int,
) -> onnx.ModelProto:
    """A model of one node; operand ``data`` is its input, the others are initializers.

    The attribute ``outputs`` is the number of outputs; ``y`` is the first.
    """
    names = ["" if a is None else f"x{i}" for i, a in enumerate(operands)]
    outputs = ["y", *(f"y{i}" for i in range(1, attributes.pop("outputs", 1)))]
    node = helper.make_node(op_type, names, outputs, name="the node", **attributes)
    given = {n: a for n, a in zip(names, operands, strict=True) if a is not None}
    x = given.pop(f"x{data}", np.zeros((1, 1), np.float32))
    dtype = helper.np_dtype_to_tensor_dtype(x.dtype)
    value = helper.make_tensor_value_info(f"x{data}", dtype, ["batch", *x.shape[1:]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    rest = [numpy_helper.from_array(a, n) for n, a in given.items()]
    graph = helper.make_graph([node], "g", [value], [y], rest)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def run(model: onnx.ModelProto, feeds: Params, checked: bool = True) -> Params:
    """The outputs of a (checked) model on stock ONNX Runtime."""
    if checked:
        onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def check_operator(
    op_type: str,
    reference: Callable[..., torch.Tensor],
    operands: Sequence[Array | None],
    opset: int = 17,
    data: int = 0,
    constant: Sequence[int] = (),
    checked: bool = True,
    **attributes: Any,
) -> None:
    """Compare value and gradients by all float operands (but ``constant``) with torch's.

    ``data`` says which operand is the model's input; where there is none such, the model has an
    input it does not use.
    """
    model = one_operator(op_type, operands, attributes, opset, data)
    tensors = [
        None if a is None else torch.tensor(a.astype(np.float64) if a.dtype.kind == "f" else a)
        for a in operands
    ]
    wrt = {
        f"x{i}": t.requires_grad_()
        for i, t in enumerate(tensors)
        if t is not None and t.is_floating_point() and i not in constant
    }
    wanted = reference(*tensors)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape).astype(np.float32)
    grads = torch.autograd.grad(
        wanted, list(wrt.values()), torch.tensor(cotangent).double(), allow_unused=True
    )
    differentiated = vjp(model, outputs=["y"], wrt=list(wrt))
    given = operands[data] if data < len(operands) else np.zeros((1, 1), np.float32)
    assert given is not None
    found = run(differentiated, {f"x{data}": given, "y@cotangent": cotangent}, checked)
    assert relative_error(found["y"], wanted.detach().numpy()) <= TOLERANCE
    for name, grad, tensor in zip(wrt, grads, wrt.values(), strict=True):
        want = np.zeros(tensor.shape) if grad is None else grad.numpy()
        assert found[f"{name}@grad"].shape == want.shape
        assert relative_error(found[f"{name}@grad"], want) <= TOLERANCE, name


@pytest.fixture(scope="session")
def check() -> Callable[..., None]:
    """:func:`check_operator`."""
    return check_operator


@pytest.fixture(scope="session")
def run_model() -> Callable[[onnx.ModelProto, Params], Params]:
    """:func:`run`."""
    return run
