"""A running server: the link on an event loop, the training run in a thread beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
import time
from dataclasses import dataclass

from fedge_server.config import Settings
from fedge_server.grid import LinkGrid
from fedge_server.inbox import Inbox
from fedge_server.journal import StoreJournal
from fedge_server.link import Link, listen
from fedge_server.report import Reporter
from fedge_server.state import ServerState
from fedge_server.training import RunPlan, Training, plan_run

log = logging.getLogger(__name__)
TOKEN_USES, TOKEN_TTL_S = 100, 24 * 3600.0  # of the join line that a first start prints
GRACE_S = 1.0


@dataclass(frozen=True)
class Address:
    """Where devices find this server."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class App:
    """Ties store, link, grid and run together.

    Args:
        state: An open state folder, whose lock the caller holds.
        settings: What to listen on and what to run.
        reporter: Told what happens.
        again: Begin another run if the last one is finished.
        until_done: Leave once the run is finished, instead of going on serving the model.
        token: Whether to print a join line with a new token.
    """

    def __init__(
        self,
        state: ServerState,
        settings: Settings,
        reporter: Reporter,
        *,
        again: bool = False,
        until_done: bool = False,
        token: bool = True,
    ) -> None:
        self._state, self._settings, self._reporter = state, settings, reporter
        self._again, self._until_done, self._token = again, until_done, token
        self._stop = threading.Event()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or, if asked for, the end of the run.

        Raises:
            FedgeError: If the port cannot be had, or the run failed.
        """
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        state = self._state
        plan = plan_run(state, self._settings, again=self._again)
        state.blobs.clear_partial()
        state.registry.clear_partial()
        state.store.disconnect_all()
        max_norm = (plan.run if plan else self._settings.run).max_norm
        inbox = Inbox(state.store, state.blobs, state.registry, max_norm)
        inbox.forget_orphans()
        grid = LinkGrid(state.store, state.blobs)
        link = Link(state.fleet, state.store, state.registry, inbox, grid.on_answer)
        grid.notify = link.wake
        address = bind_address(state, self._settings)
        server, port = await listen(link, state.fleet, state.keys, address)
        remember_address(state, self._settings, port)
        leave = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leave.set)
        self._announce(plan)
        watcher = asyncio.create_task(link.watch_revocations())
        journal = StoreJournal(state.store, state.blobs, link.wake)
        runner = asyncio.create_task(self._train(plan, grid, journal, leave))
        try:
            await leave.wait()
        finally:
            self._stop.set()
            grid.stop()
            watcher.cancel()
            link.close()
            await server.stop(GRACE_S)
            await runner
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        self._reporter.say("stopped", "stopped")

    async def _train(
        self, plan: RunPlan | None, grid: LinkGrid, journal: StoreJournal, leave: asyncio.Event
    ) -> None:
        if plan is None:
            if self._until_done:
                leave.set()
            return
        self._reporter.follow(plan.run)
        training = Training(self._state, plan, grid, journal, self._reporter.observe, self._stop)
        try:
            finished = await asyncio.to_thread(training.run)
        except BaseException:
            leave.set()  # without its run the server is of no use; _serve raises what happened
            raise
        if finished:
            self._reporter.say("finished", f"{plan.run_id} is finished", run_id=plan.run_id)
            if self._until_done:
                leave.set()

    def _announce(self, plan: RunPlan | None) -> None:
        state, address = self._state, advertised(self._state)
        token = self._new_token(address) if self._token else ""
        text = f"listening on {address}; on each device, within 24 h:\n{join_line(address, token)}"
        if not token:
            more = f"fedge-server token create --state {state.path}"
            text = f"listening on {address}; to add a device: {more}"
        self._reporter.say(
            "ready",
            text,
            address=str(address),
            token=token,
            federation_id=state.fleet.federation_id,
            bundle=state.registry.newest(),
        )
        self._announce_model()
        if plan is None:
            text = "no run is due: serving the newest model; --again trains on"
            self._reporter.say("idle", text)
        else:
            self._announce_run(plan)

    def _announce_model(self) -> None:
        registry = self._state.registry
        digest = registry.newest()
        if digest is None:
            return
        manifest = registry.manifest(digest)
        columns = ", ".join(f"{s.name} {list(s.shape[1:])}" for s in manifest.raw_inputs)
        text = f"model {manifest.name} ({columns}; loss {manifest.loss}), bundle {digest[:12]}"
        self._reporter.say("model", text, name=manifest.name, loss=manifest.loss, bundle=digest)

    def _announce_run(self, plan: RunPlan) -> None:
        events = self._state.store.events(plan.run_id)
        done = sum(e["event"] == "RoundCommitted" for e in events)
        self._reporter.say(
            "run",
            f"{plan.run_id} {'continues' if done else 'starts'}: "
            f"{plan.run.rounds - done} of {plan.run.rounds} rounds to do, "
            f"waiting for {plan.run.min_clients} clients",
            run_id=plan.run_id,
            rounds=plan.run.rounds,
            done=done,
        )

    def _new_token(self, address: Address) -> str:
        made = self._state.fleet.create_token(
            address.host,
            address.port,
            uses=TOKEN_USES,
            ttl_s=TOKEN_TTL_S,
            tag="start",
            now_s=time.time(),
        )
        return made.encode()


def join_line(address: Address, token: str) -> str:
    """What to type on a device."""
    return f"fedge-client join {address} --token {token}"


def bind_address(state: ServerState, settings: Settings) -> str:
    """``host:port`` to listen on: as told, else where this federation listened before."""
    wish = settings.server
    before = json.loads(state.store.get_meta("listen") or "{}")
    port = wish.port
    if before and (port == 0 or "server.port" not in settings.given):
        port = before["port"]
    host = wish.host
    if before and "server.host" not in settings.given:
        host = before["host"]
    return str(Address(host, port))


def remember_address(state: ServerState, settings: Settings, port: int) -> None:
    """Keep where the server listens, for tokens and for the next start."""
    before = json.loads(state.store.get_meta("listen") or "{}")
    values = {
        "host": settings.server.host,
        "port": port,
        "advertise": settings.server.advertise or before.get("advertise", ""),
    }
    if before and "server.host" not in settings.given:
        values["host"] = before["host"]
    state.store.set_meta("listen", json.dumps(values))


def advertised(state: ServerState, default_port: int = 0) -> Address:
    """The address devices are told: the one given, else this machine's."""
    values = json.loads(state.store.get_meta("listen") or "{}")
    host = values.get("advertise") or values.get("host", "0.0.0.0")  # noqa: S104 - compared below
    if host in ("0.0.0.0", "::"):  # noqa: S104
        host = _own_address()
    return Address(host, values.get("port", default_port))


def _own_address() -> str:
    """The address this machine would use to reach others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
