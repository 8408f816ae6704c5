"""What nets that blocks share are worth, by the points of a meta-training: docs/results.md, 2026-11-27.

    python meta_train.py --config configs/meta/smollm2-135m-instruct.yaml --tasks copa demo-sentiment ... --out RUN
    python benchmarks/points.py RUN [--bands 1 3 6] [--bounds 2 3] [--leave-out TASK ...] [--architecture abs] [--blind]

Nets are learned anew, in seconds, from what each point said (`points.safetensors`, of --meta-loss expected and
--granularity block), of all tasks or of all but one. A line each: the gain over sigma = 1, geometric mean and by phase.
Nets see what the run's did: --architecture changes what bounds a scale and how nets begin, not what they see. Nets that
are blind are told nothing, so each is a number. --out keeps the nets of all tasks that a last line is of.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

import zotuner.pertnn
from zotuner.block_types import alike
from zotuner.config import MetaTrainConfig
from zotuner.expected import Expected, gain
from zotuner.metrics import read_json
from zotuner.pertnn import PertNNBank, normalize
from zotuner.tuner import Tuner

Scales = Callable[[torch.Tensor], torch.Tensor]  # (..., n, 5) what the nets see -> (..., n) sigma~


def learned(
    config: MetaTrainConfig, points: dict, numels: torch.Tensor, groups: tuple[list[int], list[int]], keep: list[int]
) -> tuple[PertNNBank, Scales]:
    """Nets learned of the points of these numbers, one a block, and their scales by what they see."""
    firsts, of_block = groups[0], torch.tensor(groups[1])
    bank = PertNNBank(len(of_block), config.architecture, seed=config.seed).chosen(firsts)
    optimizer = torch.optim.Adam(bank.parameters(), lr=config.outer_lr)
    loss = Expected([], config)
    phases = [points["phases"][i] for i in keep]
    tensors = {f"visited.{name}": points[name][keep] for name in ("inputs", "own")}
    tensors |= {f"profiles.{phase}": means(points, phase) * phases.count(phase) for phase in set(phases)}
    counts = {phase: phases.count(phase) for phase in set(phases)}
    loss.restore(tensors, {"profiles": counts, "visited": phases, "remembered": {}})

    def scales(inputs: torch.Tensor) -> torch.Tensor:
        return normalize(bank(inputs, of_block), numels)

    for objective in loss.objectives(len(points["phases"]), scales):
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return bank.chosen(groups[1]), scales


@torch.no_grad()
def gains(points: dict, scales: Scales) -> dict[str, float]:
    """Over sigma = 1, by phase."""
    found = {}
    for phase in sorted(set(points["phases"])):
        whole, sigma = means(points, phase), scales(points["inputs"][numbers(points, phase)].mean(dim=0))
        found[phase] = gain(whole, sigma) / gain(whole, torch.ones_like(sigma))
    return found


def means(points: dict, phase: str) -> torch.Tensor:
    """(3, n) of all points of a phase."""
    return points["own"][numbers(points, phase)].mean(dim=0)


def numbers(points: dict, phase: str) -> list[int]:
    """Of the points of a phase."""
    return [i for i, name in enumerate(points["phases"]) if name == phase]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--bands", type=int, nargs="+", default=[1, 3, 6, 0], help="0: a net a block")
    parser.add_argument("--bounds", type=float, nargs="+", default=[3.0], help="of a scale of exp nets")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="TASK", help="a line for each, beside all")
    parser.add_argument("--architecture", choices=("exp", "abs"), help="default: the run's")
    parser.add_argument("--blind", action="store_true", help="nets are told nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the nets of all tasks' points, as a tuner")
    args = parser.parse_args()
    if args.out and args.bounds != [3.0]:
        parser.error("--out: a tuner's scales are bounded by 3, whatever they were learned with; leave out --bounds")
    tuner = Tuner.from_pretrained(args.run)
    made = {k: v for k, v in tuner.info.config.items() if k in MetaTrainConfig.model_fields}
    made |= {"architecture": args.architecture or tuner.info.architecture, "out": args.run}
    config = MetaTrainConfig.model_validate(made)
    with safe_open(args.run / "points.safetensors", framework="pt") as file:
        points = {name: file.get_tensor(name) for name in ("inputs", "own")}
        points["phases"] = json.loads(file.metadata()["phases"])
    if args.blind:
        points["inputs"] = torch.zeros_like(points["inputs"])
    numels = torch.tensor([block.numel for block in tuner.info.blocks])
    seconds = read_json(args.run / "summary.json")["seconds"]
    print(f"{args.run}: {len(points['phases'])} points in {seconds:.0f} s, {len(numels)} blocks")
    for bands in args.bands:
        groups = alike(tuner.block_names, bands or None)
        for bound in args.bounds:
            zotuner.pertnn.LIMIT = math.log(bound)
            for without in [None, *args.leave_out]:
                keep = [i for i, name in enumerate(points["phases"]) if without is None or name.split()[0] != without]
                bank, scales = learned(config, points, numels, groups, keep)
                if args.out and without is None:
                    if args.blind:
                        torch.nn.init.zeros_(bank.w1)
                    own = {"architecture": config.architecture, "bands": bands or None}
                    update = {"architecture": config.architecture, "config": tuner.info.config | own}
                    info = tuner.info.model_copy(update=update)
                    Tuner(info, bank).save_pretrained(args.out)
                reached = gains(points, scales)
                mean = math.exp(sum(math.log(x) for x in reached.values()) / len(reached))
                what = f"bands {bands or 'none'} ({len(groups[0])} nets), bound {bound:g}"
                print(
                    f"{what}, {f'without {without}' if without else 'all'}: {mean:.2f} |",
                    ", ".join(f"{phase} {value:.2f}" for phase, value in reached.items()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
