"""Models rebuilt from a ledger: the base model and a few numbers a step, without data or a forward.

base model + header + records  ->  the same updates, noise drawn again  ->  the same weights, checked by SHA-256
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zotuner import noise
from zotuner.adapters import adapted
from zotuner.config import ZEROTH_ORDER, FinetuneConfig
from zotuner.errors import ZotunerError, at_fault
from zotuner.files import is_vacant
from zotuner.finetune import SUMMARY
from zotuner.ledger import Record, read_ledger, write_ledger
from zotuner.metrics import read_json
from zotuner.models import known_as, load_model, save_model, weights_sha256
from zotuner.progress import Display
from zotuner.quantized import quantize_
from zotuner.steppers import ZOStepper
from zotuner.training import LEDGER
from zotuner.tuner import Tuner

SUFFIX = ".zoledger"


class Final(BaseModel):
    """The weights that a run delivered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(ge=0)
    weights_sha256: str


class Header(BaseModel):
    """What rebuilding reads of a ledger's header."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    weights_sha256: str
    tuner: str | None
    tuner_sha256: str | None
    noise_version: int
    config: dict[str, Any]
    final: Final | None = None  # None: of a run's own ledger, whose summary says it


@dataclass(frozen=True)
class Recorded:
    """A ledger that was read and understood.

    Attributes:
        path: The file.
        raw: Its header as it stands.
        header: What rebuilding reads of it.
        config: The run's options.
        records: All steps.
        final: The weights that the run delivered; None: it has not ended.
    """

    path: Path
    raw: dict[str, Any]
    header: Header
    config: FinetuneConfig
    records: list[Record]
    final: Final | None


def read_recorded(path: Path) -> Recorded:
    """Reads a run's folder, or a file to share.

    Raises:
        ZotunerError: Neither, or damaged, or made by a noise that this version does not have.
    """
    folder = path if path.is_dir() else None
    file = path if folder is None else path / LEDGER
    if folder is not None and not file.exists():
        raise ZotunerError(f"{path}: expected a run of a zeroth-order method, but it has no {LEDGER}")
    raw, records = read_ledger(file)
    try:
        header = Header.model_validate(raw)
        config = FinetuneConfig.model_validate({**header.config, "out": "."})
    except ValidationError as error:
        raise ZotunerError(f"{file}: header: {at_fault(error)}") from None
    if config.method not in ZEROTH_ORDER:
        raise ZotunerError(f"{file}: expected a zeroth-order method ({', '.join(ZEROTH_ORDER)}), got {config.method}")
    if header.noise_version != noise.VERSION:
        raise ZotunerError(
            f"{file}: was made with version {header.noise_version} of the noise, this is {noise.VERSION}; "
            "use the release of zotuner that made it"
        )
    if [record.step for record in records] != list(range(len(records))):
        raise ZotunerError(f"{file}: expected steps 0, 1, 2, ... in its records, got others")
    return Recorded(file, raw, header, config, records, header.final or _final(folder))


def _final(folder: Path | None) -> Final | None:
    """What a finished run's summary says of the weights that it delivered: those of the best step on dev."""
    if folder is None or not (folder / SUMMARY).exists():
        return None
    summary = read_json(folder / SUMMARY)
    best = (summary.get("dev") or {}).get("best") or {"step": 0}
    return Final(step=best["step"], weights_sha256=summary["weights_sha256"])


def rebuild(
    recorded: Recorded,
    out: Path,
    display: Display,
    *,
    base: str | None = None,
    tuner: str | None = None,
    step: int | None = None,
) -> str:
    """Rebuilds a model and saves it.

    Args:
        recorded: The steps.
        out: Folder for the model; must be empty or new.
        display: Where progress goes.
        base: The model that the run began with; None: by the name that the ledger has.
        tuner: The run's tuner, if it had one; None: likewise.
        step: After how many steps to stop; None: with the weights that the run delivered.

    Returns:
        A line that says what was verified.

    Raises:
        ZotunerError: Another base model or tuner, too many steps, or weights that are not those of the run.
    """
    if not is_vacant(out, "model"):
        raise ZotunerError(f"{out}: expected an empty folder or a new one; choose another --out")
    if out.resolve() == Path.cwd():
        raise ZotunerError(f"{out}: is the current folder, in whose place the model's would come; choose another --out")
    stop = _stop(recorded, step)
    config, name = recorded.config, base or recorded.header.model
    if config.quantize is not None and config.adapter == "none":
        raise ZotunerError(f"{recorded.path}: its weights are quantised, which transformers could not load")
    with display:
        display.say(f"loading {name}")
        model, tokenizer = load_model(name, dtype=config.dtype)
        model = adapted(model, config, name)
        if config.quantize is not None:
            quantize_(model, config.quantize, frozen_only=True)
        _check(recorded, "model", name, weights_sha256(model), recorded.header.weights_sha256)
        stepper = ZOStepper(recorded.config, model, _tuner(recorded, tuner))
        bar = display.bar("replay", stop)
        for record in recorded.records[:stop]:
            stepper.replay(record)
            bar.advance()
        bar.close()
        sha256 = weights_sha256(model)
        whole = recorded.final is not None and stop == recorded.final.step
        if whole and sha256 != recorded.final.weights_sha256:  # type: ignore[union-attr]
            raise ZotunerError(
                f"{recorded.path}: after {stop} steps the weights have SHA-256 {sha256}, "
                f"the run recorded {recorded.final.weights_sha256}"  # type: ignore[union-attr]
            )
        save_model(model, tokenizer, out, name)
    verified = "as the run recorded" if whole else "no record to compare with: the run did not deliver this step"
    return f"{out}: the model after {stop} steps, SHA-256 {sha256} ({verified})"


def export(recorded: Recorded, out: Path) -> str:
    """Writes the small file that `zotuner apply` makes the model from: the steps up to the delivered weights.

    Returns:
        A line that says what it holds.

    Raises:
        ZotunerError: The run has not ended, or the file cannot be written.
    """
    if recorded.final is None:
        raise ZotunerError(f"{recorded.path}: expected a finished run; resume it first")
    if out.suffix != SUFFIX:
        raise ZotunerError(f"--out: expected a name that ends in {SUFFIX}, got {out}")
    named = {key: None if recorded.raw[key] is None else known_as(recorded.raw[key]) for key in ("model", "tuner")}
    config = recorded.raw["config"]
    own = {"task": Path(config["task"]).name}
    if config.get("objective"):
        own["objective"] = Path(config["objective"]).name
    header = {
        **recorded.raw,
        **named,
        "config": {**config, **named, **own},
        "final": recorded.final.model_dump(),
    }
    records = recorded.records[: recorded.final.step]
    try:
        write_ledger(out, header, records)
    except OSError as error:
        raise ZotunerError(f"{out}: cannot be written: {error.strerror or error}") from None
    return f"{out}: {len(records)} steps in {out.stat().st_size / 1000:.1f} kB, for {named['model']}"


def _stop(recorded: Recorded, step: int | None) -> int:
    """After how many steps to stop."""
    if step is None:
        step = len(recorded.records) if recorded.final is None else recorded.final.step
    if step > len(recorded.records):
        raise ZotunerError(f"{recorded.path}: has {len(recorded.records)} steps, got --step {step}")
    return step


def _tuner(recorded: Recorded, name: str | None) -> Tuner | None:
    """The run's tuner."""
    wanted = recorded.header.tuner_sha256
    if wanted is None:
        return None
    which = name or recorded.header.tuner
    tuner = Tuner.from_pretrained(str(which))
    _check(recorded, "tuner", str(which), tuner.sha256(), wanted)
    return tuner


def _check(recorded: Recorded, what: str, name: str, came: str, wanted: str) -> None:
    if came != wanted:
        raise ZotunerError(
            f"{name}: {recorded.path} is for the {what} with SHA-256 {wanted}, this one has {came}; "
            f"give the very {what} that the run began with"
        )
