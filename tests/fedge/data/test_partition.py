from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.data import by_site, partition
from fedge.errors import ConfigError, DataError
from fedge.types import Array, ClientData


def _rows(n: int, classes: int) -> tuple[Array, Array]:
    return np.arange(n, dtype=np.float32)[:, None], np.arange(n) % classes


def _all_rows(clients: list[ClientData]) -> Array:
    parts = [c.train for c in clients] + [c.test for c in clients if c.test is not None]
    return np.sort(np.concatenate([p.inputs["x"][:, 0] for p in parts]))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["iid", "dirichlet", "shards"]),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_every_row_goes_to_exactly_one_client(by: str, count: int, classes: int, seed: int) -> None:
    x, y = _rows(200, classes)
    clients = partition(x, y, by=by, clients=count, seed=seed)
    assert len(clients) == count
    assert np.array_equal(_all_rows(clients), x[:, 0])
    for client in clients:
        assert len(client.train) >= 1
        assert client.test is not None
        assert len(client.test) >= 1
        rows = client.train.inputs["x"][:, 0].astype(int)
        assert np.array_equal(client.train.labels, y[rows])


def test_a_split_depends_on_its_seed_alone() -> None:
    x, y = _rows(300, 10)
    first, again, other = (partition(x, y, clients=5, seed=s) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.train.inputs["x"], b.train.inputs["x"])
    assert any(len(a.train) != len(b.train) for a, b in zip(first, other, strict=True))


def test_client_ids_sort_in_order() -> None:
    x, y = _rows(300, 3)
    ids = [c.client_id for c in partition(x, y, by="iid", clients=120)]
    assert ids == sorted(ids)
    assert ids[0] == "client-000"
    assert ids[-1] == "client-119"


def test_alpha_says_how_uneven_the_labels_are() -> None:
    x, y = _rows(4000, 10)

    def largest_share(alpha: float) -> float:
        clients = partition(x, y, alpha=alpha, clients=10, test_fraction=0)
        shares = [np.bincount(c.train.labels).max() / len(c.train) for c in clients]
        return float(np.mean(shares))

    assert largest_share(1000.0) < 0.15 < largest_share(1.0) < largest_share(0.1)


def test_shards_leave_a_client_few_classes() -> None:
    x, y = _rows(2000, 10)
    clients = partition(x, y, by="shards", clients=20, test_fraction=0)
    assert max(len(np.unique(c.train.labels)) for c in clients) <= 2


def test_sites_are_the_clients() -> None:
    x, y = _rows(30, 2)
    site = np.repeat(["b", "a", "c"], [6, 14, 10])
    clients = by_site(x, y, site, test_fraction=0.5)
    assert [(c.client_id, len(c.train)) for c in clients] == [("a", 7), ("b", 3), ("c", 5)]
    assert np.array_equal(_all_rows(clients), x[:, 0])


def test_nothing_is_held_out_where_nothing_is_asked() -> None:
    x, y = _rows(30, 2)
    assert all(c.test is None for c in partition(x, y, by="iid", clients=3, test_fraction=0))


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"by": "magic"}, ConfigError, "'magic' is not a way to split; known: dirichlet, iid"),
        ({"clients": 0}, ConfigError, "clients=0"),
        ({"alpha": 0.0}, ConfigError, "alpha=0.0"),
        ({"alpha": float("nan")}, ConfigError, "alpha=nan"),
        ({"test_fraction": 1.0}, ConfigError, "test_fraction is 1.0"),
        ({"clients": 40}, DataError, "60 rows for 40 clients; wanted at least 80"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    x, y = _rows(60, 3)
    with pytest.raises(error, match=says):
        partition(x, y, **settings)


def test_a_dirichlet_split_that_never_fits_is_an_error() -> None:
    x, y = _rows(100, 2)
    with pytest.raises(DataError, match="larger alpha or fewer clients"):
        partition(x, y, alpha=0.001, clients=40)


def test_rows_and_labels_must_match() -> None:
    with pytest.raises(DataError, match="differ in rows"):
        partition(np.zeros((4, 1)), np.zeros(3), clients=1)
    with pytest.raises(DataError, match="3 site names for 4 rows"):
        by_site(np.zeros((4, 1)), np.zeros(4), np.array(["a", "b", "c"]))
    with pytest.raises(DataError, match="b has 1 rows"):
        by_site(np.zeros((4, 1)), np.zeros(4), np.array(["a", "a", "a", "b"]))


@pytest.mark.parametrize("clients", [2.5, "3", None])
def test_a_number_of_clients_that_is_not_whole_is_refused(clients: Any) -> None:
    with pytest.raises(ConfigError, match="wanted a whole number"):
        partition(np.zeros((40, 2)), np.zeros(40, int), clients=clients)


def test_dirichlet_needs_classes() -> None:
    with pytest.raises(DataError, match="not whole numbers"):
        partition(np.zeros((40, 2)), np.linspace(0, 1, 40), clients=3)
    whole = partition(np.zeros((40, 2)), np.arange(40) % 2 * 1.0, clients=3, alpha=10)
    assert sum(len(c.train) for c in whole) > 0
