"""The connection table, edge by edge."""

from __future__ import annotations

import itertools

import pytest

from fedge.errors import LinkError
from fedge_client.phases import TABLE, Phase, step

EVENTS = sorted({event for _, event in TABLE})


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, EVENTS)))
def test_every_edge_is_in_the_table_or_refused(phase: Phase, event: str) -> None:
    if (phase, event) in TABLE:
        assert step(phase, event) is TABLE[phase, event]
    else:
        with pytest.raises(LinkError, match=phase.value):
            step(phase, event)


def test_a_usual_life() -> None:
    phase = Phase.OFFLINE
    for event in ("dial", "opened", "welcome", "task", "heartbeat", "model", "cancel"):
        phase = step(phase, event)
    assert phase is Phase.ONLINE
    assert step(step(phase, "lost"), "dial") is Phase.CONNECTING


def test_work_before_the_welcome_breaks_the_protocol() -> None:
    with pytest.raises(LinkError, match=r"'task' while greeting; expected .*welcome"):
        step(Phase.GREETING, "task")


def test_a_refusal_is_final() -> None:
    assert step(Phase.ONLINE, "refused") is Phase.REFUSED
    with pytest.raises(LinkError, match="dial"):
        step(Phase.REFUSED, "dial")


def test_every_phase_can_be_stopped() -> None:
    assert all((phase, "stop") in TABLE for phase in Phase)
