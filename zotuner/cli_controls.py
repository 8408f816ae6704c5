"""Options of what makes controls: `zotuner tuner init | static | measure` and `zotuner calibrate`."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from zotuner.config import DTYPE, STATISTIC


def _add_made_options(parser: argparse.ArgumentParser) -> None:
    """Of whatever makes a tuner for a model."""
    parser.add_argument("--model", required=True, help="name, folder or Hub id of its base (required)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the tuner (required)")


def add_init_options(parser: argparse.ArgumentParser) -> None:
    """Of `zotuner tuner init`."""
    _add_made_options(parser)
    text = "exp is MeZO until it is trained (%(default)s)"
    parser.add_argument("--architecture", choices=["abs", "exp"], default="abs", help=text)
    parser.add_argument("--seed", type=whole(0, 1 << 63), default=0, help="of the nets' weights (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a tuner in --out (off)")


def add_static_options(parser: argparse.ArgumentParser) -> None:
    """Of `zotuner tuner static`."""
    _add_made_options(parser)
    text = "types of blocks, such as self_attn.q_proj.weight=2; 1 for those not named"
    parser.add_argument(
        "--by-type", default=[], nargs="+", action="extend", type=_assignment, metavar="NAME=SIGMA", help=text
    )
    text = "tune the blocks of these layers alone, such as 18-23; all others get 0 (all layers)"
    parser.add_argument("--layers", default=[], nargs="+", action="extend", type=_span, metavar="FIRST-LAST", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a tuner in --out (off)")


def add_measure_options(parser: argparse.ArgumentParser) -> None:
    """Of `zotuner tuner measure`."""
    _add_made_options(parser)
    _add_estimate_options(parser)
    parser.add_argument("--batches", type=whole(2), default=16, help="that share no example (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a tuner in --out (off)")


def add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    """Of `zotuner calibrate`."""
    _add_made_options(parser)
    _add_estimate_options(parser)
    parser.add_argument("--forwards", type=whole(1), default=400, help="at most, in whole rounds (%(default)s)")
    text = "what is perturbed together: types, block (each alone), or so many random groups of blocks (%(default)s)"
    parser.add_argument("--groups", default="types", metavar="types|block|K", help=text)
    dtypes = [name for name in get_args(DTYPE) if name != "auto"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (%(default)s)")


def _add_estimate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="whose training examples are used: a name or a file (required)")
    text, choices = "sigma^2 ~ (G / C)^power or (G / d)^power (%(default)s)", get_args(STATISTIC)
    parser.add_argument("--statistic", choices=choices, default=choices[0], help=text)
    parser.add_argument("--power", type=_positive, default=0.5, help="0 would be MeZO (%(default)s)")
    parser.add_argument("--batch-size", type=whole(1), default=16, help="examples (%(default)s)")
    parser.add_argument("--eps", type=_positive, default=1e-3, help="size of a perturbation (%(default)s)")
    parser.add_argument("--seed", type=whole(0, 1 << 63), default=0, help="of noise, data and batches (%(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="D", help="read D/<task>/{train,validation,test}.jsonl")


def show_scales(tuner: Any, written: str) -> None:
    """The normalised scales of a static tuner, as every step will have them."""
    import numpy as np
    import torch

    from zotuner.log.scales import Scales
    from zotuner.log.tables import scales_table
    from zotuner.pertnn import normalize
    from zotuner.progress import stdout

    sigma = normalize(tuner.bank.sigma.detach(), torch.tensor([block.numel for block in tuner.info.blocks]))
    print(written)
    stdout().print(scales_table(Scales(tuner.block_names, np.zeros(1, np.int64), sigma.numpy()[None])))


def whole(least: int, below: int | None = None) -> Callable[[str], int]:
    """Reads a whole number within bounds."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
            bound = "" if below is None else f" and below {below}"
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}{bound}, got {text!r}")
        return int(text)

    return read


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _span(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or not (last if dash else first).isdecimal():
        raise argparse.ArgumentTypeError(f"expected FIRST-LAST, two numbers of layers, or one, got {text!r}")
    return int(first), int(last or first)


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=SIGMA, got {text!r}") from None
