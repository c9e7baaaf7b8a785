"""``fedge-server token | nodes | status``: who may join, who is there, how far the run is."""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import asdict
from typing import Any

from fedge.errors import ConfigError, StateError
from fedge.platform import exclusive
from fedge.wire.serde import printable
from fedge_server import cli
from fedge_server import state as states
from fedge_server.config import PORT
from fedge_server.state import ServerState
from fedge_server.store import NodeRow, TokenRow

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse's private type
    """Register the commands."""
    _token_parser(subparsers)
    _nodes_parser(subparsers)
    status = cli.command(
        subparsers, "status", "show the federation, its run and its devices", "status --json"
    )
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(func=run_status)


def _token_parser(subparsers: Any) -> None:  # noqa: ANN401
    token = subparsers.add_parser("token", help="make and list join tokens", allow_abbrev=False)
    actions = token.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = cli.command(
        actions, "create", "make a join token", "token create --uses 4 --ttl 24h --tag clinics"
    )
    create.add_argument("--uses", type=int, default=1, help="devices it admits (1)")
    create.add_argument(
        "--ttl", type=duration_s, default=86400.0, help="such as 90m, 24h, 7d (24h)"
    )
    create.add_argument("--tag", default="", help="a word kept with every device it admits")
    create.add_argument("--json", action="store_true", help="print one JSON object")
    create.set_defaults(func=run_token_create)
    ls = cli.command(actions, "ls", "list join tokens; their secrets are not kept", "token ls")
    ls.add_argument("--json", action="store_true", help="print a JSON list")
    ls.set_defaults(func=run_token_ls)
    rm = cli.command(actions, "rm", "withdraw a join token at once", "token rm 1f2e3d4c")
    rm.add_argument("token_id", metavar="ID", help="as shown by token ls")
    rm.set_defaults(func=run_token_rm)


def _nodes_parser(subparsers: Any) -> None:  # noqa: ANN401
    nodes = subparsers.add_parser("nodes", help="list and revoke devices", allow_abbrev=False)
    actions = nodes.add_subparsers(dest="action", metavar="ACTION", required=True)
    ls = cli.command(actions, "ls", "list admitted devices", "nodes ls --json")
    ls.add_argument("--json", action="store_true", help="print a JSON list")
    ls.set_defaults(func=run_nodes_ls)
    revoke = cli.command(
        actions, "revoke", "shut a device out, within a second", "nodes revoke clinic-3"
    )
    revoke.add_argument("client_id", metavar="NAME", help="as shown by nodes ls")
    revoke.set_defaults(func=run_nodes_revoke)


def run_token_create(args: argparse.Namespace) -> int:
    """Print a join line."""
    from fedge_server.app import advertised, join_line

    with states.opened(states.folder(args.state)) as state:
        address = advertised(state, PORT)
        token = state.fleet.create_token(
            address.host,
            address.port,
            uses=args.uses,
            ttl_s=args.ttl,
            tag=args.tag,
            now_s=time.time(),
        )
    line = join_line(address, token.encode())
    values = {
        "id": token.token_id,
        "token": token.encode(),
        "address": str(address),
        "join": line,
        "uses": args.uses,
        "expires_s": token.expires_s,
    }
    print(json.dumps(values) if args.json else line)
    return 0


def run_token_ls(args: argparse.Namespace) -> int:
    """List tokens."""
    with states.opened(states.folder(args.state)) as state:
        rows = [_token(t, time.time()) for t in state.store.tokens()]
    _show(rows, args.json, ("id", "uses_left", "uses", "state", "tag"))
    return 0


def run_token_rm(args: argparse.Namespace) -> int:
    """Withdraw a token."""
    with states.opened(states.folder(args.state)) as state:
        if not state.store.drop_token(args.token_id):
            raise ConfigError(f"no token {args.token_id}; see `fedge-server token ls`")
    return 0


def run_nodes_ls(args: argparse.Namespace) -> int:
    """List devices."""
    with states.opened(states.folder(args.state)) as state:
        rows = [_node(n) for n in state.store.nodes()]
    _show(rows, args.json, ("client_id", "state", "mode", "engine", "num_examples", "tag"))
    return 0


def run_nodes_revoke(args: argparse.Namespace) -> int:
    """Revoke a device."""
    with states.opened(states.folder(args.state)) as state:
        if not state.store.update_node(args.client_id, status="revoked"):
            known = ", ".join(n.client_id for n in state.store.nodes()) or "none"
            raise ConfigError(f"no device {args.client_id}; known: {known}")
    print(f"{args.client_id} is revoked: its certificate is refused from now on")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Show everything at a glance."""
    with states.opened(states.folder(args.state)) as state:
        values = status(state)
    if args.json:
        print(json.dumps(values))
        return 0
    run, model = values["run"], values["model"]
    print(f"federation {values['federation_id']} at {values['address']}")
    print(f"server     {'running' if values['running'] else 'not running'}")
    print(f"bundle     {values['bundle'] or 'none'}")
    print(f"run        {_run_line(run) if run else 'none'}")
    print(f"model      {model['run_id']} round {model['round']}" if model else "model      none")
    _show(values["nodes"], False, ("client_id", "state", "mode", "engine", "num_examples", "tag"))
    return 0


def status(state: ServerState) -> dict[str, Any]:
    """The federation as plain values."""
    from fedge_server.app import advertised

    runs, model = state.store.runs(), state.store.newest_model()
    return {
        "federation_id": state.fleet.federation_id,
        "address": str(advertised(state, PORT)),
        "running": _running(state),
        "bundle": state.registry.newest(),
        "run": _run(state) if runs else None,
        "model": {"run_id": model.run_id, "round": model.round_num} if model else None,
        "nodes": [_node(n) for n in state.store.nodes()],
    }


def duration_s(text: str) -> float:
    """``90m``, ``24h``, ``7d`` or seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; wanted such as 90m, 24h or 7d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _run(state: ServerState) -> dict[str, Any]:
    from fedge import rounds
    from fedge_server.report import round_values

    row = state.store.runs()[-1]
    events = [rounds.from_json(e) for e in state.store.events(row.run_id)]
    scored = {e.round_num: e for e in events if isinstance(e, rounds.RoundEvaluated)}
    done = [e for e in events if isinstance(e, rounds.RoundCommitted)]
    config = json.loads(row.config_json)["run"]
    return {
        "run_id": row.run_id,
        "status": row.status,
        "round": done[-1].round_num if done else 0,
        "rounds": config["rounds"],
        "min_clients": config["min_clients"],
        "history": [round_values(e, scored.get(e.round_num)) for e in done],
    }


def _run_line(run: dict[str, Any]) -> str:
    return f"{run['run_id']} {run['status']}, round {run['round']} of {run['rounds']}"


def _running(state: ServerState) -> bool:
    try:
        with exclusive(state.lock, "fedge-server"):
            return False
    except StateError:
        return True


def _token(token: TokenRow, now_s: float) -> dict[str, Any]:
    living = "spent" if not token.uses_left else "living"
    return {
        "id": token.token_id,
        "uses": token.uses,
        "uses_left": token.uses_left,
        "expires_s": token.expires_s,
        "state": "expired" if now_s > token.expires_s else living,
        "tag": token.tag,
    }


def _node(node: NodeRow) -> dict[str, Any]:
    values = asdict(node)
    for name in ("key_hash", "update_key", "status", "connected"):
        del values[name]
    values["facts"] = json.loads(values.pop("facts_json"))
    away = "connected" if node.connected else "away"
    values["state"] = "revoked" if node.status == "revoked" else away
    return values


def _show(rows: list[dict[str, Any]], as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    table = [
        columns,
        *(tuple(printable(str(r[c])).replace("\n", "?") for c in columns) for r in rows),
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
