"""``fedge-server demo``: a real federation of four hospitals on this machine, in half a minute.

One server process and four client processes on free loopback ports: mutual TLS, token enrolment,
local training in ONNX Runtime, federated averaging, then personalization at each hospital. The
data are scikit-learn's breast-cancer records, split so that the hospitals differ in size and in
the share of malignant tumours. Everything that was started is gone when the command ends.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.engines import find_training_python
from fedge.errors import ConfigError, EngineUnavailableError, FedgeError
from fedge_server import demo_report
from fedge_server.processes import EventSource, Processes, unwinding

ROUNDS = 10
LABEL, SPLIT = "malignant", "split"
MARKER = ".fedge-demo"  # says that the folder is ours to replace
_Say = Callable[[str], None]
_SETTINGS = ("--loss", "bce_with_logits", "--lr", "0.1", "--batch-size", "16", "--epochs", "2")


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse's private type
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="run a federation of four hospitals on this machine",
        description=__doc__,
        epilog="example: fedge-server demo --out ./fedge-demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("fedge-demo"), help="result folder")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    began = time.monotonic()
    out = _fresh(args.out)
    say = _quiet if args.json else _say
    with unwinding(), Processes(out / "logs") as processes:
        report = _federate(out, processes, say)
    report["seconds"] = round(time.monotonic() - began, 1)
    (out / "report.json").write_text(json.dumps(report, indent=2))
    demo_report.draw(report, out / "demo.png")
    say("")
    print(json.dumps(report) if args.json else demo_report.table(report, out))
    return 0


@dataclass
class _Hospital:
    name: str
    state: Path
    engine: str
    data: Path
    process: subprocess.Popen[bytes] | None = None


def _federate(out: Path, processes: Processes, say: _Say) -> dict[str, Any]:
    hospitals, note = _hospitals(out)
    say(f"fedge demo: 1 server, {len(hospitals)} hospitals, {ROUNDS} rounds → {out}/")
    say(f"engines: {note}")
    server = processes.server(_server_command(out, len(hospitals)))
    ready = server.wait_for("ready")
    say(f"server listens on {ready['address']} (mutual TLS); the hospitals join with a token")
    for hospital in hospitals:
        hospital.process = processes.start(_join_command(hospital, ready), hospital.name)
    rounds = list(_rounds(server, hospitals, processes, say))
    say("each hospital compares: own rows only, the global model, and that model fine-tuned")
    tuned = _personalize(hospitals, processes)
    processes.call(_server("export", str(out / "global.onnx"), state=out / "server"))
    return demo_report.collect(note, rounds, tuned)


def _hospitals(out: Path) -> tuple[list[_Hospital], str]:
    from fedge.data import breast_cancer_hospitals

    training = find_training_python()
    note = "two hospitals train with ort-training, two with ort (stock onnxruntime)"
    if training is None:
        note = "all hospitals train with ort (stock onnxruntime): no training wheel on this machine"
    hospitals = []
    for i, client in enumerate(breast_cancer_hospitals()):
        home = out / client.client_id
        home.mkdir()
        data = home / "patients.csv"
        _write_csv(data, client)
        engine = "ort-training" if training is not None and i < 2 else "ort"
        hospitals.append(_Hospital(client.client_id, home / "state", engine, data))
    return hospitals, note


def _write_csv(path: Path, client: Any) -> None:  # noqa: ANN401 - ClientData
    (name,) = client.train.inputs
    width = client.train.inputs[name].shape[1]
    with path.open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow([*(f"feature_{i}" for i in range(width)), LABEL, SPLIT])
        for part, examples in (("train", client.train), ("test", client.test)):
            for x, y in zip(examples.inputs[name], examples.labels, strict=True):
                rows.writerow([*(repr(float(v)) for v in x), int(y), part])


def _server_command(out: Path, clients: int) -> list[str]:
    options = ["--host", "127.0.0.1", "--port", "0", "--json", "--scaling", "global"]
    options += ["--rounds", str(ROUNDS), "--min-clients", str(clients), *_SETTINGS]
    return _server("start", *options, state=out / "server")


def _server(command: str, *options: str, state: Path) -> list[str]:
    return [sys.executable, "-m", "fedge_server", command, *options, "--state", str(state)]


def _client(hospital: _Hospital, command: str, *options: str) -> list[str]:
    where = ["--state", str(hospital.state)]
    return [sys.executable, "-m", "fedge_client", command, *options, *where]


def _join_command(hospital: _Hospital, ready: dict[str, Any]) -> list[str]:
    data = ["--data", str(hospital.data), "--label", LABEL, "--split", SPLIT]
    who = ["--name", hospital.name, "--engine", hospital.engine]
    return _client(hospital, "join", ready["address"], "--token", ready["token"], *who, *data)


def _rounds(
    server: EventSource, hospitals: list[_Hospital], processes: Processes, say: _Say
) -> Iterator[dict[str, Any]]:
    for event in server.events(lambda: _check_alive(hospitals, processes)):
        if event["event"] == "round":
            accuracy = sorted((c["accuracy"], c["client_id"]) for c in event["clients"])
            worst, where = accuracy[0]
            say(
                f"round {event['round']:2d}/{ROUNDS}  loss {event['loss']:.4f}  "
                f"accuracy {event['accuracy']:.3f}  worst {worst:.3f} ({where})  "
                f"{int(sum(c['bytes_up'] for c in event['clients'])):,} bytes up  "
                f"{event['seconds']:.2f} s"
            )
            yield event
        elif event["event"] == "finished":
            return


def _check_alive(hospitals: list[_Hospital], processes: Processes) -> None:
    for hospital in hospitals:
        if hospital.process is not None and hospital.process.poll() is not None:
            raise FedgeError(
                f"{hospital.name} stopped with exit code {hospital.process.returncode}: "
                f"{processes.tail(hospital.name)}"
            )


def _personalize(hospitals: list[_Hospital], processes: Processes) -> list[dict[str, Any]]:
    """Two hospitals at a time: the machine has few cores and each uses one."""
    results = []
    for hospital in hospitals:
        processes.stop(hospital.process)
    for i in range(0, len(hospitals), 2):
        pair = hospitals[i : i + 2]
        running = [processes.begin(_client(h, "personalize", "--json")) for h in pair]
        results += [json.loads(processes.finish(p)) for p in running]
    for hospital, result in zip(hospitals, results, strict=True):
        model = hospital.state.parent / "personal.onnx"
        processes.call(_client(hospital, "export", str(model)))
        status = json.loads(processes.call(_client(hospital, "status", "--json")))
        result["bytes_sent"] = status["bytes_sent"]
    return results


def _fresh(out: Path) -> Path:
    """An empty folder; what an earlier demo left in it goes, and nothing else ever does."""
    missing = [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:  # found without importing: matplotlib would write into HOME
        raise EngineUnavailableError(f"the demo needs fedge[sim]: {', '.join(missing)} is missing")
    out = out.absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is a link or a file; give an empty folder with --out")
    if out.exists():
        if not (out / MARKER).exists() and any(out.iterdir()):
            raise ConfigError(f"{out} holds other files; give an empty folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()
    return out


def _say(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    del line
