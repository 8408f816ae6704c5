"""Configurations: every option, its type, unit, bounds and default, and nowhere else.

defaults  <  --config FILE (YAML)  <  flags  ->  one frozen, checked object
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from zotuner.errors import ZotunerError, repeated, unknown

ELEMENTWISE = ("zo-sgd-momentum", "mezo-adam", "zo-adamu", "hizoo")  # keep numbers for each weight
ZEROTH_ORDER = ("zo-finetuner", "fzoo", "mezo", "zo-sign", "meazo", "lozo", *ELEMENTWISE)
FIRST_ORDER = ("adam", "sgd")
METHODS = (*ZEROTH_ORDER, *FIRST_ORDER, "none")
# The first three: the best of a grid on SST-2 with SmolLM2-135M-Instruct (docs/results.md). Others were not searched:
# they move a weight in a step about as far as mezo does there, sgd as far as adam (docs/method.md); search around them.
DEFAULT_LR = {
    "zo-finetuner": 4e-5,
    "mezo": 4e-5,
    "fzoo": 4e-3,
    "zo-sgd-momentum": 4e-6,
    "zo-sign": 1e-3,
    "mezo-adam": 1e-3,
    "meazo": 1e-3,
    "zo-adamu": 4e-5,
    "hizoo": 4e-5,
    "lozo": 4e-5,
    "adam": 1e-5,
    "sgd": 3e-4,
}
SAVE_EVERY = {"zeroth-order": 500, "first-order": 50}  # a ledger repeats a step at the cost of its update alone
OBJECTIVES = {"accuracy": "accuracy", "f1": "f1", "exact-match": "em"}  # what can be maximised -> the task's metric
DEFAULT_NOISE = {"fzoo": "rademacher", "lozo": "low-rank"}  # the papers' choices; gaussian for the others
ONLY_NOISE = {"zo-adamu": "gaussian", "hizoo": "gaussian", "lozo": "low-rank"}  # what their equations stand on
OWN = {"lozo": {"rank": 2, "factors": "gaussian", "resample_every": 50}}  # defaults other than below: the papers'
KIND = Literal["gaussian", "rademacher"]
NOISE = Literal["gaussian", "rademacher", "low-rank"]
STATISTIC = Literal["gradient-curvature", "gradient"]  # what static scales are measured by
DTYPE = Literal["float32", "bfloat16", "float16", "auto"]
ADAPTER = Literal["none", "lora", "prefix", "prompt", "ia3"]
ADAPTER_DEFAULTS: dict[str, dict[str, Any]] = {  # which options an adapter has (MeZO, arXiv:2305.17333, appendix)
    "lora": {"adapter_rank": 8, "adapter_alpha": 16, "adapter_targets": ()},
    "prefix": {"adapter_tokens": 5},
    "prompt": {"adapter_tokens": 5},
    "ia3": {"adapter_targets": ()},
}


class Config(BaseModel):
    """What the two programs' options have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    model: str = Field(description="smollm2-135m-instruct, a folder, a .gguf file or a Hub id")
    out: Path = Field(description="folder for the run; must be empty or new")
    overwrite: bool = Field(False, description="replace a run that --out holds")
    steps: int = Field(200, ge=0, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="examples a step")
    eps: float = Field(1e-3, gt=0, allow_inf_nan=False, description="size of a perturbation, an element")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the noise, the data and the order of batches")
    data_dir: Path | None = Field(None, description="read D/<task>/{train,validation,test}.jsonl, not the Hub")
    dtype: DTYPE = Field(
        "float32", description="of the weights; auto: float32, multiplied in bfloat16 where the processor can"
    )
    train_size: int = Field(1000, ge=1, description="training examples drawn by the seed")
    max_skipped: int = Field(10, ge=1, description="stop after so many steps in a row whose loss is not finite")
    save_every: int | None = Field(
        None, ge=1, description="steps between snapshots, which bound what --resume repeats; default: by program"
    )
    max_length: int = Field(1024, ge=2, description="tokens; longer prompts lose their beginning")
    adapter: ADAPTER = Field("none", description="what is tuned in place of the model's own weights")
    adapter_rank: int | None = Field(None, ge=1, description="of lora (8)")
    adapter_alpha: int | None = Field(None, ge=1, description="of lora, whose product is scaled by alpha / rank (16)")
    adapter_targets: tuple[str, ...] = Field(
        (), description="names of the layers that lora or ia3 adapts; default: peft's choice for the architecture"
    )
    adapter_tokens: int | None = Field(None, ge=1, description="virtual tokens of prefix or prompt (5)")

    @model_validator(mode="after")
    def _by_adapter(self) -> Self:
        defaults = ADAPTER_DEFAULTS.get(self.adapter, {})
        for name in ("adapter_rank", "adapter_alpha", "adapter_targets", "adapter_tokens"):
            if name in defaults:
                object.__setattr__(self, name, getattr(self, name) or defaults[name])
            elif getattr(self, name):
                takers = " or ".join(kind for kind, own in ADAPTER_DEFAULTS.items() if name in own)
                raise ValueError(f"--{name.replace('_', '-')} is for --adapter {takers}, not for {self.adapter}")
        if self.max_length < 2 + (self.adapter_tokens or 0):
            raise ValueError(
                f"--max-length {self.max_length} leaves no room beside --adapter-tokens {self.adapter_tokens}"
            )
        return self

    def _check_first_order(self, whose: str) -> None:
        """Weights of eight or eleven bits lose what a first-order step adds to them; adapters are in float32."""
        if self.dtype in ("bfloat16", "float16") and self.adapter == "none":
            raise ValueError(
                f"--dtype {self.dtype} rounds {whose} away; leave it out for float32, or tune an --adapter"
            )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("not_a_switch", "Input should not be true or false")
        return value

    @classmethod
    def read(cls, file: Path | None, flags: dict[str, Any]) -> Self:
        """Defaults, then the YAML file, then the flags.

        Raises:
            ZotunerError: A file that is no YAML mapping, a key that nobody knows, a value of the wrong type or out
                of bounds; one line.
        """
        stated = {} if file is None else read_yaml(file)
        for key in stated:
            if key not in cls.model_fields:
                raise ZotunerError(f"{file}: {unknown('key', str(key), cls.model_fields)}")
        try:
            return cls.model_validate(stated | flags)
        except ValidationError as error:
            raise ZotunerError(explain(error, stated, flags, file)) from None

    def to_yaml(self) -> str:
        """All options as they stand."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class FinetuneConfig(Config):
    """Fine-tune one model on one task by one method."""

    task: str = Field(
        description="the task to tune on: a name (`zotuner tasks` lists them), or a file, TASK.yaml or TASK.py"
    )
    method: str = Field(description=" | ".join(METHODS) + " (evaluate only)")
    objective: str | None = Field(
        None,
        description="what to maximise instead of lowering the task's loss: "
        + ", ".join(OBJECTIVES)
        + " or FILE.py:FUNCTION, a function (answer, example) -> reward",
    )
    tuner: str | None = Field(
        None, description="for zo-finetuner: a tuner's folder, name or Hub id, or auto: the one for the model's base"
    )
    lr: float | None = Field(None, gt=0, allow_inf_nan=False, description=f"learning rate; by method: {DEFAULT_LR}")
    lr_schedule: Literal["constant", "linear"] = Field("constant", description="linear: to 0 over the run")
    micro_batch_size: int | None = Field(None, ge=1, description="examples a forward at most; default: the whole batch")
    estimator: Literal["two-point", "one-sided"] | None = Field(
        None, description="of zo-finetuner: two-point (default), or one-sided, which is fzoo's"
    )
    num_perturbations: int = Field(8, ge=2, le=1 << 15, description="N of FZOO; a step costs N + 1 forwards")
    noise: NOISE | None = Field(
        None, description="gaussian, rademacher (default of fzoo's estimator) or low-rank (lozo's)"
    )
    rank: int = Field(1, ge=1, le=1 << 16, description="of low-rank noise; lozo: 2")
    factors: KIND = Field("rademacher", description="distribution of low-rank noise's factors; lozo: gaussian")
    resample_every: int = Field(
        1, ge=1, description="steps after which the second factor of low-rank noise is drawn anew; lozo: 50"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="beta of zo-sgd-momentum, beta1 of mezo-adam")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment of mezo-adam and meazo")
    smooth: float = Field(1e-6, ge=0, lt=1, description="weight of a step in hizoo's Hessian")
    engine: Literal["streamed", "in-place"] = Field(
        "streamed",
        description="streamed: perturb without writing to the weights; in-place: walk to each point and back",
    )
    branch_batch: int | Literal["auto"] = Field(
        "auto", description="losses of a step that one forward evaluates; auto: what little memory allows"
    )
    branch_threads: int | Literal["auto"] = Field(
        "auto", description="such forwards that run at the same time, each with its share of the cores; auto: likewise"
    )
    max_tokens: int | None = Field(None, ge=1, description="stop after the step that reaches so many; or after --steps")
    max_seconds: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="likewise, of the steps alone; evaluations do not count"
    )
    quantize: Literal[4, 8] | None = Field(
        None, description="bits of the linear layers' weights while they are tuned: 8 or 4; not for every method"
    )
    clip: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="scale coefficients down to so many running standard deviations"
    )
    sync_every: int = Field(1, ge=1, description="steps after which the ledger is synced to the disk")
    compile: bool = Field(False, description="run torch.compile's code for the layers, in a few static lengths")
    dev_size: int | None = Field(None, ge=1, description="development examples; the task's own number by default")
    shots: int = Field(0, ge=0, description="solved training examples before each prompt, for method none")
    chat: bool = Field(False, description="put prompts as a user's turns under the tokenizer's chat template")
    k_shot: int | None = Field(
        None,
        ge=1,
        description="training and development examples of each class, in place of their sizes; masked models: 16",
    )
    eval_size: int = Field(1000, ge=1, description="evaluation examples")
    zero_shot: bool = Field(True, description="evaluate before the first step too, not after the last one alone")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations on dev; default: 5 a run")
    eval_batch_size: int = Field(32, ge=1, description="examples a forward in evaluation")
    save_model: bool = Field(False, description="write the tuned model to OUT/model")

    @field_validator("quantize", mode="before")
    @classmethod
    def _digits(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("branch_batch", "branch_threads")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise PydanticCustomError("greater_than_equal", "Input should be auto or a number of at least 1")
        return value

    @model_validator(mode="after")
    def _by_method(self) -> Self:
        if self.method not in METHODS:
            raise ValueError(unknown("method", self.method, METHODS))
        if self.method == "zo-finetuner" and self.tuner is None:
            raise ValueError("method zo-finetuner needs --tuner (a folder, a Hub id, or auto)")
        if self.method != "zo-finetuner" and self.tuner is not None:
            raise ValueError(f"--tuner is for method zo-finetuner, not for {self.method}")
        if self.method != "zo-finetuner" and self.estimator is not None:
            raise ValueError(f"--estimator is for method zo-finetuner, not for {self.method}")
        if self.shots and self.method != "none":
            raise ValueError(f"--shots is for method none, which learns from its prompt alone, not for {self.method}")
        if self.objective is not None:
            self._check_objective(self.objective)
        if self.quantize is not None:
            self._check_quantize()
        if self.method in FIRST_ORDER:
            self._check_first_order(f"{self.method}'s steps")
        if self.compile and (self.engine == "streamed" and "engine" in self.model_fields_set):
            raise ValueError("--compile needs --engine in-place: compiled code runs on the model's own weights")
        if (only := ONLY_NOISE.get(self.method)) is not None and self.noise not in (None, only):
            raise ValueError(f"--noise {self.noise} is not for method {self.method}, whose noise is {only}")
        order = "first-order" if self.method in FIRST_ORDER else "zeroth-order"
        own = {key: value for key, value in OWN.get(self.method, {}).items() if key not in self.model_fields_set}
        steps_like = "fzoo" if self.estimator == "one-sided" else self.method  # normalised by the spread of the losses
        fill = {
            **own,
            "estimator": "two-point" if self.method == "zo-finetuner" and self.estimator is None else self.estimator,
            "engine": "in-place" if self.compile else self.engine,
            "lr": self.lr if self.lr is not None else DEFAULT_LR.get(steps_like),
            "noise": self.noise or DEFAULT_NOISE.get(steps_like, "gaussian"),
            "eval_every": self.eval_every or max(1, -(-self.steps // 5)),
            "save_every": self.save_every or SAVE_EVERY[order],
        }
        for name, value in fill.items():
            object.__setattr__(self, name, value)
        return self

    def _check_objective(self, objective: str) -> None:
        if objective not in OBJECTIVES and ".py:" not in objective:
            raise ValueError(f"{unknown('objective', objective, OBJECTIVES)}, or FILE.py:FUNCTION")
        if self.method in FIRST_ORDER:
            raise ValueError(f"--objective is for zeroth-order methods: a reward has no gradient for {self.method}")

    def _check_quantize(self) -> None:
        """What integer weights do not go with."""
        if self.method in FIRST_ORDER and self.adapter == "none":
            raise ValueError(
                f"--quantize is for zeroth-order methods: {self.method} needs gradients, which integers have none of; "
                "with an --adapter they need none"
            )
        if self.method in ELEMENTWISE and self.adapter == "none":
            raise ValueError(
                f"--quantize is not for {self.method}, which keeps numbers for each weight: there is no memory to save"
            )
        if self.compile or self.engine == "in-place":
            raise ValueError("--quantize needs the streamed engine: leave out --compile and --engine in-place")
        if self.save_model and self.adapter == "none":
            raise ValueError(
                "--save-model cannot write quantised weights, which transformers could not load: leave out --quantize "
                "or --save-model, or tune an --adapter"
            )


def forwards_per_step(config: FinetuneConfig) -> int:
    """What a step of a configuration's method costs: its losses. The backward of a first-order step is not counted."""
    if config.method == "none":
        return 0
    if config.method in FIRST_ORDER:
        return 1
    if config.method == "fzoo" or config.estimator == "one-sided":
        return config.num_perturbations + 1
    return 3 if config.method == "hizoo" else 2


class MetaTrainConfig(Config):
    """Meta-train a tuner for one base model along first-order trajectories."""

    tasks: tuple[str, ...] = Field(("copa",), min_length=1, description="tasks to walk, shuffled: names or files")
    noise: KIND = Field("rademacher", description="of the virtual step")
    architecture: Literal["abs", "exp"] = Field("exp", description="abs: the paper's; exp: starts at sigma = 1")
    granularity: Literal["block", "layer"] = Field("block", description="what shares a PertNN")
    bands: int | None = Field(
        None,
        ge=1,
        description="cut the layers into so many parts; blocks of one type in one part learn one PertNN together; "
        "default: each its own",
    )
    normalized: bool = Field(True, description="keep the Frobenius budget of the perturbation")
    meta_loss: Literal["sampled", "expected"] = Field(
        "sampled", description="after one virtual step (the paper's), or the gain expected of a step at its best lr"
    )
    second_batch: bool = Field(False, description="judge a step by another batch than the one that gave it (sampled)")
    settle: int = Field(
        20,
        ge=0,
        description="points after a reset that count all of the gradient as signal; then what sets examples apart "
        "(expected)",
    )
    inner_lr: float = Field(4e-5, gt=0, allow_inf_nan=False, description="lr of the virtual step (sampled)")
    outer_lr: float = Field(1e-3, gt=0, le=1, allow_inf_nan=False, description="Adam's lr for the PertNNs")
    outer_steps: int = Field(8, ge=1, description="of Adam, for each point so far, at the end of a round (expected)")
    fo_optimizer: Literal["adam", "sgd"] = Field("adam", description="walks the trajectory; sgd has momentum 0.9")
    fo_lr: float = Field(5e-6, gt=0, allow_inf_nan=False, description="lr of the trajectory")
    reset_every: int = Field(50, ge=1, description="points after which the model starts anew")
    snapshot_every: int | None = Field(None, ge=1, description="keep the weights of every such point in OUT/trajectory")
    trajectory: Path | None = Field(None, description="a recorded run's trajectory folder, visited instead of walked")

    @model_validator(mode="after")
    def _by_meta_loss(self) -> Self:
        if self.meta_loss == "expected" and self.second_batch:
            raise ValueError("--second-batch is for --meta-loss sampled; expected takes its signal from all points")
        if self.meta_loss == "expected" and self.batch_size < 2:
            raise ValueError(f"--meta-loss expected needs a --batch-size of at least 2, got {self.batch_size}")
        self._check_first_order("the trajectory's steps")
        return self


class _Loader(yaml.SafeLoader):
    """YAML as it is, but a key that stands twice in a mapping, of which one would be lost, is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        twice = repeated([(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[1]!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ZotunerError: No such file, no YAML, or no mapping.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ZotunerError(f"{file}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ZotunerError(f"{file}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ZotunerError(f"{file}: expected YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ZotunerError(f"{file}: expected a mapping from option to value, got {type(content).__name__}")
    return content


def explain(error: ValidationError, stated: dict[str, Any], flags: dict[str, Any], file: Path | None) -> str:
    """The first complaint of pydantic, in one line: where the value came from, what was expected, what came."""
    first = error.errors()[0]
    if not first["loc"]:
        return str(first["msg"]).removeprefix("Value error, ")
    key = str(first["loc"][0])
    flag = "--" + key.replace("_", "-")
    if first["type"] == "missing":
        return f"{flag} is required"
    where = f"{file}: {key}" if key in stated and key not in flags else flag
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
