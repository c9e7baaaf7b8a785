"""A hostile, rightly signed bundle goes the way of every bundle: verify, admit, open, one step.

The processes are the real ones, the admission worker and the engine worker; one of each serves
many cases and a new one takes over when it dies. What the resident client does, this process does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from canary import Canary

from fedge import tensors
from fedge.artifacts.admission import LIMITS
from fedge.artifacts.bundle import MANIFEST, SIGNATURE, Bundle
from fedge.artifacts.manifest import FileEntry, Manifest
from fedge.artifacts.signing import generate_signing_key, public_hex, sign
from fedge.config import TrainConfig
from fedge.engines.files import worker_header
from fedge.engines.interpreters import interpreter_for
from fedge.engines.worker import pack_examples
from fedge.errors import FedgeError, WorkerDiedError
from fedge.pipe import Child
from fedge.types import Examples

LIMIT_S = 5.0  # of one case, as the issue has it
SHAPED = TrainConfig(lr=0.01, batch_size=2, epochs=1, clip_norm=1.0)
RESTART_EVERY = 400  # cases: what a worker leaks is not a case's doing

REFUSED, ERROR, DIED, STOPPED, RAN = "refused", "error", "died", "stopped", "ran"


class Arena:
    """One bundle, one engine, and the workers that are to survive its mutants or be replaced.

    Args:
        bundle: The good one.
        engine: ``ort`` or ``ort-training``.
        root: An empty folder.
        memory_bytes: Address space declared for the engine's worker.

    Attributes:
        limit_s: How long one case may take before its worker is ended.
        last_s: How long the last case took.
        worst_s: The longest case.
        worst_rss: The largest resident memory of an engine's or admission worker, bytes.
    """

    def __init__(self, bundle: Bundle, engine: str, root: Path, memory_bytes: int) -> None:
        self.limit_s = LIMIT_S
        self.last_s, self.worst_s, self.worst_rss = 0.0, 0.0, 0
        self._engine, self._memory = engine, memory_bytes
        self._key = generate_signing_key()
        self.good = Bundle(root / "good", bundle.manifest)
        shutil.copytree(bundle.path, self.good.path)
        self._folder = root / "case"
        shutil.copytree(bundle.path, self._folder)
        self.canary = Canary(self._folder)
        self._signer = public_hex(self._key)
        rows = bundle.reference().examples
        own = {s.name: rows.inputs[s.name] for s in bundle.manifest.inputs}
        self._rows, self._inputs = pack_examples(rows), tensors.dump(own)
        self._plain_rows = pack_examples(Examples(own, rows.labels))
        self._worker: Child | None = None
        self._judge: Child | None = None
        self._served = 0

    def manifest(self) -> bytes:
        """The good manifest's bytes."""
        return self.good.manifest.to_json()

    def file(self, name: str, data: bytes) -> tuple[str, str]:
        """What becomes of the bundle with one file replaced, and why."""
        entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        manifest = replace(
            self.good.manifest,
            signer=self._signer,
            files={**self.good.manifest.files, name: entry},
        )
        (self._folder / name).write_bytes(data)
        try:
            return self._case(manifest.to_json(), name)
        finally:
            (self._folder / name).write_bytes(self.good.read(name))

    def document(self, data: bytes) -> tuple[str, str]:
        """What becomes of the bundle with another manifest, signed by the hostile signer."""
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError, IndexError):
            raw = json.loads(data)
            if raw["signer"] == self.good.manifest.signer:
                raw["signer"] = self._signer
                text = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
                data = text.encode("utf-8", "surrogatepass")
        return self._case(data, "step.onnx" if self._engine == "ort" else "training_model.onnx")

    def _case(self, manifest: bytes, name: str) -> tuple[str, str]:
        self._ready()
        (self._folder / MANIFEST).write_bytes(manifest)
        (self._folder / SIGNATURE).write_bytes(sign(self._key, manifest))
        began = time.monotonic()
        try:
            verdict = self._verdict(name, began)
        finally:
            self.last_s = time.monotonic() - began
            self.worst_s = max(self.worst_s, self.last_s)
            self._measure()
        return verdict

    def _verdict(self, name: str, began: float) -> tuple[str, str]:
        try:
            bundle = Bundle.open(self._folder, self._signer, engine=self._engine, admit=False)
        except FedgeError as exc:
            return REFUSED, str(exc)
        with self._workers():
            try:
                if name.endswith(".onnx"):
                    self._admit(name, bundle.manifest, began)
            except WorkerDiedError as exc:
                return _end(exc)
            except FedgeError as exc:
                return REFUSED, str(exc)
            try:
                self._use(bundle, name, began)
            except WorkerDiedError as exc:
                return _end(exc)
            except FedgeError as exc:
                return ERROR, str(exc)
        return RAN, ""

    def _admit(self, name: str, manifest: Manifest, began: float) -> None:
        header = {
            "folder": str(self._folder),
            "name": name,
            "entry": asdict(manifest.files[name]),
            "limits": asdict(LIMITS),
        }
        assert self._judge is not None
        self._judge.call("admit", header, timeout_s=self._left(began))

    def _use(self, bundle: Bundle, name: str, began: float) -> None:
        def call(job: str, header: dict[str, Any], *blobs: bytes) -> None:
            assert self._worker is not None
            self._worker.call(job, header, blobs, timeout_s=self._left(began))

        opened = worker_header(bundle, self._engine, 1)
        call("open", opened)
        rows = {"data": 1, "forget": []}
        match name:
            case "grad.onnx" | "grad.recompute.onnx":
                call("gradients", {}, self._rows)
            case "update.onnx":
                call("put", rows, self._rows)
                call("train", {"data": 1, "config": asdict(SHAPED), "seed": 1})
            case "evaluate.onnx":
                call("put", rows, self._plain_rows)
                call("evaluate", {"data": 1, "batch_size": 2})
            case "infer.onnx":
                call("predict", {"batch_size": 2}, self._inputs)
            case "preprocess.onnx":
                call("put", rows, self._plain_rows)
                call("preprocess", {"data": 1, "result": 2})
            case "reference.safetensors":
                call("probe", opened)
            case _:
                call("train_step", {"lr": 0.01}, self._rows)

    def _ready(self) -> None:
        """Workers that run and have imported what they need; a fresh pair now and then."""
        self._served += 1
        if self._served % RESTART_EVERY == 0:
            self.close_workers()
        if self._judge is None:
            memory, cpu = str(LIMITS.memory_bytes), "100000"
            args = ("--memory-bytes", memory, "--cpu-s", cpu)
            self._judge = Child("fedge.artifacts.admission", args=args)
        if self._worker is None:
            python, args = interpreter_for(self._engine), ("--memory-bytes", str(self._memory))
            self._worker = Child("fedge.engines.worker", python, args)
            self._worker.call("open", worker_header(self.good, self._engine, 1), timeout_s=120)
            self._worker.call("train_step", {"lr": 0.01}, [self._rows], timeout_s=120)

    @contextlib.contextmanager
    def _workers(self) -> Iterator[None]:
        """Forget those that died."""
        yield
        for kind in ("_worker", "_judge"):
            child = getattr(self, kind)
            if child is not None and child._process.poll() is not None:
                setattr(self, kind, None)

    def _measure(self) -> None:
        for child in (self._worker, self._judge):
            with contextlib.suppress(OSError, AttributeError, StopIteration):
                status = Path(f"/proc/{child.pid}/status").read_text().splitlines()  # type: ignore[union-attr]
                peak = next(line for line in status if line.startswith("VmHWM"))
                self.worst_rss = max(self.worst_rss, int(peak.split()[1]) << 10)

    def _left(self, began: float) -> float:
        return max(self.limit_s - (time.monotonic() - began), 0.01)

    def close_workers(self) -> None:
        """End both."""
        for child in (self._worker, self._judge):
            if child is not None:
                child.close()
        self._worker = self._judge = None

    def close(self) -> None:
        """End the workers and the watch."""
        self.close_workers()
        self.canary.close()


def _end(exc: WorkerDiedError) -> tuple[str, str]:
    return (STOPPED if "did not answer" in str(exc) else DIED), str(exc)
