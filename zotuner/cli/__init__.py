"""The command line `zotuner`: its exit codes, and the commands, which stand in runs, tuners and studies."""

import os
import sys
from collections.abc import Sequence

from rich_argparse import RichHelpFormatter

from zotuner.cli import runs, studies, tuners
from zotuner.cli.parser import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_SIGNAL, Parser, adder
from zotuner.errors import Interrupted, ZotunerError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0; 1 where some of many runs failed; 2 for bad input; 128 + the signal's number where one ended it.
    """
    # torch's and numba's idle threads would spin against each other, and against whatever else the machine does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except ZotunerError as error:
        print(f"zotuner: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        print(f"zotuner: {stop}", file=sys.stderr)
        return EXIT_SIGNAL + stop.signum
    except KeyboardInterrupt:
        print("zotuner: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> Parser:
    from zotuner import __version__

    parser = Parser(prog="zotuner", description="Learned zeroth-order fine-tuning.", formatter_class=RichHelpFormatter)
    parser.add_argument("--version", action="version", version=f"zotuner {__version__}")
    add = adder(parser, "COMMAND")
    runs.add_makers(add)
    tuners.add_commands(add)
    runs.add_readers(add)
    studies.add_commands(add)
    return parser
