"""What a tuner does, and whether it learned anything: its scales by block, and its weights against fresh ones.

tuner (+ base model | run | another tuner)  ->  scales at chosen features  ->  tables, a heat map, a figure
"""

from pathlib import Path

from zotuner.card import origin_of
from zotuner.errors import ZotunerError
from zotuner.inspection.figure import draw
from zotuner.inspection.fresh import spread_of_fresh, tensors
from zotuner.inspection.sigma import compare, sigmas
from zotuner.inspection.tables import (
    compared_table,
    farthest_table,
    heat_map,
    sigma_table,
    tensors_table,
)
from zotuner.log import read_run, scales_table
from zotuner.models import load_model
from zotuner.pertnn import PertNNBank
from zotuner.progress import stdout
from zotuner.report import save_figure
from zotuner.tuner import Tuner


def inspect_tuner(
    name: str,
    *,
    against: str | None = None,
    model: str | None = None,
    run: Path | None = None,
    plot_to: Path | None = None,
) -> None:
    """Shows a tuner.

    Args:
        name: As for `Tuner.from_pretrained`.
        against: Another tuner, compared on the blocks that both know.
        model: A model whose statistics the nets are told; None: what their inputs are centred at.
        run: A fine-tuning that a tuner scaled: how its scales went.
        plot_to: Where a figure goes, if anywhere.

    Raises:
        ZotunerError: No such tuner, model or run; a tuner that does not fit; a figure that cannot be written.
    """
    tuner = Tuner.from_pretrained(name)
    other = Tuner.from_pretrained(against) if against is not None else None
    record = read_run(run) if run is not None else None
    if record is not None and record.scales is None:
        raise ZotunerError(f"{run}: expected a run of zo-finetuner, but it has no scales.jsonl")
    base = load_model(model)[0] if model is not None else None
    found = sigmas(tuner, base)
    console = stdout()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    info = tuner.info
    origin = origin_of(info.model_dump())
    say(f"{name}: {len(info.blocks)} blocks ({info.architecture}, {info.granularity}) of {info.base_model}, {origin}")
    say(f"{found.name} {found.told}")
    console.print(heat_map(found))
    console.print(sigma_table(found))
    spread = f"spread over blocks (std of log {found.name}): {found.spread:.4f}"
    if found.silent:
        spread += f", without the {found.silent} blocks that have no noise"
    if isinstance(tuner.bank, PertNNBank):
        console.print(tensors_table(tensors(tuner)))
        spread += f"; {spread_of_fresh(tuner, base)}"
    say(spread)
    if other is not None:
        comparison = compare(found, sigmas(other, base))
        say(f"against {against}: {comparison.summary}")
        console.print(compared_table(comparison))
        console.print(farthest_table(comparison))
    if record is not None and record.scales is not None:
        say(f"over the run {run}:")
        console.print(scales_table(record.scales))
    if plot_to is not None:
        save_figure(draw(name, found, record), plot_to)
