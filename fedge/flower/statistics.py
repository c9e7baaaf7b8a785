"""One federated mean and variance: sites tell sums of their columns, nothing else."""

from __future__ import annotations

from flwr.app import Message, RecordDict

from fedge.data.scaling import MIN_ROWS, Moments, combine, moments
from fedge.errors import DataError, FedgeError
from fedge.flower import messages
from fedge.flower.grid import FleetGrid, Group
from fedge.flower.identity import ensure_identity
from fedge.types import Examples, Params


def collect_statistics(
    grid: FleetGrid, run_id: str, *, min_rows: int = MIN_ROWS, timeout_s: float = 600.0
) -> Moments:
    """Ask everybody who is there for the moments of its raw training rows, and add them up.

    Args:
        grid: Where the clients are.
        run_id: Names the request; asking again under the same name gets the same answers.
        min_rows: Sites with fewer rows are left out (they refuse by themselves, too).
        timeout_s: How long to wait for answers; those that are missing then are left out.

    Raises:
        DataError: If no site is left, or their columns differ.
    """
    ensure_identity()
    group = str(Group(run_id, 0, "statistics"))
    config = messages.instruction_config(0)
    ids = list(
        grid.push_messages(
            Message(
                RecordDict({messages.CONFIG: config}), node, messages.STATISTICS, group_id=group
            )
            for node in grid.get_node_ids()
        )
    )
    grid.wait(ids, timeout_s)
    answers = [m for m in grid.pull_messages(ids) if not m.has_error()]
    result = combine((_read(m) for m in answers), min_rows)
    grid.cancel(ids)
    return result


def answer_statistics(message: Message, raw: Examples, min_rows: int = MIN_ROWS) -> Message:
    """A client's answer.

    Raises:
        DataError: If it has fewer than ``min_rows`` rows, or its columns cannot be summed.
    """
    told, tensors = site_moments(raw, min_rows)
    return messages.metrics_reply(message, told, {}, tensors)


def site_moments(raw: Examples, min_rows: int = MIN_ROWS) -> tuple[int, Params]:
    """What a site tells: its number of rows, and ``sum`` and ``sumsq``, float64 [d].

    Raises:
        DataError: If it has fewer than ``min_rows`` rows, or its columns cannot be summed.
    """
    if len(raw) < min_rows:
        raise DataError(f"{len(raw)} rows are too few to tell sums of; wanted at least {min_rows}")
    told = moments(raw)
    return told.count, {"sum": told.sum, "sumsq": told.sumsq}


def _read(message: Message) -> Moments:
    arrays = messages.params_of(messages.arrays_in(message))
    try:
        return Moments(
            int(messages.metrics_in(message)[messages.WEIGHT]), arrays["sum"], arrays["sumsq"]
        )
    except (KeyError, ValueError) as exc:
        raise FedgeError(f"a site's statistics cannot be read: {exc!r}") from exc
