"""The Docker files are well formed, run without root and hold no secret."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCKER = Path(__file__).parent.parent / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SCRIPTS = Path(sys.executable).parent


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    _run(str(SCRIPTS / "hadolint"), str(path))


def test_compose_file_follows_its_schema() -> None:
    tool = str(SCRIPTS / "check-jsonschema")
    _run(tool, "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_images_drop_root_check_health_and_keep_state_in_a_volume(path: Path) -> None:
    final_stage = path.read_text().rsplit("\nFROM ", 1)[1]
    user = re.search(r"^USER (\S+)$", final_stage, re.MULTILINE)
    assert user, "no USER"
    assert user[1] not in ("0", "root")
    assert re.search(r"^HEALTHCHECK .*\\\n +CMD \[", final_stage, re.MULTILINE)
    assert re.search(r"^VOLUME /var/lib/fedge$", final_stage, re.MULTILINE)
    assert "ORT_DISABLE_TELEMETRY=1" in final_stage


@pytest.mark.parametrize("path", [*DOCKERFILES, DOCKER / "compose.yaml"], ids=lambda p: p.name)
def test_no_secret_is_baked_in(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"fedge1\.|BEGIN [A-Z ]*KEY|PASSWORD|SECRET", text)


def test_the_images_copy_only_what_they_install() -> None:
    """The build context admits source and licence: no state folder, key or data can get in."""
    lines = (DOCKER.parent / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for path in DOCKERFILES
        for line in re.findall(r"^COPY (?!--from)(.*)$", path.read_text(), re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == allowed
