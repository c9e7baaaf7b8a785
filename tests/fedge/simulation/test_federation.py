"""The federation on real bundles and engines, in real worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from flwr.serverapp import strategy as flower
from onnx import TensorProto, helper, numpy_helper

import fedge
from fedge import rounds
from fedge.artifacts.preprocessing import SiteStandardize, Standardize
from fedge.artifacts.rescale import with_preprocessing
from fedge.data import breast_cancer_hospitals, combine, moments, site_stats
from fedge.engines import available_engines, find_training_python, open_engine
from fedge.errors import ConfigError, DataError, EngineError
from fedge.params import relative_distance
from fedge.simulation import Run
from fedge.simulation.grid import _three
from fedge.types import ClientData, ClientId, Metrics, Params

HOSPITALS = breast_cancer_hospitals(seed=0)


def mlp(inputs: int, hidden: int, outputs: int, seed: int = 0) -> Any:
    """Gemm, Relu, Gemm as an ONNX model, without torch."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (hidden, inputs), "b1": (hidden,), "w2": (outputs, hidden), "b2": (outputs,)}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["z"], transB=1),
            helper.make_node("Relu", ["z"], ["h"]),
            helper.make_node("Gemm", ["h", "w2", "b2"], ["logits"], transB=1),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", inputs])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", outputs])],
        [
            numpy_helper.from_array((0.1 * rng.standard_normal(s)).astype(np.float32), n)
            for n, s in shapes.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def bundle() -> fedge.Bundle:
    return fedge.build(
        mlp(30, 8, 1),
        loss="bce_with_logits",
        preprocessing=SiteStandardize(),
        train=fedge.TrainConfig(lr=0.2, batch_size=16, epochs=2),
    )


@pytest.fixture(scope="module")
def run(bundle: fedge.Bundle) -> Run:
    return fedge.Federation(bundle, HOSPITALS, engine="ort", workers=1).run(rounds=3)


def same(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def test_the_block_of_the_readme_works_on_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    monkeypatch.chdir(tmp_path)
    bundle = fedge.build(
        model,
        loss="cross_entropy",
        optimizer="sgd",
        sample=x[:1],
        train=fedge.TrainConfig(lr=0.1, batch_size=32, epochs=1),
    )
    clients = fedge.data.partition(x, y, by="dirichlet", alpha=0.5, clients=20, seed=0)
    run = fedge.Federation(bundle, clients, strategy=fedge.strategies.FedAvg(), seed=0).run(
        rounds=20
    )
    assert len(run.table) == 20 * 20
    assert run.metrics["accuracy"].iloc[-1] > 0.7 > 0.2 > run.metrics["accuracy"].iloc[0]
    assert len(run.plot().axes) == 2
    run.export("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x[:5]})
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(run.params[name]))
        wanted = model(torch.from_numpy(x[:5])).numpy()
    np.testing.assert_allclose(got[0], wanted, rtol=1e-4, atol=1e-5)


def test_the_table_has_a_line_per_round_and_client(run: Run) -> None:
    table = run.table
    assert list(table.columns) == [
        "round",
        "client_id",
        "num_examples",
        "train_loss",
        "test_examples",
        "loss",
        "accuracy",
        "auc",
        "bytes_up",
        "bytes_down",
        "seconds",
    ]
    assert len(table) == 3 * 4
    assert not table.isna().any().any()
    assert list(table["client_id"][:4]) == ["east", "north", "south", "west"]
    assert list(table["num_examples"][:4]) == [len(c.train) for c in HOSPITALS]
    size = sum(v.nbytes for v in run.params.values())
    assert (table["bytes_up"] > size).all()
    assert (table["bytes_down"] > 2 * size).all()


def test_the_metrics_have_a_line_per_round(run: Run) -> None:
    table, metrics = run.table, run.metrics
    last = table[table["round"] == 3]
    assert list(metrics["round"]) == [1, 2, 3]
    assert metrics["worst_accuracy"].iloc[-1] == last["accuracy"].min()
    assert metrics["bytes_up"].iloc[-1] == last["bytes_up"].sum()
    expected = np.average(last["accuracy"], weights=last["test_examples"].astype(float))
    assert metrics["accuracy"].iloc[-1] == pytest.approx(expected)
    assert metrics["train_loss"].is_monotonic_decreasing


def test_the_picture_shows_mean_and_worst(run: Run) -> None:
    scores, traffic = run.plot().axes
    assert [line.get_label() for line in scores.lines] == ["mean over all rows", "worst client"]
    assert scores.lines[1].get_ydata().tolist() == run.metrics["worst_accuracy"].tolist()
    assert traffic.lines[0].get_ydata()[-1] == run.metrics["bytes_up"].sum() / 2**20


def test_the_number_of_workers_changes_nothing(bundle: fedge.Bundle, run: Run) -> None:
    other = fedge.Federation(bundle, HOSPITALS, engine="ort", workers=3).run(rounds=3)
    assert same(other.params, run.params)


def test_both_engines_agree(bundle: fedge.Bundle, run: Run) -> None:
    if find_training_python() is None:
        pytest.skip("no interpreter with onnxruntime-training here")
    reason = available_engines(bundle)["ort-training"]
    if reason:
        pytest.skip(f"ort-training cannot run here: {reason}")
    other = fedge.Federation(bundle, HOSPITALS, engine="ort-training", workers=1).run(rounds=3)
    assert all(d <= 1e-4 for d in relative_distance(other.params, run.params).values())


@pytest.mark.parametrize("make", [flower.FedAvg, flower.FedAdam], ids=lambda s: s.__name__)
def test_flowers_strategies_run_unchanged(bundle: fedge.Bundle, run: Run, make: Any) -> None:
    federation = fedge.Federation(bundle, HOSPITALS, strategy=make(), engine="ort", workers=1)
    other = federation.run(rounds=3)
    assert other.metrics["accuracy"].iloc[-1] > 0.8
    if make is flower.FedAvg:
        assert all(d <= 1e-6 for d in relative_distance(other.params, run.params).values())
    assert same(federation.run(rounds=3).params, other.params)


def test_export_per_client_takes_its_scale(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="site_mean"):
        run.export(tmp_path / "global.onnx")
    with pytest.raises(ConfigError, match="client 'moon' took no part; there are east, north"):
        run.export(tmp_path / "moon.onnx", client_id="moon")
    path = run.export(tmp_path / "west.onnx", client_id="west")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    west = HOSPITALS[3]
    assert west.test is not None
    outputs = dict(
        zip(
            [o.name for o in session.get_outputs()],
            session.run(None, {"x": west.test.inputs["x"]}),
            strict=True,
        )
    )
    correct = (outputs["probability"].ravel() > 0.5) == west.test.labels.ravel()
    last = run.table[(run.table["round"] == 3) & (run.table["client_id"] == "west")]
    assert np.mean(correct) == pytest.approx(float(last["accuracy"].iloc[0]))


# --- personal params -----------------------------------------------------------------------------


def test_personal_params_stay_with_their_client() -> None:
    bundle = fedge.build(
        mlp(30, 8, 1),
        loss="bce_with_logits",
        preprocessing=SiteStandardize(),
        personal=["w2", "b2"],
        train=fedge.TrainConfig(lr=0.2, batch_size=16),
    )
    run = fedge.Federation(bundle, HOSPITALS, engine="ort").run(rounds=2)
    initial = bundle.initial_params()
    assert all(np.array_equal(run.params[n], initial[n]) for n in ("w2", "b2"))
    assert not np.array_equal(run.params["w1"], initial["w1"])
    heads = [run.personal[c.client_id]["w2"] for c in HOSPITALS]
    assert all(not np.array_equal(heads[0], h) for h in heads[1:])
    assert run.personal.keys() == {c.client_id for c in HOSPITALS}
    assert run.personal["east"].keys() == {"w2", "b2"}
    with pytest.raises(ConfigError, match="w2, b2 belong to the clients; say whose"):
        run.export("model.onnx")
    shared = {n: v for n, v in initial.items() if n in ("w1", "b1")}
    assert (run.table["bytes_up"] < 1.5 * sum(v.nbytes for v in shared.values()) + 600).all()


# --- a researcher's own client -------------------------------------------------------------------


def test_the_clients_work_may_be_written_in_python(bundle: fedge.Bundle, run: Run) -> None:
    """The engine called by hand gives the built-in client's numbers bit for bit."""
    engine = open_engine(bundle, "ort")
    seen: set[tuple[str, int]] = set()

    def work(
        client_id: ClientId, data: ClientData, params: Params, round_num: int, seed: int
    ) -> tuple[Params, int, Metrics]:
        seen.add((client_id, round_num))
        rows = engine.preprocess(data.train, site_stats(data.train))
        engine.set_params(params)
        result = engine.train(rows, bundle.manifest.train, seed)
        return engine.get_params(), len(rows), {"train_loss": result.loss}

    try:
        other = fedge.Federation(bundle, HOSPITALS, local=work, engine="ort").run(rounds=3)
    finally:
        engine.close()
    assert same(other.params, run.params)
    assert len(seen) == 12


def test_a_run_in_which_everybody_fails_says_why(bundle: fedge.Bundle) -> None:
    def broken(*_: object) -> tuple[Params, int, Metrics]:
        raise ZeroDivisionError("oops")

    federation = fedge.Federation(bundle, HOSPITALS, local=broken, engine="ort", workers=1)
    with pytest.raises(EngineError, match=r"0 of 2 updates in 3 attempts \(east: ZeroDivision"):
        federation.run(rounds=1)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"weight": np.zeros(3)}, "local returned 'weight'; the params are w1, b1, w2, b2"),
        ({"b1": np.zeros(3)}, r"local returned b1 \[3\]; wanted \[8\]"),
    ],
)
def test_what_a_function_returns_must_fit(
    bundle: fedge.Bundle, params: Params, message: str
) -> None:
    def work(*_: object) -> tuple[Params, int, Metrics]:
        return params, 1, {"train_loss": 0.0}

    with pytest.raises(EngineError, match=message):
        fedge.Federation(bundle, HOSPITALS, local=work, engine="ort").run(rounds=1)


def test_a_client_whose_rows_do_not_fit_is_dropped(
    bundle: fedge.Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = fedge.Examples({"x": np.zeros((5, 3), np.float32)}, np.zeros(5, np.int64))
    empty = fedge.Examples({"x": np.zeros((0, 30), np.float32)}, np.zeros(0, np.int64))
    events: list[rounds.Event] = []
    clients = [*HOSPITALS, ClientData("narrow", narrow), ClientData("empty", empty)]
    run = fedge.Federation(bundle, clients, engine="ort").run(rounds=1, observer=events.append)
    empty_line, narrow_line = caplog.messages
    assert empty_line.startswith("round 1: empty is left out: 0 training rows")
    assert narrow_line.startswith("round 1: narrow is left out: x has shape [5, 3]")
    (commit,) = [e for e in events if isinstance(e, rounds.RoundCommitted)]
    assert commit.dropped.keys() == {"narrow", "empty"}
    assert list(run.metrics["dropped"]) == [2]
    assert set(run.table["client_id"]) == {c.client_id for c in HOSPITALS}


# --- scaling -------------------------------------------------------------------------------------


def test_a_global_scale_gets_into_the_bundle() -> None:
    bundle = fedge.build(
        mlp(30, 8, 1),
        loss="bce_with_logits",
        train=fedge.TrainConfig(lr=0.2, batch_size=16),
    )
    tiny = ClientData("tiny", HOSPITALS[0].train.take(slice(0, 9)))
    clients = [*HOSPITALS, tiny]
    federation = fedge.Federation(bundle, clients, scaling="global", engine="ort", workers=1)
    assert federation.bundle.manifest.scaling == "global"
    assert federation.bundle.manifest.provenance["rescaled_from"] == bundle.digest
    assert fedge.Bundle.open(federation.bundle.path).digest == federation.bundle.digest
    mean, std = combine(moments(c.train) for c in HOSPITALS).standardize()
    engine = open_engine(federation.bundle, "ort")
    try:
        raw = HOSPITALS[1].train
        ready = engine.preprocess(raw)
    finally:
        engine.close()
    wanted = (raw.inputs["x"] - mean) / std
    np.testing.assert_allclose(ready.inputs["x"], wanted, rtol=1e-4, atol=1e-4)
    run = federation.run(rounds=3)
    assert run.metrics["accuracy"].iloc[-1] > 0.85
    by_hand = with_preprocessing(bundle, Standardize(mean, std))
    other = fedge.Federation(by_hand, clients, engine="ort", workers=1).run(rounds=3)
    assert same(run.params, other.params)


# --- settings ------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused(bundle: fedge.Bundle) -> None:
    with pytest.raises(ConfigError, match="scaling='site' is unknown"):
        fedge.Federation(bundle, HOSPITALS, scaling="site")
    one = fedge.Federation(bundle, HOSPITALS[:1], strategy=flower.FedAvg(), engine="ort")
    with pytest.raises(ConfigError, match="a round needs 2 clients, there are 1"):
        one.run(rounds=1)
    with pytest.raises(ConfigError, match="cohort_size is 1"):
        fedge.Federation(bundle, HOSPITALS, engine="ort").run(rounds=1, cohort_size=1)
    with pytest.raises(ConfigError, match="without clients"):
        fedge.Federation(bundle, [], engine="ort").run(rounds=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "folder"}, "bundle is a str"),
        ({"clients": [(1, 2)]}, "clients hold a tuple"),
        ({"clients": [ClientData("", HOSPITALS[0].train)]}, "client id ''"),
        ({"strategy": "fedavg"}, "strategy is 'fedavg'"),
        ({"strategy": flower.FedAvg}, "strategy is the class FedAvg"),
        ({"engine": "onnx"}, "engine='onnx' is unknown; known: auto, ort, ort-training"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(
    bundle: fedge.Bundle, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"bundle": bundle, "clients": HOSPITALS, **change}
    with pytest.raises(ConfigError, match=message):
        fedge.Federation(**arguments)


def test_rounds_are_whole(bundle: fedge.Bundle) -> None:
    with pytest.raises(ConfigError, match=r"rounds = 1.5 is float; wanted int"):
        fedge.Federation(bundle, HOSPITALS, engine="ort").run(rounds=1.5)  # type: ignore[arg-type]


def test_one_client_alone_is_enough_for_our_own_strategy(bundle: fedge.Bundle) -> None:
    run = fedge.Federation(bundle, HOSPITALS[:1], engine="ort").run(rounds=1, evaluate=False)
    assert len(run.table) == 1
    assert "worst_accuracy" not in run.metrics
    assert [line.get_label() for line in run.plot().axes[0].lines] == ["mean"]


def test_cohorts_leave_gaps_in_the_table(bundle: fedge.Bundle) -> None:
    federation = fedge.Federation(bundle, HOSPITALS, engine="ort", workers=1)
    table = federation.run(rounds=4, cohort_size=2).table
    assert table["train_loss"].notna().sum() == 8
    assert table["accuracy"].notna().sum() == 8
    assert table["train_loss"].isna().any() or len(table) == 8


@pytest.mark.parametrize("returned", [None, {}, ({}, 3), ({}, 2.5, {}), ([], 3, {})])
def test_a_local_function_that_returns_something_else_is_told_what_is_wanted(
    returned: Any,
) -> None:
    with pytest.raises(DataError, match=r"wanted \(params, num_examples, metrics\)"):
        _three(returned)


def test_what_a_notebook_shows_of_them_is_short(bundle: fedge.Bundle, run: Run) -> None:
    federation = fedge.Federation(bundle, HOSPITALS, engine="ort")
    assert repr(federation) == f"Federation({bundle!r}, 4 clients, FedAvg)"
    assert repr(run) == f"Run({bundle!r}, 3 rounds, 4 clients)"
