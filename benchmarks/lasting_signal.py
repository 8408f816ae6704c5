"""Where the gradient that lasts lies, layers by layers: docs/results.md, 2026-11-26.

    python benchmarks/lasting_signal.py DATA_DIR TASK [--centred] [--steps 60] [--lr 1e-6] [--seed 0]

Walks by Adam, batches with as many examples of each label, on the loss or the centred one (`Objective.centred_loss`).
Signal: the product of a step's gradient with the running mean over earlier ones; energy: its square. Means over the
second half of the walk, as shares of all, with the standard error of signal / energy.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

import zotuner
from zotuner.block_types import layer_of
from zotuner.blocks import find_blocks
from zotuner.expected import Remembered
from zotuner.objective import objective_for
from zotuner.tasks import Example, batches, get_task
from zotuner.trajectory import first_order

BATCH, GROUP = 8, 6  # examples; layers


def balanced(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """Endless batches with as many examples of each label, give or take one."""
    labels = sorted({example.label for example in examples})
    streams = [batches([e for e in examples if e.label == label], 1, seed) for label in labels]
    order = (next(stream)[0] for stream in cycle(streams))
    while True:
        yield list(islice(order, BATCH))


def group_of(name: str) -> str:
    """The layers that a block lies in."""
    layer = layer_of(name)
    first = None if layer is None else layer // GROUP * GROUP
    return name if first is None else f"layers {first} to {first + GROUP - 1}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("task")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--centred", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model, tokenizer = zotuner.load_model(given.model)
    task = get_task(given.task, given.data)
    splits = task.splits(train_size=1000, dev_size=100, eval_size=10, seed=given.seed, kind="causal")
    objective = objective_for(task, model, tokenizer)
    loss = objective.centred_loss if given.centred else objective.loss
    blocks = find_blocks(model)
    optimizer, remembered = first_order("adam", model, given.lr), Remembered()
    signal, energy = np.zeros((2, given.steps, len(blocks)))
    for step, examples in zip(range(given.steps), balanced(splits.train, given.seed), strict=False):
        loss(model, objective.training_batch(examples)).backward()
        for number, block in enumerate(blocks):
            for piece in block.pieces:
                gradient = piece.of(piece.param.grad)
                signal[step, number] += remembered.meet(piece, gradient)
                energy[step, number] += float(gradient.square().sum())
        remembered.pass_on()
        optimizer.step()
        optimizer.zero_grad()
    half = slice(given.steps // 2, None)
    whole = energy[half].sum()
    print(f"{'blocks':28}{'signal':>10}{'energy':>10}{'signal / energy':>24}")
    names = [group_of(block.name) for block in blocks]
    for group in [*dict.fromkeys(names), "all"]:
        members = [i for i, name in enumerate(names) if group in (name, "all")]
        s, e = signal[half][:, members].sum(axis=1), energy[half][:, members].sum(axis=1)
        error = s.std() / len(s) ** 0.5 / e.mean()
        shares = f"{s.sum() / signal[half].sum():10.3f}{e.sum() / whole:10.3f}"
        print(f"{group:28}{shares}{s.mean() / e.mean():14.3f} +- {error:.3f}")


if __name__ == "__main__":
    main()
