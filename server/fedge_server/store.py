"""The server's durable memory: one SQLite file (WAL, every commit fsynced).

The only module that knows SQLAlchemy. Each method is one transaction; the command line uses the
same file while the server runs. Times are Unix seconds by the server's clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from fedge.errors import StateError

SCHEMA = 1
_md = sa.MetaData()
_I, _S, _F, _B = sa.Integer, sa.String, sa.Float, sa.LargeBinary


def _table(name: str, *items: sa.schema.SchemaItem) -> sa.Table:
    return sa.Table(name, _md, *items)


def _c(name: str, kind: Any, **extra: Any) -> sa.Column[Any]:  # noqa: ANN401 - SQLAlchemy's own
    return sa.Column(name, kind, nullable=extra.pop("nullable", False), **extra)


_meta = _table("meta", _c("key", _S, primary_key=True), _c("value", _S))
_tokens = _table(
    "tokens",
    _c("token_id", _S, primary_key=True),
    _c("secret_hash", _S),
    _c("fingerprint", _S, unique=True),
    _c("cert_pem", _S),
    _c("tag", _S),
    _c("uses", _I),
    _c("uses_left", _I),
    _c("created_s", _F),
    _c("expires_s", _F),
    _c("spent_s", _F, nullable=True),
)
_nodes = _table(
    "nodes",
    _c("client_id", _S, primary_key=True),
    _c("mode", _S),
    _c("tag", _S),
    _c("token_id", _S),
    _c("key_hash", _S),
    _c("update_key", _B),
    _c("status", _S),
    _c("created_s", _F),
    _c("seen_s", _F),
    _c("connected", sa.Boolean),
    _c("engine", _S),
    _c("has_data", sa.Boolean),
    _c("num_examples", _I),
    _c("facts_json", _S),
)
_runs = _table(
    "runs",
    _c("run_id", _S, primary_key=True),
    _c("status", _S),
    _c("config_json", _S),
    _c("created_s", _F),
)
_events = _table(
    "events",
    _c("run_id", _S, primary_key=True),
    _c("seq", _I, primary_key=True, autoincrement=False),
    _c("json", _S),
)
_tasks = _table(
    "tasks",
    _c("task_id", _S, primary_key=True),
    _c("run_id", _S),
    _c("group_id", _S),
    _c("round_num", _I),
    _c("kind", _I),
    _c("client_id", _S),
    _c("bundle_digest", _S),
    _c("params_digest", _S),
    _c("config_json", _S),
    _c("state", _S),
    sa.Index("tasks_open", "client_id", "state"),
)
_results = _table(
    "results",
    _c("task_id", _S, primary_key=True),
    _c("client_id", _S),
    _c("update_id", _S),
    _c("digest", _S),
    _c("num_examples", _I),
    _c("metrics_json", _S),
    _c("tensors", _B),
    _c("error", _S),
    _c("size_bytes", _I),
    _c("received_s", _F),
)
_bundles = _table("bundles", _c("digest", _S, primary_key=True), _c("seq", _I), _c("created_s", _F))
_models = _table(
    "models",
    _c("run_id", _S, primary_key=True),
    _c("round_num", _I, primary_key=True, autoincrement=False),
    _c("bundle_digest", _S),
    _c("params_digest", _S),
)


@dataclass(frozen=True)
class TokenRow:
    """A join token as the server keeps it: its secret only as a hash."""

    token_id: str
    secret_hash: str
    fingerprint: str
    cert_pem: str
    tag: str
    uses: int
    uses_left: int
    created_s: float
    expires_s: float
    spent_s: float | None = None


@dataclass(frozen=True)
class NodeRow:
    """An admitted device; ``status`` is active or revoked."""

    client_id: str
    mode: str
    tag: str
    token_id: str
    key_hash: str
    update_key: bytes
    status: str
    created_s: float
    seen_s: float = 0.0
    connected: bool = False
    engine: str = ""
    has_data: bool = False
    num_examples: int = 0
    facts_json: str = "{}"


@dataclass(frozen=True)
class RunRow:
    """A training run; ``status`` is running, finished or failed."""

    run_id: str
    status: str
    config_json: str
    created_s: float


@dataclass(frozen=True)
class TaskRow:
    """One piece of work for one client; ``state`` is open, done or cancelled."""

    task_id: str
    run_id: str
    group_id: str
    round_num: int
    kind: int
    client_id: str
    bundle_digest: str
    params_digest: str
    config_json: str
    state: str = "open"


@dataclass(frozen=True)
class ResultRow:
    """The one answer to a task: an update (``digest``), small tensors and metrics, or an error."""

    task_id: str
    client_id: str
    received_s: float
    update_id: str = ""
    digest: str = ""
    num_examples: int = 0
    metrics_json: str = "{}"
    tensors: bytes = b""
    error: str = ""
    size_bytes: int = 0


@dataclass(frozen=True)
class ModelRow:
    """A committed global model."""

    run_id: str
    round_num: int
    bundle_digest: str
    params_digest: str


Row = TypeVar("Row", TokenRow, NodeRow, RunRow, TaskRow, ResultRow, ModelRow)


class Store:
    """Opens, and creates where absent, the server's database.

    Args:
        path: The SQLite file.

    Raises:
        StateError: If it is damaged or written by a newer fedge.
    """

    def __init__(self, path: Path) -> None:
        url = f"sqlite:///{path}"
        args = {"check_same_thread": False, "timeout": 30}
        self._write = sa.create_engine(url, connect_args=args)
        self._read = sa.create_engine(url, connect_args=args)
        for engine in (self._write, self._read):
            sa.event.listen(engine, "connect", _configure)
        sa.event.listen(self._write, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
        try:
            with self._writing() as db:
                _md.create_all(db)
                db.execute(_insert_or_ignore(_meta, {"key": "schema", "value": str(SCHEMA)}))
            found = self.get_meta("schema")
        except sa.exc.DatabaseError as exc:
            raise StateError(f"{path} is not a fedge database: {exc.orig}") from exc
        if found != str(SCHEMA):
            raise StateError(f"{path} has schema {found}, this fedge knows {SCHEMA}: upgrade fedge")
        path.chmod(0o600)

    def close(self) -> None:
        """Close all connections."""
        self._write.dispose()
        self._read.dispose()

    # -- meta ---------------------------------------------------------------------------------

    def get_meta(self, key: str) -> str | None:
        """A single remembered value."""
        with self._read.connect() as db:
            return db.scalar(sa.select(_meta.c.value).where(_meta.c.key == key))

    def set_meta(self, key: str, value: str) -> None:
        """Remember a single value."""
        with self._writing() as db:
            db.execute(_meta.delete().where(_meta.c.key == key))
            db.execute(_meta.insert().values(key=key, value=value))

    # -- tokens -------------------------------------------------------------------------------

    def add_token(self, token: TokenRow) -> None:
        """Remember a new token."""
        self._insert(_tokens, token)

    def tokens(self) -> list[TokenRow]:
        """All tokens, oldest first."""
        return self._all(TokenRow, sa.select(_tokens).order_by(_tokens.c.created_s))

    def token(self, fingerprint: str) -> TokenRow | None:
        """The token whose derived certificate has this SHA-256."""
        return self._one(TokenRow, sa.select(_tokens).where(_tokens.c.fingerprint == fingerprint))

    def drop_token(self, token_id: str) -> bool:
        """Delete a token; whether it existed."""
        with self._writing() as db:
            return db.execute(_tokens.delete().where(_tokens.c.token_id == token_id)).rowcount > 0

    # -- nodes --------------------------------------------------------------------------------

    def node(self, client_id: str) -> NodeRow | None:
        """One admitted device."""
        return self._one(NodeRow, sa.select(_nodes).where(_nodes.c.client_id == client_id))

    def nodes(self) -> list[NodeRow]:
        """All admitted devices, by name."""
        return self._all(NodeRow, sa.select(_nodes).order_by(_nodes.c.client_id))

    def add_node(self, node: NodeRow, now_s: float) -> str:
        """Admit a device and spend one use of its token, in one transaction.

        Returns:
            "admitted"; or, with nothing changed, "taken" if there is a node of that name, "spent"
            if the token has no use left.
        """
        with self._writing() as db:
            if db.scalar(sa.select(_nodes.c.mode).where(_nodes.c.client_id == node.client_id)):
                return "taken"
            left = db.scalar(
                sa.select(_tokens.c.uses_left).where(_tokens.c.token_id == node.token_id)
            )
            if not left:
                return "spent"
            spent = {"uses_left": left - 1, "spent_s": now_s if left == 1 else None}
            db.execute(_tokens.update().where(_tokens.c.token_id == node.token_id).values(spent))
            db.execute(_nodes.insert().values(_values(node)))
            return "admitted"

    def update_node(self, client_id: str, **changes: object) -> bool:
        """Change some columns of a node; whether it exists."""
        with self._writing() as db:
            where = _nodes.c.client_id == client_id
            return db.execute(_nodes.update().where(where).values(changes)).rowcount > 0

    def revoked(self) -> set[str]:
        """Names of the devices that were revoked."""
        query = sa.select(_nodes.c.client_id).where(_nodes.c.status == "revoked")
        with self._read.connect() as db:
            return set(db.scalars(query))

    def disconnect_all(self) -> None:
        """Mark every node as away: a server that just started has no sessions."""
        with self._writing() as db:
            db.execute(_nodes.update().values(connected=False))

    # -- runs and their events ----------------------------------------------------------------

    def add_run(self, run: RunRow) -> None:
        """Remember a new run."""
        self._insert(_runs, run)

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        return self._all(RunRow, sa.select(_runs).order_by(_runs.c.created_s, _runs.c.run_id))

    def set_run_status(self, run_id: str, status: str) -> None:
        """Move a run to finished or failed."""
        with self._writing() as db:
            db.execute(_runs.update().where(_runs.c.run_id == run_id).values(status=status))

    def append_event(
        self, run_id: str, event: dict[str, Any], model: ModelRow | None = None
    ) -> None:
        """Append to a run's journal, with the model that the event commits, if any."""
        with self._writing() as db:
            last = db.scalar(
                sa.select(sa.func.max(_events.c.seq)).where(_events.c.run_id == run_id)
            )
            row = {"run_id": run_id, "seq": (last or 0) + 1, "json": json.dumps(event)}
            db.execute(_events.insert().values(row))
            if model is not None:
                db.execute(_insert_or_ignore(_models, _values(model)))

    def events(self, run_id: str) -> list[dict[str, Any]]:
        """A run's journal, in order."""
        query = sa.select(_events.c.json).where(_events.c.run_id == run_id).order_by(_events.c.seq)
        with self._read.connect() as db:
            return [json.loads(text) for text in db.scalars(query)]

    # -- tasks and results --------------------------------------------------------------------

    def add_tasks(self, tasks: Sequence[TaskRow]) -> None:
        """Remember tasks; one that is known already stays as it is."""
        with self._writing() as db:
            for task in tasks:
                db.execute(_insert_or_ignore(_tasks, _values(task)))

    def task(self, task_id: str) -> TaskRow | None:
        """One task."""
        return self._one(TaskRow, sa.select(_tasks).where(_tasks.c.task_id == task_id))

    def open_tasks(self, client_id: str) -> list[TaskRow]:
        """A client's unanswered tasks."""
        t = _tasks.c
        where = (t.client_id == client_id) & (t.state == "open")
        return self._all(TaskRow, sa.select(_tasks).where(where).order_by(t.round_num, t.task_id))

    def tasks_of_run(self, run_id: str) -> list[TaskRow]:
        """All tasks of a run."""
        query = sa.select(_tasks).where(_tasks.c.run_id == run_id)
        return self._all(TaskRow, query.order_by(_tasks.c.round_num, _tasks.c.task_id))

    def cancel_tasks(self, task_ids: Sequence[str]) -> list[TaskRow]:
        """Close tasks that have no answer; returns those that were open."""
        t = _tasks.c
        with self._writing() as db:
            where = t.task_id.in_(task_ids) & (t.state == "open")
            rows = [_row(TaskRow, r) for r in db.execute(sa.select(_tasks).where(where))]
            db.execute(_tasks.update().where(where).values(state="cancelled"))
        return rows

    def add_result(self, result: ResultRow) -> str:
        """Record the answer to a task, once.

        Returns:
            "accepted"; "duplicate" if the task has its answer already; "late" if it was cancelled.
        """
        with self._writing() as db:
            where = _tasks.c.task_id == result.task_id
            state = db.scalar(sa.select(_tasks.c.state).where(where))
            if state != "open":
                return "duplicate" if state == "done" else "late"
            db.execute(_results.insert().values(_values(result)))
            db.execute(_tasks.update().where(where).values(state="done"))
            return "accepted"

    def closed(self, task_ids: Sequence[str]) -> set[str]:
        """Those of the tasks that are answered or cancelled."""
        t = _tasks.c
        query = sa.select(t.task_id).where(t.task_id.in_(task_ids) & (t.state != "open"))
        with self._read.connect() as db:
            return set(db.scalars(query))

    def result(self, task_id: str) -> ResultRow | None:
        """The answer to a task."""
        return self._one(ResultRow, sa.select(_results).where(_results.c.task_id == task_id))

    def results_of_run(self, run_id: str) -> list[ResultRow]:
        """All answers of a run."""
        join = sa.select(_results).join(_tasks, _tasks.c.task_id == _results.c.task_id)
        return self._all(ResultRow, join.where(_tasks.c.run_id == run_id))

    # -- bundles and models -------------------------------------------------------------------

    def add_bundle(self, digest: str, now_s: float) -> None:
        """Remember a bundle as the newest."""
        with self._writing() as db:
            last = db.scalar(sa.select(sa.func.max(_bundles.c.seq)))
            row = {"digest": digest, "seq": (last or 0) + 1, "created_s": now_s}
            db.execute(_bundles.delete().where(_bundles.c.digest == digest))
            db.execute(_bundles.insert().values(row))

    def bundles(self) -> list[str]:
        """Digests of all bundles, oldest first."""
        with self._read.connect() as db:
            return list(db.scalars(sa.select(_bundles.c.digest).order_by(_bundles.c.seq)))

    def models(self, run_id: str | None = None) -> list[ModelRow]:
        """Committed models, oldest first."""
        query = sa.select(_models).join(_runs, _runs.c.run_id == _models.c.run_id)
        if run_id is not None:
            query = query.where(_models.c.run_id == run_id)
        return self._all(ModelRow, query.order_by(_runs.c.created_s, _models.c.round_num))

    def drop_models(self, run_id: str, before: int) -> None:
        """Forget a run's models of rounds before ``before``."""
        m = _models.c
        with self._writing() as db:
            db.execute(_models.delete().where((m.run_id == run_id) & (m.round_num < before)))

    def newest_model(self) -> ModelRow | None:
        """The model committed last."""
        query = sa.select(_models).join(_runs, _runs.c.run_id == _models.c.run_id)
        newest = query.order_by(_runs.c.created_s.desc(), _models.c.round_num.desc())
        return self._one(ModelRow, newest)

    def may_download(self, client_id: str, digest: str) -> bool:
        """Whether params with this digest are a model, or belong to a task of this client."""
        t = _tasks.c
        model = sa.select(_models.c.round_num).where(_models.c.params_digest == digest)
        task = sa.select(t.round_num).where(
            (t.client_id == client_id) & (t.params_digest == digest)
        )
        with self._read.connect() as db:
            return db.scalar(sa.union_all(model, task).limit(1)) is not None

    # -- helpers ------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._write.begin() as db:
            yield db

    def _insert(self, table: sa.Table, row: Row) -> None:
        with self._writing() as db:
            db.execute(table.insert().values(_values(row)))

    def _one(self, kind: type[Row], query: sa.Select[Any]) -> Row | None:
        with self._read.connect() as db:
            found = db.execute(query.limit(1)).first()
        return None if found is None else _row(kind, found)

    def _all(self, kind: type[Row], query: sa.Select[Any]) -> list[Row]:
        with self._read.connect() as db:
            return [_row(kind, r) for r in db.execute(query)]


def _configure(connection: Any, record: object) -> None:  # noqa: ANN401, ARG001 - DB-API's own
    connection.isolation_level = None  # transactions begin where we say, with BEGIN IMMEDIATE
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _insert_or_ignore(table: sa.Table, values: dict[str, Any]) -> sa.Insert:
    return table.insert().prefix_with("OR IGNORE").values(values)


def _values(row: Row) -> dict[str, Any]:
    return {f.name: getattr(row, f.name) for f in fields(row)}


def _row(kind: type[Row], found: sa.Row[Any]) -> Row:
    values = found._mapping
    return kind(**{f.name: values[f.name] for f in fields(kind)})
