"""One run, from its directory: what happened step by step, as a table and as a figure.

config.yaml | metrics.jsonl | evals.jsonl | scales.jsonl  ->  Run  ->  tables on the terminal, panels in a PNG
"""

from pathlib import Path

from zotuner.log.figure import draw, paint_scales
from zotuner.log.run import Run, read_run
from zotuner.log.tables import headline, scales_table, steps_table
from zotuner.progress import stdout
from zotuner.report import save_figure

__all__ = ["Run", "log", "paint_scales", "read_run", "scales_table"]


def log(folder: Path, *, rows: int, plot_to: Path | None) -> None:
    """Shows a run of fine-tuning or meta-training: finished, going on, or killed.

    Args:
        folder: The run's directory.
        rows: Of the table of steps.
        plot_to: Where a figure goes, if anywhere.

    Raises:
        ZotunerError: No run, no step yet, a damaged file, or a figure that cannot be written.
    """
    run = read_run(folder)
    console = stdout()
    console.print(headline(run), markup=False, highlight=False, soft_wrap=True)
    console.print(steps_table(run, rows))
    if run.scales is not None:
        console.print(scales_table(run.scales))
    if plot_to is not None:
        save_figure(draw(run), plot_to)
