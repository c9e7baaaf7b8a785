"""What each ``fedge-client`` command does."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from fedge.artifacts import advice
from fedge.artifacts.advice import parse_size
from fedge.artifacts.bundle import read_manifest
from fedge.errors import ConfigError, StateError
from fedge.wire.serde import printable
from fedge.wire.token import PREFIX, Token
from fedge_client import config as settings
from fedge_client import enroll, environments, memory
from fedge_client.config import ClientConfig, DataConfig
from fedge_client.outbox import Outbox
from fedge_client.personal import PersonalModels
from fedge_client.session import Session
from fedge_client.state import FEDERATED, Identity, State
from fedge_client.tasks import Desk

DEFAULT_STATE = "fedge-client"
TOKEN = "FEDGE_TOKEN"  # noqa: S105 - the variable that may hold one


def join(args: argparse.Namespace) -> int:
    """Be admitted if this state folder is not yet, then take part."""
    token = _token(args)
    state = _state(args, create=True)
    before = settings.load(state.root)
    config = _with_flags(before, args)
    if config.data is not None:
        config.data.require_columns()  # before the token is spent
    with state.running():
        if config != before:
            settings.save(state.root, config)
        identity = state.identity()
        if identity is None:
            mode = args.mode or FEDERATED
            identity = asyncio.run(enroll.enroll(state, token, mode, args.name))
            report(f"joined as {identity.client_id} ({identity.mode})")
        else:
            identity = _joined_before(state, identity, token, args)
            report(f"joined before as {identity.client_id}; going on")
        if args.enroll_only:
            return 0
        return _serve(state, identity, config)


def run(args: argparse.Namespace) -> int:
    """Take part until stopped."""
    state = _state(args)
    identity = state.require_identity()
    config = settings.load(state.root)
    with state.running():
        return _serve(state, identity, config)


def status(args: argparse.Namespace) -> int:
    """Say what is known from the state folder alone.

    ``bytes_sent`` counts the files of delivered updates, whatever the verdict. The server's
    ``bytes_up`` of a round counts answers to evaluation tasks too, so that it is a little more.
    """
    state = _state(args)
    identity = state.require_identity()
    config = settings.load(state.root)
    session = state.read_note("session.json")
    model = state.read_json("model.json") or {}
    running = _alive(session.get("pid"))
    found = {
        "client_id": identity.client_id,
        "mode": identity.mode,
        "server": identity.address,
        "federation_id": identity.federation_id,
        "running": running,
        "connection": session.get("phase", "offline") if running else "offline",
        "doing": session.get("doing", "") if running else "",
        "engine": session.get("engine", ""),
        "engine_reason": session.get("engine_reason", ""),
        "data": _data_status(config),
        "rows": (state.read_json("data.json") or {}).get("train", 0),
        "round_num": session.get("round_num", 0),
        "model_round": model.get("round_num"),
        "outbox": sum(1 for p in (state.folder("outbox")).iterdir() if p.is_dir()),
        "updates_sent": session.get("updates_sent", 0),
        "bytes_sent": session.get("bytes_sent", 0),
        "last_contact_s": session.get("last_contact_s"),
        "last_error": session.get("last_error", ""),
        "certificate_days_left": round(enroll.certificate_days_left(state), 1),
    }
    if not args.json:
        found["last_contact"] = _ago(found.pop("last_contact_s"))
    _show(found, args.json)
    return 0


def personalize(args: argparse.Namespace) -> int:
    """Fine-tune here, keep the result here."""
    overrides = {
        n: getattr(args, n)
        for n in ("lr", "batch_size", "epochs", "seed")
        if getattr(args, n) is not None
    }
    found = _personal(args, lambda models: models.personalize(overrides))
    if args.json:
        print(json.dumps(found))
        return 0
    rows = found["rows"]
    print(f"round {found['round_num']}, {rows['train']} training rows, {rows['test']} held out")
    for name, scores in found["metrics"].items():
        print(f"  {name.replace('_', ' '):<12}{_scores(scores)}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write an inference-ready model."""
    found = _personal(args, lambda models: models.export(Path(args.out), args.only_global))
    _done(found, args.json, f"{found['model']} model of round {found['round_num']}")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Write probabilities."""
    out = Path(args.out or f"{args.file}.scores.csv")
    columns = _names(args.columns)
    found = _personal(
        args,
        lambda models: models.predict(models.source_for(args.file, columns), out, args.only_global),
    )
    _done(found, args.json, f"{found['rows']} rows, {found['model']} model")
    return 0


def engines(args: argparse.Namespace) -> int:
    """List engines, or make the training interpreter."""
    if args.action == "list":
        root = Path(args.state or os.environ.get("FEDGE_STATE") or DEFAULT_STATE)
        config = settings.load(root) if root.is_dir() else ClientConfig()
        _show(environments.describe(config.engine), args.json)
        return 0
    state = _state(args, create=True)
    python = environments.install(state, args.python, args.find_links, report)
    config = settings.load(state.root)
    engine = dataclasses.replace(config.engine, training_python=str(python))
    settings.save(state.root, dataclasses.replace(config, engine=engine))
    _show({"engine": "ort-training", "python": str(python)}, args.json)
    return 0


def estimate(args: argparse.Namespace) -> int:
    """From the manifest alone; the time is this device's own where the engine was probed."""
    root = Path(args.state or os.environ.get("FEDGE_STATE") or DEFAULT_STATE)
    config = settings.load(root) if root.is_dir() else ClientConfig()
    state = State(root, create=False) if root.is_dir() or not args.bundle else None
    folder = Path(args.bundle) if args.bundle else memory.newest_bundle(state)
    manifest = read_manifest(folder)
    given = memory.budget(config.engine) if args.memory is None else parse_size(args.memory)
    found = advice.report(manifest, given, args.batch, memory.rate(state, manifest))
    print(json.dumps(found) if args.json else "\n".join(advice.lines(found)))
    return 0


def report(line: str) -> None:
    """One line of progress: bare on a terminal, with the time in a log."""
    stamp = "" if sys.stderr.isatty() else time.strftime("%Y-%m-%dT%H:%M:%S ")
    print(f"{stamp}{printable(line)}", file=sys.stderr, flush=True)


def _serve(state: State, identity: Identity, config: ClientConfig) -> int:
    if config.data is not None:
        config.data.require_file()
    return asyncio.run(_until_stopped(state, identity, config))


async def _until_stopped(state: State, identity: Identity, config: ClientConfig) -> int:
    outbox = Outbox(state, identity) if identity.mode == FEDERATED else None
    session = Session(state, identity, Desk(state, identity, config, outbox), report)
    running = asyncio.create_task(session.run())
    stopped: list[int] = []

    def stop(number: int) -> None:
        stopped.append(number)
        running.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await running
    except asyncio.CancelledError:
        report("stopped")
    return 130 if signal.SIGINT in stopped else 0


def _personal(args: argparse.Namespace, work: Any) -> dict[str, Any]:  # noqa: ANN401 - a lambda
    state = _state(args)
    models = PersonalModels(state, state.require_identity(), settings.load(state.root))

    async def do() -> dict[str, Any]:
        job: Coroutine[Any, Any, dict[str, Any]] = work(models)
        try:
            return await job
        finally:
            await models.close()

    return asyncio.run(do())


def _state(args: argparse.Namespace, create: bool = False) -> State:
    folder = args.state or os.environ.get("FEDGE_STATE") or DEFAULT_STATE
    return State(Path(folder), create)


def _token(args: argparse.Namespace) -> Token:
    """The token, pointed at the address given beside it."""
    if args.where.startswith(PREFIX):
        return Token.decode(args.where)
    text = _secret(args.token)
    if not text:
        raise ConfigError(
            f"{args.where}: give --token (- reads it from standard input), set {TOKEN}, or give "
            "the token alone instead of the address"
        )
    host, _, port = args.where.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"address {args.where!r}; wanted HOST:PORT, such as 10.0.0.5:8443")
    token = Token.decode(text)
    return dataclasses.replace(token, host=host.strip("[]"), port=int(port))


def _secret(flag: str | None) -> str:
    """The token's text: not on the command line, everybody on the machine can read that."""
    hidden = os.environ.pop(TOKEN, "")  # not for our workers either
    return sys.stdin.readline().strip() if flag == "-" else flag or hidden


def _joined_before(
    state: State, identity: Identity, token: Token, args: argparse.Namespace
) -> Identity:
    """The same client again; the federation may have moved to another address.

    Raises:
        StateError: If the folder is another client's, of another federation or in another mode.
    """
    if token.ca_pem != state.read_key(enroll.CA_CERT):
        raise StateError(f"{state.root} belongs to another federation; use another --state")
    for what, wished, here in (
        ("--name", args.name, identity.client_id),
        ("--mode", args.mode, identity.mode),
    ):
        if wished and wished != here:
            raise StateError(f"{state.root} joined with {what} {here}; use another --state")
    moved = dataclasses.replace(identity, host=token.host, port=token.port)
    if moved != identity:
        state.save_identity(moved)
    return moved


def _with_flags(config: ClientConfig, args: argparse.Namespace) -> ClientConfig:
    """The settings with the flags of ``join`` over them."""
    data, engine = config.data, config.engine
    if args.data is not None:
        label = args.label or (data.label if data is not None else "")
        if not label:
            raise ConfigError("--data needs --label: the column that holds the label")
        data = DataConfig(str(Path(args.data).absolute()), label)
    given = {
        "label": args.label,
        "columns": _names(args.columns) or None,
        "split": args.split,
        "test_fraction": args.test_fraction,
    }
    changes = {n: v for n, v in given.items() if v is not None}
    if changes and data is None:
        raise ConfigError(f"--{next(iter(changes)).replace('_', '-')} needs --data")
    if data is not None:
        data = dataclasses.replace(data, **changes)
    if args.engine is not None:
        engine = dataclasses.replace(engine, name=args.engine)
    return ClientConfig(data, engine)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(n.strip() for n in text.split(",") if n.strip()) if text else ()


def _data_status(config: ClientConfig) -> str:
    if config.data is None:
        return "no data source: takes no part in training; set [data] in client.toml"
    return f"{config.data.path} ({config.data.format}, label {config.data.label})"


def _ago(when_s: float | None) -> str:
    """How long ago a Unix time was, in its largest unit; empty for never."""
    if when_s is None:
        return ""
    passed_s = max(0, round(time.time() - when_s))
    for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed_s >= 2 * size_s:
            return f"{passed_s // size_s} {unit} ago"
    return f"{passed_s} s ago"


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _scores(scores: dict[str, float]) -> str:
    parts = []
    for name in ("accuracy", "auc", "rmse", "concordance"):
        if name in scores:
            text = f"{name} {scores[name]:.3f}"
            if f"{name}_low" in scores:
                text += f" [{scores[f'{name}_low']:.3f}, {scores[f'{name}_high']:.3f}]"
            parts.append(text)
    return "  ".join(parts)


def _done(found: dict[str, Any], as_json: bool, what: str) -> None:
    print(json.dumps(found) if as_json else f"{found['path']}: {what}")


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    width = max(len(n) for n in found) + 2
    for name, value in found.items():
        if value not in ("", None):
            print(f"{name.replace('_', ' '):<{width}}{printable(str(value))}")
