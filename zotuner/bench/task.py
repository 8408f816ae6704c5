"""What a step on a real task costs, and what its parts save: real examples, a MeZO step with Rademacher noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from zotuner.bench.measure import LR, seconds_of
from zotuner.objective import Objective
from zotuner.optim import MeZO
from zotuner.progress import Display
from zotuner.tasks import Example, batches, get_task

Loss = Callable[..., Tensor]  # (branches) -> loss or losses


@dataclass(frozen=True)
class Setting:
    """One way to take the same step.

    Attributes:
        optimizer: Takes it.
        loss_of: Examples -> the closure's loss.
    """

    optimizer: MeZO
    loss_of: Callable[[Sequence[Example]], Loss]


def task_rounds(
    model: Any, tokenizer: Any, *, task: str, data_dir: Path | None, batch_size: int, rounds: int, display: Display
) -> dict[str, dict[str, Any]]:
    """Takes the step of each setting on the same batches, one batch a round, after one that does not count.

    Returns:
        Name -> seconds (median), `per_shared` (over the step whose candidates share rows), and, for bfloat16
        products, `difference_error`: the median over the rounds of |D' - D| / |D|, D = L+ - L- in float32.
    """
    chosen = get_task(task, data_dir)
    train = chosen.splits(train_size=batch_size * (rounds + 1), dev_size=1, eval_size=1, seed=0).train
    objective = Objective(chosen, tokenizer)
    shared = partial(_shared, model, objective)
    settings = {
        "candidates share rows": Setting(MeZO(model, lr=LR, noise="rademacher"), shared),
        "a sequence a candidate": Setting(
            MeZO(model, lr=LR, noise="rademacher"), partial(_separate, model, tokenizer, objective)
        ),
        "products in bfloat16": Setting(MeZO(model, lr=LR, noise="rademacher", compute_dtype=torch.bfloat16), shared),
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    differences: dict[str, list[float]] = {name: [] for name in settings}
    bar = display.bar(task, len(settings) * (rounds + 1))
    for number, examples in enumerate(islice(batches(train, batch_size, 0), rounds + 1)):
        for name, setting in settings.items():
            took = seconds_of(partial(setting.optimizer.step, setting.loss_of(examples)))
            assert setting.optimizer.last is not None
            plus, minus = setting.optimizer.last.losses
            if number:
                seconds[name].append(took)
                differences[name].append(plus - minus)
            bar.advance()
    bar.close()
    first, *_, half = settings
    errors = [abs(d - exact) / abs(exact) for d, exact in zip(differences[half], differences[first], strict=True)]
    return {
        name: {
            "seconds": median(took),
            "per_shared": median(a / b for a, b in zip(took, seconds[first], strict=True)),
            "difference_error": median(errors) if name == half else None,
            "rounds": {"seconds": took, "differences": differences[name]},
        }
        for name, took in seconds.items()
    }


def task_table(entries: dict[str, dict[str, Any]], title: str) -> Table:
    """The figures of `task_rounds`."""
    table = Table("MeZO step", "seconds", "step / shared rows", "error of L+ - L-, median", title=title)
    for name, row in entries.items():
        error = "" if row["difference_error"] is None else f"{row['difference_error']:.2%}"
        table.add_row(name, f"{row['seconds']:.3f}", f"{row['per_shared']:.3f}", error)
    return table


def _shared(model: Any, objective: Objective, examples: Sequence[Example]) -> Loss:
    batch = objective.training_batch(examples)
    return lambda branches=1: objective.loss(model, batch, branches)


def _separate(model: Any, tokenizer: Any, objective: Objective, examples: Sequence[Example]) -> Loss:
    """The plain way: prompt + candidate as a sequence of its own, for each candidate; logits at the end alone."""
    texts = [example.prompt + text for example in examples for text in example.candidates]
    sizes = [
        len(tokenizer(e.prompt + text)["input_ids"]) - len(tokenizer(e.prompt)["input_ids"])
        for e in examples
        for text in e.candidates
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]  # (examples * candidates, length)
    longest, labels = max(sizes), torch.tensor([example.label for example in examples])
    position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)
    counted = torch.arange(longest) >= longest - torch.tensor(sizes)[:, None]

    def loss(branches: int = 1) -> Tensor:
        repeated = [x.repeat(branches, 1) for x in (ids, mask, position_ids)]
        names = ("input_ids", "attention_mask", "position_ids")
        out = model(**dict(zip(names, repeated, strict=True)), use_cache=False, logits_to_keep=longest + 1).logits
        means = []
        for logits in out.chunk(branches):  # (sequences, longest + 1, vocabulary)
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, -longest:, None])[..., 0]
            scores = (log_probs * counted).sum(dim=1) / counted.sum(dim=1)
            means.append(objective.losses(scores.view(len(examples), -1), labels).mean())
        return means[0] if branches == 1 else torch.stack(means)

    return loss
