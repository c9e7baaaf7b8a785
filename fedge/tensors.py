"""Named tensors as bytes: one container for params, updates and recorded steps.

The layout is that of safetensors: eight bytes little-endian header length, a JSON header
``{"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {…}}``
padded with spaces to a multiple of eight, then the raw little-endian values, C order, in header
order without gaps. Every length is checked before anything is allocated, and nothing is ever
evaluated. Metadata is one JSON object, stored under the key ``fedge``.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from fedge.errors import ArtifactError
from fedge.types import Array, Params

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_RANK = 16
METADATA = "__metadata__"
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "?",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}


def dump(tensors: Params, metadata: dict[str, Any] | None = None) -> bytes:
    """Serialise tensors, in the dictionary's order.

    Raises:
        ArtifactError: If a tensor has a dtype the container does not know, or a reserved name.
    """
    _want(METADATA not in tensors, f"no tensor can be called {METADATA}")
    header: dict[str, Any] = {}
    if metadata is not None:
        header[METADATA] = {"fedge": _json(metadata)}
    blobs: list[bytes] = []
    at = 0
    for name, array in tensors.items():
        raw = _little(name, array)
        blob = raw.tobytes()
        header[name] = {
            "dtype": _NAMES[raw.dtype],
            "shape": list(raw.shape),
            "data_offsets": [at, at + len(blob)],
        }
        at += len(blob)
        blobs.append(blob)
    head = _json(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *blobs])


def load(data: bytes | memoryview) -> tuple[Params, dict[str, Any]]:
    """Read what :func:`dump` wrote.

    Returns:
        The tensors, as read-only views of ``data``, and the metadata.

    Raises:
        ArtifactError: If anything in the bytes is not exactly as the layout says.
    """
    view = memoryview(data)
    header, start = _header(view)
    metadata = _metadata(header.pop(METADATA, None))
    _want(len(header) <= MAX_TENSORS, f"{len(header)} tensors; at most {MAX_TENSORS}")
    tensors: Params = {}
    at = 0
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        _want(begin == at, f"tensor {name!r} starts at {begin}, wanted {at}")
        _want(end <= len(view) - start, f"tensor {name!r} ends at {end}, beyond the file")
        size = math.prod(shape) * dtype.itemsize
        _want(end - begin == size, f"tensor {name!r} has {end - begin} bytes, wanted {size}")
        tensors[name] = np.frombuffer(view[start + begin : start + end], dtype).reshape(shape)
        at = end
    _want(start + at == len(view), f"{len(view) - start - at} bytes follow the last tensor")
    return tensors, metadata


def _header(view: memoryview) -> tuple[dict[str, Any], int]:
    _want(len(view) >= 8, f"{len(view)} bytes are too few for a header")
    size = int.from_bytes(view[:8], "little")
    _want(size <= min(MAX_HEADER_BYTES, len(view) - 8), f"header length {size} is out of range")
    try:
        header = json.loads(bytes(view[8 : 8 + size]), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"broken tensor file: header is not JSON: {exc}") from exc
    _want(isinstance(header, dict), "header is not an object")
    return header, 8 + size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    _want(len(set(names)) == len(names), f"a name occurs twice in {names[:9]}")
    return dict(pairs)


def _entry(name: str, entry: object) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    _want(
        isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
        f"tensor {name!r} needs exactly dtype, shape, data_offsets",
    )
    assert isinstance(entry, dict)  # noqa: S101 - for the type checker; checked above
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _want(isinstance(dtype, str) and dtype in _DTYPES, f"tensor {name!r} has dtype {dtype!r}")
    _want(_sizes(shape) and len(shape) <= MAX_RANK, f"tensor {name!r} has shape {shape!r}")
    _want(_sizes(offsets) and len(offsets) == 2, f"tensor {name!r} has offsets {offsets!r}")
    return np.dtype(_DTYPES[dtype]), tuple(shape), offsets[0], offsets[1]


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in value
    )


def _metadata(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        inner = json.loads(value["fedge"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, RecursionError) as exc:
        raise ArtifactError(f"broken tensor file: metadata: {exc}") from exc
    _want(isinstance(inner, dict), "metadata is not an object")
    return dict(inner)


def _little(name: str, array: Array) -> Array:
    array = np.asarray(array)
    little = array.dtype.newbyteorder("<")
    if little not in _NAMES:
        raise ArtifactError(f"tensor {name!r} has dtype {array.dtype}; known: {', '.join(_DTYPES)}")
    return np.ascontiguousarray(array, little).reshape(array.shape)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise ArtifactError(f"broken tensor file: {message}")
