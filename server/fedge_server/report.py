"""What a running server says: one line per event, for a person, a log file or a program."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

from fedge import rounds
from fedge.config import RunConfig
from fedge.rounds import Event
from fedge.wire.serde import printable


class Reporter:
    """Prints events as they become durable.

    Args:
        as_json: One JSON object per line instead of text.
        out: Where to.
    """

    def __init__(self, as_json: bool, out: TextIO | None = None) -> None:
        self._json = as_json
        self._out = out or sys.stdout
        self._run = RunConfig()
        self._began_s = time.monotonic()
        self._committed: rounds.RoundCommitted | None = None

    def follow(self, run: RunConfig) -> None:
        """Events to come are this run's."""
        self._run = run

    def say(self, event: str, text: str, **values: object) -> None:
        """Print one event."""
        line = json.dumps({"event": event, **values}) if self._json else text
        print(printable(line), file=self._out, flush=True)

    def observe(self, event: Event) -> None:
        """Follow a run."""
        if isinstance(event, rounds.RoundStarted):
            self._began_s = time.monotonic()
        elif isinstance(event, rounds.RoundRetried):
            self.say(
                "retry",
                f"round {event.round_num} got {event.accepted} of {event.wanted} updates: again"
                f"{_dropped(event.dropped)}",
                round=event.round_num,
                accepted=event.accepted,
                wanted=event.wanted,
                dropped=event.dropped,
            )
        elif isinstance(event, rounds.RoundCommitted):
            self._committed = event
            if not self._run.evaluate:
                self._round(event, None)
        elif isinstance(event, rounds.RoundEvaluated) and self._committed is not None:
            self._round(self._committed, event)

    def _round(self, trained: rounds.RoundCommitted, scored: rounds.RoundEvaluated | None) -> None:
        values = round_values(trained, scored)
        seconds = round(time.monotonic() - self._began_s, 3)
        loss = values.get("loss", values.get("train_loss"))
        shown = [
            f"round {trained.round_num}/{self._run.rounds}",
            f"{len(values['clients'])} clients",
        ]
        if loss is not None:
            shown.append(f"loss {loss:.4f}")
        scores = ("accuracy", "rmse", "concordance")
        shown += [f"{n} {values[n]:.4f}" for n in scores if n in values]
        sent = int(sum(c.get("bytes_up", 0) for c in values["clients"]))
        shown += [f"{sent:,} bytes up", f"{seconds:.2f} s"]
        text = "  ".join(shown) + _dropped(trained.dropped)
        self.say("round", text, **values, seconds=seconds)


def round_values(
    trained: rounds.RoundCommitted, scored: rounds.RoundEvaluated | None
) -> dict[str, Any]:
    """A round as plain numbers, with one row per client: what it trained and how it scored."""
    clients = {str(row["client_id"]): dict(row) for row in trained.rows}
    for row in scored.rows if scored else ():
        mine = clients.setdefault(str(row["client_id"]), {"client_id": row["client_id"]})
        sent = mine.get("bytes_up", 0.0) + row.get("bytes_up", 0.0)
        trained_on = mine.get("num_examples", 0)
        mine.update(row, bytes_up=sent, num_examples=trained_on, num_test=row["num_examples"])
    metrics = {**trained.metrics, **(scored.metrics if scored else {})}
    metrics.pop("num-examples", None)
    return {
        "round": trained.round_num,
        **metrics,
        "clients": [clients[name] for name in sorted(clients)],
        "dropped": trained.dropped,
    }


def _dropped(reasons: dict[str, str]) -> str:
    if not reasons:
        return ""
    return "  without " + "; ".join(f"{c} ({r})" for c, r in sorted(reasons.items()))
