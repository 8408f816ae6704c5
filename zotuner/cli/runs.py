"""Commands on one run: finetune, meta-train; replay, export, apply; report, log, demo."""

import argparse
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from zotuner.cli.parser import Add, count, quiet
from zotuner.config import Config, FinetuneConfig, MetaTrainConfig, read_yaml
from zotuner.errors import ZotunerError

C = TypeVar("C", bound=Config)


def add_makers(add: Add) -> None:
    """Commands that write a run, or a model or file from one."""
    _add_options(add("finetune", _finetune, "fine-tune a model on a task by one method"), FinetuneConfig)
    _add_options(add("meta-train", _meta_train, "meta-train a tuner for a base model"), MetaTrainConfig)

    replay = add("replay", _replay, "rebuild a run's model from its base and its ledger, without data")
    replay.add_argument("folder", type=Path, metavar="DIR", help="a run of a zeroth-order method, finished or not")
    replay.add_argument("--out", required=True, type=Path, metavar="MODEL", help="folder for the model (required)")
    replay.add_argument("--step", type=count, metavar="N", help="stop after N steps (as the run delivered it)")
    replay.add_argument("--model", metavar="BASE", help="the base model, if it is elsewhere now")
    replay.add_argument("--tuner", metavar="TUNER", help="the run's tuner, likewise")

    export = add("export", _export, "write a finished run's ledger as a small file to share")
    export.add_argument("folder", type=Path, metavar="DIR", help="a finished run of a zeroth-order method")
    export.add_argument("--out", required=True, type=Path, metavar="FILE", help="name.zoledger (required)")

    apply = add("apply", _apply, "make the model that such a file describes, from its base")
    apply.add_argument("file", type=Path, metavar="FILE", help="a .zoledger file")
    apply.add_argument("--model", required=True, metavar="BASE", help="the base model it was made for (required)")
    apply.add_argument("--out", required=True, type=Path, metavar="MODEL", help="folder for the model (required)")
    apply.add_argument("--tuner", metavar="TUNER", help="the run's tuner: folder or Hub id (by the name in the file)")


def add_readers(add: Add) -> None:
    """Commands that show runs, and the demo."""
    report = add("report", _report, "show runs side by side")
    report.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="finished runs")
    report.add_argument("--plot", type=Path, metavar="FILE", help="write the loss curves as PNG")

    log = add("log", _log, "show one run, also while it goes on: losses, coefficients, scales by block")
    log.add_argument("run_dir", type=Path, metavar="DIR", help="a run's directory")
    log.add_argument("--rows", type=count, default=20, help="rows of the table, at most (%(default)s)")
    log.add_argument("--plot", type=Path, metavar="FILE", help="write the curves, and the scales as a heat map, as PNG")

    demo = add("demo", _demo, "fine-tune the demo model by three methods at equal forwards")
    demo.add_argument("--out", type=Path, default=Path("demo-run"), help="folder for the runs (%(default)s)")
    demo.add_argument("--tuner", default="smollm2-135m-instruct", help="name, folder or Hub id (%(default)s)")
    text = "forward passes a method, of which a multiple of 18 is spent (%(default)s)"
    demo.add_argument("--forwards", type=count, default=54, help=text)


def _finetune(arguments: argparse.Namespace) -> None:
    config = _config(FinetuneConfig, arguments)
    quiet()
    from zotuner.finetune import finetune
    from zotuner.progress import Display, stdout
    from zotuner.report import table

    finetune(config, Display(), resume=arguments.resume is not None)
    stdout().print(table([config.out]))


def _meta_train(arguments: argparse.Namespace) -> None:
    config = _config(MetaTrainConfig, arguments)
    quiet()
    from zotuner.meta_train import meta_train
    from zotuner.progress import Display

    meta_train(config, Display(), resume=arguments.resume is not None)


def _replay(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.progress import Display
    from zotuner.replay import read_recorded, rebuild

    options = {"base": arguments.model, "tuner": arguments.tuner, "step": arguments.step}
    print(rebuild(read_recorded(arguments.folder), arguments.out, Display(), **options))


def _export(arguments: argparse.Namespace) -> None:
    from zotuner.replay import export, read_recorded

    print(export(read_recorded(arguments.folder), arguments.out))


def _apply(arguments: argparse.Namespace) -> None:
    quiet()
    from zotuner.progress import Display
    from zotuner.replay import read_recorded, rebuild

    options = {"base": arguments.model, "tuner": arguments.tuner}
    print(rebuild(read_recorded(arguments.file), arguments.out, Display(), **options))


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
