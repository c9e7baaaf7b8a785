"""The ``fedge-client`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import fedge
from fedge.errors import FedgeError
from fedge.wire.serde import printable
from fedge_client import commands
from fedge_client.config import ENGINES
from fedge_client.state import MODES

INTERRUPTED = 130
EXIT_CODES = """\
exit codes:
  0  done, or stopped by SIGTERM     6  the server cannot be reached or broke the protocol
  1  another error                   7  the server said no: token spent, name taken, revoked
  2  a setting or flag is wrong      8  the update was refused
  3  the data do not fit             9  this site's settings forbid it (personal mode)
  4  a bundle or model is refused   10  the state folder is missing, locked or damaged
  5  training or inference failed  130  Ctrl-C
"""
Parser = argparse.ArgumentParser
_Adder = Callable[..., Parser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one line on standard error."""
    args = _parser().parse_args(argv)
    try:
        return int(args.func(args))
    except FedgeError as exc:
        text = " ".join(str(exc).split())
        print(f"fedge-client: error: {printable(text)}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="fedge-client",
        allow_abbrev=False,
        description="Take part in a federation: train on this device, send only what is declared.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedge-client {fedge.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, help_text: str, example: str) -> Parser:
        command: Parser = subparsers.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--state", metavar="DIR", help="state folder (default: $FEDGE_STATE or ./fedge-client)"
        )
        return command

    _join(add)
    _run(add)
    _personal(add)
    _engines(add)
    _estimate(add)
    return parser


def _join(add: _Adder) -> None:
    join = add(
        "join",
        "join a federation and take part in its rounds until stopped",
        "fedge-client join 10.0.0.5:8443 --token fedge1.… --data patients.csv --label outcome",
    )
    join.add_argument("where", metavar="HOST:PORT|TOKEN", help="the server, or just the token")
    join.add_argument(
        "--token", help="the token the server printed; - reads it from standard input"
    )
    join.add_argument("--name", default="", metavar="CLIENT_ID", help="wished name of this client")
    join.add_argument("--mode", choices=MODES, help="personal uploads nothing (federated)")
    join.add_argument("--enroll-only", action="store_true", help="be admitted, then stop")
    _data_flags(join)
    join.add_argument("--engine", choices=ENGINES, help="engine to train with (default: auto)")
    join.set_defaults(func=commands.join)


def _data_flags(parser: Parser) -> None:
    data = parser.add_argument_group("data source (written to client.toml)")
    data.add_argument("--data", metavar="FILE", help="CSV with a header line, or NPZ")
    data.add_argument("--label", metavar="COL", help="column or array that holds the label")
    data.add_argument("--columns", metavar="A,B,…", help="input columns in order (default: others)")
    data.add_argument("--split", metavar="COL", help="column that says train or test")
    data.add_argument("--test-fraction", type=float, metavar="X", help="share held out (0.2)")


def _run(add: _Adder) -> None:
    run = add("run", "take part again, after join", "fedge-client run --state /var/lib/fedge")
    run.set_defaults(func=commands.run)
    status = add("status", "say who this client is and what it does", "fedge-client status --json")
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.set_defaults(func=commands.status)


def _personal(add: _Adder) -> None:
    tune = add(
        "personalize",
        "fine-tune the newest global model on this site's rows and keep the result here",
        "fedge-client personalize --epochs 5",
    )
    tune.add_argument("--lr", type=float, help="learning rate (default: the bundle's)")
    tune.add_argument("--batch-size", type=int, help="rows per step (default: the bundle's)")
    tune.add_argument("--epochs", type=int, help="passes over the rows (default: the bundle's)")
    tune.add_argument("--seed", type=int, default=0, help="fixes the row order")
    tune.add_argument("--json", action="store_true", help="one JSON object")
    tune.set_defaults(func=commands.personalize)
    export = add(
        "export",
        "write an inference-ready ONNX model: personal if there, else global",
        "fedge-client export model.onnx",
    )
    export.add_argument("out", metavar="MODEL.onnx")
    export.add_argument("--global", dest="only_global", action="store_true", help="the global one")
    export.add_argument("--json", action="store_true", help="one JSON object")
    export.set_defaults(func=commands.export)
    predict = add(
        "predict",
        "write the model's probabilities for the rows of a file",
        "fedge-client predict new-patients.csv --out scores.csv",
    )
    predict.add_argument("file", metavar="FILE", help="CSV or NPZ with the input columns")
    predict.add_argument("--out", metavar="FILE", help="CSV to write (default: FILE.scores.csv)")
    predict.add_argument("--columns", metavar="A,B,…", help="input columns in order")
    predict.add_argument("--global", dest="only_global", action="store_true", help="the global one")
    predict.add_argument("--json", action="store_true", help="one JSON object")
    predict.set_defaults(func=commands.predict)


def _estimate(add: _Adder) -> None:
    estimate = add(
        "estimate",
        "say what memory and time training takes on this device, and what fits",
        "fedge-client estimate --memory 256MB --batch 8",
    )
    estimate.add_argument("bundle", nargs="?", metavar="BUNDLE", help="a folder (the newest here)")
    estimate.add_argument("--memory", metavar="SIZE", help="(memory_mb of client.toml, or free)")
    estimate.add_argument("--batch", type=int, metavar="N", help="rows per step (the bundle's)")
    estimate.add_argument("--json", action="store_true", help="one JSON object")
    estimate.set_defaults(func=commands.estimate)


def _engines(add: _Adder) -> None:
    engines = add(
        "engines",
        "list the engines of this device, or install ONNX Runtime's training wheel",
        "fedge-client engines install ort-training --python python3.11",
    )
    engines.add_argument("action", nargs="?", choices=("list", "install"), default="list")
    engines.add_argument("engine", nargs="?", choices=("ort-training",), default="ort-training")
    engines.add_argument("--python", help="Python 3.11 or 3.12 for the new environment")
    engines.add_argument("--find-links", metavar="DIR", help="where pip looks for wheels")
    engines.add_argument("--json", action="store_true", help="one JSON object")
    engines.set_defaults(func=commands.engines)
