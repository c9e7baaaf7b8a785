"""Split rows over clients, evenly or as unevenly as the field's papers do."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from fedge.errors import ConfigError, DataError
from fedge.seeds import derive_seed
from fedge.types import Array, ClientData, Examples, Indices

MIN_ROWS = 2  # one to train on and one to hold out
MAX_DRAWS = 10_000
INPUT = "x"  # what the split rows are called in Examples.inputs
_Rng: TypeAlias = np.random.Generator


def partition(
    x: Array,
    y: Array,
    *,
    by: str = "dirichlet",
    alpha: float = 0.5,
    clients: int = 20,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> list[ClientData]:
    """Split rows over made-up clients; every row goes to exactly one of them.

    Args:
        x: Rows, [N, ...]; each client gets its part under the input name ``x``.
        y: Labels, [N, ...]; classes, that is whole numbers or texts, for ``dirichlet``.
        by: ``iid``: shuffled and cut evenly. ``dirichlet``: each class is spread over the clients
            in Dirichlet(alpha) proportions (Yurochkin et al., ICML 2019, arXiv:1905.12022).
            ``shards``: sorted by label, cut into 2 · clients pieces, two pieces each (McMahan et
            al., AISTATS 2017, arXiv:1602.05629).
        alpha: Dirichlet concentration; 100 is almost even, 0.1 leaves a client one or two classes.
        clients: How many.
        seed: Fixes the split. The same arguments give the same split on every machine.
        test_fraction: Share of each client's rows held out in ``test``; 0 holds out none.

    Returns:
        Clients ``client-00``, ``client-01``, …, each with at least two rows.

    Raises:
        ConfigError: For an unknown ``by`` or a value out of range.
        DataError: If x and y differ in rows, there are too few rows for so many clients, or labels
            are no classes where classes are to be spread.
    """
    chosen = _SCHEMES.get(by)
    if chosen is None:
        raise ConfigError(f"by={by!r} is not a way to split; known: {', '.join(_SCHEMES)}")
    if not isinstance(clients, numbers.Integral) or clients < 1:
        raise ConfigError(f"clients={clients!r}; wanted a whole number, at least 1")
    if not isinstance(alpha, numbers.Real) or not 0 < alpha < np.inf:
        raise ConfigError(f"alpha={alpha!r}; wanted a number above 0")
    data = Examples({INPUT: np.asarray(x)}, np.asarray(y))
    if by == "dirichlet" and not _are_classes(data.labels):
        raise DataError(
            "by='dirichlet' spreads classes; these labels are not whole numbers: give classes, or "
            "by='iid' or 'shards'"
        )
    if len(data) < MIN_ROWS * clients:
        raise DataError(
            f"{len(data)} rows for {clients} clients; wanted at least {MIN_ROWS * clients} rows"
        )
    parts = chosen(data.labels, clients, alpha, _rng(seed, "partition", by))
    width = max(2, len(str(clients - 1)))
    return [
        hold_out(f"client-{i:0{width}d}", data.take(np.sort(rows)), test_fraction, seed)
        for i, rows in enumerate(parts)
    ]


def by_site(
    x: Array, y: Array, site: Array, *, test_fraction: float = 0.2, seed: int = 0
) -> list[ClientData]:
    """Split rows by where they come from.

    Args:
        x: Rows, [N, ...].
        y: Labels, [N, ...].
        site: Name or number of each row's site, [N]; its text becomes the client id.
        test_fraction: Share of each site's rows held out.
        seed: Fixes which rows are held out.

    Returns:
        One client per site, in order of client id.

    Raises:
        DataError: If the arrays differ in rows or a site has a single row.
        ConfigError: If ``test_fraction`` is out of range.
    """
    data = Examples({INPUT: np.asarray(x)}, np.asarray(y))
    names = np.array([str(s) for s in np.asarray(site).ravel()])
    if len(names) != len(data):
        raise DataError(f"{len(names)} site names for {len(data)} rows; wanted one per row")
    return [
        hold_out(str(name), data.take(np.flatnonzero(names == name)), test_fraction, seed)
        for name in np.unique(names)
    ]


def hold_out(client_id: str, data: Examples, test_fraction: float, seed: int) -> ClientData:
    """Set a random share of a client's rows aside; both parts keep the order of the rows.

    Raises:
        ConfigError: If ``test_fraction`` is not in [0, 1).
        DataError: If fewer than two rows are there to split.
    """
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction}; wanted 0 <= test_fraction < 1")
    if test_fraction == 0:
        return ClientData(client_id, data)
    if len(data) < MIN_ROWS:
        raise DataError(f"{client_id} has {len(data)} rows; wanted at least {MIN_ROWS} to split")
    held = min(max(1, round(test_fraction * len(data))), len(data) - 1)
    order = _rng(seed, "hold-out", client_id).permutation(len(data))
    test, train = np.sort(order[:held]), np.sort(order[held:])
    return ClientData(client_id, data.take(train), data.take(test))


def _are_classes(labels: Array) -> bool:
    kind = labels.dtype.kind
    return kind in "biuUS" or (kind == "f" and bool((labels == np.floor(labels)).all()))


def _iid(labels: Array, clients: int, _alpha: float, rng: _Rng) -> list[Indices]:
    return np.array_split(rng.permutation(len(labels)), clients)


def _shards(labels: Array, clients: int, _alpha: float, rng: _Rng) -> list[Indices]:
    shuffled = rng.permutation(len(labels))
    ordered = shuffled[np.argsort(labels.ravel()[shuffled], kind="stable")]
    shards = np.array_split(ordered, 2 * clients)
    pairs = rng.permutation(2 * clients).reshape(clients, 2)
    return [np.concatenate([shards[a], shards[b]]) for a, b in pairs]


def _dirichlet(labels: Array, clients: int, alpha: float, rng: _Rng) -> list[Indices]:
    """Drawn again, as a whole, until every client has MIN_ROWS."""
    classes: list[Indices] = [np.flatnonzero(labels.ravel() == c) for c in np.unique(labels)]
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(clients, alpha), len(classes))
        counts = np.array([_counts(len(c), s) for c, s in zip(classes, shares, strict=True)])
        if counts.sum(axis=0).min() >= MIN_ROWS:
            return _deal(classes, counts, rng)
    raise DataError(
        f"no Dirichlet(alpha={alpha}) split of {len(labels)} rows gave each of {clients} clients "
        f"{MIN_ROWS} rows in {MAX_DRAWS} draws; use a larger alpha or fewer clients"
    )


def _counts(rows: int, shares: Array) -> Indices:
    cuts = np.floor(np.cumsum(shares) * rows).astype(np.int64)
    cuts[-1] = rows
    return np.asarray(np.diff(cuts, prepend=0))


def _deal(classes: list[Indices], counts: Array, rng: _Rng) -> list[Indices]:
    hands: list[list[Indices]] = [[] for _ in range(counts.shape[1])]
    for rows, shares in zip(classes, counts, strict=True):
        pieces = np.split(rng.permutation(rows), np.cumsum(shares)[:-1])
        for hand, piece in zip(hands, pieces, strict=True):
            hand.append(piece)
    return [np.concatenate(hand) for hand in hands]


def _rng(seed: int, *purpose: Any) -> _Rng:  # noqa: ANN401 - anything with a text
    return np.random.Generator(np.random.Philox(derive_seed(seed, *purpose)))


_SCHEMES: dict[str, Callable[[Array, int, float, _Rng], list[Indices]]] = {
    "dirichlet": _dirichlet,
    "iid": _iid,
    "shards": _shards,
}
