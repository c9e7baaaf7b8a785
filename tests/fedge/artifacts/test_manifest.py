from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.artifacts import manifest as m
from fedge.artifacts.manifest import (
    FileEntry,
    LabelSpec,
    Manifest,
    Optimizer,
    ParamSpec,
    TensorSpec,
)
from fedge.config import TrainConfig
from fedge.errors import ArtifactError

FILES = (*m.COMMON_FILES, *m.ENGINE_FILES["ort"])
X = TensorSpec("x", "float32", (m.BATCH, 13))
WHOLE = Manifest(
    name="heart",
    loss="bce_with_logits",
    optimizer=Optimizer("sgd", {"momentum": 0.9}),
    train=TrainConfig(lr=0.1, batch_size=4, steps=10),
    raw_inputs=(X,),
    inputs=(X,),
    outputs=(TensorSpec("logit", "float32", (m.BATCH, 1)),),
    labels=LabelSpec("labels", "float32", (m.BATCH, 1), 0.0, 1.0),
    params=(
        ParamSpec("body.weight", "float32", (8, 13)),
        ParamSpec("head.weight", "float32", (1, 8), shared=False),
        ParamSpec("body.mean", "float32", (8,), trainable=False),
    ),
    state=(TensorSpec("body.weight@momentum", "float32", (8, 13)),),
    engines={"ort": "", "ort-training": "onnxruntime-training-cpu is not installed here"},
    scaling="site",
    files={name: FileEntry(3, hashlib.sha256(name.encode()).hexdigest()) for name in FILES},
    signer="ab" * 32,
    provenance={"fedge": "0.1.0"},
)


def _changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The canonical bytes of WHOLE after ``change`` edited its plain form."""
    raw = json.loads(WHOLE.to_json())
    change(raw)
    return json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_a_manifest_survives_its_bytes() -> None:
    again = Manifest.from_json(WHOLE.to_json())
    assert again == WHOLE
    assert again.digest == WHOLE.digest == hashlib.sha256(WHOLE.to_json()).hexdigest()


def test_every_change_changes_the_digest() -> None:
    for changed in (
        replace(WHOLE, name="heart2"),
        replace(WHOLE, train=WHOLE.train.replace(lr=0.2)),
        replace(WHOLE, params=WHOLE.params[::-1]),
        replace(WHOLE, files={**WHOLE.files, m.STEP: FileEntry(4, "00" * 32)}),
    ):
        assert changed.digest != WHOLE.digest


def test_names_that_may_leave_are_the_trainable_and_shared_ones() -> None:
    assert WHOLE.trainable == ("body.weight", "head.weight")
    assert WHOLE.shared == ("body.weight",)
    assert WHOLE.personal == ("head.weight",)
    assert WHOLE.shared_shapes() == {"body.weight": (8, 13)}


def test_text_outside_ascii_is_kept() -> None:
    named = replace(WHOLE, provenance={"site": "Köln", "note": "∑ δ"})
    assert Manifest.from_json(named.to_json()) == named


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b'"ab', b'"\\u0061b'),
        lambda data: data.replace(b'"bytes":3', b'"bytes":3.0', 1),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: json.dumps(json.loads(data), indent=1).encode(),
        lambda data: data.replace(b'"name":"heart"', b'"name":"other","name":"heart"'),
    ],
)
def test_only_the_canonical_form_is_accepted(edit: Callable[[bytes], bytes]) -> None:
    data = edit(WHOLE.to_json())
    assert data != WHOLE.to_json()
    with pytest.raises(ArtifactError):
        Manifest.from_json(data)


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda r: r.update(schema=2), "schema 2, wanted 1"),
    (lambda r: r.pop("schema"), "schema None"),
    (lambda r: r.update(plugin="x.py"), "no setting plugin"),
    (lambda r: r.pop("params"), "params"),
    (lambda r: r.update(name=3), "name = 3 is int"),
    (lambda r: r.update(name="../../etc"), "name"),
    (lambda r: r.update(name=""), "name"),
    (lambda r: r.update(loss="hinge"), "loss 'hinge'; known: bce_with_logits"),
    (lambda r: r.update(scaling="auto"), "scaling 'auto'"),
    (lambda r: r["train"].update(lr=-1), "lr is -1"),
    (lambda r: r["train"].update(lr=10**400), "finite"),
    (lambda r: r["labels"].update(low=math.nan), "JSON"),
    (lambda r: r["optimizer"]["settings"].update(momentum=math.inf), "JSON"),
    (lambda r: r["train"].update(epochs=1), "both set"),
    (lambda r: r["optimizer"].update(settings=[1]), "settings"),
    (lambda r: r["optimizer"].update(settings={"momentum": "high"}), "settings"),
    (lambda r: r["params"][0].update(dtype="complex64"), "dtype 'complex64'"),
    (lambda r: r["params"][0].update(shape=["N", 13]), "symbolic"),
    (lambda r: r["params"][0].update(shape=[-1, 13]), "dimension -1"),
    (lambda r: r["params"][0].update(shape=[True, 13]), "dimension True"),
    (lambda r: r["params"][0].update(shape=[1 << 40]), "dimension"),
    (lambda r: r["params"][0].update(shape=7), "broken manifest"),
    (lambda r: r["params"][0].update(shared=1), "shared = 1 is int; wanted bool"),
    (lambda r: r["params"][1].update(name="body.weight"), "a param name occurs twice"),
    (lambda r: r["params"][0].update(name=["a"]), "name"),
    (lambda r: [p.update(trainable=False) for p in r["params"]], "no param is trainable"),
    (lambda r: r["inputs"][0].update(shape=["N*T", 13]), "dimension 'N\\*T'"),
    (lambda r: r.update(inputs={}), "canonical"),
    (lambda r: r.update(inputs=[3]), "broken manifest"),
    (lambda r: r["labels"].update(low="0"), "low"),
    (lambda r: r["engines"].update(tpu=""), "engine 'tpu'"),
    (lambda r: r.update(engines=[]), "broken manifest"),
    (lambda r: r["engines"].update({"ort-training": ""}), "lacks the files training_model.onnx"),
    (lambda r: r["engines"].update(ort=None), "ort"),
    (lambda r: r["files"].pop(m.PARAMS), "lacks the files params.safetensors"),
    (lambda r: r["files"].update({"../x": r["files"][m.STEP]}), "not part of a bundle"),
    (lambda r: r["files"].update({"hook.py": r["files"][m.STEP]}), "not part of a bundle"),
    (lambda r: r["files"][m.STEP].update(bytes=-1), "bytes"),
    (lambda r: r["files"][m.STEP].update(sha256="zz"), "sha256"),
    (lambda r: r.update(signer="nothex"), "signer"),
    (lambda r: r.update(provenance={"a": 1}), "provenance"),
    (lambda r: r.update(provenance=[]), "provenance"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_what_a_manifest_cannot_be_is_refused(
    change: Callable[[dict[str, Any]], object], said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        Manifest.from_json(_changed(change))


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"null", b"{", b"\xff", b"[" * 100_000, b"{}"])
def test_other_json_and_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json(data)


def test_a_manifest_has_a_size_limit() -> None:
    with pytest.raises(ArtifactError, match="at most 4194304"):
        Manifest.from_json(b" " * (m.MAX_MANIFEST_BYTES + 1))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    return [p for key, inner in items for p in [(*path, key), *_paths(inner, (*path, key))]]


PATHS = _paths(json.loads(WHOLE.to_json()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)


@settings(max_examples=500)
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_anywhere_gives_a_manifest_or_an_artifact_error(
    path: tuple[Any, ...], value: Any
) -> None:
    def put(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    try:
        manifest = Manifest.from_json(_changed(put))
    except ArtifactError:
        return
    assert manifest.digest
    assert set(manifest.shared) <= {p.name for p in manifest.params}
    assert all(isinstance(reason, str) for reason in manifest.engines.values())


_RAW = WHOLE.to_json()


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(_RAW) - 1), st.integers(0, 255)), max_size=3))
def test_changed_bytes_give_a_manifest_or_an_artifact_error(edits: list[tuple[int, int]]) -> None:
    data = bytearray(_RAW)
    for at, value in edits:
        data[at] = value
    try:
        manifest = Manifest.from_json(bytes(data))
    except ArtifactError:
        return
    assert manifest.to_json() == bytes(data)


def test_reading_a_manifest_needs_no_numerical_library() -> None:
    program = (
        "import sys; from fedge.artifacts.manifest import Manifest\n"
        "Manifest.from_json(sys.stdin.buffer.read())\n"
        "print(sorted({'numpy', 'onnx', 'onnxruntime', 'flwr', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=_RAW, capture_output=True)
    assert done.stdout == b"[]\n", done.stderr
