"""Folders that tuners are written to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zotuner.errors import ZotunerError
from zotuner.files import is_run, is_vacant, locked, writing
from zotuner.tuner import DESCRIPTION, WEIGHTS, Tuner

TABLE, ROWS = "measured.json", "measurements.jsonl"  # beside a measured or calibrated tuner: what it stands on


@contextmanager
def claimed(out: Path, overwrite: bool) -> Iterator[None]:
    """A folder for a tuner, which no other process writes to meanwhile.

    Raises:
        ZotunerError: The folder holds a run, a calibration, a tuner that is to stay, or something else alone; or it
            cannot be written.
    """
    _check(out, overwrite)
    with locked(out):
        _check(out, overwrite)  # by now another process may have been there
        yield


def _check(out: Path, overwrite: bool) -> None:
    if is_vacant(out, "tuner"):
        return
    if is_run(out) or not all((out / name).is_file() for name in (WEIGHTS, DESCRIPTION)):
        raise ZotunerError(f"{out}: expected an empty folder or a tuner, found other files; choose another --out")
    if (out / ROWS).exists():
        raise ZotunerError(f"{out}: holds a calibration ({ROWS}), which would be lost; choose another --out")
    if not overwrite:
        raise ZotunerError(f"{out}: holds a tuner; choose another --out, or pass --overwrite to replace it")


def keep_tuner(tuner: Tuner, out: Path) -> str:
    """Writes a tuner into a folder that is `claimed` or locked; returns a line that says so.

    Raises:
        ZotunerError: The folder cannot be written.
    """
    with replacing(out):
        tuner.save_pretrained(out)
        info, size = tuner.info, (out / WEIGHTS).stat().st_size
    return f"tuner for {len(info.blocks)} blocks of {info.base_model} written to {out} ({size / 1000:.1f} kB)"


@contextmanager
def replacing(out: Path) -> Iterator[None]:
    """Around the writing of a tuner: the table of an earlier one goes, and a failure is one line."""
    with writing(out):
        (out / TABLE).unlink(missing_ok=True)
        yield
