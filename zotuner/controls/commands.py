"""The commands that make a control: load, make, write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from zotuner.controls.calibrate import calibrate
from zotuner.controls.fresh import by_hand, untrained
from zotuner.controls.measure import measure
from zotuner.controls.scales import write_table
from zotuner.controls.setting import load
from zotuner.errors import ZotunerError
from zotuner.files import is_vacant, locked
from zotuner.progress import Display
from zotuner.signals import Requests
from zotuner.tuner import Tuner
from zotuner.tuner_out import ROWS, claimed, keep_tuner


def init(model: str, out: Path, architecture: Literal["abs", "exp"], seed: int, overwrite: bool) -> str:
    """Writes an untrained tuner; returns a line that says so."""
    with claimed(out, overwrite):
        return keep_tuner(untrained(model, architecture, seed), out)


def static(
    model: str, out: Path, by_type: Mapping[str, float], layers: Sequence[tuple[int, int]], overwrite: bool
) -> tuple[Tuner, str]:
    """Writes a tuner of scales by hand, and returns it with a line that says so."""
    if not by_type and not layers:
        raise ZotunerError("expected --by-type or --layers; without either all scales would be 1, which is MeZO")
    with claimed(out, overwrite):
        tuner = by_hand(model, by_type, layers)
        return tuner, keep_tuner(tuner, out)


def measured(
    model: str, task: str, data_dir: Path | None, out: Path, overwrite: bool, display: Display, **options: Any
) -> tuple[Tuner, str]:
    """As `static`, of scales from `measure`, whose options these are."""
    with display, claimed(out, overwrite):
        display.say(f"loading {model} and task {task}")
        setting = load(model, task, data_dir, options["seed"])
        tuner, found = measure(setting, display, **options)
        written = keep_tuner(tuner, out)
        write_table(out, tuner, found)
    return tuner, written


def calibrated(
    model: str, task: str, data_dir: Path | None, out: Path, dtype: str, display: Display, **options: Any
) -> tuple[Tuner, str]:
    """As `static`, of scales from `calibrate`, whose options these are; goes on with what `out` holds of it."""
    if not is_vacant(out, "tuner") and not (out / ROWS).is_file():
        raise ZotunerError(f"{out}: expected an empty folder or a calibration, found other files; choose another --out")
    with display, Requests() as requests, locked(out):
        display.say(f"loading {model} and task {task}")
        setting = load(model, task, data_dir, options["seed"], dtype)
        tuner, found = calibrate(setting, out, display, requests, **options)
        written = keep_tuner(tuner, out)
        write_table(out, tuner, found)
    return tuner, written
