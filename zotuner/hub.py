"""Tuners by model: those that come with the package, those of the Hub, and the one to take for a model.

model  ->  a tuner of it, shipped or on the Hub  |  its base models, as its card states them  ->  theirs  ->  ...
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from zotuner.adapters import ADAPTER_CONFIG, base_of
from zotuner.card import CARD, ORIGINALS, TAGS, hub_base
from zotuner.errors import ZotunerError
from zotuner.remote import asking
from zotuner.tuner import DESCRIPTION, WEIGHTS, Tuner, locate, shipped, write_files
from zotuner.tuner_out import claimed, replacing

AUTO = "auto"  # in place of a tuner's name: the one for the model
MOST_MODELS = 16  # that are looked at on the way to a base with a tuner
MOST_LISTED = 200  # tuners of the Hub

Say = Callable[[str], object]


@dataclass(frozen=True)
class Listed:
    """A tuner that can be had.

    Attributes:
        name: By which `Tuner.from_pretrained` finds it.
        base: The model that it was made for.
        downloads: From the Hub of late; None of one that comes with the package.
    """

    name: str
    base: str
    downloads: int | None


def push(tuner: str, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a tuner; returns a line that says where it is.

    Raises:
        ZotunerError: No such tuner; the Hub refuses, or cannot be reached.
    """
    address = Tuner.from_pretrained(tuner).push_to_hub(repo_id, private=private, revision=revision)
    return f"{tuner}: pushed to {repo_id}, {address}"


def pull(name: str, out: Path, *, revision: str | None = None, overwrite: bool = False) -> str:
    """Brings a tuner into a folder, its files as they are; returns a line that says what it is.

    Raises:
        ZotunerError: No such tuner, or a damaged one; the folder holds something else.
    """
    with claimed(out, overwrite):
        folder, source = locate(name, revision)
        tuner = Tuner.from_pretrained(folder)
        card = (folder / CARD).read_bytes() if (folder / CARD).exists() else None
        with replacing(out):
            write_files(out, (folder / WEIGHTS).read_bytes(), (folder / DESCRIPTION).read_bytes(), card)
    base = tuner.info.base_model or "a model that it does not name"
    return f"{out}: tuner {source} for {len(tuner.block_names)} blocks of {base}"


def tuners(base: str | None = None) -> Iterator[Listed]:
    """The tuners that come with the package, then those of the Hub, the most downloaded first.

    Args:
        base: Only those for this model.

    Raises:
        ZotunerError: The Hub cannot be asked; after the shipped ones.
    """
    for name, info in shipped().items():
        if base is None or _same(base, info.base_model):
            yield Listed(name, info.base_model, None)
    on_hub = hub_base(base) if base is not None else None
    if base is None or on_hub is not None:
        yield from _on_the_hub(on_hub)


def find_tuner(model: str, say: Say = lambda _: None) -> Tuner:
    """The tuner for a model: one of its own, or else of the nearest base that its card leads to.

    For each model, those that come with the package are looked at first. On the Hub, one of the base model's owner
    goes before others, then the one that is downloaded most.

    Args:
        model: Anything that `load_model` takes.
        say: Told which one it is and by which way, and of what the Hub would not answer.

    Raises:
        ZotunerError: There is none, or the one there is cannot be had.
    """

    def answer(question: Callable[[str], tuple[str, ...]], about: str) -> tuple[str, ...]:
        try:
            return question(about)
        except ZotunerError as trouble:  # another model of the way may have a tuner all the same
            troubles.append(str(trouble))
            say(str(trouble))
            return ()

    ways, seen, troubles = deque[tuple[str, ...]]([(model,)]), list[str](), list[str]()
    while ways and len(seen) < MOST_MODELS:
        way = ways.popleft()
        if way[0] in seen:
            continue
        seen.append(way[0])
        if found := answer(_tuners_of, way[0]):
            tuner = Tuner.from_pretrained(found[0])
            several = f" (one of {len(found)})" if len(found) > 1 else ""
            say(f"tuner {tuner.source}{several}, of base {', which is the base of '.join(way)}")
            return tuner
        ways += [(base, *way) for base in answer(_bases_of, way[0])]
    bases = f", nor for what it comes from by its card, {', '.join(seen[1:])}" if seen[1:] else ""
    why = f"; {troubles[0]}" if troubles else ""
    raise ZotunerError(
        f"--tuner auto: no tuner for {model}, neither with the package nor on the Hub{bases}{why}; "
        "name one (a folder or a Hub id), or meta-train one on the base model"
    )


def _tuners_of(model: str) -> tuple[str, ...]:
    """Names of the tuners for this very model, the one to take first; the Hub is asked where none is shipped."""
    own = tuple(name for name, info in shipped().items() if _same(model, info.base_model))
    hub_id = None if Path(model).exists() else hub_base(model)
    if own or hub_id is None:
        return own
    owner = hub_id.partition("/")[0]
    found = sorted(_on_the_hub(hub_id), key=lambda one: not one.name.startswith(f"{owner}/"))
    return tuple(one.name for one in found)


def _same(model: str, base: str) -> bool:
    """Whether two names are of one model; a model that comes as a package has the name of the Hub's, too."""
    return base != "" and (ORIGINALS.get(model) or model) == (ORIGINALS.get(base) or base)


def _on_the_hub(base: str | None) -> list[Listed]:
    """The Hub's tuners, of one base model or of any."""
    from huggingface_hub import HfApi

    wanted = [*TAGS, *([f"base_model:{base}"] if base else [])]
    with asking(f"the Hub's tuners{f' for {base}' if base else ''} cannot be listed"):
        found = list(HfApi().list_models(filter=wanted, sort="downloads", limit=MOST_LISTED))
    return [Listed(info.id, base or _base_in(info.tags or []), info.downloads or 0) for info in found]


def _base_in(tags: list[str]) -> str:
    stated = (tag.removeprefix("base_model:") for tag in tags if tag.startswith("base_model:"))
    return next((name for name in stated if hub_base(name)), "")


def _bases_of(model: str) -> tuple[str, ...]:
    """The base models that a model's card states; of a folder with an adapter, the one that this is for.

    Raises:
        ZotunerError: The card, or the adapter's description, cannot be had, or be read.
    """
    from huggingface_hub.repocard import metadata_load

    if (Path(model) / ADAPTER_CONFIG).is_file():
        return (base_of(Path(model)),)
    path = _card_of(model)
    if path is None:
        return ()
    try:
        stated = (metadata_load(path) or {}).get("base_model")
    except (OSError, ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())[:200]
        raise ZotunerError(f"{path}: expected a model card with YAML in front: {line}") from None
    names = stated if isinstance(stated, list) else [stated]
    return tuple(name for name in names if isinstance(name, str))


def _card_of(model: str) -> Path | None:
    """In its folder, or on the Hub; None where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    hub_id = None if Path(model).exists() else hub_base(model)
    if hub_id is None:
        path = Path(model) / CARD
        return path if path.is_file() else None
    with asking(f"{model}: its card cannot be read for its base model"):
        try:
            return Path(hf_hub_download(hub_id, CARD))
        except RemoteEntryNotFoundError:
            return None
