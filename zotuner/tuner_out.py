"""Folders that tuners are written to."""

from pathlib import Path

from zotuner.errors import ZotunerError
from zotuner.files import is_run, is_vacant
from zotuner.tuner import DESCRIPTION, WEIGHTS, Tuner


def check_tuner_out(out: Path, overwrite: bool) -> None:
    """Refuses an output folder that holds something, unless it is a tuner that may be overwritten.

    Raises:
        ZotunerError: The folder holds a run, a tuner that is to stay, or anything else.
    """
    if is_vacant(out, "tuner"):
        return
    if is_run(out) or not all((out / name).is_file() for name in (WEIGHTS, DESCRIPTION)):
        raise ZotunerError(f"{out}: expected an empty folder or a tuner, found other files; choose another --out")
    if not overwrite:
        raise ZotunerError(f"{out}: holds a tuner; choose another --out, or pass --overwrite to replace it")


def keep_tuner(tuner: Tuner, out: Path) -> str:
    """Writes a tuner; returns a line that says so.

    Raises:
        ZotunerError: The folder cannot be written.
    """
    try:
        tuner.save_pretrained(out)
        size = (out / WEIGHTS).stat().st_size
    except OSError as error:
        raise ZotunerError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from None
    info = tuner.info
    return f"tuner for {len(info.blocks)} blocks of {info.base_model} written to {out} ({size / 1000:.1f} kB)"
