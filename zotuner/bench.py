"""What a step costs: measured side by side in one process, interleaved, medians over rounds."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from zotuner.errors import ZotunerError
from zotuner.metrics import write_json
from zotuner.models import load_model
from zotuner.optim import FZOO, MeZO, ZOFineTuner
from zotuner.progress import Display, stdout
from zotuner.tuner import Tuner, versions

LR = 1e-12  # the weights may drift by nothing that matters while we measure


def bench(model_name: str, *, batch_size: int, length: int, rounds: int, out: Path | None, display: Display) -> None:
    """Times a forward and a step of each method on random tokens; prints a table, and writes JSON if asked.

    Args:
        model_name: As `--model` everywhere.
        batch_size: Sequences a forward.
        length: Tokens a sequence.
        rounds: Measurements of each; the order within a round is fixed, and one round before them is not counted.
        out: Where the JSON goes.
        display: Where progress goes.
    """
    if out is not None and not out.absolute().parent.is_dir():
        raise ZotunerError(f"{out}: there is no folder {out.parent} to write to")
    with display:
        display.say(f"loading {model_name}")
        model, _ = load_model(model_name)
        ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))

        def closure() -> torch.Tensor:
            loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            return loss

        entries = _entries(model, closure)
        seconds: dict[str, list[float]] = {name: [] for name in entries}
        bar = display.bar("rounds", rounds + 1)
        for number in range(rounds + 1):
            for name, (_, run) in entries.items():
                started = time.perf_counter()
                run()
                if number:
                    seconds[name].append(time.perf_counter() - started)
            bar.advance()
        bar.close()
    result = _result(entries, seconds)
    about = {"model": model_name, "batch_size": batch_size, "length": length, "rounds": rounds}
    about |= {"threads": torch.get_num_threads(), "versions": versions()}
    if out is not None:
        write_json(out, {**about, "entries": result})
    stdout().print(_table(result, f"{model_name}, batch {batch_size} x {length}, median of {rounds} rounds"))


def _entries(model: Any, closure: Callable[[], torch.Tensor]) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name -> (forwards, what runs)."""
    tuner = Tuner.for_model(model)
    forward = torch.no_grad()(closure)
    entries: dict[str, tuple[int, Callable[[], Any]]] = {"forward": (1, forward)}
    for kind in ("rademacher", "gaussian"):
        mezo = MeZO(model, lr=LR, noise=kind)
        tuned = ZOFineTuner(model, tuner, lr=LR, noise=kind)
        entries[f"mezo {kind}"] = (2, lambda opt=mezo: opt.step(closure))  # type: ignore[misc]
        entries[f"zo-finetuner {kind}"] = (2, lambda opt=tuned: opt.step(closure))  # type: ignore[misc]
    fzoo = FZOO(model, lr=LR)
    entries["fzoo rademacher"] = (9, lambda: fzoo.step(closure))
    return entries


def _result(
    entries: dict[str, tuple[int, Callable[[], Any]]], seconds: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """Medians; ratios are taken round by round, so that a slow spell of the machine falls on both sides."""
    out = {}
    for name, (forwards, _) in entries.items():
        ratios = [s / (forwards * f) for s, f in zip(seconds[name], seconds["forward"], strict=True)]
        out[name] = {"seconds": median(seconds[name]), "forwards": forwards, "per_own_forwards": median(ratios)}
        base = name.replace("zo-finetuner", "mezo")
        if base != name:
            over = [s / b for s, b in zip(seconds[name], seconds[base], strict=True)]
            out[name]["per_mezo_step"] = median(over)
    return out


def _table(result: dict[str, dict[str, float]], title: str) -> Table:
    table = Table("step", "seconds", "forwards", "step / its forwards", "step / MeZO step", title=title)
    for name, row in result.items():
        over = f"{row['per_mezo_step']:.3f}" if "per_mezo_step" in row else ""
        table.add_row(name, f"{row['seconds']:.3f}", f"{row['forwards']:.0f}", f"{row['per_own_forwards']:.3f}", over)
    return table
