"""The connection as a table: which event may come in which phase, and where it leads."""

from __future__ import annotations

from enum import Enum

from fedge.errors import LinkError


class Phase(Enum):
    """Where the connection to the server stands."""

    OFFLINE = "offline"
    CONNECTING = "connecting"
    GREETING = "greeting"
    ONLINE = "online"
    REFUSED = "refused"
    STOPPED = "stopped"


_P = Phase
TABLE: dict[tuple[Phase, str], Phase] = {
    (_P.OFFLINE, "dial"): _P.CONNECTING,
    (_P.CONNECTING, "opened"): _P.GREETING,  # the stream is open, Hello was sent
    (_P.GREETING, "welcome"): _P.ONLINE,
    # What a server may say once it has welcomed us.
    (_P.ONLINE, "task"): _P.ONLINE,
    (_P.ONLINE, "cancel"): _P.ONLINE,
    (_P.ONLINE, "heartbeat"): _P.ONLINE,
    (_P.ONLINE, "model"): _P.ONLINE,
    # Ends. A refusal is final: the device does not knock again by itself.
    (_P.CONNECTING, "lost"): _P.OFFLINE,
    (_P.GREETING, "lost"): _P.OFFLINE,
    (_P.ONLINE, "lost"): _P.OFFLINE,
    (_P.CONNECTING, "refused"): _P.REFUSED,
    (_P.GREETING, "refused"): _P.REFUSED,
    (_P.ONLINE, "refused"): _P.REFUSED,
    (_P.OFFLINE, "stop"): _P.STOPPED,
    (_P.CONNECTING, "stop"): _P.STOPPED,
    (_P.GREETING, "stop"): _P.STOPPED,
    (_P.ONLINE, "stop"): _P.STOPPED,
    (_P.REFUSED, "stop"): _P.REFUSED,
    (_P.STOPPED, "stop"): _P.STOPPED,
}


def step(phase: Phase, event: str) -> Phase:
    """The phase after ``event``.

    Raises:
        LinkError: If that event has no place in this phase: the server broke the protocol.
    """
    try:
        return TABLE[phase, event]
    except KeyError:
        allowed = ", ".join(sorted(e for p, e in TABLE if p is phase)) or "nothing"
        raise LinkError(f"{event!r} while {phase.value}; expected {allowed}") from None
