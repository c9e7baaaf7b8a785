"""The documentation says what is so: commands parse, Python runs, links lead somewhere."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge_client import cli as client_cli
from fedge_server import cli as server_cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = Path(sys.executable).parent
PARSERS = {"fedge-server": server_cli.parser(), "fedge-client": client_cli._parser()}


_COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*((?:fedge-server|fedge-client|make)(?: .*)?)")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> Iterator[list[str]]:
    """Every line of a page's plain code blocks, and every inline code, that starts a program."""
    text = page.read_text()
    lines = [line for block in _blocks(text, "") for line in block.splitlines()]
    lines += re.findall(r"`((?:fedge-(?:server|client)|make) [^`\n]+)`", text)
    for line in lines:
        if found := _COMMAND.fullmatch(line):
            yield shlex.split(found[1], comments=True)


COMMANDS = [(page.name, words) for page in PAGES for words in _commands(page)]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{p}:{' '.join(w)[:50]}" for p, w in COMMANDS]
)
def test_commands_in_the_documentation_are_commands(page: str, words: list[str]) -> None:
    program, *args = words
    if program == "make":
        assert {a for a in args if "=" not in a} <= TARGETS
        return
    try:
        PARSERS[program].parse_args(args)
    except SystemExit as exc:
        pytest.fail(f"{page} shows {shlex.join(words)}, which exits with {exc.code}")


def test_the_readme_shows_commands_of_both_sides() -> None:
    shown = {words[0] for page, words in COMMANDS if page == "README.md"}
    assert shown == {"fedge-server", "fedge-client", "make"}


def _paths(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _paths(inner, (*path, name))


HELPED = [(program, path) for program, parser in PARSERS.items() for path in _paths(parser)]


@pytest.mark.parametrize(("program", "path"), HELPED, ids=[" ".join((p, *w)) for p, w in HELPED])
def test_every_command_has_help(
    program: str, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        PARSERS[program].parse_args([*path, "--help"])
    said = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert said.startswith(f"usage: {' '.join((program, *path))}")
    group = "{" in said.splitlines()[0] or "ACTION" in said or "COMMAND" in said
    assert group or "example" in said, "a command's help shows an example"


@pytest.mark.parametrize("program", PARSERS)
def test_the_installed_programs_start(program: str) -> None:
    done = subprocess.run([SCRIPTS / program, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert re.search(r"\d+\.\d+\.\d+", done.stdout)
    done = subprocess.run([SCRIPTS / program, "fly"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


PYTHON = [
    (f"{page.name}-{i}", block)
    for page in PAGES
    for i, block in enumerate(_blocks(page.read_text(), "python"))
]


@pytest.mark.parametrize(("name", "block"), PYTHON, ids=[name for name, _ in PYTHON])
def test_python_in_the_documentation_runs(name: str, block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{name}\n{done.stderr}"
    if "run.export" in block:
        assert (tmp_path / "model.onnx").stat().st_size > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_the_documents_a_project_needs_are_there() -> None:
    names = {"README", "ARCHITECTURE", "SECURITY", "CONTRIBUTING", "CHANGELOG"}
    assert names <= {page.stem for page in PAGES}
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


_MAP_ROW = re.compile(r"^\| (`[^|]+`)", re.MULTILINE)


def test_the_code_map_names_every_module_and_nothing_else() -> None:
    """Packages by folder, the modules directly in fedge/ by file."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = text.partition("## Code map")[2].partition("\n## ")[0]
    named = {
        name.rstrip("/").removeprefix("fedge/")
        for row in _MAP_ROW.findall(rows)
        for name in re.findall(r"`([^`]+)`", row)
    }
    inside = {p.name for p in (ROOT / "fedge").iterdir() if p.suffix == ".py" or _package(p)}
    wanted = inside - {"__init__.py"} | {"server/fedge_server", "client/fedge_client", "proto"}
    assert named == wanted


def _package(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.py"))


def test_the_repository_names_no_place_but_public_ones() -> None:
    """No path of the machine it was written on, no private host."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    foreign = re.compile(r"/(?:root|work)/|file:///opt")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix != ".png" and path != Path(__file__):
            assert not foreign.search(path.read_text(errors="replace")), name
