"""Commands about tuners: `zotuner tuner list | pull | push | import | inspect | init | static | measure`; calibrate."""

import argparse
from pathlib import Path
from typing import Any, get_args

from zotuner.cli.parser import Add, add_data_dir, adder, count, positive, quiet, stated, whole
from zotuner.config import DTYPE, STATISTIC
from zotuner.errors import ZotunerError, repeated


def add_commands(add: Add) -> None:
    """tuner and its actions, calibrate."""
    action = adder(add("tuner", None, "list, pull, push, import, make and inspect tuners"), "ACTION")
    _add_list_options(action("list", _list, "list tuners: those with this package, then the Hub's"))
    _add_pull_options(action("pull", _pull, "bring a tuner of the Hub into a folder"))
    _add_push_options(action("push", _push, "put a tuner on the Hub"))
    _add_import_options(action("import", _import, "read a published tuner (.pth), running no code of it"))
    _add_inspect_options(action("inspect", _inspect, "show a tuner's scales, and whether it is a fresh one"))
    _add_init_options(action("init", _init, "make an untrained tuner: a control"))
    _add_static_options(action("static", _static, "make a tuner of a scale by hand for each type of block"))
    text = "make a tuner of static scales from gradients and curvatures on a task, by backpropagation"
    _add_measure_options(action("measure", _measure, text))
    text = "make a tuner of static scales by forward passes alone; the same command goes on where it was"
    _add_calibrate_options(add("calibrate", _calibrate, text))


def _add_list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="MODEL", help="only those for this model, by name or Hub id")


def _list(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.hub import tuners
    from zotuner.progress import stdout
    from zotuner.report import new_table

    table = new_table(None, "tuner", "base model", "from", "downloads")
    table.columns[1].justify = table.columns[2].justify = "left"
    try:
        for one in tuners(arguments.base):
            on_hub = one.downloads is not None
            table.add_row(one.name, one.base, "the Hub" if on_hub else "this package", str(one.downloads or ""))
    finally:  # where the Hub cannot be asked, those of the package can be had all the same
        if table.row_count:
            stdout().print(table)
    if not table.row_count:
        print(f"no tuner for {arguments.base}, neither with this package nor on the Hub")


def _add_pull_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a tuner's Hub id")
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    _add_tuner_out(parser)


def _pull(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.hub import pull

    print(pull(arguments.id, arguments.out, revision=arguments.revision, overwrite=arguments.overwrite))


def _add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a tuner's folder")
    parser.add_argument("id", metavar="ID", help="OWNER/NAME on the Hub; made if it is new")
    parser.add_argument("--private", action="store_true", help="make a new repository private (off)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it is new (main)")


def _push(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.hub import push

    print(push(arguments.folder, arguments.id, private=arguments.private, revision=arguments.revision))


def _add_import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a dict from parameter names to nets, by torch.save")
    parser.add_argument("--base", required=True, metavar="MODEL", help="name, folder or Hub id of its base (required)")
    rows = "rows of an embedding table that the normalisation counts; the published code: 15 x batch size (all)"
    parser.add_argument("--embedding-rows", type=count, metavar="N", help=rows)
    _add_tuner_out(parser)


def _import(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.published import import_tuner, write_tuner
    from zotuner.tuner_out import claimed

    with claimed(arguments.out, arguments.overwrite):
        imported = import_tuner(arguments.file, arguments.base, embedding_rows=arguments.embedding_rows)
        print("\n".join(write_tuner(imported, arguments.out)))


def _add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuner", metavar="DIR", help="a tuner: folder, name or Hub id")
    parser.add_argument("--against", metavar="OTHER", help="another tuner, to compare with block by block")
    parser.add_argument(
        "--model", metavar="M", help="tell the nets this model's statistics (those they are centred at)"
    )
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="a run of zo-finetuner, over its steps")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the scales as a heat map, as PNG")


def _inspect(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.inspection import inspect_tuner

    options = {"against": arguments.against, "model": arguments.model, "run": arguments.run_dir}
    inspect_tuner(arguments.tuner, plot_to=arguments.plot, **options)


def _add_init_options(parser: argparse.ArgumentParser) -> None:
    _add_base(parser)
    text = "exp is MeZO until it is trained (%(default)s)"
    parser.add_argument("--architecture", choices=["abs", "exp"], default="abs", help=text)
    parser.add_argument("--seed", type=whole(0, 1 << 63), default=0, help="of the nets' weights (%(default)s)")
    _add_tuner_out(parser)


def _init(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.controls.commands import init

    print(init(**stated(arguments)))


def _add_static_options(parser: argparse.ArgumentParser) -> None:
    _add_base(parser)
    text = "types of blocks, such as self_attn.q_proj.weight=2; 1 for those not named"
    parser.add_argument(
        "--by-type", default=[], nargs="+", action="extend", type=_assignment, metavar="NAME=SIGMA", help=text
    )
    text = "tune the blocks of these layers alone, such as 18-23; all others get 0 (all layers)"
    parser.add_argument("--layers", default=[], nargs="+", action="extend", type=_span, metavar="FIRST-LAST", help=text)
    _add_tuner_out(parser)


def _static(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.controls.commands import static

    twice = repeated([name for name, _ in arguments.by_type])
    if twice is not None:
        raise ZotunerError(f"--by-type: {twice} stands twice; give each type one scale")
    _show_scales(*static(**{**stated(arguments), "by_type": dict(arguments.by_type)}))


def _add_measure_options(parser: argparse.ArgumentParser) -> None:
    _add_base(parser)
    _add_estimate_options(parser)
    parser.add_argument("--batches", type=whole(2), default=16, help="that share no example (%(default)s)")
    _add_tuner_out(parser)


def _measure(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.controls.commands import measured
    from zotuner.progress import Display

    _show_scales(*measured(display=Display(), **stated(arguments)))


def _add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    _add_base(parser)
    _add_estimate_options(parser)
    parser.add_argument("--forwards", type=count, default=400, help="at most, in whole rounds (%(default)s)")
    text = "what is perturbed together: types, block (each alone), or so many random groups of blocks (%(default)s)"
    parser.add_argument("--groups", default="types", metavar="types|block|K", help=text)
    dtypes = [name for name in get_args(DTYPE) if name != "auto"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights (%(default)s)")
    _add_out(parser)


def _calibrate(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.controls.commands import calibrated
    from zotuner.progress import Display

    _show_scales(*calibrated(display=Display(), **stated(arguments)))


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="name, folder or Hub id of its base (required)")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the tuner (required)")


def _add_tuner_out(parser: argparse.ArgumentParser) -> None:
    _add_out(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a tuner in --out (off)")


def _add_estimate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="whose training examples are used: a name or a file (required)")
    text, choices = "sigma^2 ~ (G / C)^power or (G / d)^power (%(default)s)", get_args(STATISTIC)
    parser.add_argument("--statistic", choices=choices, default=choices[0], help=text)
    parser.add_argument("--power", type=positive, default=0.5, help="0 would be MeZO (%(default)s)")
    parser.add_argument("--batch-size", type=count, default=16, help="examples (%(default)s)")
    parser.add_argument("--eps", type=positive, default=1e-3, help="size of a perturbation (%(default)s)")
    parser.add_argument("--seed", type=whole(0, 1 << 63), default=0, help="of noise, data and batches (%(default)s)")
    add_data_dir(parser)


def _show_scales(tuner: Any, written: str) -> None:
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
