"""Einsum against torch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from onnx import parser

from fedge.autodiff import vjp
from fedge.errors import UnsupportedOperatorError


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nij,jk->nik", [(3, 2, 4), (4, 5)]),
        ("nhqd,hkd->nhqk", [(3, 2, 4, 5), (2, 6, 5)]),
        ("ni,i->", [(3, 4), (4,)]),
        ("nij->nji", [(3, 2, 4)]),
        ("nij->n", [(3, 2, 4)]),
        ("ni,ij,jk->nk", [(3, 4), (4, 5), (5, 2)]),
        ("n...,...->n...", [(3, 4, 2), (4, 2)]),
        ("...i,ij", [(3, 5, 4), (4, 2)]),
        ("ni, jk -> nij", [(3, 4), (5, 2)]),
    ],
)
def test_einsum(check: Callable[..., None], equation: str, shapes: list[tuple[int, ...]]) -> None:
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    check("Einsum", lambda *t: torch.einsum(equation, *t), operands, equation=equation)


def test_diagonals_are_refused() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17]>'
        'g (float[N,4,4] x) => (float[N,4] y) {y = Einsum<equation="nii->ni">(x)}'
    )
    with pytest.raises(UnsupportedOperatorError, match="nii->ni"):
        vjp(parser.parse_model(text), outputs=["y"], wrt=["x"])
