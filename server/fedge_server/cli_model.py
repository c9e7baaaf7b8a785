"""``fedge-server init | build | estimate | export``: the model without the network."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from fedge.errors import StateError
from fedge.platform import exclusive, private_dir, silence_telemetry
from fedge_server import cli, cli_start
from fedge_server import state as states


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse's private type
    """Register the commands."""
    init = cli.command(
        subparsers,
        "init",
        "make a state folder with certificate authority and keys",
        "init --state /srv/fedge --advertise fedge.example.org",
    )
    init.add_argument("--advertise", metavar="HOST", help="name devices shall use")
    init.add_argument("--json", action="store_true", help="print one JSON object")
    init.set_defaults(func=run_init)
    build = cli.command(
        subparsers,
        "build",
        "make a signed bundle from a model and keep it as the newest",
        "build model.onnx --loss mse --lr 0.01 --out ./bundle",
    )
    cli_start.model_options(build)
    build.add_argument("--out", type=Path, metavar="DIR", help="also write the bundle here")
    build.add_argument("--json", action="store_true", help="print one JSON object")
    build.set_defaults(func=run_build)
    estimate = cli.command(
        subparsers,
        "estimate",
        "say what memory and time training a bundle takes, and what fits a budget",
        "estimate ./bundle --memory 256MB --batch 8",
    )
    estimate.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder")
    estimate.add_argument("--memory", metavar="SIZE", help="of the client's worker, as 256MB")
    estimate.add_argument("--batch", type=int, metavar="N", help="rows per step (the bundle's)")
    estimate.add_argument("--json", action="store_true", help="print one JSON object")
    estimate.set_defaults(func=run_estimate)
    export = cli.command(
        subparsers,
        "export",
        "write the newest global model as one ONNX file",
        "export model.onnx --round 5",
    )
    export.add_argument("path", type=Path, metavar="MODEL", help="file to write")
    export.add_argument("--round", type=int, dest="round_num", help="of the newest run (the last)")
    export.add_argument("--json", action="store_true", help="print one JSON object")
    export.set_defaults(func=run_export)


def run_init(args: argparse.Namespace) -> int:
    """Make the state folder; harmless if it is there."""
    path = states.folder(args.state)
    states.create(path, [args.advertise] if args.advertise else [])
    with states.opened(path) as state:
        if args.advertise and state.store.get_meta("listen") is None:
            listen = {"host": "0.0.0.0", "port": 8443, "advertise": args.advertise}  # noqa: S104
            state.store.set_meta("listen", json.dumps(listen))
        federation = state.fleet.federation_id
    text = f"federation {federation} in {path}; next: fedge-server start --state {path}"
    print(json.dumps({"federation_id": federation, "state": str(path)}) if args.json else text)
    return 0


def run_build(args: argparse.Namespace) -> int:
    """Build, sign, keep."""
    silence_telemetry()
    settings = cli_start.settings_of(args)
    path = states.folder(args.state)
    private_dir(path)
    with exclusive(path / states.LOCK, f"fedge-server on {path}"):
        states.create(path)
        with states.opened(path) as state:
            made = cli_start.make_bundle(state, settings)
            state.store.set_meta("model", cli_start.identity(settings.model.path))
            bundle = state.registry.add(made, time.time())
            if args.out is not None:
                files = {n: bundle.read(n) for n in bundle.manifest.files}
                type(bundle).write(bundle.manifest, files, state.keys.signing_key, args.out)
    engines = {n: why or "ready" for n, why in bundle.manifest.engines.items()}
    values = {"digest": bundle.digest, "name": bundle.manifest.name, "engines": engines}
    lines = [f"bundle {bundle.manifest.name} {bundle.digest}"]
    lines += [f"  engine {name}: {why}" for name, why in engines.items()]
    print(json.dumps(values) if args.json else "\n".join(lines))
    return 0


def run_estimate(args: argparse.Namespace) -> int:
    """From the manifest alone."""
    from fedge.artifacts import advice
    from fedge.artifacts.bundle import read_manifest

    memory = None if args.memory is None else advice.parse_size(args.memory)
    found = advice.report(read_manifest(args.bundle), memory, args.batch)
    print(json.dumps(found) if args.json else "\n".join(advice.lines(found)))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Bake a committed model into one file."""
    silence_telemetry()
    from fedge import tensors
    from fedge.exporting import export

    with states.opened(states.folder(args.state)) as state:
        models = state.store.models()
        if args.round_num is not None and models:
            last = models[-1].run_id
            models = [m for m in models if (m.run_id, m.round_num) == (last, args.round_num)]
        if not models:
            raise StateError("there is no such model yet: no round was committed")
        model = models[-1]
        bundle = state.registry.open(model.bundle_digest)
        shared, _ = tensors.load(state.blobs.get(model.params_digest))
        export(bundle, {**bundle.initial_params(), **shared}, args.path)
    values = {"path": str(args.path), "run_id": model.run_id, "round": model.round_num}
    text = f"{args.path}: {model.run_id} after round {model.round_num}"
    print(json.dumps(values) if args.json else text)
    return 0
