"""The one exception of the project: something outside the program is wrong, and its user can put it right."""

import difflib
from collections.abc import Iterable


class ZotunerError(Exception):
    """What was expected, what came and what to do, in one line. The command line prints it and exits with 2."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that nobody knows: suggests the nearest one and lists them all.

    >>> unknown("task", "cop", ["copa", "sst2"])
    "unknown task 'cop'; did you mean 'copa'? Known: copa, sst2"
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean {near[0]!r}? Known" if near else " known"
    return f"unknown {what} {name!r};{hint}: {', '.join(names)}"
