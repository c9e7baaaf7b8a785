"""The tree drawn in the docstring is the tree in the code."""

from __future__ import annotations

import inspect
import re

import pytest

from fedge import errors
from fedge.errors import BY_NAME, FedgeError

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, Exception) and cls.__module__ == "fedge.errors"
]


def _drawn() -> dict[str, tuple[str | None, int]]:
    """Class name -> (parent, exit code), read from the docstring's tree."""
    tree: dict[str, tuple[str | None, int]] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)(\w+Error)\s+(?:exit code )?(\d+)", line)
        if match:
            depth, name = len(match[1]), match[2]
            while stack and stack[-1][0] >= depth:
                stack.pop()
            tree[name] = (stack[-1][1] if stack else None, int(match[3]))
            stack.append((depth, name))
    return tree


def test_the_docstring_draws_every_class_with_its_parent_and_exit_code() -> None:
    actual = {
        cls.__name__: (cls.__base__.__name__ if cls is not FedgeError else None, cls.exit_code)
        for cls in CLASSES
    }
    assert _drawn() == actual


def test_every_class_crosses_a_pipe_by_name() -> None:
    assert {cls.__name__: cls for cls in CLASSES} == BY_NAME


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_an_error_is_caught_as_a_fedge_error_and_keeps_its_message(cls: type[FedgeError]) -> None:
    with pytest.raises(FedgeError, match="what was seen"):
        raise cls("what was seen, what was wanted, what to do")
    assert cls.__doc__


def test_exit_codes_of_families_differ_and_leave_the_shell_its_own() -> None:
    families = [cls.exit_code for cls in CLASSES if cls.__base__ is FedgeError]
    assert len(set(families)) == len(families)
    assert all(1 <= cls.exit_code < 64 for cls in CLASSES)
