import csv
from pathlib import Path

import numpy as np
import pytest

from fedge.data import breast_cancer_hospitals, digits, heart_disease
from fedge.data.datasets import HEART_COLUMNS
from fedge.errors import ConfigError
from fedge.types import Array


@pytest.fixture
def data_folder(fedge_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDGE_DATA", str(fedge_data))
    return fedge_data


def _published(folder: Path, site: str, split: str) -> tuple[Array, Array]:
    with (folder / "heart_disease" / "flamby_split.csv").open() as handle:
        rows = [r for r in csv.DictReader(handle) if r["site"] == site and r["split"] == split]

    def column(row: dict[str, str], name: str) -> float:
        source, _, level = name.partition("_")
        value = float(row[source])
        return float(value == int(level)) if level else value

    x = np.array([[column(r, name) for name in HEART_COLUMNS] for r in rows], np.float32)
    return x, np.array([int(r["label"]) for r in rows])


def test_the_heart_split_is_flambys_row_by_row(data_folder: Path) -> None:
    clients = heart_disease()
    assert [c.client_id for c in clients] == ["cleveland", "hungarian", "switzerland", "va"]
    assert [len(c.train) for c in clients] == [199, 172, 30, 85]
    for client in clients:
        for part, split in ((client.train, "train"), (client.test, "test")):
            x, y = _published(data_folder, client.client_id, split)
            assert part is not None
            assert np.array_equal(part.inputs["x"], x)
            assert np.array_equal(part.labels, y)
            assert part.inputs["x"].dtype == np.float32
            assert part.labels.dtype == np.int64


def test_another_heart_split_has_the_same_rows_elsewhere(data_folder: Path) -> None:
    for fixed, drawn in zip(heart_disease(), heart_disease(split=1), strict=True):
        assert len(fixed.train) == len(drawn.train)
        assert not np.array_equal(fixed.train.inputs["x"], drawn.train.inputs["x"])
        rows = [
            np.concatenate([c.train.inputs["x"], c.test.inputs["x"]])
            for c in (fixed, drawn)
            if c.test is not None
        ]
        assert np.array_equal(*(np.unique(r, axis=0) for r in rows))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="'newest'; wanted 'flamby' or a number"):
        heart_disease("newest")


def test_the_made_up_hospitals_differ_in_size_and_prevalence() -> None:
    clients = breast_cancer_hospitals()
    sizes = {c.client_id: len(c.train) + len(c.test or []) for c in clients}
    assert sizes == {"east": 240, "north": 160, "south": 100, "west": 69}
    prevalence = [round(float(c.train.labels.mean()), 2) for c in clients]
    assert prevalence == [0.2, 0.45, 0.6, 0.46]
    rows = [p.inputs["x"] for c in clients for p in (c.train, c.test) if p is not None]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 569


def test_the_made_up_hospitals_depend_on_the_seed_alone() -> None:
    a, b, c = (breast_cancer_hospitals(s)[0].train.inputs["x"] for s in (3, 3, 4))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_digits_are_grey_values_and_classes() -> None:
    x, y = digits()
    assert x.shape == (1797, 64)
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert sorted(set(y.tolist())) == list(range(10))
