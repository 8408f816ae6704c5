"""The exceptions of the project: something outside the program is wrong, or asks it to stop."""

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")


class ZotunerError(Exception):
    """What was expected, what came and what to do, in one line. The command line prints it and exits with 2."""


class Interrupted(Exception):  # noqa: N818 (not an error: a run that was asked to stop has stopped)
    """A signal ended a run cleanly. The command line prints the text and exits with 128 + the signal's number."""

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.signum = signum


def repeated(values: Sequence[T]) -> T | None:
    """The first value that stands more than once; None if none does.

    >>> repeated(["a", "b", "a"])
    'a'
    """
    return next((value for value in values if values.count(value) > 1), None)


def at_fault(error: "ValidationError") -> str:
    """The first key that does not fit, what was expected there, and what came."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "content"
    return f"{key}: {first['msg']}, got {str(first['input'])[:60]!r}"


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that nobody knows: suggests the nearest one and lists them all.

    >>> unknown("task", "cop", ["copa", "sst2"])
    "unknown task 'cop'; did you mean 'copa'? Known: copa, sst2"
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean {near[0]!r}? Known" if near else " known"
    return f"unknown {what} {name!r};{hint}: {', '.join(names)}"


def first_line(error: Exception) -> str:
    """What a library's error says first, with a heading the line below it: the rest is for those who work on it."""
    first, *rest = (line.strip() for line in str(error).strip().split("\n"))
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
