"""The command line: `zotuner finetune | meta-train | replay | report | ...`, a command a function."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo
from rich_argparse import RichHelpFormatter

from zotuner.cli_controls import (
    add_calibrate_options,
    add_init_options,
    add_measure_options,
    add_static_options,
    show_scales,
    whole,
)
from zotuner.config import DTYPE, Config, FinetuneConfig, MetaTrainConfig, read_yaml
from zotuner.errors import Interrupted, ZotunerError, repeated

C = TypeVar("C", bound=Config)

EXIT_SOME_FAILED, EXIT_BAD_INPUT, EXIT_SIGNAL, EXIT_INTERRUPTED = 1, 2, 128, 130

_count = whole(1)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0; 1 where some of many runs failed; 2 for bad input; 128 + the signal's number where one ended it.
    """
    # torch's and numba's idle threads would spin against each other, and against whatever else the machine does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except ZotunerError as error:
        print(f"zotuner: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        print(f"zotuner: {stop}", file=sys.stderr)
        return EXIT_SIGNAL + stop.signum
    except KeyboardInterrupt:
        print("zotuner: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from zotuner import __version__

    parser = _Parser(prog="zotuner", description="Learned zeroth-order fine-tuning.", formatter_class=RichHelpFormatter)
    parser.add_argument("--version", action="version", version=f"zotuner {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str, group: Any = commands) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = group.add_parser(
            name, help=text, description=text, formatter_class=RichHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    _add_options(add("finetune", _finetune, "fine-tune a model on a task by one method"), FinetuneConfig)
    _add_options(add("meta-train", _meta_train, "meta-train a tuner for a base model"), MetaTrainConfig)
    _add_replay_options(add("replay", _replay, "rebuild a run's model from its base and its ledger, without data"))
    export = add("export", _export, "write a finished run's ledger as a small file to share")
    export.add_argument("folder", type=Path, metavar="DIR", help="a finished run of a zeroth-order method")
    export.add_argument("--out", required=True, type=Path, metavar="FILE", help="name.zoledger (required)")
    _add_apply_options(add("apply", _apply, "make the model that such a file describes, from its base"))
    tuner = add("tuner", None, "list, pull, push, import, make and inspect tuners")
    actions = tuner.add_subparsers(required=True, metavar="ACTION")
    _add_list_options(add("list", _tuner_list, "list tuners: those with this package, then the Hub's", actions))
    _add_pull_options(add("pull", _tuner_pull, "bring a tuner of the Hub into a folder", actions))
    _add_push_options(add("push", _tuner_push, "put a tuner on the Hub", actions))
    _add_import_options(add("import", _tuner_import, "read a published tuner (.pth), running no code of it", actions))
    _add_inspect_options(
        add("inspect", _tuner_inspect, "show a tuner's scales, and whether it is a fresh one", actions)
    )
    add_init_options(add("init", _tuner_init, "make an untrained tuner: a control", actions))
    add_static_options(add("static", _tuner_static, "make a tuner of a scale by hand for each type of block", actions))
    text = "make a tuner of static scales from gradients and curvatures on a task, by backpropagation"
    add_measure_options(add("measure", _tuner_measure, text, actions))
    text = "make a tuner of static scales by forward passes alone; the same command goes on where it was"
    add_calibrate_options(add("calibrate", _calibrate, text))
    report = add("report", _report, "show runs side by side")
    report.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="finished runs")
    report.add_argument("--plot", type=Path, metavar="FILE", help="write the loss curves as PNG")
    log = add("log", _log, "show one run, also while it goes on: losses, coefficients, scales by block")
    log.add_argument("run_dir", type=Path, metavar="DIR", help="a run's directory")
    log.add_argument("--rows", type=_count, default=20, help="rows of the table, at most (%(default)s)")
    log.add_argument("--plot", type=Path, metavar="FILE", help="write the curves, and the scales as a heat map, as PNG")
    demo = add("demo", _demo, "fine-tune the demo model by three methods at equal forwards")
    demo.add_argument("--out", type=Path, default=Path("demo-run"), help="folder for the runs (%(default)s)")
    demo.add_argument("--tuner", default="smollm2-135m-instruct", help="name, folder or Hub id (%(default)s)")
    demo.add_argument("--forwards", type=_count, default=54, help="forward passes a method (%(default)s)")
    _add_compare_options(add("compare", _compare, "compare methods over tasks, learning rates and seeds, and report"))
    _add_bench_options(add("bench", _bench, "measure what a step of each method costs"))
    tasks = add("tasks", _tasks, "list the tasks, or show one")
    tasks.add_argument("task", nargs="?", metavar="TASK", help="name, or file of a task of your own")
    tasks.add_argument("--show", type=_count, default=3, metavar="N", help="examples of it to show (%(default)s)")
    tasks.add_argument("--data-dir", type=Path, metavar="D", help="read D/<task>/{train,validation,test}.jsonl")
    tasks.add_argument("--model", metavar="MODEL", help="count the tokens of the examples as this model reads them")
    return parser


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run of a zeroth-order method, finished or not")
    parser.add_argument("--out", required=True, type=Path, metavar="MODEL", help="folder for the model (required)")
    parser.add_argument("--step", type=_count, metavar="N", help="stop after N steps (as the run delivered it)")
    parser.add_argument("--model", metavar="BASE", help="the base model, if it is elsewhere now")
    parser.add_argument("--tuner", metavar="TUNER", help="the run's tuner, likewise")


def _add_apply_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a .zoledger file")
    parser.add_argument("--model", required=True, metavar="BASE", help="the base model it was made for (required)")
    parser.add_argument("--out", required=True, type=Path, metavar="MODEL", help="folder for the model (required)")
    parser.add_argument("--tuner", metavar="TUNER", help="the run's tuner: folder or Hub id (by the name in the file)")


def _add_list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="MODEL", help="only those for this model, by name or Hub id")


def _add_pull_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a tuner's Hub id")
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the tuner (required)")
    parser.add_argument("--overwrite", action="store_true", help="replace a tuner in --out (off)")


def _add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a tuner's folder")
    parser.add_argument("id", metavar="ID", help="OWNER/NAME on the Hub; made if it is new")
    parser.add_argument("--private", action="store_true", help="make a new repository private (off)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it is new (main)")


def _add_import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a dict from parameter names to nets, by torch.save")
    parser.add_argument("--base", required=True, metavar="MODEL", help="name, folder or Hub id of its base (required)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the tuner (required)")
    rows = "rows of an embedding table that the normalisation counts; the published code: 15 x batch size (all)"
    parser.add_argument("--embedding-rows", type=_count, metavar="N", help=rows)
    parser.add_argument("--overwrite", action="store_true", help="replace a tuner in --out (off)")


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML: tasks, methods, seeds, budget (docs/compare.md)")
    out = "folder for runs and results; an earlier one is gone on with (required)"
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=out)
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="runs at once, sharing cores (%(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="D", help="read D/<task>/{train,validation,test}.jsonl")
    only = parser.add_mutually_exclusive_group()
    text = "show the runs, what is done and what remains; make none"
    only.add_argument("--list", "--dry-run", dest="only", action="store_const", const="list", help=text)
    text = "write the results of what is done; make no run"
    only.add_argument("--report-only", dest="only", action="store_const", const="report", help=text)


def _add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuner", metavar="DIR", help="a tuner: folder, name or Hub id")
    parser.add_argument("--against", metavar="OTHER", help="another tuner, to compare with block by block")
    parser.add_argument(
        "--model", metavar="M", help="tell the nets this model's statistics (those they are centred at)"
    )
    parser.add_argument("--run", type=Path, dest="run_dir", metavar="DIR", help="a run of zo-finetuner, over its steps")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the scales as a heat map, as PNG")


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m-instruct", help="also random:0.5b, random:1.1b (%(default)s)")
    parser.add_argument("--batch-size", type=_count, default=16, help="sequences (%(default)s)")
    parser.add_argument("--length", type=_count, default=40, help="tokens a sequence (%(default)s)")
    parser.add_argument("--logits", choices=["all", "last"], default="all", help="positions of the loss (%(default)s)")
    parser.add_argument("--dtype", choices=get_args(DTYPE), default="float32", help="of the weights (%(default)s)")
    parser.add_argument("--rounds", type=_count, default=7, help="measurements of each (%(default)s)")
    parser.add_argument(
        "--methods", nargs="+", action="extend", metavar="NAME", help="rows, such as 'mezo gaussian' (all)"
    )
    drift = "measure instead how far so many steps with lr = 0 move the weights"
    parser.add_argument("--drift", type=_count, dest="drift_steps", metavar="STEPS", help=drift)
    pertnn = "measure instead one evaluation of N PertNNs; OPT-30B has 772 blocks"
    parser.add_argument("--pertnn", type=_count, dest="pertnn_blocks", metavar="N", help=pertnn)
    parser.add_argument(
        "--task", help="measure instead a MeZO step on real examples, such as sst2, and what saves time"
    )
    parser.add_argument("--data-dir", type=Path, metavar="D", help="read D/<task>/{train,validation,test}.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, dest="plot_to", metavar="FILE", help="write them as PNG")


def _add_options(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """One flag a field. Values stay text: the configuration checks and converts them."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML of options; flags win over it")
    resume = "go on with the run in DIR, which was stopped or killed, by its own options; takes no others"
    parser.add_argument("--resume", type=Path, metavar="DIR", help=resume)
    for name, field in config.model_fields.items():
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name, "help": _help(field)}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is tuple:
            options |= {"nargs": "+", "action": "extend", "metavar": name[:-1].upper()}
        else:
            options["metavar"] = "|".join(_choices(field.annotation)) or name.upper()
        parser.add_argument("--" + name.replace("_", "-"), **options)


def _help(field: FieldInfo) -> str:
    default = field.default
    if field.is_required():
        text = f"{field.description} (required)"
    elif isinstance(default, bool):
        text = f"{field.description} ({'on' if default else 'off'})"
    elif default is None or default == ():
        text = str(field.description)
    else:
        shown = " ".join(default) if isinstance(default, tuple) else default
        text = f"{field.description} ({shown})"
    return text.replace("%", "%%")


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, also within `Literal[...] | None`; of `int | Literal[...]` also N."""
    parts = get_args(annotation)
    found: list[str] = []
    for part in parts:
        found += [str(part)] if isinstance(part, str | int) else _choices(part)
    return [*found, "N"] if found and int in parts else found


def _config(kind: type[C], arguments: argparse.Namespace) -> C:
    """The options: those of the run to go on with, or those that the flags and the file state."""
    flags = {name: value for name, value in vars(arguments).items() if name in kind.model_fields}
    if arguments.resume is None:
        return kind.read(arguments.config, flags)
    if flags or arguments.config:
        stated = ["--" + name.replace("_", "-") for name in [*flags, *(["config"] if arguments.config else [])]]
        raise ZotunerError(f"--resume goes on with the run's own options: leave out {', '.join(stated)}")
    file = arguments.resume / "config.yaml"
    if not file.is_file():
        raise ZotunerError(f"{arguments.resume}: expected a run to go on with, but it has no config.yaml")
    other: type[Config] = MetaTrainConfig if issubclass(kind, FinetuneConfig) else FinetuneConfig
    only = set(other.model_fields) - set(kind.model_fields)
    if only & read_yaml(file).keys():
        command = "meta-train" if other is MetaTrainConfig else "finetune"
        raise ZotunerError(
            f"{arguments.resume}: is a run of another program: zotuner {command} --resume goes on with it"
        )
    return kind.read(file, {"out": arguments.resume})


def _quiet() -> None:
    """transformers' and datasets' own progress bars would fight with ours; of a failed request we tell ourselves."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _finetune(arguments: argparse.Namespace) -> None:
    config = _config(FinetuneConfig, arguments)
    _quiet()
    from zotuner.finetune import finetune
    from zotuner.progress import Display, stdout
    from zotuner.report import table

    finetune(config, Display(), resume=arguments.resume is not None)
    stdout().print(table([config.out]))


def _meta_train(arguments: argparse.Namespace) -> None:
    config = _config(MetaTrainConfig, arguments)
    _quiet()
    from zotuner.meta_train import meta_train
    from zotuner.progress import Display

    meta_train(config, Display(), resume=arguments.resume is not None)


def _replay(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.progress import Display
    from zotuner.replay import read_recorded, rebuild

    options = {"base": arguments.model, "tuner": arguments.tuner, "step": arguments.step}
    print(rebuild(read_recorded(arguments.folder), arguments.out, Display(), **options))


def _export(arguments: argparse.Namespace) -> None:
    from zotuner.replay import export, read_recorded

    print(export(read_recorded(arguments.folder), arguments.out))


def _apply(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.progress import Display
    from zotuner.replay import read_recorded, rebuild

    options = {"base": arguments.model, "tuner": arguments.tuner}
    print(rebuild(read_recorded(arguments.file), arguments.out, Display(), **options))


def _tuner_list(arguments: argparse.Namespace) -> None:
    _quiet()
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


def _tuner_pull(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.hub import pull

    print(pull(arguments.id, arguments.out, revision=arguments.revision, overwrite=arguments.overwrite))


def _tuner_push(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.hub import push

    print(push(arguments.folder, arguments.id, private=arguments.private, revision=arguments.revision))


def _tuner_import(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.published import check_tuner_out, import_tuner, write_tuner

    check_tuner_out(arguments.out, arguments.overwrite)
    imported = import_tuner(arguments.file, arguments.base, embedding_rows=arguments.embedding_rows)
    print("\n".join(write_tuner(imported, arguments.out)))


def _tuner_inspect(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.inspection import inspect_tuner

    options = {"against": arguments.against, "model": arguments.model, "run": arguments.run_dir}
    inspect_tuner(arguments.tuner, plot_to=arguments.plot, **options)


def _tuner_init(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.controls.commands import init

    print(init(**_stated(arguments)))


def _tuner_static(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.controls.commands import static

    twice = repeated([name for name, _ in arguments.by_type])
    if twice is not None:
        raise ZotunerError(f"--by-type: {twice} stands twice; give each type one scale")
    show_scales(*static(**{**_stated(arguments), "by_type": dict(arguments.by_type)}))


def _tuner_measure(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.controls.commands import measured
    from zotuner.progress import Display

    show_scales(*measured(display=Display(), **_stated(arguments)))


def _calibrate(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.controls.commands import calibrated
    from zotuner.progress import Display

    show_scales(*calibrated(display=Display(), **_stated(arguments)))


def _stated(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name != "run"}


def _report(arguments: argparse.Namespace) -> None:
    from zotuner.progress import stdout
    from zotuner.report import plot, table

    stdout().print(table(arguments.runs))
    if arguments.plot:
        plot(arguments.runs, arguments.plot)


def _log(arguments: argparse.Namespace) -> None:
    from zotuner.log import log

    log(arguments.run_dir, rows=arguments.rows, plot_to=arguments.plot)


def _demo(arguments: argparse.Namespace) -> None:
    from zotuner.demo import demo

    demo(arguments.out, arguments.tuner, arguments.forwards)


def _compare(arguments: argparse.Namespace) -> int:
    from zotuner.compare import compare
    from zotuner.progress import Display

    options = {name: value for name, value in vars(arguments).items() if name != "run"}
    return 0 if compare(display=Display(), **options) else EXIT_SOME_FAILED


def _bench(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would say on each use that it starts and stops
    _quiet()
    from zotuner.bench import bench
    from zotuner.progress import Display

    options = {name: value for name, value in vars(arguments).items() if name != "run"}
    bench(display=Display(), **options)


def _tasks(arguments: argparse.Namespace) -> None:
    if arguments.task is not None:
        return _preview(arguments)
    from rich.table import Table

    from zotuner.progress import stdout
    from zotuner.tasks import TASKS

    table = Table("task", "models", "loss", "metrics", "from", "what it is")
    for name, task in TASKS.items():
        what = (task.__doc__ or "").split("\n")[0].partition(" (")[0]  # without the source
        where = " ".join(task.hub) if task.hub else "the package"
        table.add_row(name, " ".join(task.kinds()), task.loss, " ".join(task.metrics), where, what)
    stdout().print(table)


def _preview(arguments: argparse.Namespace) -> None:
    _quiet()
    from zotuner.preview import preview

    for line in preview(arguments.task, arguments.show, data_dir=arguments.data_dir, model=arguments.model):
        print(line)
