"""``fedge-server``: the command line.

Exit codes: 0 done, 1 unexpected, 130 Ctrl-C, and those of :mod:`fedge.errors`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedge
from fedge.errors import FedgeError
from fedge.wire.serde import printable

_COMMANDS = ("cli_start", "cli_model", "cli_fleet", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if args.verbose:
        for name in ("fedge", "fedge_server"):
            logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        return int(args.func(args))
    except FedgeError as exc:
        if args.verbose:
            logging.exception("failed")
        print(f"fedge-server: {printable(str(exc))}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = argparse.ArgumentParser(
        prog="fedge-server",
        allow_abbrev=False,
        description="Train a model on devices that keep their data.",
        epilog="example: fedge-server start model.onnx --loss cross_entropy --lr 0.1",
    )
    top.add_argument("--version", action="version", version=f"fedge-server {fedge.__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="log more; show tracebacks")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"fedge_server.{name}").add_parser(commands)
    return top


def command(subparsers: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's private type
    """A subcommand with help, an example and ``--state``."""
    made: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: fedge-server {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--state", type=Path, metavar="DIR", help="state folder (FEDGE_STATE; ./fedge-server-state)"
    )
    made.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    return made
