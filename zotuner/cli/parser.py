"""What the commands share: errors in one line, values checked as they are read, options that several have."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

from rich_argparse import RichHelpFormatter

EXIT_SOME_FAILED, EXIT_BAD_INPUT, EXIT_SIGNAL, EXIT_INTERRUPTED = 1, 2, 128, 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Add(Protocol):
    """Adds a command: its name, what it runs (gets the arguments, returns an exit code or None), its help."""

    def __call__(self, name: str, run: Any, text: str) -> argparse.ArgumentParser: ...


def adder(parser: argparse.ArgumentParser, metavar: str) -> Add:
    """What adds commands below `parser`, one of which has to be given."""
    group = parser.add_subparsers(required=True, metavar=metavar)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = group.add_parser(
            name, help=text, description=text, formatter_class=RichHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    return add


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """`--data-dir`."""
    parser.add_argument("--data-dir", type=Path, metavar="D", help="read D/<task>/{train,validation,test}.jsonl")


def stated(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a command by name, for a function that has arguments of the same names."""
    return {name: value for name, value in vars(arguments).items() if name != "run"}


def whole(least: int, below: int | None = None) -> Callable[[str], int]:
    """Reads a whole number within bounds."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
            bound = "" if below is None else f" and below {below}"
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}{bound}, got {text!r}")
        return int(text)

    return read


count = whole(1)


def positive(text: str) -> float:
    """Reads a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def quiet() -> None:
    """transformers' and datasets' own progress bars would fight with ours; of a failed request we tell ourselves."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()
