"""``fedge-server start``, and the settings it shares with ``init`` and ``build``."""

from __future__ import annotations

import argparse
import os
import socket
import time
from pathlib import Path
from typing import Any

from fedge.artifacts.bundle import MANIFEST, Bundle
from fedge.errors import ConfigError, LinkError
from fedge.losses import NAMES as LOSSES
from fedge.platform import exclusive, private_dir, silence_telemetry
from fedge_server import cli, config, example
from fedge_server import state as states
from fedge_server.config import Settings
from fedge_server.state import ServerState

_SUPERLINK = """\
The same federation on Flower's own SuperLink and SuperNodes is the Flower app in
simulations/flower_app. It runs on sites that already run Flower:

  flower-superlink --insecure        # or with TLS, see Flower's documentation
  flower-supernode --insecure --superlink HOST:PORT      # at each site
  flwr run simulations/flower_app

There an app, which is code, is sent to the sites; over fedge's own link no code travels."""


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse's private type
    """Register the command."""
    parser = cli.command(
        subparsers,
        "start",
        "run the federation: make what is missing, listen, train",
        "start model.onnx --loss cross_entropy --lr 0.1 --rounds 20",
    )
    model_options(parser)
    add = parser.add_argument
    add("--host", dest="server.host", metavar="HOST", help="address to listen on (0.0.0.0)")
    add(
        "--port",
        dest="server.port",
        metavar="PORT",
        type=int,
        help=f"TCP port ({config.PORT}); 0: a free one",
    )
    add("--advertise", dest="server.advertise", metavar="HOST", help="name devices shall use")
    add("--rounds", dest="run.rounds", metavar="N", type=int, help="rounds to train (10)")
    add(
        "--min-clients", dest="run.min_clients", metavar="N", type=int, help="quorum of a round (2)"
    )
    add(
        "--cohort-size",
        dest="run.cohort_size",
        metavar="N",
        type=int,
        help="clients drawn per round (all)",
    )
    add("--deadline", dest="run.deadline_s", type=float, metavar="S", help="of a round (600 s)")
    add("--seed", dest="run.seed", metavar="N", type=int, help="fixes cohorts and row order (0)")
    add(
        "--no-evaluate",
        dest="run.evaluate",
        action="store_false",
        default=None,
        help="do not score",
    )
    add("--strategy", dest="strategy.name", choices=config.STRATEGIES, help="(fedavg)")
    add("--grid", choices=("link", "superlink"), default="link", help="link: fedge's own")
    add("--again", action="store_true", help="begin another run after a finished one")
    add("--until-done", action="store_true", help="leave when the run is finished")
    add("--json", action="store_true", help="one JSON object per event")
    parser.set_defaults(func=run)


def model_options(parser: argparse.ArgumentParser) -> None:
    """The model and how it is trained."""
    add = parser.add_argument
    add(
        "model.path",
        nargs="?",
        metavar="MODEL",
        help="model.onnx or a bundle folder; example if none",
    )
    add("--config", type=Path, metavar="TOML", help="settings file, federation.toml")
    add("--loss", dest="model.loss", metavar="NAME", help=", ".join(LOSSES))
    add(
        "--optimizer",
        dest="model.optimizer",
        metavar="NAME",
        help="of the clients: " + ", ".join(config.OPTIMIZERS),
    )
    add("--lr", dest="train.lr", metavar="X", type=float, help="learning rate of the clients")
    add("--batch-size", dest="train.batch_size", metavar="N", type=int, help="rows per step (32)")
    length = parser.add_mutually_exclusive_group()
    for name, what in (("epochs", "passes per round (1)"), ("steps", "steps per round")):
        length.add_argument(f"--{name}", dest=f"train.{name}", metavar="N", type=int, help=what)
    add(
        "--scaling",
        dest="model.scaling",
        metavar="NAME",
        help="of inputs: " + ", ".join(config.SCALINGS),
    )
    add(
        "--recompute",
        dest="model.recompute",
        choices=tuple(config.RECOMPUTE),
        help="activations, to save memory; auto: a device that is short of it does (no)",
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """Flags over environment over file."""
    flags = {k: v for k, v in vars(args).items() if "." in k}
    return config.load(args.config, flags)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    silence_telemetry()
    if args.grid == "superlink":
        print(_SUPERLINK)
        return 0
    settings = settings_of(args)
    path = states.folder(args.state)
    fresh = not states.exists(path)
    if fresh:  # before anything is written
        _require_free(settings.server.host, settings.server.port)
    private_dir(path)
    with exclusive(path / states.LOCK, f"fedge-server on {path}"):
        states.create(path, [settings.server.advertise] if settings.server.advertise else [])
        with states.opened(path) as state:
            _require_free(*_listen_address(state, settings))
            ensure_bundle(state, settings)
            _serve(state, settings, args, token=fresh or not state.store.nodes())
    return 0


def _listen_address(state: ServerState, settings: Settings) -> tuple[str, int]:
    from fedge_server.app import bind_address

    host, _, port = bind_address(state, settings).rpartition(":")
    return host.strip("[]"), int(port)


def _require_free(host: str, port: int) -> None:
    """Fail before the work of a start, not after it, where the address cannot be had.

    Raises:
        LinkError: If it is taken, or none of this machine's.
    """
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as exc:
        why = str(exc.strerror).partition(" (while")[0]
        raise LinkError(
            f"cannot listen on {host} port {port}: {why}; is another server "
            "running there? use --port, or --port 0 for a free one"
        ) from exc


def ensure_bundle(state: ServerState, settings: Settings) -> Bundle:
    """The bundle to train: the registry's newest, or one made now from the model named.

    Raises:
        ConfigError: If a setting is missing, or a model is named though there is a bundle already.
    """
    newest = state.registry.newest()
    if newest is not None:
        named = settings.model.path
        if "model.path" in settings.given and state.store.get_meta("model") != identity(named):
            raise ConfigError(
                f"{state.path} trains another model already; use another --state for {named}, "
                "or leave the model out to go on"
            )
        return state.registry.open(newest)
    made = make_bundle(state, settings)
    state.store.set_meta("model", identity(settings.model.path))  # first: a crash then builds anew
    return state.registry.add(made, time.time())


def make_bundle(state: ServerState, settings: Settings) -> Bundle:
    """A bundle from what the settings name: a bundle, an ONNX model, or the built-in example."""
    model = settings.model
    path = Path(model.path) if model.path else None
    if path is not None and (path / MANIFEST).is_file():
        return Bundle.open(path)
    if path is not None and not path.is_file():
        what = "is a folder without a bundle" if path.is_dir() else "does not exist"
        raise ConfigError(f"model {path} {what}; give an ONNX file or a bundle folder")
    if path is not None:
        _require(settings, str(path))
    from fedge.artifacts.build import build
    from fedge.artifacts.preprocessing import SiteStandardize

    return build(
        str(path) if path else example.model(),
        loss={**model.loss_settings, "name": model.loss or "bce_with_logits"},
        optimizer=model.optimizer,
        preprocessing=SiteStandardize() if model.scaling == "site" else None,
        train=settings.train,
        name=None if path else example.NAME,
        signing_key=state.keys.signing_key,
        recompute=config.RECOMPUTE[model.recompute],
    )


def _require(settings: Settings, what: str) -> None:
    missing = []
    if not settings.model.loss:
        missing.append(f"--loss (one of {', '.join(LOSSES)})")
    if "train.lr" not in settings.given:
        missing.append("--lr (learning rate of the clients, such as 0.1)")
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}; give them as flags or in federation.toml "
            "under [model] and [train]"
        )


def identity(path: str) -> str:
    """What the state remembers as the model it trains."""
    return os.path.realpath(path) if path else "example"


def _serve(
    state: ServerState, settings: Settings, args: argparse.Namespace, *, token: bool
) -> None:
    from fedge_server.app import App
    from fedge_server.report import Reporter

    reporter = Reporter(args.json)
    App(state, settings, reporter, again=args.again, until_done=args.until_done, token=token).run()
