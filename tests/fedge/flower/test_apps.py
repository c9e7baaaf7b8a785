"""The standard Flower app without Flower's processes: its grid adapter and its client."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from onnx import TensorProto, helper, numpy_helper

import fedge
from fedge import tensors
from fedge.data import breast_cancer_hospitals
from fedge.errors import ConfigError, LinkError
from fedge.flower import Coordinator, MemoryJournal, client_app, messages, server_app
from fedge.flower.apps import run_settings
from fedge.flower.identity import ensure_identity
from fedge.flower.stock import StockGrid
from fedge.params import relative_distance
from fedge.simulation.grid import LocalGrid
from fedge.strategies import FedAvg
from fedge.testing import LogisticEngine, logistic_clients, logistic_manifest, logistic_params

MANIFEST = logistic_manifest()
INITIAL = logistic_params(MANIFEST)
CONFIG = fedge.RunConfig(rounds=2, deadline_s=30)
HOSPITALS = breast_cancer_hospitals(seed=0)

ensure_identity()


def local_grid() -> LocalGrid:
    return LocalGrid(
        MANIFEST, INITIAL, logistic_clients(3), lambda: LogisticEngine(MANIFEST, INITIAL)
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> fedge.Bundle:
    tensors_ = [
        numpy_helper.from_array(np.full((2, 30), 0.01, np.float32), "w1"),
        numpy_helper.from_array(np.ones((1, 2), np.float32), "w2"),
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1"], ["h"], transB=1),
            helper.make_node("Gemm", ["h", "w2"], ["logit"], transB=1),
        ],
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 30])],
        [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["N", 1])],
        tensors_,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return fedge.build(
        model,
        loss="bce_with_logits",
        preprocessing="site",
        personal=["w2"],
        train=fedge.TrainConfig(lr=0.1, batch_size=32),
        out=tmp_path_factory.mktemp("app") / "bundle",
    )


def test_flowers_grid_carries_the_same_rounds() -> None:
    def run(stock: bool) -> fedge.types.Params:
        with local_grid() as grid:
            return Coordinator(
                StockGrid(grid) if stock else grid,
                FedAvg(),
                MANIFEST,
                CONFIG,
                "run",
                journal=MemoryJournal(),
                initial=INITIAL,
            ).run()

    assert all(d <= 1e-6 for d in relative_distance(run(True), run(False)).values())


def test_a_reply_that_flower_hands_over_once_is_held() -> None:
    with local_grid() as inner:
        grid = StockGrid(inner)
        node, name = next(iter(grid.clients().items()))
        assert grid.node_id(name) == node
        content = RecordDict(
            {"arrays": messages.array_record(INITIAL), "config": messages.instruction_config(0)}
        )
        sent = [grid.create_message(content, "train", node, "run/1/train")]
        (first,) = grid.push_messages(sent)
        assert list(grid.push_messages(sent)) == [first]
        assert grid.wait([first], 10) == {first}
        inner.cancel([first])
        assert len(list(grid.pull_messages([first, first, "unknown"]))) == 2
        grid.cancel([first])
        assert list(grid.pull_messages([first])) == []
        assert grid.wait([first], 0.01) == set()


def test_a_superlink_that_takes_no_message_is_an_error() -> None:
    class Full(LocalGrid):
        def push_messages(self, messages: object) -> list[str]:
            return []

    with Full(
        MANIFEST, INITIAL, logistic_clients(1), lambda: LogisticEngine(MANIFEST, INITIAL)
    ) as inner:
        grid = StockGrid(inner)
        message = grid.create_message(RecordDict(), "train", 7, "run/1/train")
        with pytest.raises(LinkError, match="took 0 of 1 messages"):
            grid.push_messages([message])


def context(bundle: fedge.Bundle | None, **run_config: bool | float | str) -> Context:
    if bundle is not None:
        run_config["bundle"] = str(bundle.path)
    return Context(1, 7, {"partition-id": 0}, RecordDict(), run_config)


def message(kind: str, params: fedge.types.Params, group: str) -> Message:
    content = RecordDict(
        {"arrays": messages.array_record(params), "config": messages.instruction_config(3)}
    )
    return Message(content, 7, kind, group_id=group)


@pytest.fixture
def app() -> ClientApp:
    return client_app(lambda c: HOSPITALS[int(c.node_config["partition-id"])])


def test_personal_params_stay_in_the_nodes_state(bundle: fedge.Bundle, app: ClientApp) -> None:
    """The ClientApp trains what the local grid trains, and keeps what is personal."""
    where = context(bundle)
    shared = {"w1": bundle.initial_params()["w1"]}
    reply = app(message("train", shared, "run/1/train"), where)
    got = messages.params_of(messages.arrays_in(reply))
    assert got.keys() == {"w1"}
    assert messages.metrics_in(reply).keys() == {"num-examples", "train_loss"}
    kept = messages.params_of(where.state["personal"])  # type: ignore[arg-type]
    assert kept.keys() == {"w2"}
    run = fedge.Federation(bundle, HOSPITALS[:1], seed=3, engine="ort").run(1)
    assert got["w1"].tobytes() == run.params["w1"].tobytes()
    assert kept["w2"].tobytes() == run.personal["east"]["w2"].tobytes()
    scored = app(message("evaluate", got, "run/1/evaluate"), where)
    score = messages.metrics_in(scored)
    assert score["accuracy"] == pytest.approx(float(run.table["accuracy"].iloc[0]))
    assert score["num-examples"] == len(HOSPITALS[0].test or ())


def test_a_client_app_tells_statistics(app: ClientApp) -> None:
    asked = Message(RecordDict(), 7, "query.statistics", group_id="run/0/statistics")
    arrays = messages.params_of(messages.arrays_in(app(asked, context(None))))
    rows = HOSPITALS[0].train.inputs["x"].astype(np.float64)
    np.testing.assert_allclose(arrays["sum"], rows.sum(0))


def test_without_a_bundle_nothing_starts(app: ClientApp) -> None:
    with pytest.raises(ConfigError, match="no bundle is named"):
        app(message("train", INITIAL, "run/1/train"), context(None))
    with local_grid() as grid, pytest.raises(ConfigError, match="no bundle is named"):
        server_app()(grid, context(None))


def test_settings_come_from_the_runs_config() -> None:
    config = {"num-rounds": 4, "min-clients": 3, "seed": 5, "deadline-s": 9.0, "bundle": "x"}
    assert run_settings(config) == fedge.RunConfig(4, 3, None, 9.0, seed=5)
    with pytest.raises(ConfigError, match="rounds is 0"):
        run_settings({"num-rounds": 0})


def test_a_server_app_writes_the_final_params(bundle: fedge.Bundle, tmp_path: Path) -> None:
    from fedge.engines import open_engine

    clients = HOSPITALS[:2]
    out = tmp_path / "params.safetensors"
    settings = {"num-rounds": 1, "out": str(out)}
    with LocalGrid(
        bundle.manifest, bundle.initial_params(), clients, lambda: open_engine(bundle, "ort")
    ) as grid:
        server_app()(grid, context(bundle, **settings))
    run = fedge.Federation(bundle, clients, engine="ort").run(1)
    got = tensors.load(out.read_bytes())[0]
    assert relative_distance(got, {"w1": run.params["w1"]})["w1"] <= 1e-6
