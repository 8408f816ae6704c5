"""Keeps the finished runs of a comparison in the repository, so that it can go on, and be read, anywhere.

    python benchmarks/keep_runs.py runs/study docs/study

Of each run that is done: its options (without where the data lay), evaluations, summary, ledger, the losses of its test
examples and its note, 18 kB in all.
`zotuner compare FILE --out docs/study --report-only` makes tables and page of them; without --report-only it goes on.
"""

import argparse
import shutil
from pathlib import Path

import yaml

from zotuner.metrics import read_rows, write_rows

KEPT = ("evals.jsonl", "summary.json", "ledger.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    for summary in sorted(given.comparison.glob("runs/*/*/*/*/summary.json")):
        run = summary.parent
        kept = given.out / run.relative_to(given.comparison)
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run / name).exists():
                shutil.copy(run / name, kept / name)
        if (run / "predictions.jsonl").exists():
            rows = read_rows(run / "predictions.jsonl")
            write_rows(kept / "predictions.jsonl", [{"loss": row["loss"] and round(row["loss"], 5)} for row in rows])
        options = yaml.safe_load((run / "config.yaml").read_text())
        (kept / "config.yaml").write_text(yaml.safe_dump({**options, "data_dir": None}, sort_keys=False))
        note = run.with_name(run.name + ".json")
        shutil.copy(note, kept.with_name(note.name))


if __name__ == "__main__":
    main()
