from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge import tensors
from fedge.errors import ArtifactError
from fedge.types import Params

NAMES = st.text(max_size=8).filter(lambda name: name != "__metadata__")
DTYPES = st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"])
ARRAYS = DTYPES.flatmap(
    lambda code: hnp.arrays(code, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
TENSORS = st.dictionaries(NAMES, ARRAYS, max_size=4)
METADATA = st.dictionaries(
    st.text(max_size=5), st.text(max_size=5) | st.integers() | st.none() | st.booleans()
)


def _file(header: object, body: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@given(TENSORS, METADATA)
def test_what_is_dumped_is_loaded(values: Params, metadata: dict[str, Any]) -> None:
    loaded, meta = tensors.load(tensors.dump(values, metadata))
    assert meta == metadata
    assert list(loaded) == list(values)
    for name, array in values.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()


@given(TENSORS)
def test_the_same_tensors_give_the_same_bytes(values: Params) -> None:
    data = tensors.dump(values, {"b": 1, "a": 2})
    again, meta = tensors.load(data)
    assert tensors.dump(again, meta) == data
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_recorded_bytes() -> None:
    data = tensors.dump({"w": np.array([[1.0, -2.0]], np.float32)}, {"kind": "params"})
    header = (
        b'{"__metadata__":{"fedge":"{\\"kind\\":\\"params\\"}"},'
        b'"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    body = b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    assert data == len(padded).to_bytes(8, "little") + padded + body


def test_order_strides_and_byte_order_do_not_matter() -> None:
    straight = np.arange(12, dtype="<i4").reshape(3, 4)
    turned = np.asfortranarray(straight).astype(">i4")
    assert tensors.dump({"a": straight}) == tensors.dump({"a": turned})
    assert tensors.dump({"a": straight[:, ::2]}) == tensors.dump({"a": straight[:, ::2].copy()})


def test_loaded_tensors_are_views_and_cannot_be_written() -> None:
    data = tensors.dump({"a": np.zeros(3, np.float32)})
    loaded, _ = tensors.load(data)
    assert not loaded["a"].flags.writeable
    assert not loaded["a"].flags.owndata


def test_a_memoryview_is_read_like_bytes() -> None:
    data = tensors.dump({"a": np.arange(3)})
    np.testing.assert_array_equal(tensors.load(memoryview(data))[0]["a"], [0, 1, 2])


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([1j]), np.array([None])])
def test_a_dtype_the_container_does_not_know_is_refused(array: Any) -> None:
    with pytest.raises(ArtifactError, match=r"tensor 'x' has dtype .* known: F64, F32"):
        tensors.dump({"x": array})


def test_the_reserved_name_is_refused() -> None:
    with pytest.raises(ArtifactError, match="__metadata__"):
        tensors.dump({"__metadata__": np.zeros(1)})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes are too few"),
        (b"1234567", "7 bytes are too few"),
        ((1 << 62).to_bytes(8, "little"), "header length 4611686018427387904 is out of range"),
        ((9).to_bytes(8, "little") + b"{}", "header length 9 is out of range"),
        (_file(b"{"), "header is not JSON"),
        (_file(b"\xff\xff"), "header is not JSON"),
        (_file(b"[" * 200_000), "header is not JSON"),
        (_file([]), "header is not an object"),
        (_file({"w": 3}), "needs exactly dtype, shape, data_offsets"),
        (_file({"w": _tensor(extra=1)}, b"8" * 8), "needs exactly"),
        (_file({"w": _tensor(dtype="O")}, b"8" * 8), "has dtype 'O'"),
        (_file({"w": _tensor(dtype=[1])}, b"8" * 8), "has dtype"),
        (_file({"w": _tensor(shape=[-2])}, b"8" * 8), "has shape"),
        (_file({"w": _tensor(shape=[True])}, b"8" * 8), "has shape"),
        (_file({"w": _tensor(shape=[1] * 17)}, b"8" * 8), "has shape"),
        (_file({"w": _tensor(shape=[1 << 60])}, b"8" * 8), "has shape"),
        (_file({"w": _tensor(shape="2")}, b"8" * 8), "has shape"),
        (_file({"w": _tensor(data_offsets=[0])}, b"8" * 8), "has offsets"),
        (_file({"w": _tensor(data_offsets=[4, 12])}, b"8" * 12), "starts at 4, wanted 0"),
        (_file({"w": _tensor(data_offsets=[0, 4])}, b"8" * 4), "has 4 bytes, wanted 8"),
        (_file({"w": _tensor()}, b"8" * 7), "beyond the file"),
        (_file({"w": _tensor()}, b"8" * 9), "1 bytes follow the last tensor"),
        (_file({"a": _tensor(), "b": _tensor()}, b"8" * 8), "tensor 'b' starts at 0, wanted 8"),
        (_file({"__metadata__": {"fedge": "[]"}}), "metadata is not an object"),
        (_file({"__metadata__": {"fedge": "{"}}), "metadata"),
        (_file({"__metadata__": {"fedge": 3}}), "metadata"),
        (_file({"__metadata__": {}}), "metadata"),
        (_file({"__metadata__": [1]}), "metadata"),
    ],
)
def test_a_broken_file_is_refused_and_says_why(data: bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        tensors.load(data)


def test_a_name_given_twice_is_refused() -> None:
    one = json.dumps(_tensor())
    with pytest.raises(ArtifactError, match=r"a name occurs twice in .'w', 'w'."):
        tensors.load(_file(f'{{"w":{one},"w":{one}}}'.encode(), b"8" * 8))


GOOD = tensors.dump(
    {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(True)},
    {"kind": "update", "metrics": {"loss": 0.5}},
)
EDITS = st.lists(
    st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6
)


def _loads_or_refuses(data: bytes) -> None:
    try:
        loaded, meta = tensors.load(data)
    except ArtifactError:
        return
    assert sum(a.nbytes for a in loaded.values()) <= len(data)
    assert isinstance(meta, dict)


@settings(max_examples=600)
@given(EDITS)
def test_changed_bytes_give_tensors_or_an_artifact_error(edits: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in edits:
        data[at] = value
    _loads_or_refuses(bytes(data))


@given(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)), st.binary(max_size=20))
def test_cut_and_spliced_bytes_give_tensors_or_an_artifact_error(
    start: int, end: int, insert: bytes
) -> None:
    _loads_or_refuses(GOOD[:start] + insert + GOOD[end:])


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BOOL", "I64", "X"]) | _JSON,
        "shape": st.lists(st.integers(-1, 9) | _JSON, max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | _JSON,
    }
)
_HEADER = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _ENTRY | _JSON) | _JSON


@settings(max_examples=300)
@given(_HEADER, st.binary(max_size=32))
def test_any_json_header_gives_tensors_or_an_artifact_error(header: object, body: bytes) -> None:
    _loads_or_refuses(_file(header, body))


def test_a_hostile_header_allocates_nothing() -> None:
    """A header that claims 2^47 bytes is refused in a process that may not have them."""
    program = (
        "import resource, json; from fedge import tensors; from fedge.errors import ArtifactError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "entry = {'dtype': 'F64', 'shape': [1 << 44], 'data_offsets': [0, 1 << 47]}\n"
        "head = json.dumps({'w': entry}).encode()\n"
        "try: tensors.load(len(head).to_bytes(8, 'little') + head)\n"
        "except ArtifactError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "ends at 140737488355328, beyond the file" in done.stdout
