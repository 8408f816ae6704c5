"""Models: found, loaded, identified, saved; the real one where it matters."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, hub_env
from tiny import tiny_llama

from zotuner.errors import ZotunerError
from zotuner.models import (
    compile_layers,
    compute_dtype,
    keep_weights,
    kind_saved,
    load_model,
    load_tokenizer,
    restore_weights,
    save_model,
    weights_sha256,
)

ROOT = Path(__file__).parents[1]
REAL = "smollm2-135m-instruct"


def test_the_hash_knows_names_values_and_dtype() -> None:
    base = weights_sha256(tiny_llama())
    assert base == weights_sha256(tiny_llama())
    moved = tiny_llama()
    with torch.no_grad():
        moved.model.norm.weight[3] += 1e-6
    renamed = torch.nn.ModuleDict({"other": tiny_llama()})
    assert len({base, weights_sha256(moved), weights_sha256(renamed), weights_sha256(tiny_llama().bfloat16())}) == 4


def test_a_saved_model_comes_back_with_the_same_weights(model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    save_model(model, tokenizer, tmp_path / "saved", "base")
    again, _ = load_model(tmp_path / "saved")
    assert weights_sha256(again) == weights_sha256(model)
    assert not again.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_asked_for(model_dir: Path, dtype: str) -> None:
    model, _ = load_model(model_dir, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_kept_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = weights_sha256(model)
    keep_weights(model, tmp_path / "kept.safetensors")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    restore_weights(model, tmp_path / "kept.safetensors")
    assert weights_sha256(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'"),
        ("missing.gguf", "no such file"),
        ("empty", "no config.json"),
        ("broken.gguf", "cannot be read as a GGUF"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOTUNER_CACHE", str(tmp_path / "cache"))
    Path("empty").mkdir()
    Path("broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ZotunerError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache").glob("models/*/"))


def test_weights_that_do_not_fit_their_configuration_are_told_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    stated = json.loads(config.read_text())
    config.write_text(json.dumps({**stated, "intermediate_size": 5}))
    with pytest.raises(ZotunerError) as caught:
        load_model(tmp_path / "model")
    wide, high = stated["hidden_size"], stated["intermediate_size"]
    assert str(caught.value).endswith(
        f"key model.layers.0.mlp.down_proj.weight: expected weights ({wide}, 5), as its configuration says, "
        f"got ({wide}, {high})"
    )


def test_an_adapters_kind_and_tokenizer_are_those_of_its_base(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_dir)}))
    assert kind_saved(tmp_path) == "causal"
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(model_dir).get_vocab()


def test_a_hub_id_is_downloaded_and_a_missing_one_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as server:
        shutil.copytree(model_dir, server.root / "models/acme/tiny")
        code = (
            "import zotuner\nfrom zotuner.models import weights_sha256\n"
            "print(weights_sha256(zotuner.load_model('acme/tiny')[0]))\n"
            "try: zotuner.load_model('acme/none')\n"
            "except zotuner.ZotunerError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=hub_env(server, tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    digest, refusal = done.stdout.splitlines()
    assert digest == weights_sha256(load_model(model_dir)[0])
    assert refusal.startswith("acme/none: cannot be loaded")


@pytest.mark.slow
def test_the_real_model_is_converted_and_loaded() -> None:
    model, tokenizer = load_model(REAL)
    assert len(list(model.parameters())) == 272
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


def run(*arguments: Any) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_two_commands_work_on_the_real_model(tmp_path: Path) -> None:
    common = ["--model", REAL, "--steps", 2, "--batch-size", 4]
    run("meta_train.py", *common, "--tasks", "demo-copa", "--out", tmp_path / "tuner")
    assert (tmp_path / "tuner" / "tuner.safetensors").stat().st_size < 2_000_000
    common += ["--task", "demo-sentiment", "--eval-size", 8, "--dev-size", 8]
    run(
        "finetune.py", *common, "--method", "zo-finetuner", "--tuner", tmp_path / "tuner", "--out", tmp_path / "run",
        "--save-model",
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    saved, _ = load_model(tmp_path / "run" / "model")
    assert summary["forwards"] == 4
    assert weights_sha256(saved) == summary["weights_sha256"]


@pytest.mark.slow
def test_the_shipped_tuner_fits_the_real_model() -> None:
    from zotuner.optim import ZOFineTuner
    from zotuner.tuner import Tuner

    tuner = Tuner.from_pretrained(ROOT / "tuners" / REAL)
    model, _ = load_model(REAL)
    assert tuner.info.base_weights_sha256 == weights_sha256(model)
    opt = ZOFineTuner(model, tuner, lr=0.0)
    opt.step(lambda: 1.0)
    assert opt.last is not None
    assert opt.last.scales is not None
    assert float(opt.last.scales.std()) > 0.01


def test_layers_are_compiled_for_static_shapes_and_served_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self).__name__, options))
    )
    compile_layers(tiny_llama(num_hidden_layers=3))
    assert compiled == [("LlamaDecoderLayer", {"dynamic": False})] * 3
    with pytest.raises(ZotunerError, match="--compile: Linear has no list of layers"):
        compile_layers(torch.nn.Linear(2, 2))


def test_products_are_in_bfloat16_only_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert compute_dtype(cpu) is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert compute_dtype(cpu) is torch.bfloat16
