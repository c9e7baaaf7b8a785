"""A site's data: read as meant, or refused in one line that holds no value."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge.artifacts.manifest import (
    FileEntry,
    LabelSpec,
    Manifest,
    Optimizer,
    ParamSpec,
    TensorSpec,
)
from fedge.config import TrainConfig
from fedge.errors import DataError
from fedge_client import sources
from fedge_client.config import DataConfig

COLUMNS = ("age", "dose", "rate")
SECRET = "73.25"  # stands in every file; no message may show it


def manifest(
    *,
    shape: tuple[int | str, ...] = ("N", 3),
    dtype: str = "float32",
    labels: LabelSpec | None = None,
) -> Manifest:
    inputs = (TensorSpec("x", dtype, shape),)
    files = ("evaluate.onnx", "infer.onnx", "preprocess.onnx", "params.safetensors")
    return Manifest(
        name="m",
        loss="bce_with_logits",
        optimizer=Optimizer("sgd"),
        train=TrainConfig(),
        raw_inputs=inputs,
        inputs=inputs,
        outputs=(TensorSpec("logit", "float32", ("N", 1)),),
        labels=labels or LabelSpec("labels", "float32", ("N", 1), 0.0, 1.0),
        params=(ParamSpec("w", "float32", (3, 1)),),
        state=(),
        engines={"ort": ""},
        scaling="none",
        files={n: FileEntry(1, "0" * 64) for n in files},
        signer="0" * 64,
    )


CLASSES = LabelSpec("labels", "int64", ("N",), 0, 2)
GOOD = ["age,dose,rate,sick", f"{SECRET},1,2,0", "50,1.5,2,1", "60,2,2.5,1", "70,0,0,0"]


def write(folder: Path, lines: list[str]) -> DataConfig:
    path = folder / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return DataConfig(str(path), "sick", test_fraction=0.25)


def test_a_csv_becomes_rows(tmp_path: Path) -> None:
    data = sources.load(write(tmp_path, GOOD), manifest())
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (3, 1)
    rows = np.concatenate([data.train.inputs["x"], data.test.inputs["x"]])
    assert rows.dtype == np.float32
    assert sorted(rows[:, 0]) == [50, 60, 70, np.float32(SECRET)]
    assert data.train.labels.shape == (3, 1)
    assert data.train.labels.dtype == np.float32


def test_columns_are_taken_in_the_order_named(tmp_path: Path) -> None:
    config = write(tmp_path, GOOD)
    config = DataConfig(config.path, "sick", columns=("rate", "age", "dose"), test_fraction=0)
    data = sources.load(config, manifest())
    assert data.test is None
    np.testing.assert_array_equal(data.train.inputs["x"][1], [2, 50, 1.5])


def test_a_wide_table_does_not_take_for_ever(tmp_path: Path) -> None:
    width = 60_000
    header = ",".join(f"gene{i}" for i in range(width)) + ",sick"
    rows = [",".join(["1"] * width) + f",{i % 2}" for i in range(2)]
    began = time.process_time()
    data = sources.load(write(tmp_path, [header, *rows]), manifest(shape=("N", width)))
    assert len(data.train) + (0 if data.test is None else len(data.test)) == 2
    assert time.process_time() - began < 10


def test_the_split_column_decides(tmp_path: Path) -> None:
    lines = [
        f"{line},{part}" for line, part in zip(GOOD, ["part", *["train", "test"] * 2], strict=True)
    ]
    config = DataConfig(write(tmp_path, lines).path, "sick", split="part")
    data = sources.load(config, manifest())
    assert data.test is not None
    np.testing.assert_array_equal(data.test.inputs["x"][:, 0], [50, 70])


def test_the_drawn_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    lines = ["a,b,c,sick", *(f"{i},0,0,{i % 2}" for i in range(40))]
    config = write(tmp_path, lines)
    first, again = sources.load(config, manifest()), sources.load(config, manifest())
    np.testing.assert_array_equal(first.train.inputs["x"], again.train.inputs["x"])
    other = DataConfig(config.path, "sick", test_fraction=0.25, seed=1)
    moved = sources.load(other, manifest())
    assert not np.array_equal(first.train.inputs["x"], moved.train.inputs["x"])
    assert len(first.train) == 30


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "is empty"),
        (["age,dose,rate,sick"], "has no rows"),
        (["age,dose,sick", f"{SECRET},1,0"], "2 input columns (age, dose); the model takes 3"),
        (
            ["age,dose,rate,ill", f"{SECRET},1,2,0"],
            "lacks the column sick; it has age, dose, rate, ill",
        ),
        (["age,age,rate,sick", f"{SECRET},1,2,0"], "names the column age twice"),
        ([*GOOD, f"1,{SECRET}x,2,0"], "line 6, column 'dose' is not a number"),
        ([*GOOD, f"{SECRET},1,,0"], "line 6, column 'rate' is empty"),
        ([*GOOD, f"{SECRET},nan,1,0"], "line 6, column 'dose' is NaN or infinite"),
        ([*GOOD, f"{SECRET},inf,1,0"], "line 6, column 'dose' is NaN or infinite"),
        ([*GOOD, f"{SECRET},1e300,1,0"], "line 6, value 2 of 'x' is NaN or infinite"),
        ([*GOOD, f"1,2,3,{SECRET}"], "line 6: label 'sick' is out of range in 1 of 5 rows; wanted"),
        ([*GOOD, f"{SECRET},1,2"], "line 6 has 3 cells, the header 4"),
    ],
)
def test_what_does_not_fit_is_one_line_without_values(
    tmp_path: Path, lines: list[str], says: str
) -> None:
    config = write(tmp_path, lines)
    if not lines:
        Path(config.path).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        sources.load(config, manifest())
    message = str(caught.value)
    assert says in message
    assert message.startswith("rows.csv ")
    assert SECRET not in message
    assert "\n" not in message


def test_classes_must_be_whole_and_in_range(tmp_path: Path) -> None:
    wanted = manifest(labels=CLASSES)
    assert sources.load(write(tmp_path, GOOD), wanted).train.labels.dtype == np.int64
    for cell in ("3", "-1", "0.5"):
        with pytest.raises(DataError, match="wanted a whole number from 0 to 2"):
            sources.load(write(tmp_path, [*GOOD, f"1,2,3,{cell}"]), wanted)


def test_a_missing_file_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        sources.load(DataConfig(str(tmp_path / "none.csv"), "sick"), manifest())
    (tmp_path / "rows.csv").write_bytes(b"a,b\xff\xfe,c\n")
    with pytest.raises(DataError, match="not UTF-8"):
        sources.load(DataConfig(str(tmp_path / "rows.csv"), "sick"), manifest())


def test_every_row_may_not_be_held_out(tmp_path: Path) -> None:
    lines = ["age,dose,rate,sick,part", "1,2,3,0,test"]
    config = DataConfig(write(tmp_path, lines).path, "sick", split="part")
    with pytest.raises(DataError, match="leaves no row for training"):
        sources.load(config, manifest())
    Path(config.path).write_text("age,dose,rate,sick,part\n1,2,3,0,both\n")
    with pytest.raises(DataError, match="neither train nor test in 1 of 1 rows"):
        sources.load(config, manifest())


# npz


def save(folder: Path, **arrays: object) -> DataConfig:
    path = folder / "rows.npz"
    np.savez(path, **{n: np.asarray(a) for n, a in arrays.items()})
    return DataConfig(str(path), "y", test_fraction=0)


@given(
    rows=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 9), st.just(3)), elements=st.floats(-9, 9, width=32)
    )
)
def test_an_npz_gives_back_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray
) -> None:
    config = save(tmp_path_factory.mktemp("npz"), x=rows, y=np.arange(len(rows)) % 2)
    data = sources.load(config, manifest())
    np.testing.assert_array_equal(data.train.inputs["x"], rows)


def test_npz_images_and_named_splits(tmp_path: Path) -> None:
    x = np.arange(2 * 4, dtype=np.uint8).reshape(2, 1, 2, 2)
    config = save(tmp_path, pixels=x, y=[0, 1], part=["test", "train"])
    config = DataConfig(config.path, "y", columns=("pixels",), split="part")
    data = sources.load(config, manifest(shape=("N", 1, 2, 2)))
    assert data.train.inputs["x"].shape == (1, 1, 2, 2)
    assert data.train.inputs["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((2, 3))}, "lacks the array y; it has x"),
        ({"z": np.zeros((2, 3)), "y": [0, 1]}, "lacks the array x; it has z, y"),
        ({"x": np.zeros((2, 4)), "y": [0, 1]}, "has 2x4 values for 'x'; wanted x [Nx3]"),
        ({"x": np.zeros((2, 3)), "y": [0, 1, 1]}, "arrays of different lengths"),
        ({"x": [[0, 0, np.nan]], "y": [0]}, "row 1, value 3 of 'x' is NaN"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0)}, "has no rows"),
        ({"x": [["a", "b", "c"]], "y": [0]}, "holds <U1 for 'x'"),
        ({"x": np.zeros((2, 3)), "y": [0, 7]}, "row 2: label 'y' is out of range"),
        ({"x": np.zeros((2, 3)), "y": [[0, 1], [1, 1]]}, "4 label values for 2 rows; wanted [Nx1]"),
    ],
)
def test_an_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, object], says: str) -> None:
    with pytest.raises(DataError) as caught:
        sources.load(save(tmp_path, **arrays), manifest())
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01\x00\xff\xff{'descr"]
)
def test_a_hostile_npz_is_a_data_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be read as NPZ"):
        sources.load(DataConfig(str(tmp_path / "rows.npz"), "y"), manifest())


def test_objects_in_an_npz_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.array([{}], dtype=object), y=[0])
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        sources.load(DataConfig(str(tmp_path / "rows.npz"), "y"), manifest())


def test_rows_to_predict_need_no_label(tmp_path: Path) -> None:
    config = write(tmp_path, ["age,dose,rate", "1,2,3", "4,5,6"])
    config = DataConfig(config.path, "sick", columns=COLUMNS)
    np.testing.assert_array_equal(
        sources.load_inputs(config, manifest())["x"], [[1, 2, 3], [4, 5, 6]]
    )


# --- Labels and inputs of other losses -----------------------------------------------------------

SURVIVAL = LabelSpec("labels", "float32", ("N", 2), 0.0)


def test_time_and_event_are_two_columns(tmp_path: Path) -> None:
    lines = ["age,dose,rate,days,died", f"{SECRET},1,2,30,0", "50,1,2,12.5,1"]
    path = write(tmp_path, lines).path
    config = DataConfig(path, "days, died", test_fraction=0)
    data = sources.load(config, manifest(labels=SURVIVAL))
    np.testing.assert_array_equal(data.train.labels, [[30, 0], [12.5, 1]])
    assert data.train.inputs["x"].shape == (2, 3)
    with pytest.raises(DataError, match="lacks the column death"):
        sources.load(DataConfig(path, "days,death"), manifest(labels=SURVIVAL))
    with pytest.raises(DataError, match="has 2 label values for 2 rows"):
        sources.load(
            DataConfig(path, "died", columns=("age", "dose", "rate")), manifest(labels=SURVIVAL)
        )


def test_an_ignored_label_is_in_range(tmp_path: Path) -> None:
    lines = [GOOD[0], "1,2,3,-1", "1,2,3,2"]
    config = DataConfig(write(tmp_path, lines).path, "sick", test_fraction=0)
    with pytest.raises(DataError, match="out of range in 1 of 2 rows"):
        sources.load(config, manifest(labels=CLASSES))
    data = sources.load(config, manifest(labels=replace(CLASSES, ignore=-1)))
    np.testing.assert_array_equal(data.train.labels, [-1, 2])


def test_a_teachers_logits_come_from_npz(tmp_path: Path) -> None:
    extra = TensorSpec("teacher_logits", "float32", ("N", 1))
    asked = replace(manifest(), extras=(extra,))
    arrays = {"x": np.zeros((3, 3)), "sick": np.array([0, 1, 0])}
    path = tmp_path / "rows.npz"
    np.savez(path, teacher_logits=np.ones((3, 1)), **arrays)
    data = sources.load(DataConfig(str(path), "sick", format="npz", test_fraction=0), asked)
    assert data.train.inputs["teacher_logits"].dtype == np.float32
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="lacks the array teacher_logits"):
        sources.load(DataConfig(str(path), "sick", format="npz"), asked)
    with pytest.raises(DataError, match="also trains on teacher_logits: use NPZ"):
        sources.load(write(tmp_path, GOOD), asked)
