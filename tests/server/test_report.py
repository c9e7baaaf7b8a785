"""One line per round, for people and for programs."""

from __future__ import annotations

import io
import json

from fedge import rounds
from fedge.config import RunConfig
from fedge_server.report import Reporter, round_values

STARTED = rounds.RoundStarted(1, 1, ("a", "b"))
ROWS = (
    {"client_id": "b", "num_examples": 20, "train_loss": 0.4, "bytes_up": 100.0},
    {"client_id": "a", "num_examples": 10, "train_loss": 0.6, "bytes_up": 100.0},
)
COMMITTED = rounds.RoundCommitted(1, "p", "", {"train_loss": 0.5}, ROWS, {"c": "no reply"})
SCORES = (
    {"client_id": "a", "num_examples": 3, "loss": 0.3, "accuracy": 1.0, "bytes_up": 9.0},
    {"client_id": "b", "num_examples": 5, "loss": 0.2, "accuracy": 0.5, "bytes_up": 9.0},
)
EVALUATED = rounds.RoundEvaluated(1, {"loss": 0.25, "accuracy": 0.7}, SCORES)


def lines(as_json: bool, run: RunConfig, *events: rounds.Event) -> list[str]:
    out = io.StringIO()
    reporter = Reporter(as_json, out)
    reporter.follow(run)
    for event in events:
        reporter.observe(event)
    return out.getvalue().splitlines()


def test_a_round_is_one_line_of_text() -> None:
    (line,) = lines(False, RunConfig(rounds=7), STARTED, COMMITTED, EVALUATED)
    assert line.startswith("round 1/7  2 clients  loss 0.2500  accuracy 0.7000  218 bytes up")
    assert line.endswith("without c (no reply)")


def test_a_round_is_one_object_with_a_row_per_client() -> None:
    (line,) = lines(True, RunConfig(), STARTED, COMMITTED, EVALUATED)
    event = json.loads(line)
    assert (event["event"], event["round"], event["accuracy"]) == ("round", 1, 0.7)
    assert [c["client_id"] for c in event["clients"]] == ["a", "b"]
    assert event["clients"][0] == {
        "client_id": "a",
        "num_examples": 10,
        "num_test": 3,
        "train_loss": 0.6,
        "loss": 0.3,
        "accuracy": 1.0,
        "bytes_up": 109.0,
    }


def test_without_scores_a_round_ends_with_its_commit() -> None:
    (line,) = lines(False, RunConfig(evaluate=False), STARTED, COMMITTED)
    assert "loss 0.5000" in line
    assert round_values(COMMITTED, None)["clients"][1]["client_id"] == "b"


def test_a_retried_round_says_why() -> None:
    retried = rounds.RoundRetried(2, 1, 1, 2, {"b": "NaN"})
    (line,) = lines(False, RunConfig(), retried)
    assert line == "round 2 got 1 of 2 updates: again  without b (NaN)"


def test_a_device_that_only_scored_has_a_row_too() -> None:
    alone = rounds.RoundEvaluated(1, {}, ({"client_id": "z", "num_examples": 4, "loss": 1.0},))
    row = round_values(COMMITTED, alone)["clients"][-1]
    assert (row["client_id"], row["num_examples"], row["num_test"]) == ("z", 0, 4)
