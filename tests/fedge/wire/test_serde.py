"""Limits and checks of what crosses the link, and content in chunks."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import LinkError
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb

DIGEST = hashlib.sha256(b"x").hexdigest()


def test_update_id_binds_task_client_and_content() -> None:
    made = serde.update_id("task", "client", DIGEST)
    assert made == hashlib.sha256(f"task\0client\0{DIGEST}".encode()).digest()
    assert (
        len({made, serde.update_id("task2", "client", DIGEST), serde.update_id("t", "c", "")}) == 3
    )


@given(st.binary(max_size=5000), st.integers(0, 6000), st.integers(1, 700))
def test_chunks_carry_content_from_any_offset(data: bytes, offset: int, size: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(serde, "MAX_CHUNK_BYTES", size)
        source, target = Path(name) / "source", Path(name) / "target"
        source.write_bytes(data)
        if offset > len(data):
            with pytest.raises(LinkError, match="beyond"):
                list(serde.iter_chunks(source, offset))
            return
        (Path(name) / "part").write_bytes(data[:offset])
        receiver = serde.Receiver(Path(name) / "part", hashlib.sha256(data).hexdigest(), 5000)
        assert receiver.offset == offset
        for chunk in serde.iter_chunks(source, offset):
            assert len(chunk.data) <= size
            receiver.add(chunk)
        receiver.commit(target)
        assert target.read_bytes() == data
        assert target.stat().st_mode & 0o777 == 0o600


def chunk(data: bytes, offset: int = 0, total: int = 4) -> pb.Chunk:
    return pb.Chunk(offset=offset, total_bytes=total, data=data)


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        ([chunk(b"abcd", total=1000)], "at most"),
        ([chunk(b"abcde")], "beyond"),
        ([chunk(b"ab"), chunk(b"cd", 3)], "wanted 2"),
        ([chunk(b"ab"), chunk(b"ab", 0)], "wanted 2"),
        ([chunk(b"ab"), chunk(b"cd", 2, 5)], "changed"),
        ([chunk(b"ab")], "ended at 2 of 4"),
        ([], "ended at 0"),
        ([chunk(b"abce")], "digest"),
    ],
)
def test_receiver_refuses(tmp_path: Path, chunks: list[pb.Chunk], why: str) -> None:
    receiver = serde.Receiver(tmp_path / "part", hashlib.sha256(b"abcd").hexdigest(), 10)

    def receive() -> None:
        for one in chunks:
            receiver.add(one)
        receiver.commit(tmp_path / "whole")

    with pytest.raises(LinkError, match=why):
        receive()
    receiver.discard()
    assert not list(tmp_path.iterdir())


def test_receiver_keeps_what_came_for_later(tmp_path: Path) -> None:
    wanted = hashlib.sha256(b"abcd").hexdigest()
    first = serde.Receiver(tmp_path / "part", wanted, 10)
    first.add(chunk(b"ab"))
    first.close()
    second = serde.Receiver(tmp_path / "part", wanted, 10)
    second.add(chunk(b"cd", 2))
    second.commit(tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"abcd"


def test_largest_update_leaves_room_for_names_and_metadata() -> None:
    import numpy as np

    from fedge.update import Update

    shapes = {f"layer.{i}.weight": (3, i + 1) for i in range(200)}
    delta = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    made = Update("c" * 64, 1 << 30, delta, 1 << 40, {f"m{i}": 0.1 for i in range(50)})
    limit = serde.max_update_bytes(shapes)
    assert len(made.to_bytes()) <= limit
    assert limit < 4 * sum(v.size for v in delta.values()) + 2 * serde.UPDATE_OVERHEAD_BYTES


@pytest.mark.parametrize("name", ["a", "clinic-1", "A.b_c", "x" * 64])
def test_good_client_ids(name: str) -> None:
    serde.check_client_id(name)


@pytest.mark.parametrize(
    "name", ["", "-a", ".", "a/b", "a b", "x" * 65, "é", "fedge-server", "a\n"]
)
def test_bad_client_ids(name: str) -> None:
    with pytest.raises(LinkError, match="name"):
        serde.check_client_id(name)


GOOD: list[tuple[Any, pb.Hello | pb.Task | pb.TaskResult | pb.TaskFailed]] = [
    (serde.check_hello, pb.Hello(wire_version=1, mode=pb.MODE_PERSONAL, facts={"os": "linux"})),
    (
        serde.check_task,
        pb.Task(
            task_id="a",
            run_id="run-1",
            kind=pb.TASK_KIND_TRAIN,
            bundle_digest=DIGEST,
            params_digest=DIGEST,
            config_json=b'{"lr":0.1,"seed":"7"}',
        ),
    ),
    (serde.check_result, pb.TaskResult(task_id="a", metrics={"loss": 0.5})),
    (serde.check_failed, pb.TaskFailed(task_id="a", error="DataError", message="no rows")),
]
BAD: list[dict[str, Any]] = [
    {"fedge_version": "1 2"},
    {"fedge_version": "x" * 33},
    {"wire_version": 2},
    {"mode": 0},
    {"engine": "x" * 129},
    {"facts": {str(i): "" for i in range(33)}},
    {"facts": {"a": "x" * 257}},
    {"facts": {"x" * 257: ""}},
    {"run_id": "x" * 129},
    {"kind": 0},
    {"kind": 9},
    {"bundle_digest": "x"},
    {"params_digest": ""},
    {"config_json": b"[]"},
    {"config_json": b"{"},
    {"config_json": b'{"a":[1]}'},
    {"config_json": b'{"a":"' + b"x" * 70_000 + b'"}'},
    {"config_json": b"[" * 50_000},
    {"task_id": ""},
    {"task_id": "../a"},
    {"task_id": "a/b"},
    {"metrics": {"loss": float("inf")}},
    {"metrics": {"x" * 129: 1.0}},
    {"metrics": {str(i): 0.0 for i in range(65)}},
    {"tensors": bytes((1 << 20) + 1)},
    {"error": "x" * 129},
    {"message": "x" * 513},
]


def test_good_messages_pass() -> None:
    for check, message in GOOD:
        check(message)


@pytest.mark.parametrize("change", BAD, ids=lambda c: f"{next(iter(c))}-{len(str(c))}")
def test_bad_messages_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    tried = 0
    for check, message in GOOD:
        if name in message.DESCRIPTOR.fields_by_name:
            values = {f.name: v for f, v in message.ListFields() if f.name != name}
            with pytest.raises(LinkError):
                check(type(message)(**{**values, **change}))
            tried += 1
    assert tried


def test_one_line_always_passes_the_check() -> None:
    for text in ("a\nb", "é" * 600, "x" * 2000, ""):
        serde.check_failed(pb.TaskFailed(task_id="a", message=serde.one_line(text)))
    assert serde.one_line("two\n  lines") == "two lines"


@given(st.binary(max_size=300))
def test_random_bytes_never_do_more_than_fail(data: bytes) -> None:
    from google.protobuf.message import DecodeError

    for kind, check in (
        (pb.Hello, serde.check_hello),
        (pb.Task, serde.check_task),
        (pb.TaskResult, serde.check_result),
        (pb.EnrollRequest, serde.check_enroll),
    ):
        with contextlib.suppress(DecodeError, LinkError):
            check(kind.FromString(data))


def test_the_wire_needs_neither_numpy_nor_grpc() -> None:
    code = (
        "import sys, fedge.wire.serde, fedge.wire.token; print({'numpy','grpc'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
