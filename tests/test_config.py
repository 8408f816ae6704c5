"""Configurations: defaults < YAML < flags, checked, one line a complaint; and the files that ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from zotuner.config import (
    DEFAULT_LR,
    ELEMENTWISE,
    METHODS,
    Config,
    FinetuneConfig,
    MetaTrainConfig,
    forwards_per_step,
    read_yaml,
)
from zotuner.errors import ZotunerError
from zotuner.steppers import without_effect

CONFIGS = Path(__file__).parents[1] / "configs"
REQUIRED = {"model": "m", "task": "t", "method": "mezo", "out": "o"}
SHIPPED = sorted(set(CONFIGS.rglob("*.yaml")) - set(CONFIGS.glob("compare/*")))  # for those: test_compare
KINDS: dict[str, type[Config]] = {"meta": MetaTrainConfig, "finetune": FinetuneConfig}

FINETUNE = {"model": "m", "task": "copa", "method": "mezo", "out": "o"}
META = {"model": "m", "out": "o"}


def finetune(file: Path | None = None, **flags: Any) -> FinetuneConfig:
    """A fine-tuning configuration with what is required filled in."""
    return FinetuneConfig.read(file, FINETUNE | flags)


def yaml_file(tmp_path: Path, text: str) -> Path:
    """A YAML file."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(kind: type[Config], file: Path | None = None, **flags: Any) -> str:
    """What a configuration that is refused says, which is one line."""
    required = FINETUNE if kind is FinetuneConfig else META
    with pytest.raises(ZotunerError) as caught:
        kind.read(file, {**required, **flags})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_documented_ones() -> None:
    config = finetune()
    assert (config.steps, config.batch_size, config.eps, config.seed) == (200, 16, 1e-3, 0)
    assert (config.dtype, config.train_size, config.eval_size, config.dev_size) == ("float32", 1000, 1000, None)
    assert (config.overwrite, config.save_model, config.lr_schedule) == (False, False, "constant")
    assert config.micro_batch_size is None
    meta = MetaTrainConfig.read(None, META)
    assert (meta.tasks, meta.normalized, meta.trajectory) == (("copa",), True, None)


def test_yaml_wins_over_defaults_and_flags_win_over_yaml(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "steps: 7\nbatch_size: 3\ntask: sst2\n")
    config = finetune(file, steps="9", task="copa")
    assert (config.steps, config.batch_size, config.eval_size) == (9, 3, 1000)
    assert config.task == "copa"


def test_yaml_alone_can_state_everything(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, yaml.safe_dump(FINETUNE | {"lr": 1e-5}))
    assert FinetuneConfig.read(file, {}) == finetune(lr=1e-5)


@pytest.mark.parametrize("text", ["1e-7", "1.0e-7", "0.0000001", "'1e-7'"])
def test_a_small_number_in_yaml_is_a_float(tmp_path: Path, text: str) -> None:
    config = finetune(yaml_file(tmp_path, f"lr: {text}\neps: 1e-3\n"))
    assert config.lr == 1e-7
    assert isinstance(config.lr, float)
    assert isinstance(config.eps, float)


def test_text_of_flags_becomes_its_type() -> None:
    config = finetune(lr="3e-6", steps="12", out="some/where", data_dir="d", save_model=True)
    assert (config.lr, config.steps, config.out, config.data_dir) == (3e-6, 12, Path("some/where"), Path("d"))
    meta = MetaTrainConfig.read(None, META | {"tasks": ["copa", "sst2"]})
    assert meta.tasks == ("copa", "sst2")


def test_an_empty_file_states_nothing(tmp_path: Path) -> None:
    assert finetune(yaml_file(tmp_path, "# nothing yet\n")) == finetune()


@pytest.mark.parametrize(("key", "near"), [("learning_rate", None), ("step", "steps"), ("batch-size", "batch_size")])
def test_an_unknown_key_names_its_file_and_suggests_the_nearest(tmp_path: Path, key: str, near: str | None) -> None:
    file = yaml_file(tmp_path, f"{key}: 3\n")
    says = complaint(FinetuneConfig, file)
    assert says.startswith(f"{file}: unknown key {key!r};")
    assert (f"did you mean {near!r}?" in says) is (near is not None)
    assert "batch_size" in says


def test_a_key_of_the_other_program_is_unknown(tmp_path: Path) -> None:
    assert "unknown key 'reset_every'" in complaint(FinetuneConfig, yaml_file(tmp_path, "reset_every: 3\n"))
    assert "unknown key 'method'" in complaint(MetaTrainConfig, yaml_file(tmp_path, "method: mezo\n"))


@pytest.mark.parametrize(
    "text",
    [
        "steps: many",
        "steps: 1.5",
        "steps: true",
        "steps: [1]",
        "steps: null",
        "steps: 1e400",
        "lr: fast",
        "lr: .nan",
        "lr: .inf",
        "lr: true",
        "out: 3",
        "out: 2026-02-03",
        "model: {a: b}",
        "overwrite: maybe",
        "dtype: float8",
        "noise: pink",
        "lr_schedule: cosine",
        "tuner: 3",
    ],
)
def test_a_value_of_the_wrong_type_names_the_file_the_key_and_the_value(tmp_path: Path, text: str) -> None:
    file = yaml_file(tmp_path, text + "\n")
    key = text.split(":", maxsplit=1)[0]
    with pytest.raises(ZotunerError) as caught:
        FinetuneConfig.read(file, {name: value for name, value in FINETUNE.items() if name != key})
    assert str(caught.value).startswith(f"{file}: {key}: ")
    assert ", got " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "-1"),
        ("batch_size", "0"),
        ("eps", "0"),
        ("eps", "-1e-3"),
        ("eps", "nan"),
        ("eps", "inf"),
        ("lr", "0"),
        ("lr", "-1e-6"),
        ("lr", "nan"),
        ("seed", "-1"),
        ("seed", str(1 << 63)),
        ("train_size", "0"),
        ("dev_size", "0"),
        ("eval_size", "0"),
        ("eval_every", "0"),
        ("eval_batch_size", "0"),
        ("micro_batch_size", "0"),
        ("num_perturbations", "1"),
        ("max_length", "1"),
        ("max_skipped", "0"),
    ],
)
def test_a_number_out_of_bounds_names_the_flag_and_the_value(key: str, value: str) -> None:
    says = complaint(FinetuneConfig, **{key: value})
    assert says.startswith(f"--{key.replace('_', '-')}: input should be ")
    assert says.endswith(f", got {value!r}")


@pytest.mark.parametrize("key", ["inner_lr", "outer_lr", "fo_lr"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_learning_rates_of_meta_training_must_be_positive_numbers(key: str, value: str) -> None:
    assert complaint(MetaTrainConfig, **{key: value}).startswith(f"--{key.replace('_', '-')}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("reset_every", "0"), ("snapshot_every", "0"), ("tasks", []), ("architecture", "relu")],
)
def test_bounds_of_meta_training(key: str, value: Any) -> None:
    assert complaint(MetaTrainConfig, **{key: value}).startswith(f"--{key.replace('_', '-')}: ")


def test_the_largest_seed_is_accepted() -> None:
    assert finetune(seed=str((1 << 63) - 1)).seed == (1 << 63) - 1


@pytest.mark.parametrize("key", ["model", "task", "method", "out"])
def test_what_is_required_is_named_as_a_flag(key: str) -> None:
    with pytest.raises(ZotunerError) as caught:
        FinetuneConfig.read(None, {name: value for name, value in FINETUNE.items() if name != key})
    assert str(caught.value) == f"--{key} is required"


def test_an_unknown_method_suggests_the_nearest() -> None:
    says = complaint(FinetuneConfig, method="mez")
    assert "unknown method 'mez'; did you mean 'mezo'?" in says
    assert all(method in says for method in METHODS)


def test_a_tuner_belongs_to_the_method_that_uses_it() -> None:
    assert "zo-finetuner needs --tuner" in complaint(FinetuneConfig, method="zo-finetuner")
    assert "--tuner is for method zo-finetuner, not for mezo" in complaint(FinetuneConfig, tuner="t")


@pytest.mark.parametrize(
    ("stated", "idle"),
    [
        ({"method": "mezo", "eps": 1e-2, "clip": 3, "noise": "gaussian", "train_size": 9, "dev_size": 9}, []),
        (
            {"method": "mezo", "momentum": 0.5, "rank": 4, "num_perturbations": 9},
            ["num_perturbations", "rank", "momentum"],
        ),
        ({"method": "mezo", "rank": 4, "noise": "low-rank"}, []),
        ({"method": "adam", "eps": 3, "clip": 1, "engine": "in-place", "lr": 1e-5}, ["eps", "engine", "clip"]),
        ({"method": "zo-finetuner", "tuner": "t", "estimator": "one-sided", "num_perturbations": 4}, []),
        ({"method": "hizoo", "smooth": 1e-3, "beta2": 0.9}, ["beta2"]),
        ({"method": "mezo", "k_shot": 4, "dev_size": 9}, ["dev_size"]),
    ],
)
def test_options_that_a_method_does_not_read_are_known(stated: dict[str, Any], idle: list[str]) -> None:
    assert without_effect(finetune(**stated)) == idle


@pytest.mark.parametrize("where", ["", "deep: "])
def test_a_key_that_stands_twice_is_an_error_and_neither_is_lost(tmp_path: Path, where: str) -> None:
    text = f"{where}{{steps: 1, steps: 2}}\n" if where else "steps: 1\nsteps: 2\n"
    file = yaml_file(tmp_path, text)
    with pytest.raises(ZotunerError, match=r"run\.yaml: expected YAML: .*'steps' stands twice"):
        read_yaml(file)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_first_order_steps_are_not_left_to_weights_that_round_them_away(dtype: str) -> None:
    """Adam's steps of 5e-6 changed 1 % of a small model's weights in bfloat16, 17 % in float16."""
    says = complaint(FinetuneConfig, method="adam", dtype=dtype)
    assert says == f"--dtype {dtype} rounds adam's steps away; leave it out for float32, or tune an --adapter"
    assert "rounds the trajectory's steps away" in complaint(MetaTrainConfig, dtype=dtype)
    assert finetune(method="adam", dtype=dtype, adapter="lora").dtype == dtype
    assert finetune(method="mezo", dtype=dtype).dtype == dtype
    assert finetune(method="zo-finetuner", tuner="t").tuner == "t"


def test_a_tuner_with_fzoos_estimator_has_fzoos_defaults_and_cost() -> None:
    plain = finetune(method="zo-finetuner", tuner="t")
    assert (plain.estimator, plain.noise, plain.lr) == ("two-point", "gaussian", DEFAULT_LR["zo-finetuner"])
    assert forwards_per_step(plain) == 2
    many = finetune(method="zo-finetuner", tuner="t", estimator="one-sided", num_perturbations=4)
    assert (many.noise, many.lr) == ("rademacher", DEFAULT_LR["fzoo"])
    assert forwards_per_step(many) == forwards_per_step(finetune(method="fzoo", num_perturbations=4)) == 5
    assert finetune(method="zo-finetuner", tuner="t", estimator="one-sided", noise="gaussian").noise == "gaussian"


@pytest.mark.parametrize("method", [method for method in METHODS if method != "zo-finetuner"])
def test_an_estimator_is_chosen_for_a_tuner_alone(method: str) -> None:
    assert finetune(method=method).estimator is None
    expected = f"--estimator is for method zo-finetuner, not for {method}"
    assert expected in complaint(FinetuneConfig, method=method, estimator="two-point")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_fills_in_its_own_defaults(method: str) -> None:
    tuner = {"tuner": "t"} if method == "zo-finetuner" else {}
    config = finetune(method=method, **tuner)
    assert config.lr == DEFAULT_LR.get(method)
    assert config.noise == {"fzoo": "rademacher", "lozo": "low-rank"}.get(method, "gaussian")
    assert (config.rank, config.factors, config.resample_every) == (
        (2, "gaussian", 50) if method == "lozo" else (1, "rademacher", 1)
    )
    assert config.eval_every == 40
    stated = finetune(method=method, lr=0.5, noise=config.noise, rank=3, eval_every=7, **tuner)
    assert (stated.lr, stated.noise, stated.rank, stated.eval_every) == (0.5, config.noise, 3, 7)


@pytest.mark.parametrize(("method", "noise"), [("hizoo", "rademacher"), ("zo-adamu", "low-rank"), ("lozo", "gaussian")])
def test_a_method_whose_equations_stand_on_one_noise_refuses_others(method: str, noise: str) -> None:
    assert f"--noise {noise} is not for method {method}" in complaint(FinetuneConfig, method=method, noise=noise)


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_methods_that_keep_numbers_for_each_weight_refuse_integers(method: str) -> None:
    assert f"--quantize is not for {method}" in complaint(FinetuneConfig, method=method, quantize=8)


@pytest.mark.parametrize(("steps", "expected"), [(0, 1), (3, 1), (10, 2), (1004, 201)])
def test_evaluations_are_at_most_five_a_run_by_default(steps: int, expected: int) -> None:
    assert finetune(steps=steps).eval_every == expected


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        finetune().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS)
def test_a_resolved_finetune_config_reads_back_the_same(tmp_path: Path, method: str) -> None:
    tuner = {"tuner": "t"} if method == "zo-finetuner" else {}
    config = finetune(method=method, data_dir="d", save_model=True, **tuner)
    assert FinetuneConfig.read(yaml_file(tmp_path, config.to_yaml()), {}) == config


def test_a_resolved_meta_train_config_reads_back_the_same(tmp_path: Path) -> None:
    config = MetaTrainConfig.read(None, META | {"tasks": ["copa", "sst2"], "trajectory": "t", "inner_lr": "1e-7"})
    assert MetaTrainConfig.read(yaml_file(tmp_path, config.to_yaml()), {}) == config


def test_a_resolved_config_states_every_option() -> None:
    assert set(yaml.safe_load(finetune().to_yaml())) == set(FinetuneConfig.model_fields)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "3", "a: [1\n", "a: b: c", "\tx: 1", "[" * 1500, "a: *b"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    file = yaml_file(tmp_path, text)
    says = complaint(FinetuneConfig, file)
    assert says.startswith(f"{file}: expected ")


@pytest.mark.parametrize("text", ["out: 2026-02-30", "steps: " + "9" * 5000], ids=["no such day", "a huge number"])
def test_a_value_that_yaml_itself_cannot_convert_is_one_line(tmp_path: Path, text: str) -> None:
    file = yaml_file(tmp_path, text)
    assert complaint(FinetuneConfig, file).startswith(f"{file}: ")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert complaint(FinetuneConfig, file).startswith(f"{file}: expected YAML")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "latin-1"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "run.yaml"
    if kind == "folder":
        file.mkdir()
    if kind == "latin-1":
        file.write_bytes("model: café\n".encode("latin-1"))
    assert complaint(FinetuneConfig, file).startswith(f"{file}: ")


def test_every_option_is_described() -> None:
    for kind in KINDS.values():
        assert [name for name, field in kind.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("file", SHIPPED, ids=[str(file.relative_to(CONFIGS)) for file in SHIPPED])
def test_a_shipped_config_loads(file: Path) -> None:
    kind = KINDS[file.relative_to(CONFIGS).parts[0]]
    stated = read_yaml(file)
    flags = {"out": "o", **({"tuner": "t"} if stated.get("method") == "zo-finetuner" else {})}
    config = kind.read(file, {name: value for name, value in flags.items() if name not in stated})
    came = config.model_dump(mode="json")
    for key in stated:
        assert came[key] is not None


def test_there_is_a_shipped_config() -> None:
    assert SHIPPED


def test_compiled_code_walks_in_place() -> None:
    assert FinetuneConfig.read(None, {**REQUIRED, "compile": True}).engine == "in-place"
    with pytest.raises(ZotunerError, match="--compile needs --engine in-place"):
        FinetuneConfig.read(None, {**REQUIRED, "compile": True, "engine": "streamed"})


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_branch_batch_is_auto_or_a_number(value: str) -> None:
    assert FinetuneConfig.read(None, {**REQUIRED, "branch_batch": "4"}).branch_batch == 4
    with pytest.raises(ZotunerError, match="--branch-batch: "):
        FinetuneConfig.read(None, {**REQUIRED, "branch_batch": value})


def test_meta_training_knows_no_low_rank_noise() -> None:
    with pytest.raises(ZotunerError, match="--noise: "):
        MetaTrainConfig.read(None, {"model": "m", "out": "o", "noise": "low-rank"})
