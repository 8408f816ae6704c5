"""The tuner, PertNNs or static scales, as an artefact: a folder of `tuner.safetensors`, `tuner.json` and a card."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from zotuner.blocks import Block, Piece, find_blocks, hosts_of, moments
from zotuner.card import CARD, adapter_line, card
from zotuner.errors import ZotunerError, at_fault
from zotuner.files import write_atomically
from zotuner.pertnn import FEATURES, Bank, FeatureSpec, PertNNBank, StaticBank
from zotuner.remote import asking

WEIGHTS, DESCRIPTION = "tuner.safetensors", "tuner.json"
MOST_ROWS = 1 << 31  # of an embedding table
SHOWN = 3  # blocks named when a tuner does not fit a model
LATER = ("embedding_rows", "adapter", "results")  # written where they are set: older versions do not know them
SHIPPED = Path(__file__).parent / "tuners"  # those that come with the package; in a checkout a link to the folder there


class BlockInfo(BaseModel):
    """A block as the artefact names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    numel: int = Field(ge=1, lt=1 << 63)


class FeatureInfo(BaseModel):
    """`FeatureSpec` as the artefact writes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...]
    transform: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @field_validator("names")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names != FEATURES:
            raise ValueError(f"expected {', '.join(FEATURES)}")
        return names

    @model_validator(mode="after")
    def _computable(self) -> Self:
        FeatureSpec(**self.model_dump(exclude={"names"}))
        return self


class AdapterInfo(BaseModel):
    """The adapter whose tensors are the blocks, `zotuner.adapters`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()  # names of the layers that it is in
    tokens: int | None = None  # virtual ones

    def __str__(self) -> str:
        return adapter_line(self.model_dump())


class Result(BaseModel):
    """What a model that was tuned with a tuner reached, for the card's `model-index`.

    Attributes:
        task: The kind of task as the Hub names it, such as "text-classification".
        dataset: Hub id, or a name.
        metric: Such as "accuracy".
        value: Of the metric.
        how: Method, budget, seeds: what the value stands for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: str
    dataset: str
    metric: str
    value: float
    how: str = ""


class TunerInfo(BaseModel):
    """Everything about a tuner but its weights: the content of `tuner.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    base_model: str = ""
    base_weights_sha256: str = ""
    architecture: Literal["abs", "exp", "static"]  # of the nets; static: a number in place of each
    granularity: Literal["block", "layer"] = "block"
    normalized: bool = True
    embedding_rows: int | None = Field(None, ge=1, le=MOST_ROWS)
    adapter: AdapterInfo | None = None
    blocks: tuple[BlockInfo, ...] = Field(min_length=1)
    features: FeatureInfo
    tasks: tuple[str, ...] = ()
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    license: str = "apache-2.0"
    notes: str = ""
    results: tuple[Result, ...] = ()

    @property
    def made_for(self) -> str:
        """The base model, and its adapter if it has one, for messages."""
        model = self.base_model or "another model"
        return model if self.adapter is None else f"{model} with the adapter {self.adapter}"

    @field_validator("blocks")
    @classmethod
    def _distinct(cls, blocks: tuple[BlockInfo, ...]) -> tuple[BlockInfo, ...]:
        seen: set[str] = set()
        for block in blocks:
            if block.name in seen:
                raise ValueError(f"block {block.name} comes twice")
            seen.add(block.name)
        return blocks


class Tuner:
    """Frozen PertNNs of a model's blocks, or a number in place of each.

    Args:
        info: What they are.
        bank: The nets, in the order of `info.blocks`.
        source: By which name `from_pretrained` finds the very same again; "" for one that was not loaded.

    Example:
        >>> tuner = Tuner.from_pretrained("smollm2-135m-instruct")
        >>> opt = zotuner.ZOFineTuner(model, tuner, lr=1e-6)
    """

    def __init__(self, info: TunerInfo, bank: Bank, source: str = "") -> None:
        self.info = info
        self.bank = bank
        self.source = source
        fields = info.features.model_dump(exclude={"names"})
        self.spec = FeatureSpec(**fields)
        self._position = {block.name: i for i, block in enumerate(info.blocks)}

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        architecture: Literal["abs", "exp"] = "exp",
        seed: int = 0,
        *,
        granularity: Literal["block", "layer"] = "block",
        **about: Any,
    ) -> Self:
        """Fresh PertNNs for a model's blocks.

        Args:
            model: Its trainable parameters count.
            architecture: "abs" (the paper's) or "exp" (starts at sigma = 1).
            seed: Of the nets' weights.
            granularity: "block" or "layer".
            **about: Further fields of `TunerInfo`.
        """
        blocks = find_blocks(model, granularity)
        spec = FeatureSpec()
        if architecture == "exp":
            mean, var = torch.tensor([moments(block) for block in blocks]).T
            spec = FeatureSpec.standardized(mean, var)
        info = _info(blocks, spec, architecture=architecture, granularity=granularity, **about)
        return cls(info, PertNNBank(len(blocks), architecture, seed=seed))

    @classmethod
    def static(cls, model: nn.Module, sigma: Tensor, **about: Any) -> Self:
        """Scales that are the same in every step: a control for learned ones.

        Args:
            model: Its trainable parameters count.
            sigma: (n,) raw scales of its blocks, finite, not negative, not all 0.
            **about: Further fields of `TunerInfo`.

        Raises:
            ValueError: Other scales, or another number of them.
        """
        blocks = find_blocks(model, about.get("granularity", "block"))
        if sigma.shape != (len(blocks),):
            raise ValueError(f"expected a scale for each of {len(blocks)} blocks, got {tuple(sigma.shape)}")
        return cls(_info(blocks, FeatureSpec(), architecture="static", **about), StaticBank(sigma))

    @property
    def block_names(self) -> tuple[str, ...]:
        """The blocks' names, in the order of the nets."""
        return tuple(self._position)

    @property
    def granularity(self) -> str:
        """ "block" or "layer": the blocks that a model must be cut into."""
        return self.info.granularity

    def nets_for(self, blocks: Sequence[Block]) -> Tensor:
        """Which net each of a model's blocks has: (n,) int64. A tuner may know blocks that the model keeps frozen.

        Raises:
            ZotunerError: A block is unknown or has another size; names the first ones.
        """
        wrong = []
        for block in blocks:
            known = self._numel(block.name)
            if known is None:
                wrong.append(f"{block.name} ({block.numel} elements; the tuner does not know it)")
            elif known != block.numel:
                wrong.append(f"{block.name} ({block.numel} elements; the tuner has {known})")
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise ZotunerError(
                f"the tuner was made for {self.info.made_for} and does not fit this model: "
                f"{len(wrong)} of {len(blocks)} blocks differ: {'; '.join(wrong[:SHOWN])}{more}; "
                "use a tuner of this model's base, or meta-train one"
            )
        return torch.tensor([self._position[block.name] for block in blocks])

    def hosts_for(self, model: nn.Module, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Of which block's net and statistics each of a model's blocks makes use.

        That is itself; but if the tuner does not know all of them, as what an adapter adds to a layer, what they
        were added to (`hosts_of`).
        """
        if all(self._numel(block.name) == block.numel for block in blocks):
            return tuple(blocks)
        return hosts_of(model, blocks, self.granularity)

    def _numel(self, name: str) -> int | None:
        """Elements of the block of that name which the tuner was made for; None: of none."""
        at = self._position.get(name)
        return None if at is None else self.info.blocks[at].numel

    def numels_for(self, model: nn.Module, blocks: Sequence[Block]) -> Tensor:
        """What the normalisation counts of each block, d_i: (n,) int64.

        That is its number of elements; but where `embedding_rows` is set, a table of an `nn.Embedding` counts with so
        many rows, whatever it has.

        Args:
            model: Whose modules say which parameters are embedding tables, tied ones too.
            blocks: Of it.
        """
        rows = self.info.embedding_rows
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

        def counted(piece: Piece) -> int:
            return piece.numel if rows is None or id(piece.param) not in tables else rows * piece.param.shape[1]

        return torch.tensor([sum(counted(piece) for piece in block.pieces) for block in blocks])

    @torch.no_grad()
    def scales(
        self,
        features: Tensor,  # (m, 5) raw: loss_plus, loss_minus, sigma_prev, mean, var
        nets: Tensor | None = None,  # (m,) from `nets_for`; None: one row a net, in order
        loss_start: float | None = None,  # that the run began with; None: it begins now
    ) -> Tensor:  # (m,) raw sigma, float32
        """The bank's answer, before normalisation.

        Raises:
            ZotunerError: No block has any noise: nothing would be left to normalise.
        """
        raw: Tensor = self.bank(self.spec(features.float(), loss_start), nets)
        if bool((raw == 0).all()):
            raise ZotunerError(f"{self.source or 'the tuner'}: gives no block any noise; get or train another one")
        return raw

    def sha256(self) -> str:
        """Of all that the scales follow from: the nets' weights and what `tuner.json` says of their use."""
        used = {"architecture", "granularity", "normalized", "embedding_rows", "blocks", "features"}
        text = self.info.model_dump_json(include=used)
        return hashlib.sha256(text.encode() + self._packed()).hexdigest()

    def _packed(self, dtype: torch.dtype = torch.float32) -> bytes:
        """The nets' weights as safetensors."""
        return bytes(save({k: v.to(dtype).contiguous() for k, v in self.bank.state_dict().items()}))

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the three files, each atomically; `write_files` has the order.

        Args:
            directory: Made if need be.
            dtype: Of the nets' weights in the file; half precision takes half the room. Loading makes them float32
                again: what was rounded is another tuner, with another SHA-256.

        Raises:
            ValueError: A dtype in which the weights are not finite, or which is not of floating point.
        """
        if not dtype.is_floating_point or not all(p.to(dtype).isfinite().all() for p in self.bank.parameters()):
            raise ValueError(f"dtype: expected one of floating point that holds the nets' weights, got {dtype}")
        unused = {name for name in LATER if not getattr(self.info, name)}
        description = self.info.model_dump_json(indent=2, exclude=unused) + "\n"
        write_files(Path(directory), self._packed(dtype), description, card(self.info.model_dump()))

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> Self:
        """Loads a tuner; no code of the file runs.

        Args:
            name: A folder, the name of a tuner that comes with the package, or a Hub id such as
                "someone/smollm2-tuner", with or without "@" and a revision.
            revision: Branch, tag or commit on the Hub.

        Raises:
            ZotunerError: No such tuner, a missing, truncated or inconsistent file.
        """
        folder, source = locate(str(name), revision)
        info = read_info(folder / DESCRIPTION)
        return cls(info, _read_bank(folder / WEIGHTS, info), source)

    def push_to_hub(self, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
        """Uploads the three files, making the repository and the branch if need be; returns the commit's address.

        Raises:
            ZotunerError: The Hub refuses, or cannot be reached.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder, asking(f"{repo_id}: cannot be pushed to"):
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload tuner"
            )
        return str(commit.commit_url)


def _info(blocks: Sequence[Block], spec: FeatureSpec, **about: Any) -> TunerInfo:
    return TunerInfo(
        blocks=tuple(BlockInfo(name=block.name, numel=block.numel) for block in blocks),
        features=FeatureInfo(**spec.to_dict()),
        versions=versions(),
        **about,
    )


def versions() -> dict[str, str]:
    """What made a file: for its record."""
    from zotuner import __version__

    return {"zotuner": __version__, "torch": version("torch"), "python": platform.python_version()}


def write_files(folder: Path, weights: bytes, description: str | bytes, card: str | bytes | None) -> None:
    """Writes a tuner's files, in place of an earlier one's; while they are of two tuners, none describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DESCRIPTION, CARD):
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS, weights)
    if card is not None:
        write_atomically(folder / CARD, card)
    write_atomically(folder / DESCRIPTION, description)


def shipped() -> dict[str, TunerInfo]:
    """The tuners that come with the package: what each is, by name."""
    return {path.parent.name: read_info(path) for path in sorted(SHIPPED.glob(f"*/{DESCRIPTION}"))}


def locate(name: str, revision: str | None = None) -> tuple[Path, str]:
    """Where a tuner's files are, downloaded if need be, and by which name the very same are found again.

    Args:
        name: As for `Tuner.from_pretrained`.
        revision: Likewise.

    Raises:
        ZotunerError: No such tuner; or a revision of one that is not on the Hub.
    """
    own = name == Path(name).name and (SHIPPED / name / DESCRIPTION).is_file()
    if (folder := Path(name)).is_dir() or own:
        if revision is not None:
            where = "a folder" if folder.is_dir() else "a tuner of the package"
            raise ZotunerError(f"{name}: revisions are of tuners on the Hub, and this is {where}; got {revision!r}")
        return (folder if folder.is_dir() else SHIPPED / name), name
    from huggingface_hub import snapshot_download

    repo_id, _, stated = name.partition("@")
    revision = revision or stated or None
    which = f"{repo_id} (revision {revision})" if revision else name
    with asking(f"{which}: no such tuner: neither a folder nor to be had from the Hub"):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[WEIGHTS, DESCRIPTION, CARD]))
    return folder, f"{repo_id}@{folder.name}"  # the cache has a folder a commit


def read_info(path: Path) -> TunerInfo:
    """What a `tuner.json` says.

    Raises:
        ZotunerError: No such file, or something else than a tuner's description; names the key.
    """
    try:
        return TunerInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ZotunerError(f"{path}: missing; a tuner is a folder with {WEIGHTS} and {DESCRIPTION}") from None
    except OSError as error:
        raise ZotunerError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        raise ZotunerError(f"{path}: {at_fault(error)}") from None


def _read_bank(path: Path, info: TunerInfo) -> Bank:
    try:
        weights = load_file(path)
    except FileNotFoundError:  # which safetensors says of one that may not be read, too
        what = "cannot be read" if path.exists() else "missing"
        raise ZotunerError(f"{path}: {what}; a tuner is a folder with {WEIGHTS} and {DESCRIPTION}") from None
    except (SafetensorError, OSError) as error:
        raise ZotunerError(f"{path}: expected a whole safetensors file: {error}; get the file again") from None
    n = len(info.blocks)
    bank = _blank(n, info.architecture)
    for name, param in bank.named_parameters():
        came = weights.get(name)
        if came is None or came.shape != param.shape or not came.is_floating_point():
            shape = None if came is None else tuple(came.shape)
            raise ZotunerError(
                f"{path}: key {name}: expected a floating-point tensor {tuple(param.shape)} for {n} blocks, got {shape}"
            )
        if not torch.isfinite(came.float()).all():
            raise ZotunerError(f"{path}: key {name}: expected finite weights, got infinities or NaN")
    if isinstance(bank, StaticBank):
        try:
            return StaticBank(weights["sigma"])
        except ValueError as error:
            raise ZotunerError(f"{path}: key sigma: {error}") from None
    bank.load_state_dict({k: v.float() for k, v in weights.items() if k in dict(bank.named_parameters())}, assign=True)
    return bank


def _blank(blocks: int, architecture: str) -> Bank:
    """A bank whose tensors have the right names and shapes, and no values that count."""
    if architecture == "static":
        return StaticBank(torch.ones(blocks))
    with torch.device("meta"):
        return PertNNBank(blocks, architecture)
