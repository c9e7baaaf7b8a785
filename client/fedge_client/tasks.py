"""What a task needs and what becomes of it: bundle and params in, update or answer out.

Still the resident half: it moves files and asks the worker; it computes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.artifacts.bundle import Bundle, read_manifest
from fedge.artifacts.estimate import Frugal
from fedge.artifacts.manifest import Manifest
from fedge.engines.interpreters import stock_versions
from fedge.engines.probe import probe_engines
from fedge.errors import DataError, LinkError, PolicyError, WorkerDiedError
from fedge.wire import serde
from fedge.wire.v1 import link_pb2 as pb
from fedge_client import config as settings
from fedge_client import enroll, updater
from fedge_client.config import ClientConfig
from fedge_client.memory import Budget
from fedge_client.outbox import PERSONAL, Entry, Outbox
from fedge_client.state import Identity, State
from fedge_client.updater import Fetch
from fedge_client.workers import Workers, available

NO_DATA = "no data source is configured; set path and label in client.toml [data]"


@dataclass(frozen=True)
class Readiness:
    """What this device can do with a bundle.

    Attributes:
        bundle_digest: Which bundle.
        engine: The chosen engine.
        reason: Why that one.
        train_rows: Rows to train on; 0 without a data source.
        test_rows: Rows held out.
    """

    bundle_digest: str
    engine: str
    reason: str
    train_rows: int = 0
    test_rows: int = 0


@dataclass(frozen=True)
class SignedUpload:
    """An update ready to go: its header and its file."""

    header: pb.UploadHeader
    path: Path


class Desk:
    """Does the tasks of one client.

    Args:
        state: Its folder.
        identity: Who it is.
        config: Its settings.
        outbox: Where finished updates go; None where nothing may leave (personal mode).
    """

    def __init__(
        self, state: State, identity: Identity, config: ClientConfig, outbox: Outbox | None = None
    ) -> None:
        self._state, self._identity, self._config = state, identity, config
        self._workers = Workers(config.engine)
        self._budget = Budget(config.engine)
        self.outbox = outbox
        self.ready: Readiness | None = None
        self.fetch: Fetch = _offline

    @property
    def has_data(self) -> bool:
        """Whether a data source is configured."""
        return self._config.data is not None

    async def prepare(self, digest: str) -> Readiness:
        """Fetch a bundle, choose the engine, read the data once.

        Raises:
            DataError: If the data do not fit the bundle.
            ArtifactError: If the bundle is not right.
            EngineUnavailableError: If no engine can run it.
        """
        if self.ready is not None and self.ready.bundle_digest == digest:
            return self.ready
        manifest = await self._bundle(digest)
        engine, reason = await self.choose_engine(manifest)
        rows = await self._describe(digest, engine)
        self.ready = Readiness(digest, engine, reason, *rows)
        return self.ready

    async def choose_engine(self, manifest: Manifest) -> tuple[str, str]:
        """The engine for a bundle and why; probed once and remembered."""
        config = self._config.engine
        if config.name != "auto" and not config.providers:
            return config.name, "set in client.toml"
        known = self._state.read_json("engines.json") or {}
        what = (*available(config), *config.providers, stock_versions())
        key = f"{manifest.digest}/{config.threads}/{','.join(what)}"
        if key not in known:
            bundle = Bundle(self._state.bundle(manifest.digest), manifest)
            how = (config.training_python or None, config.name, config.providers)
            report = await asyncio.to_thread(probe_engines, bundle, config.threads, *how)
            step_s = report.per_engine[report.engine].step_s
            known[key] = [report.engine, report.reason, step_s]
            self._state.write_json("engines.json", known)
        return known[key][0], known[key][1]

    async def do(self, task: pb.Task) -> tuple[pb.DeviceEvent | None, str]:
        """Do one task.

        Returns:
            The answer to send, None where it went into the outbox, and a line of progress.

        Raises:
            PolicyError: In personal mode.
            DataError: If the data do not fit.
            FedgeError: If it cannot be done for another reason.
        """
        if self.outbox is None:
            raise PolicyError("this client is in personal mode: it answers no tasks")
        if task.kind == pb.TASK_KIND_TRAIN:
            return None, await self._train(task, self.outbox)
        return await self._small(task)

    async def keep_model(self, model: pb.ModelReady, tasks: Sequence[pb.Task]) -> None:
        """Have the newest global model here, and nothing older that no waiting task needs."""
        serde.check_digest("bundle", model.bundle_digest)
        serde.check_digest("params", model.params_digest)
        manifest = await self._bundle(model.bundle_digest)
        await self._params(model.params_digest, manifest)
        self._state.write_json(
            "model.json",
            {
                "bundle": model.bundle_digest,
                "params": model.params_digest,
                "round_num": model.round_num,
                "received_s": time.time(),
            },
        )
        ready = {self.ready.bundle_digest} if self.ready is not None else set()
        updater.prune(
            self._state,
            {model.bundle_digest, *ready, *(t.bundle_digest for t in tasks)},
            {model.params_digest, *(t.params_digest for t in tasks)},
        )

    def signed(self, entry: Entry) -> SignedUpload:
        """An update with its header, signed by this device's update key.

        Raises:
            PolicyError: In personal mode.
        """
        if self.outbox is None:
            raise PolicyError("this client is in personal mode: it uploads nothing")
        update_id = self.outbox.update_id(entry)
        header = pb.UploadHeader(
            task_id=entry.task_id,
            update_id=update_id.hex(),
            digest=entry.digest,
            total_bytes=entry.bytes,
            signature=enroll.update_key(self._state).sign(update_id),
        )
        return SignedUpload(header, self.outbox.path(entry))

    def delivered(self, entry: Entry) -> None:
        """The server has judged this update."""
        if self.outbox is not None:
            self.outbox.remove(entry)

    def abort(self) -> None:
        """End the job that runs in the worker."""
        self._workers.abort()

    async def close(self) -> None:
        """End the worker."""
        await self._workers.close()

    async def call(
        self, name: str, digest: str, job: dict[str, Any]
    ) -> tuple[str, dict[str, Any], list[bytes]]:
        """Have the worker do something with a bundle that is here.

        Returns:
            The engine that did it, the answer, and its blobs.
        """
        manifest = read_manifest(self._state.bundle(digest), self._identity.signer)
        engine, _ = await self.choose_engine(manifest)
        frugal = self._frugal(manifest, name, job.get("config", {}))
        job = {**self._job(digest, engine), **job, "frugal": dataclasses.asdict(frugal)}
        return engine, *await self._workers.call(name, job, engine)

    def _frugal(self, manifest: Manifest, name: str, overrides: dict[str, Any]) -> Frugal:
        size = manifest.train.override(overrides).batch_size
        rows = 0 if self.ready is None else self.ready.train_rows + self.ready.test_rows
        wanted = self._budget.plan if name in ("train", "personalize") else self._budget.scoring
        return wanted(manifest, size, rows)

    async def _train(self, task: pb.Task, outbox: Outbox) -> str:
        if outbox.delivered(task.task_id):
            return "its update was delivered before"
        if task.task_id in outbox:
            return "its update waits in the outbox"
        self._require_data()
        manifest = await self._bundle(task.bundle_digest)
        params = await self._params(task.params_digest, manifest)
        work = self._state.scratch("train")
        _, answer, _ = await self.call(
            "train",
            task.bundle_digest,
            {
                "params": str(params),
                "round_num": task.round_num,
                "config": serde.decode_config(task.config_json),
                "mode": self._identity.mode,
                "out": str(work),
            },
        )
        with _judging_the_worker():
            loss = answer["metrics"].get("train_loss")
            shown = "" if loss is None else f", loss {loss:.4f}"
            outbox.commit(work, task.task_id, task.bundle_digest, task.round_num)
            return f"trained on {answer['num_examples']} rows{shown}"

    async def _small(self, task: pb.Task) -> tuple[pb.DeviceEvent, str]:
        self._require_data()
        manifest = await self._bundle(task.bundle_digest)
        job: dict[str, Any] = {}
        name = "statistics"
        if task.kind == pb.TASK_KIND_EVALUATE:
            name = "evaluate"
            job["params"] = str(await self._params(task.params_digest, manifest))
        _, answer, blobs = await self.call(name, task.bundle_digest, job)
        with _judging_the_worker():
            result = pb.TaskResult(
                task_id=task.task_id,
                num_examples=answer["num_examples"],
                metrics=answer["metrics"],
                tensors=blobs[0] if blobs else b"",
            )
        serde.check_result(result)
        shown = ", ".join(f"{n} {v:.4f}" for n, v in sorted(result.metrics.items()))
        line = f"{name} over {result.num_examples} rows" + (f": {shown}" if shown else "")
        return pb.DeviceEvent(result=result), line

    async def _bundle(self, digest: str) -> Manifest:
        engines = available(self._config.engine)
        return await updater.fetch_bundle(
            self._state, digest, self._identity.signer, engines, self.fetch
        )

    async def _params(self, digest: str, manifest: Manifest) -> Path:
        limit = serde.max_update_bytes(manifest.shared_shapes())
        return await updater.fetch_blob(self._state, digest, limit, self.fetch)

    async def _describe(self, digest: str, engine: str) -> tuple[int, int]:
        """Rows for training and held-out tests; read again only when the file has changed."""
        data = self._config.data
        if data is None:
            return 0, 0
        data.require_file()
        found = Path(data.path).stat()
        key = [digest, repr(data), found.st_mtime_ns, found.st_size]
        known = self._state.read_json("data.json") or {}
        if known.get("key") != key:
            answer, _ = await self._workers.call("describe", self._job(digest, engine), engine)
            with _judging_the_worker():
                rows = {part: int(answer[part]) for part in ("train", "test")}
            known = {"key": key, **rows}
            self._state.write_json("data.json", known)
        return known["train"], known["test"]

    def _job(self, digest: str, engine: str) -> dict[str, Any]:
        data = self._config.data
        return {
            "bundle": str(self._state.bundle(digest)),
            "digest": digest,
            "engine": engine,
            "threads": self._config.engine.threads,
            "client_id": self._identity.client_id,
            "data": None if data is None else settings.as_json(data),
            "personal": str(self._state.personal(digest) / PERSONAL),
        }

    def _require_data(self) -> None:
        if self._config.data is None:
            raise DataError(NO_DATA)


@contextlib.contextmanager
def _judging_the_worker() -> Iterator[None]:
    """A worker may have been taken over: an answer that makes no sense is its end, not ours."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as exc:
        raise WorkerDiedError(f"the worker's answer makes no sense: {exc!r}") from exc


async def _offline(digest: str, receiver: serde.Receiver) -> None:
    del receiver
    raise LinkError(f"{digest[:12]}… is not on this device and there is no connection to fetch it")
