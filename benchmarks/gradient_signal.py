"""What a gradient is made of, block type by block type: docs/results.md, 2026-11-26.

    python benchmarks/gradient_signal.py DATA_DIR TASK [--walk 0] [--batches 30]

After `--walk` steps of Adam: signal |E g|^2 and energy E |g|^2 of batches of 8 at these weights, the share of both
along the gradient of the mean difference of two candidates' scores, and what signal is left beside it.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import zotuner
from zotuner.evaluate import evaluate
from zotuner.objective import objective_for
from zotuner.tasks import batches, get_task

BATCH, DEV, LR = 8, 192, 5e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("task")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--walk", type=int, default=0)
    parser.add_argument("--batches", type=int, default=30)
    given = parser.parse_args()
    model, tokenizer = zotuner.load_model(given.model)
    task = get_task(given.task, given.data)
    splits = task.splits(train_size=1000, dev_size=DEV, eval_size=10, seed=0, kind="causal")
    objective = objective_for(task, model, tokenizer)
    params = dict(model.named_parameters())
    adam = torch.optim.Adam(params.values(), lr=LR, fused=True)
    for _, examples in zip(range(given.walk), batches(splits.train, BATCH, 9), strict=False):
        adam.zero_grad()
        objective.loss(model, objective.training_batch(examples)).backward()
        adam.step()
    del adam

    def gradient(value: Tensor) -> dict[str, Tensor]:
        return dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))

    def dots(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((a[name] * b[name]).sum()) for name in params}

    count = given.batches
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    prior = {name: torch.zeros_like(p) for name, p in params.items()}
    energy, along = dict.fromkeys(params, 0.0), 0.0
    for _, examples in zip(range(count), batches(splits.train, BATCH, 5), strict=False):
        batch = objective.training_batch(examples)
        g = gradient(objective.loss(model, batch))
        scores = objective.scores(model, batch)
        b = gradient((scores[:, 1] - scores[:, 0]).mean())
        squares = dots(g, g)
        along += sum(dots(g, b).values()) ** 2 / sum(squares.values()) / sum(dots(b, b).values()) / count
        for name in params:
            energy[name] += squares[name] / count
            mean[name] += g[name] / count
            prior[name] += b[name] / count
    whole, both, norm = dots(mean, mean), sum(dots(mean, prior).values()), sum(dots(prior, prior).values())
    beside = {name: mean[name] - both / norm * prior[name] for name in params}
    left = dots(beside, beside)
    print(f"dev {evaluate(model, objective, splits.dev).figures}")
    share = both**2 / norm / sum(whole.values())
    print(f"along the difference of candidates: mean gradient {share:.3f}, batches {along:.3f}")
    print(f"{'type':28}{'signal':>10}{'energy':>10}{'beside':>10}{'its noise at most':>20}")
    types: dict[str, list[str]] = {}
    for name in params:
        types.setdefault(name.split(".")[-2], []).append(name)
    for label, names in types.items():
        total, square, rest = (sum(column[name] for name in names) for column in (energy, whole, left))
        signal = (square * count - total) / (count - 1)
        print(f"{label:28}{signal:10.3f}{total:10.3f}{rest:10.3f}{(total - signal) / count:20.3f}")


if __name__ == "__main__":
    main()
