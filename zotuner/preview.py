"""A task before a run: the sizes of its splits, and its first examples as a model reads them."""

from collections.abc import Iterator
from pathlib import Path

from zotuner.config import FinetuneConfig
from zotuner.models import kind_saved, load_tokenizer
from zotuner.objective import Objective
from zotuner.tasks import Example, Kind, get_task


def preview(name: str, count: int, *, data_dir: Path | None = None, model: str | None = None) -> Iterator[str]:
    """Lines that describe a task. Text of examples is quoted as Python quotes it: white space is seen, a line a line.

    Args:
        name: The task's name or file.
        count: Training examples to show.
        data_dir: As of a run.
        model: Counts tokens as its tokenizer makes them.

    Raises:
        ZotunerError: Whatever is wrong with the task, its data or the model.
    """
    task = get_task(name, data_dir)
    kind: Kind = kind_saved(model) if model is not None else type(task).kinds()[0]
    objective = Objective(task, load_tokenizer(model), kind=kind) if model is not None else None
    splits = task.splits(train_size=FinetuneConfig.model_fields["train_size"].default, kind=kind)
    what = "generated text" if task.generates else task.loss
    yield f"task {task.name}: {what}, metrics: {', '.join(task.metrics)}"
    yield "examples that a run of default sizes and seed 0 draws:"
    for part, split in (("train", "train"), ("dev", task.dev_split), ("test", task.test_split)):
        yield f"  {part:5}  {len(getattr(splits, part)):5} of {split}"
    for number, example in enumerate(splits.train[:count], start=1):
        yield ""
        yield f"train {number}" + (f", a row of {objective.length(example)} tokens" if objective is not None else "")
        yield from _described(example, objective)


def _described(example: Example, objective: Objective | None) -> Iterator[str]:
    """The prompt, the candidates with a mark at the right one, the answers."""
    yield from (f"    {line!r}" for line in example.prompt.splitlines(keepends=True))
    counts = [""] * len(example.candidates)
    if objective is not None and not example.suffix:
        counts = [f"  ({count} tokens)" for count in objective.batch([example]).counts.tolist()]
    for number, (text, tokens) in enumerate(zip(example.candidates, counts, strict=True)):
        yield f"  {'*' if number == example.label else '-'} {text!r}{tokens}"
    if example.suffix:
        yield f"    {example.suffix!r}"
    if example.answers:
        yield f"  right: {', '.join(map(repr, example.answers))}"
