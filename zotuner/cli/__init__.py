"""The command line `zotuner`: its exit codes, and the commands, which stand in runs, tuners and studies."""

import errno
import os
import signal
import sys
from collections.abc import Sequence

from rich_argparse import RichHelpFormatter

from zotuner.cli import runs, studies, tuners
from zotuner.cli.parser import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_SIGNAL, Parser, adder
from zotuner.errors import Interrupted, ZotunerError

# What a machine says to files that it will not read or write; anything else is a fault of ours, with a traceback
OF_THE_MACHINE = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO", "ENAMETOOLONG", "EISDIR", "ENOTDIR")
    if hasattr(errno, name)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0; 1 where some of many runs failed; 2 for bad input; 128 + the signal's number where one ended it.
    """
    # torch's and numba's idle threads would spin against each other, and against whatever else the machine does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parser().parse_args(argv)
    try:
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGNAL + signal.SIGPIPE
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        print(f"zotuner: error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
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
