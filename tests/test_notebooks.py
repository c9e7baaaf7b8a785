"""Every notebook runs from its first cell to its last, and shows what is saved in it."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "simulations").glob("*.ipynb"))
TIMEOUT_S = 120
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# What README and DESIGN promise as the first thing to type; nothing in it may drift.
FIRST_BLOCK = """\
import fedge
bundle = fedge.build(model, loss="cross_entropy", optimizer="sgd", sample=x[:1],        # nn.Module or .onnx
                     train=fedge.TrainConfig(lr=0.1, batch_size=32, epochs=1))
clients = fedge.data.partition(x, y, by="dirichlet", alpha=0.5, clients=20, seed=0)      # or by_site(...)
run = fedge.Federation(bundle, clients, strategy=fedge.strategies.FedAvg(), seed=0).run(rounds=20)
run.table                                  # DataFrame: per round and client
run.plot()                                 # accuracy per round, worst client, bytes
run.export("model.onnx")
"""  # noqa: E501 - as printed


def _text(notebook: Any) -> str:
    """All printed and displayed text, without pictures' names."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            parts.append(re.sub(r"<[^>]*>", "", text))
    return "\n".join(parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_shows_what_is_saved(
    path: Path, fedge_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work, tmp_path / "matplotlib"):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FEDGE_DATA", str(fedge_data))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    saved = nbformat.read(path, as_version=4)
    fresh = nbformat.from_dict(saved)  # type: ignore[no-untyped-call]
    NotebookClient(
        fresh, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": work}}
    ).execute()
    assert not list(home.iterdir())
    assert (work / "model.onnx").stat().st_size > 0
    old, new = _text(saved), _text(fresh)
    assert _NUMBER.sub("#", new).split() == _NUMBER.sub("#", old).split()
    numbers = [[float(n) for n in _NUMBER.findall(t)] for t in (new, old)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.05)


def test_the_first_block_is_what_the_design_promises() -> None:
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    assert FIRST_BLOCK.rstrip() in {cell.source for cell in notebook.cells}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_names_no_place_of_one_machine(path: Path) -> None:
    text = path.read_text("utf-8")
    assert os.fspath(Path.home()) + "/" not in text
    assert os.fspath(Path(__file__).parents[1]) not in text
    assert "/tmp/" not in text  # noqa: S108
