"""A site asks for a GPU it does not have: the client trains on the CPU and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fedge.artifacts.bundle import Bundle
from fedge.types import ClientData


def test_status_says_why_a_provider_is_not_used(
    world: Any,
    make_bundle: Callable[..., Bundle],
    hospitals: dict[str, ClientData],
    data_flags: Callable[[str], list[str]],
) -> None:
    del hospitals
    options = ["--rounds", "1", "--min-clients", "1", "--no-evaluate"]
    server = world.serve(str(make_bundle("mlp").path), *options)
    state = world.root / "clinic-a"
    state.mkdir(mode=0o700)
    (state / "client.toml").write_text("[engine]\nname = 'ort'\nproviders = ['cuda']\n")
    client = world.join(server, "clinic-a", *data_flags("clinic-a"))
    client.wait_for("model of round 1 is here")
    status = json.loads(world.command("clinic-a", "status", "--json").stdout)
    assert status["engine"] == "ort"
    assert "ort:cuda not: this onnxruntime has no CUDAExecutionProvider" in status["engine_reason"]
