"""What may cross the link: limits, checks of every message, ids, and content in chunks.

Both sides check what they receive with the functions below before they act on it; each raises
:class:`~fedge.errors.LinkError` naming what was seen and what was wanted. No grpc, no numpy here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedge.errors import LinkError
from fedge.platform import commit_file
from fedge.wire.token import SERVER_NAME
from fedge.wire.v1 import link_pb2 as pb

WIRE_VERSION = 1
MAX_CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 2 << 20  # one gRPC message: a chunk, or a task with its settings
MAX_METADATA_BYTES = 16 << 10  # gRPC headers of one call
MAX_CONFIG_JSON_BYTES = 64 << 10
MAX_RESULT_TENSORS_BYTES = 1 << 20
MAX_CSR_BYTES = 4 << 10
MAX_FACTS, MAX_FACT_BYTES = 32, 256
MAX_METRICS, MAX_NAME_BYTES = 64, 128
MAX_TEXT_BYTES = 512  # an error's one line
MAX_CONTENT_BYTES = 4 << 30  # one file of a bundle, params or an update
HEARTBEAT_S = 15  # both sides; silence for three of these means gone
UPDATE_OVERHEAD_BYTES = 64 << 10  # metadata of an update: metrics, provenance
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[A-Za-z0-9.+_-]{0,32}")


def update_id(task_id: str, client_id: str, digest: str) -> bytes:
    """SHA-256(task_id ‖ 0 ‖ client_id ‖ 0 ‖ digest), 32 bytes: what a device signs.

    The header carries it in hex. The same bytes for the same task always have the same id.
    """
    return hashlib.sha256(f"{task_id}\0{client_id}\0{digest}".encode()).digest()


def max_update_bytes(shared_shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The largest update file a manifest allows: float32 values plus header and metadata."""
    values = sum(4 * math.prod(shape) for shape in shared_shapes.values())
    names = sum(6 * len(name.encode()) + 24 * len(shape) for name, shape in shared_shapes.items())
    return values + names + 128 * len(shared_shapes) + UPDATE_OVERHEAD_BYTES


def file_digest(path: Path) -> tuple[str, int]:
    """SHA-256 (hex) and size of a file, read in chunks."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as handle:
        while block := handle.read(MAX_CHUNK_BYTES):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def iter_chunks(path: Path, offset: int = 0) -> Iterator[pb.Chunk]:
    """A file's content from ``offset`` on, at most ``MAX_CHUNK_BYTES`` a piece.

    An empty file, or an offset at its end, is one empty chunk: the receiver learns the size.

    Raises:
        LinkError: If the offset lies beyond the file.
    """
    with path.open("rb") as handle:
        total = os.fstat(handle.fileno()).st_size
        _want(offset <= total, f"offset {offset} is beyond the content's {total} bytes")
        handle.seek(offset)
        at = offset
        while at < total or at == offset:
            data = handle.read(min(MAX_CHUNK_BYTES, total - at))
            yield pb.Chunk(offset=at, total_bytes=total, data=data)
            if not data:
                return
            at += len(data)


class Receiver:
    """Writes arriving chunks to a temporary file, hashing as they come; keep it to resume.

    Args:
        part: The temporary file. What it holds already counts as received: ask the sender to
            start at :attr:`offset`.
        digest: SHA-256 the whole content must have, hex.
        max_bytes: Largest content accepted.
        total_bytes: Its size, where known beforehand.

    Raises:
        LinkError: From :meth:`add` and :meth:`commit`, if sizes, offsets or digest do not fit.
    """

    def __init__(
        self, part: Path, digest: str, max_bytes: int, total_bytes: int | None = None
    ) -> None:
        self.offset = 0
        self.total_bytes = total_bytes
        self._digest, self._max_bytes, self._part = digest, max_bytes, part
        self._hash = hashlib.sha256()
        self._handle = part.open("a+b")
        part.chmod(0o600)
        self._handle.seek(0)
        while block := self._handle.read(MAX_CHUNK_BYTES):
            self._hash.update(block)
            self.offset += len(block)

    @property
    def complete(self) -> bool:
        """Whether every byte has arrived."""
        return self.offset == self.total_bytes

    def add(self, chunk: pb.Chunk) -> None:
        """Append one chunk."""
        if self.total_bytes is None:
            self.total_bytes = chunk.total_bytes
        total = self.total_bytes
        _want(chunk.total_bytes == total, f"total changed from {total} to {chunk.total_bytes}")
        _want(total <= self._max_bytes, f"content of {total} bytes; at most {self._max_bytes}")
        _want(chunk.offset == self.offset, f"chunk at {chunk.offset}, wanted {self.offset}")
        _want(len(chunk.data) <= MAX_CHUNK_BYTES, f"chunk of {len(chunk.data)} bytes")
        _want(bool(chunk.data) or self.offset == total, "an empty chunk before the end")
        _want(self.offset + len(chunk.data) <= total, "chunk goes beyond the content's end")
        self._handle.write(chunk.data)
        self._hash.update(chunk.data)
        self.offset += len(chunk.data)

    def commit(self, path: Path) -> None:
        """Check size and digest, then make the content durable under ``path``."""
        _want(self.complete, f"content ended at {self.offset} of {self.total_bytes} bytes")
        found = self._hash.hexdigest()
        if found != self._digest:
            self.discard()
            raise LinkError(f"content has digest {found[:12]}…, wanted {self._digest[:12]}…")
        self._handle.flush()
        commit_file(self._handle.fileno(), self._part, path)
        self._handle.close()

    def discard(self) -> None:
        """Forget what arrived."""
        self._handle.close()
        self._part.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what arrived for a later resume."""
        self._handle.close()


def encode_config(config: Mapping[str, Any]) -> bytes:
    """A task's settings as JSON bytes: scalars only."""
    return json.dumps(dict(config), sort_keys=True, separators=(",", ":")).encode()


def decode_config(data: bytes) -> dict[str, Any]:
    """Read a task's settings."""
    _want(len(data) <= MAX_CONFIG_JSON_BYTES, f"settings of {len(data)} bytes")
    try:
        config = json.loads(data or b"{}")
    except (ValueError, RecursionError) as exc:
        raise LinkError(f"settings are not JSON: {exc}") from exc
    _want(isinstance(config, dict), "settings are not an object")
    for name, value in config.items():
        _want(isinstance(value, (str, int, float, bool)), f"setting {name!r} is not a scalar")
    return dict(config)


def check_digest(what: str, digest: str) -> None:
    """SHA-256, lower-case hex."""
    _want(_DIGEST.fullmatch(digest) is not None, f"{what} {digest[:80]!r} is not a SHA-256 in hex")


def check_client_id(client_id: str) -> None:
    """Letters, digits, ``. _ -``; 1 to 64; not the server's own name."""
    ok = _CLIENT_ID.fullmatch(client_id) is not None and client_id != SERVER_NAME
    _want(ok, f"name {client_id[:80]!r}; wanted 1 to 64 letters, digits or . _ -")


def check_task_id(task_id: str) -> None:
    """Letters, digits, ``. _ -``; 1 to 128: fit to be a folder name."""
    _want(_TASK_ID.fullmatch(task_id) is not None, f"task id {task_id[:80]!r} is malformed")


def check_enroll(request: pb.EnrollRequest) -> None:
    """A device's wish to be admitted; an empty name means the server chooses."""
    _size("csr_der", request.csr_der, MAX_CSR_BYTES)
    if request.client_id:
        check_client_id(request.client_id)
    _mode(request.mode)
    _version(request.fedge_version)
    size = len(request.update_public_key)
    _want(size == 32, f"update_public_key has {size} bytes, wanted 32")


def check_enrolled(reply: pb.EnrollReply) -> None:
    """A server's admission; the certificate is the caller's to verify."""
    check_client_id(reply.client_id)
    size = len(reply.signer_public_key)
    _want(size == 32, f"signer_public_key has {size} bytes, wanted 32")
    _text("federation_id", reply.federation_id, MAX_NAME_BYTES)


def check_hello(hello: pb.Hello) -> None:
    """What a device says of itself at the start of a session."""
    _version(hello.fedge_version)
    _want(
        hello.wire_version == WIRE_VERSION,
        f"wire version {hello.wire_version}, this side speaks {WIRE_VERSION}; upgrade the older",
    )
    _mode(hello.mode)
    _text("engine", hello.engine, MAX_NAME_BYTES)
    _want(len(hello.facts) <= MAX_FACTS, f"{len(hello.facts)} facts; at most {MAX_FACTS}")
    for name, value in hello.facts.items():
        _text("fact name", name, MAX_FACT_BYTES)
        _text("fact", value, MAX_FACT_BYTES)


def check_task(task: pb.Task) -> None:
    """Work a server pushes."""
    check_task_id(task.task_id)
    _text("run_id", task.run_id, MAX_NAME_BYTES)
    kinds = (pb.TASK_KIND_TRAIN, pb.TASK_KIND_EVALUATE, pb.TASK_KIND_STATISTICS)
    _want(task.kind in kinds, f"task kind {task.kind} is unknown; upgrade this client")
    check_digest("bundle", task.bundle_digest)
    if task.kind != pb.TASK_KIND_STATISTICS:
        check_digest("params", task.params_digest)
    decode_config(task.config_json)


def check_result(result: pb.TaskResult) -> None:
    """A small answer: metrics, and tensors for statistics."""
    check_task_id(result.task_id)
    count = len(result.metrics)
    _want(count <= MAX_METRICS, f"{count} metrics; at most {MAX_METRICS}")
    for name, value in result.metrics.items():
        _text("metric name", name, MAX_NAME_BYTES)
        _want(math.isfinite(value), f"metric {name!r} is {value}")
    size = len(result.tensors)
    _want(size <= MAX_RESULT_TENSORS_BYTES, f"tensors of {size} bytes")


def check_failed(failed: pb.TaskFailed) -> None:
    """A device's report that it could not do a task."""
    check_task_id(failed.task_id)
    _text("error", failed.error, MAX_NAME_BYTES)
    _text("message", failed.message, MAX_TEXT_BYTES)


def check_upload(header: pb.UploadHeader, client_id: str, max_bytes: int) -> None:
    """The first part of an upload; the signature is the caller's to verify."""
    check_task_id(header.task_id)
    check_digest("digest", header.digest)
    wanted = update_id(header.task_id, client_id, header.digest).hex()
    _want(header.update_id == wanted, "update id is not that of this task, device and digest")
    _want(
        0 < header.total_bytes <= max_bytes,
        f"update of {header.total_bytes} bytes; at most {max_bytes}",
    )
    _want(len(header.signature) == 64, f"signature has {len(header.signature)} bytes, wanted 64")


def check_welcome(welcome: pb.Welcome) -> None:
    """A server's greeting."""
    check_client_id(welcome.client_id)
    if welcome.bundle_digest:
        check_digest("bundle", welcome.bundle_digest)


def one_line(text: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """``text`` on one printable line, cut so that it passes the checks above."""
    line = printable(" ".join(text.split()))
    return line.encode(errors="replace")[:max_bytes].decode(errors="ignore")


def printable(text: str) -> str:
    """``text`` with ``?`` for what a terminal would obey instead of showing; line ends stay.

    Whatever the other side wrote passes here on its way to a screen or a log.
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _mode(mode: int) -> None:
    _want(mode in (pb.MODE_FEDERATED, pb.MODE_PERSONAL), f"mode {mode} is unknown")


def _version(text: str) -> None:
    _want(_VERSION.fullmatch(text) is not None, f"version {text[:80]!r} is malformed")


def _text(what: str, text: str, max_bytes: int) -> None:
    size = len(text.encode())
    _want(size <= max_bytes, f"{what} has {size} bytes; at most {max_bytes}")
    _want(text.isprintable(), f"{what} {text[:80]!r} holds control characters")


def _size(what: str, data: bytes, max_bytes: int) -> None:
    _want(0 < len(data) <= max_bytes, f"{what} has {len(data)} bytes; wanted 1 to {max_bytes}")


def _want(ok: bool, message: str) -> None:
    if not ok:
        raise LinkError(f"broken message: {message}")
