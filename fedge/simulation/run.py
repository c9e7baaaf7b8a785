"""What a simulated run leaves behind: params, a table, a picture, a model file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import rounds
from fedge.artifacts.bundle import Bundle
from fedge.data.scaling import site_stats
from fedge.errors import ConfigError
from fedge.exporting import export
from fedge.rounds import Event, Row
from fedge.types import ClientData, ClientId, Params

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TRAINING = ("num_examples", "train_loss")
_SCORES = ("test_examples", "loss", "accuracy", "rmse", "concordance", "auc")
_TRAFFIC = ("bytes_up", "bytes_down", "seconds")
COLUMNS = ("round", "client_id", *_TRAINING, *_SCORES, *_TRAFFIC)


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run.

    Attributes:
        bundle: What the clients ran.
        params: The bundle's params with the last round's shared ones; every client's personal
            params are in ``personal``.
        personal: Client -> its personal params; empty where the bundle shares everything.
        events: The run's journal.
        clients: Who took part.
    """

    bundle: Bundle
    params: Params
    personal: dict[ClientId, Params]
    events: tuple[Event, ...]
    clients: Sequence[ClientData]

    def __repr__(self) -> str:
        done = sum(isinstance(e, rounds.RoundCommitted) for e in self.events)
        return f"Run({self.bundle!r}, {done} rounds, {len(self.clients)} clients)"

    @property
    def table(self) -> pd.DataFrame:
        """One line per round and client.

        Columns: round, client_id, num_examples, train_loss, test_examples, loss, accuracy (or
        rmse), auc where there are two classes, bytes_up (of the update), bytes_down (of params, for
        training and for scoring), seconds. A value is NaN where
        the client was not asked, or its reply did not count. A client of which no reply counted in
        a round, trained or scored, has no line there: the events' ``dropped`` say why, and
        :attr:`metrics` how many.
        """
        import pandas as pd

        frame = pd.DataFrame(client_rows(self.events), columns=list(COLUMNS))
        unused = [c for c in ("accuracy", "rmse", "concordance", "auc") if frame[c].isna().all()]
        whole = ("num_examples", "test_examples", "bytes_up", "bytes_down")
        return frame.drop(columns=unused).astype(dict.fromkeys(whole, "Int64"))

    @property
    def metrics(self) -> pd.DataFrame:
        """One line per round.

        Columns: round, clients, dropped, the strategy's means (train_loss, loss, accuracy or
        rmse), the worst client's score (worst_accuracy or worst_rmse), bytes_up, bytes_down.
        """
        import pandas as pd

        return pd.DataFrame(round_rows(self.events))

    def plot(self) -> Figure:
        """A figure: the score per round (mean and worst client), and the bytes sent so far."""
        from fedge.simulation.plot import plot_rounds

        return plot_rounds(self.metrics, self.bundle.manifest.name)

    def export(self, path: str | Path, client_id: ClientId | None = None) -> Path:
        """Write the model as one ONNX file, preprocessing included.

        Args:
            path: File to write.
            client_id: Take this client's personal params and, where scaling is per site, its
                statistics. Needed where params are personal or scaling is per site.

        Raises:
            ConfigError: If there is no such client, or none is named and there are personal params.
            DataError: If scaling is per site and no client is named.
        """
        if client_id is None:
            if self.personal:
                names = ", ".join(self.bundle.manifest.personal)
                raise ConfigError(f"{names} belong to the clients; say whose: client_id=…")
            return export(self.bundle, self.params, path)
        data = {c.client_id: c for c in self.clients}.get(client_id)
        if data is None:
            known = ", ".join(c.client_id for c in self.clients)
            raise ConfigError(f"client {client_id!r} took no part; there are {known}")
        params = {**self.params, **self.personal.get(client_id, {})}
        site = site_stats(data.train) if self.bundle.manifest.scaling == "site" else None
        return export(self.bundle, params, path, site=site)


def client_rows(events: Sequence[Event]) -> list[Row]:
    """Training and scoring of each client and round in one row."""
    merged: dict[tuple[int, ClientId], Row] = {}
    for event in events:
        if not isinstance(event, (rounds.RoundCommitted, rounds.RoundEvaluated)):
            continue
        scores = isinstance(event, rounds.RoundEvaluated)
        for row in event.rows:
            key = (event.round_num, row["client_id"])
            into = merged.setdefault(key, {"round": key[0], "client_id": key[1]})
            _merge(into, row, scores)
    return [merged[key] for key in sorted(merged)]


def round_rows(events: Sequence[Event]) -> list[dict[str, Any]]:
    """What each round came to."""
    traffic: dict[int, list[Row]] = {}
    for row in client_rows(events):
        traffic.setdefault(row["round"], []).append(row)
    out: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, rounds.RoundCommitted):
            rows = traffic.get(event.round_num, [])
            out[event.round_num] = {
                "round": event.round_num,
                "clients": len(event.rows),
                "dropped": len(event.dropped),
                **event.metrics,
                **_worst(rows),
                **{n: int(sum(r.get(n, 0) for r in rows)) for n in ("bytes_up", "bytes_down")},
            }
        elif isinstance(event, rounds.RoundEvaluated):
            out[event.round_num].update({**_concordance(event.rows), **event.metrics})
    return list(out.values())


def _merge(into: Row, row: Row, scores: bool) -> None:
    for name, value in row.items():
        if name == "num_examples" and scores:
            into["test_examples"] = value
        elif name in _TRAFFIC:
            into[name] = into.get(name, 0) + value
        else:
            into[name] = value


def _concordance(rows: Sequence[Row]) -> dict[str, float]:
    """Mean over the rows of clients that have one: some have no pair to compare."""
    scored = [r for r in rows if "concordance" in r]
    total = sum(r["num_examples"] for r in scored)
    summed = sum(r["concordance"] * r["num_examples"] for r in scored)
    return {"concordance": summed / total} if scored else {}


def _worst(rows: Sequence[Row]) -> dict[str, float]:
    for name, pick in (("accuracy", min), ("rmse", max), ("concordance", min)):
        values = [r[name] for r in rows if name in r]
        if values:
            return {f"worst_{name}": pick(values)}
    return {}
