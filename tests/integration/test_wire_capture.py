"""What a client serializes for the link, before TLS, searched for what must not be in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedge
from fedge import local, tensors
from fedge.artifacts.bundle import Bundle
from fedge.engines import open_in_process
from fedge.params import subtract
from fedge.types import ClientData, Params
from fedge.wire.token import Token
from fedge.wire.v1.link_pb2_grpc import LinkStub
from fedge_client import config, enroll
from fedge_client import link as link_module
from fedge_client.config import DataConfig, EngineConfig
from fedge_client.outbox import Outbox
from fedge_client.session import Session
from fedge_client.state import State
from fedge_client.tasks import Desk

ROUNDS = 3
WINDOW = 8  # bytes: two neighbouring float32 values are enough to count as a leak
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Tap:
    """A channel that keeps a copy of every message its stub serializes."""

    def __init__(self, channel: Any, kept: list[bytes]) -> None:
        self._channel, self._kept = channel, kept

    def __getattr__(self, name: str) -> Any:
        made = getattr(self._channel, name)
        if name not in KINDS:
            return made

        def wrap(path: str, request_serializer: Callable[[Any], bytes], **rest: Any) -> Any:
            def serialize(message: Any) -> bytes:
                data = request_serializer(message)
                self._kept.append(data)
                return data

            return made(path, request_serializer=serialize, **rest)

        return wrap


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Everything clients of this process serialize."""
    kept: list[bytes] = []
    monkeypatch.setattr(link_module, "LinkStub", lambda channel: LinkStub(Tap(channel, kept)))
    return kept


async def _take_part(server: Any, state: State, mode: str, data: DataConfig) -> list[str]:
    """A whole client in this process: join, take part until the last model is here."""
    token = Token.decode(server.events[0]["token"])
    settings = config.ClientConfig(data, EngineConfig("ort"))
    config.save(state.root, settings)
    identity = await enroll.enroll(state, token, mode, "clinic-a")
    outbox = Outbox(state, identity) if mode == "federated" else None
    said: list[str] = []
    session = Session(state, identity, Desk(state, identity, settings, outbox), said.append)
    running = asyncio.create_task(session.run())
    async with asyncio.timeout(60):
        while f"model of round {ROUNDS} is here" not in said:
            assert not running.done(), running
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)  # the last evaluation's answer
    running.cancel()
    await asyncio.wait([running])
    return said


def _data(root: Path) -> DataConfig:
    return DataConfig(str(root / "clinic-a.csv"), "sick", split="part")


def test_federated_mode_sends_shared_deltas_and_nothing_else(
    world: Any,
    sent: list[bytes],
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    bundle = make_bundle("mlp", personal=["head.*"])
    server = world.serve(str(bundle.path), "--rounds", str(ROUNDS))
    world.join(server, "clinic-b", *data_flags("clinic-b"), "--engine", "ort")
    state = State(world.root / "clinic-a", create=True)
    asyncio.run(_take_part(server, state, "federated", _data(world.root)))
    wire = b"\0".join(sent)

    for name, values in _first_delta(bundle, hospitals["clinic-a"]).items():
        assert values.tobytes() in wire, f"control: the delta of {name} was not found"
    for values in _personal_values(bundle, hospitals):
        assert _leaks(values, wire) == []
    _no_rows(hospitals["clinic-a"], world.root / "clinic-a.csv", wire)


def test_personal_mode_sends_no_tensor_at_all(
    world: Any,
    sent: list[bytes],
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    bundle = make_bundle("mlp")
    server = world.serve(str(bundle.path), "--rounds", str(ROUNDS), "--min-clients", "1")
    world.join(server, "clinic-b", *data_flags("clinic-b"), "--engine", "ort")
    state = State(world.root / "own", create=True)
    said = asyncio.run(_take_part(server, state, "personal", _data(world.root)))
    assert not any("update" in line for line in said)
    tuned = world.command("own", "personalize", "--json")
    assert tuned.returncode == 0, tuned.stderr
    wire = b"\0".join(sent)

    assert bundle.manifest.files["step.onnx"].sha256.encode() in wire  # control: it was tapped
    initial = bundle.initial_params()
    (path,) = state.root.glob("personal/*/model.safetensors")
    mine, _ = tensors.load(path.read_bytes())
    for values in (initial, mine, subtract(mine, initial)):
        assert [n for v in values.values() for n in _leaks(v, wire)] == []
    _no_rows(hospitals["clinic-a"], world.root / "clinic-a.csv", wire)


def _first_delta(bundle: Bundle, data: ClientData) -> Params:
    """What the first round's update must hold."""
    engine = open_in_process(bundle, "ort")
    initial = bundle.initial_params()
    shared = {n: initial[n] for n in bundle.manifest.shared}
    site = local.prepare(engine, bundle.manifest, data)
    task = local.TrainTask(1, bundle.manifest.train, 0)
    update, _ = local.train(engine, bundle.manifest, initial, site, shared, task)
    assert set(update.delta) == {"body.w", "body.b"}
    return update.delta


def _personal_values(bundle: Bundle, hospitals: dict[str, ClientData]) -> Iterator[Any]:
    """The personal tensors before and after every round, and what each round changed."""
    before = {n: bundle.initial_params()[n] for n in bundle.manifest.personal}
    yield from before.values()
    for rounds in range(1, ROUNDS + 1):
        run = fedge.Federation(bundle, list(hospitals.values()), engine="ort").run(rounds)
        after = run.personal["clinic-a"]
        assert set(after) == {"head.w", "head.b"}
        yield from after.values()
        yield from subtract(after, before).values()
        before = after


def _no_rows(data: ClientData, path: Path, wire: bytes) -> None:
    assert data.test is not None
    for examples in (data.train, data.test):
        for row in examples.inputs["x"]:
            assert _leaks(row, wire) == []
            assert _leaks(row.astype(np.float64), wire) == []
    for line in path.read_text().splitlines()[1:]:
        for cell in line.split(",")[:-2]:
            assert cell.encode() not in wire


def _leaks(values: Any, wire: bytes) -> list[bytes]:
    """Windows of the values' bytes that are in the capture; a single value counts whole."""
    data = np.ascontiguousarray(values).tobytes()
    size = min(max(WINDOW, 2 * values.itemsize), len(data))
    starts = range(0, len(data) - size + 1, values.itemsize)
    windows = (data[at : at + size] for at in starts)
    return [w for w in windows if any(w) and w in wire]
