"""The tuner: made for a model, saved, loaded, refused when it is broken or belongs to another model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import HubServer, hub_env
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import tiny_gpt2, tiny_llama, tiny_phi3
from torch import Tensor

from zotuner.blocks import find_blocks, moments
from zotuner.card import CARD, card
from zotuner.errors import ZotunerError
from zotuner.files import write_atomically
from zotuner.pertnn import ARCHITECTURES, FEATURES
from zotuner.tuner import DESCRIPTION, WEIGHTS, Tuner

Json = dict[str, Any]
ABOUT: Json = {
    "base_model": "acme/tiny-llama",
    "base_weights_sha256": "ab" * 32,
    "tasks": ("copa", "sst2"),
    "config": {"steps": 30, "inner_lr": 1e-6, "note": "a: b"},
    "notes": "Loss 0.6 after 100 steps {not a template field}.",
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(architecture: str = "exp", **about: Any) -> Tuner:
    """A tuner for `tiny_llama()` whose weights are all different from 0, as after meta-training."""
    tuner = Tuner.for_model(tiny_llama(), architecture, seed=1, **about)
    with torch.no_grad():
        for seed, param in enumerate(tuner.bank.parameters()):
            param.add_(random(*param.shape, seed=seed) / 8)
    return tuner


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tuner of `tiny_llama()`."""
    trained(**ABOUT).save_pretrained(tmp_path / "tuner")
    return tmp_path / "tuner"


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    """Changes `tuner.json`."""
    info = json.loads((folder / DESCRIPTION).read_text())
    change(info)
    (folder / DESCRIPTION).write_text(json.dumps(info))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes `tuner.safetensors`."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def refusal(source: Path | str, *parts: str) -> str:
    """Why a tuner cannot be loaded: one line that holds `parts`."""
    with pytest.raises(ZotunerError) as caught:
        Tuner.from_pretrained(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for part in parts:
        assert part in message
    return message


# Made for a model


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tuner_has_a_net_for_each_block(architecture: str, granularity: str) -> None:
    model = tiny_llama()
    blocks = find_blocks(model, granularity)
    tuner = Tuner.for_model(model, architecture, granularity=granularity)
    assert tuner.block_names == tuple(block.name for block in blocks)
    assert tuple(info.numel for info in tuner.info.blocks) == tuple(block.numel for block in blocks)
    assert sum(p.numel() for p in tuner.bank.parameters()) == 449 * len(blocks)
    assert (tuner.granularity, tuner.info.architecture) == (granularity, architecture)
    assert tuner.nets_for(blocks).tolist() == list(range(len(blocks)))


def test_the_default_architecture_starts_at_mezo() -> None:
    tuner = Tuner.for_model(tiny_llama())
    n = len(tuner.block_names)
    assert tuner.info.architecture == "exp"
    assert torch.equal(tuner.scales(random(n, 5).abs()), torch.ones(n))


def test_the_abs_architecture_sees_raw_features() -> None:
    tuner = Tuner.for_model(tiny_llama(), architecture="abs")
    x = random(len(tuner.block_names), 5)
    assert torch.equal(tuner.spec(x), x)
    assert torch.equal(tuner.scales(x), tuner.bank(x).detach())


def test_the_exp_architecture_standardizes_the_models_own_statistics() -> None:
    model = tiny_llama()
    tuner, n = Tuner.for_model(model, "exp"), 21
    statistics = torch.tensor([moments(block) for block in find_blocks(model)])
    seen = tuner.spec(torch.cat([torch.ones(n, 3), statistics], dim=1))[:, 3:]
    assert seen.mean(dim=0).tolist() == pytest.approx([0, 0], abs=1e-4)
    assert seen.std(dim=0).tolist() == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scales_are_a_positive_number_a_block(architecture: str) -> None:
    tuner = trained(architecture)
    n = len(tuner.block_names)
    sigma = tuner.scales(random(n, 5).double())
    assert (sigma.shape, sigma.dtype, sigma.requires_grad) == ((n,), torch.float32, False)
    assert (sigma > 0).all()
    assert sigma.unique().numel() == n


def test_scales_of_chosen_nets_are_theirs() -> None:
    tuner = trained()
    x = random(21, 5)
    torch.testing.assert_close(tuner.scales(x[[4, 0, 9]], torch.tensor([4, 0, 9])), tuner.scales(x)[[4, 0, 9]])


def test_seeds_decide_the_weights_and_nothing_else_does() -> None:
    x, state = random(21, 5), torch.get_rng_state()
    first, again, other = (Tuner.for_model(tiny_llama(), "abs", seed=seed).scales(x) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)abs.*exp"):
        Tuner.for_model(tiny_llama(), architecture="relu")
    with pytest.raises(ValueError, match="unknown granularity 'rows'; known: block, layer"):
        Tuner.for_model(tiny_llama(), granularity="rows")


# Saved and loaded


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_tuner_comes_back_bit_for_bit(architecture: str, granularity: str, tmp_path: Path) -> None:
    tuner = trained(architecture, granularity=granularity, **ABOUT)
    tuner.save_pretrained(tmp_path / "not" / "yet" / "there")
    loaded = Tuner.from_pretrained(tmp_path / "not" / "yet" / "there")
    assert loaded.info == tuner.info
    assert loaded.spec == tuner.spec
    assert loaded.block_names == tuner.block_names
    x = random(len(tuner.block_names), 5)
    assert torch.equal(loaded.scales(x), tuner.scales(x))
    assert all(torch.equal(a, b) for a, b in zip(tuner.bank.parameters(), loaded.bank.parameters(), strict=True))
    assert Tuner.from_pretrained(str(tmp_path / "not/yet/there")).info == tuner.info


def test_saving_writes_the_three_files_and_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, DESCRIPTION, CARD])
    Tuner.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, DESCRIPTION, CARD):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_over_a_tuner_replaces_it(folder: Path) -> None:
    trained("abs").save_pretrained(folder)
    assert Tuner.from_pretrained(folder).info.architecture == "abs"
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, DESCRIPTION, CARD])


@pytest.mark.parametrize("name", [WEIGHTS, CARD, DESCRIPTION])
def test_a_tuner_that_was_replaced_in_part_is_none(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(path: Path, content: str | bytes) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        write_atomically(path, content)

    monkeypatch.setattr("zotuner.tuner.write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        trained("abs").save_pretrained(folder)
    with pytest.raises(ZotunerError, match=r"tuner\.json: missing"):
        Tuner.from_pretrained(folder)


def test_a_revision_of_what_is_not_on_the_hub_is_refused(folder: Path) -> None:
    for name, what in ((folder, "a folder"), ("smollm2-135m-instruct", "a tuner of the package")):
        with pytest.raises(ZotunerError, match=f"revisions are of tuners on the Hub, and this is {what}; got 'main'"):
            Tuner.from_pretrained(name, revision="main")


def test_a_description_that_cannot_be_read_is_one_line(folder: Path) -> None:
    (folder / DESCRIPTION).unlink()
    (folder / DESCRIPTION).mkdir()
    with pytest.raises(ZotunerError, match=r"tuner\.json: cannot be read: Is a directory"):
        Tuner.from_pretrained(folder)


def test_nets_that_give_no_block_any_noise_are_refused() -> None:
    tuner = Tuner.for_model(tiny_llama(), "abs")
    with torch.no_grad():
        for param in tuner.bank.parameters():
            param.zero_()
    with pytest.raises(ZotunerError, match="the tuner: gives no block any noise"):
        tuner.scales(random(21, 5))


def test_a_loaded_tuner_can_be_trained_on(folder: Path) -> None:
    tuner = Tuner.from_pretrained(folder)
    tuner.bank(random(21, 5)).sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in tuner.bank.parameters())


def test_a_file_stays_small_and_holds_no_code(folder: Path) -> None:
    assert (folder / WEIGHTS).stat().st_size < 21 * 449 * 4 + 1000
    assert set(load_file(folder / WEIGHTS)) == {"w1", "b1", "w2", "b2"}


def test_the_description_says_what_the_tuner_is(folder: Path) -> None:
    info = json.loads((folder / DESCRIPTION).read_text())
    assert info["format_version"] == 1
    assert info["base_model"] == "acme/tiny-llama"
    assert info["features"]["names"] == list(FEATURES)
    assert info["blocks"][0] == {"name": "model.embed_tokens.weight", "numel": 1024}
    assert info["tasks"] == ["copa", "sst2"]
    assert info["config"] == ABOUT["config"]
    assert {"zotuner", "torch", "python"} <= set(info["versions"])


def test_half_precision_weights_are_read_as_float32(folder: Path) -> None:
    exact = load_file(folder / WEIGHTS)
    edit_weights(folder, lambda w: w.update({k: v.half() for k, v in w.items()}))
    for name, param in Tuner.from_pretrained(folder).bank.named_parameters():
        assert torch.equal(param, exact[name].half().float())


# The card


def front_matter(text: str) -> Json:
    head, front, _ = text.split("---\n", 2)
    assert head == ""
    return yaml.safe_load(front)


def test_the_cards_front_matter_is_what_the_hub_reads(folder: Path) -> None:
    front = front_matter((folder / CARD).read_text())
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "zotuner"
    assert front["base_model"] == "acme/tiny-llama"
    assert {"zotuner", "zeroth-order"} <= set(front["tags"])


def test_the_card_names_the_facts(folder: Path) -> None:
    text = (folder / CARD).read_text()
    facts = ["acme/tiny-llama", "21 PertNNs", "exp", "granularity\nblock", "copa, sst2", "ab" * 32, ABOUT["notes"]]
    for fact in [*facts, "| steps | 30 |", "| inner_lr | 1e-06 |", "arXiv:2510.00419", f"torch {torch.__version__}"]:
        assert fact in text, fact


def test_a_card_without_facts_is_whole_all_the_same(tmp_path: Path) -> None:
    Tuner.for_model(tiny_llama()).save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "base_model" not in front_matter(text)
    assert "no task yet" in text
    assert "not recorded" in text
    assert "Not compared with anything yet." in text


@pytest.mark.parametrize("base", ["tiny-llama", "./runs/model", "/data/models/tiny", "a/b/c", "../up/model"])
def test_a_base_model_that_is_no_hub_id_is_kept_out_of_the_metadata(base: str) -> None:
    info = trained(base_model=base).info.model_dump()
    assert "base_model" not in front_matter(card(info))
    assert f"Tuner for {base}" in card(info)


@pytest.mark.parametrize("value", ["a | b", "two\nlines"])
def test_an_option_of_the_config_stays_in_its_row(value: str) -> None:
    text = card(trained(config={"first": value, "second": 2}).info.model_dump())
    rows = text.split("| --- | --- |\n")[1].split("\n\n")[0].split("\n")
    assert len(rows) == 2
    assert all(row.replace(r"\|", "").count("|") == 3 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_saved_in_half_precision_come_back_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    tuner = trained("abs")
    tuner.save_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    for name, param in Tuner.from_pretrained(tmp_path).bank.named_parameters():
        assert param.dtype == torch.float32
        assert torch.equal(param, tuner.bank.get_parameter(name).to(dtype).float())


@pytest.mark.parametrize(("dtype", "weight"), [(torch.int8, 1.0), (torch.float16, 1e6)])
def test_a_precision_that_does_not_hold_the_weights_is_refused(
    tmp_path: Path, dtype: torch.dtype, weight: float
) -> None:
    tuner = trained("abs")
    with torch.no_grad():
        tuner.bank.b2[0] = weight
    with pytest.raises(ValueError, match="expected one of floating point that holds the nets' weights, got torch"):
        tuner.save_pretrained(tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_tuner_for_opt_30b_takes_less_than_a_megabyte(tmp_path: Path) -> None:
    """The paper's largest model, without its weights: 772 blocks; the paper says below 2 MB (arXiv:2510.00419)."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 7168, "num_hidden_layers": 48, "num_attention_heads": 56, "ffn_dim": 28672}
    config = OPTConfig(**sizes, word_embed_proj_dim=7168, vocab_size=50272, max_position_embeddings=2048)
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    assert sum(param.numel() for param in model.parameters()) == pytest.approx(30e9, rel=0.01)
    tuner = Tuner.for_model(model, "abs", base_model="facebook/opt-30b")
    assert len(tuner.block_names) == 772
    tuner.save_pretrained(tmp_path, dtype=torch.float16)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1e6
    assert Tuner.from_pretrained(tmp_path).block_names == tuner.block_names


# Broken files


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "none"), "no/such/tuner", "./tuners/none", "a b"):
        refusal(name, name, "no such tuner", "neither a folder nor to be had from the Hub")


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refusal(folder, f"{folder / name}: missing", f"a folder with {WEIGHTS} and {DESCRIPTION}")


def test_a_missing_card_does_no_harm(folder: Path) -> None:
    (folder / CARD).unlink()
    assert len(Tuner.from_pretrained(folder).block_names) == 21


def test_weights_cut_off_anywhere_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    lengths = {0, 1, 7, 8, 9, 50, *range(0, len(whole), len(whole) // 40), len(whole) - 4, len(whole) - 1}
    for length in sorted(lengths):
        (folder / WEIGHTS).write_bytes(whole[:length])
        refusal(folder, str(folder / WEIGHTS), "expected a whole safetensors file", "get the file again")
    (folder / WEIGHTS).write_bytes(whole)
    assert Tuner.from_pretrained(folder).info.base_model == "acme/tiny-llama"


def test_weights_that_are_something_else_are_refused(folder: Path) -> None:
    for content in (b"<!doctype html><html>Not found</html>", b"\xff" * 5000, b"version https://git-lfs.github.com"):
        (folder / WEIGHTS).write_bytes(content)
        refusal(folder, str(folder / WEIGHTS), "expected a whole safetensors file")


def test_a_description_cut_off_anywhere_is_refused(folder: Path) -> None:
    whole = (folder / DESCRIPTION).read_bytes().rstrip()
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        (folder / DESCRIPTION).write_bytes(whole[:length])
        refusal(folder, str(folder / DESCRIPTION))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe\x00", b"<html>\nNot found\n</html>", b"{}"])
def test_a_description_that_is_something_else_is_refused(folder: Path, content: bytes) -> None:
    (folder / DESCRIPTION).write_bytes(content)
    refusal(folder, str(folder / DESCRIPTION))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d["blocks"][3].update(shape=[1]), "blocks.3.shape"),
        (lambda d: d["features"].update(more=1), "features.more"),
        (lambda d: d.update(format_version=2), "format_version"),
        (lambda d: d.update(architecture="relu"), "architecture"),
        (lambda d: d.pop("architecture"), "architecture"),
        (lambda d: d.update(granularity="row"), "granularity"),
        (lambda d: d.update(blocks=[]), "blocks"),
        (lambda d: d["blocks"][2].update(numel=0), "blocks.2.numel"),
        (lambda d: d["blocks"][2].update(numel="many"), "blocks.2.numel"),
        (lambda d: d["blocks"][2].pop("name"), "blocks.2.name"),
        (lambda d: d.update(normalized="perhaps"), "normalized"),
        (lambda d: d.pop("features"), "features"),
    ],
)
def test_a_wrong_key_of_the_description_is_named(folder: Path, change: Callable[[Json], object], key: str) -> None:
    edit(folder, change)
    refusal(folder, f"{folder / DESCRIPTION}: {key}: ")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d["features"].update(transform=["identity"] * 4), "features"),
        (lambda d: d["features"].update(transform=["square"] * 5), "features"),
        (lambda d: d["features"].update(scale=[0.0] * 5), "features"),
        (lambda d: d["features"].update(names=["loss"] * 5), "features.names"),
        (lambda d: d["features"].update(names=list(reversed(FEATURES))), "features.names"),
    ],
)
def test_features_that_cannot_be_computed_are_refused(folder: Path, change: Callable[[Json], object], key: str) -> None:
    edit(folder, change)
    refusal(folder, str(folder / DESCRIPTION), key)


def test_a_block_that_comes_twice_is_refused(folder: Path) -> None:
    edit(folder, lambda d: d["blocks"].__setitem__(2, d["blocks"][1]))
    refusal(folder, str(folder / DESCRIPTION), "blocks", "model.layers.0.self_attn.q_proj.weight")


def test_weights_for_another_number_of_blocks_are_refused(folder: Path) -> None:
    edit(folder, lambda d: d["blocks"].pop())
    refusal(folder, str(folder / WEIGHTS), "key w1", "(20, 64, 5) for 20 blocks", "got (21, 64, 5)")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: w.update(w1=w["w1"][:, :32].clone()), ["key w1", "(21, 64, 5)", "got (21, 32, 5)"]),
        (lambda w: w.update(b2=w["b2"][:, None].clone()), ["key b2", "(21,)", "got (21, 1)"]),
        (lambda w: w.pop("w2"), ["key w2", "(21, 64)", "got None"]),
        (lambda w: w.update(b1=w["b1"].int()), ["key b1", "floating-point"]),
        (lambda w: w["w1"][4, 3].fill_(torch.nan), ["key w1", "finite"]),
        (lambda w: w["b2"][0].fill_(torch.inf), ["key b2", "finite"]),
        (lambda w: w["w2"][20, 63].fill_(-torch.inf), ["key w2", "finite"]),
    ],
)
def test_weights_that_cannot_be_used_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object], parts: list[str]
) -> None:
    edit_weights(folder, change)
    refusal(folder, str(folder / WEIGHTS), *parts)


# Another model


def misfit(tuner: Tuner, model: torch.nn.Module) -> str:
    with pytest.raises(ZotunerError) as caught:
        tuner.nets_for(find_blocks(model, tuner.granularity))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_of_another_size_is_refused_with_the_first_blocks_that_differ() -> None:
    message = misfit(trained(**ABOUT), tiny_llama(vocab_size=80))
    assert "made for acme/tiny-llama" in message
    assert "2 of 21 blocks differ" in message
    assert "model.embed_tokens.weight (1280 elements; the tuner has 1024)" in message
    assert "lm_head.weight (1280 elements; the tuner has 1024)" in message
    assert "more" not in message


def test_a_model_of_another_family_is_refused_with_a_count() -> None:
    message = misfit(trained(), tiny_gpt2())
    blocks = find_blocks(tiny_gpt2())
    assert f"{len(blocks)} of {len(blocks)} blocks differ" in message
    for block in blocks[:3]:
        assert f"{block.name} ({block.numel} elements; the tuner does not know it)" in message
    assert blocks[3].name not in message
    assert f"and {len(blocks) - 3} more" in message
    assert "another model" in message


def test_a_deeper_model_is_refused() -> None:
    message = misfit(trained(), tiny_llama(num_hidden_layers=3))
    assert "9 of 30 blocks differ" in message
    assert "model.layers.2.self_attn.q_proj.weight" in message


def test_a_model_with_frozen_parameters_uses_its_part_of_a_tuner() -> None:
    tuner, model = trained(), tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    blocks = find_blocks(model)
    nets = tuner.nets_for(blocks)
    assert nets.tolist() == list(range(10, 21))
    assert [tuner.block_names[net] for net in nets] == [block.name for block in blocks]
    x = random(21, 5)
    torch.testing.assert_close(tuner.scales(x[nets], nets), tuner.scales(x)[nets])


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
@pytest.mark.parametrize("build", [tiny_llama, tiny_phi3])
def test_a_wrapped_model_fits_the_tuner_of_the_bare_one(build: Callable[[], Any], wrap: Callable[[Any], Any]) -> None:
    tuner, model = Tuner.for_model(build()), wrap(build())
    blocks = find_blocks(model)
    assert tuner.nets_for(blocks).tolist() == list(range(len(tuner.block_names)))


def test_a_tuner_of_layers_fits_layers_alone() -> None:
    tuner, model = Tuner.for_model(tiny_llama(), granularity="layer"), tiny_llama()
    assert tuner.nets_for(find_blocks(model, "layer")).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ZotunerError, match="18 of 21 blocks differ"):
        tuner.nets_for(find_blocks(model, "block"))


# The Hub

ON_THE_HUB = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from zotuner.errors import ZotunerError
from zotuner.files import write_atomically
from zotuner.tuner import Tuner

def refusal(*args):
    try:
        Tuner.from_pretrained(*args)
    except ZotunerError as error:
        return str(error)

model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
first, second = (Tuner.for_model(model, "abs", seed=seed, base_model="acme/base") for seed in (1, 2))
address = first.push_to_hub("acme/tuner")
Path(sys.argv[1], "models/acme/tuner@next").mkdir()
second.push_to_hub("acme/tuner", revision="next")
x = torch.linspace(-1, 1, 20).view(4, 5)
loaded, branch = Tuner.from_pretrained("acme/tuner"), Tuner.from_pretrained("acme/tuner", revision="next")
commit = Tuner.from_pretrained("acme/tuner", address.rsplit("/", 1)[-1])
print(json.dumps({
    "address": address,
    "main": torch.equal(loaded.scales(x), first.scales(x)) and loaded.info == first.info,
    "next": torch.equal(branch.scales(x), second.scales(x)),
    "commit": torch.equal(commit.scales(x), first.scales(x)),
    "differ": not torch.equal(first.scales(x), second.scales(x)),
    "no repository": refusal("acme/none"),
    "no revision": refusal("acme/tuner", "none"),
    "no tuner": refusal("acme/other"),
}))
"""


@pytest.fixture(scope="module")
def on_the_hub(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """What a process saw that pushed two revisions of a tuner and loaded them; and the repository's files."""
    tmp = tmp_path_factory.mktemp("hub")
    with HubServer(tmp / "hub") as server:
        other = server.root / "models/acme/other"
        other.mkdir(parents=True)
        (other / "README.md").write_text("# Not a tuner\n")
        environment = hub_env(server, tmp / "home") | {"HF_TOKEN": "hf_test", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ON_THE_HUB, os.fspath(server.root)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        files = {path.name: path.read_text(errors="replace") for path in (server.root / "models/acme/tuner").iterdir()}
        return {**json.loads(done.stdout.splitlines()[-1]), "files": files, "endpoint": server.endpoint}


def test_a_pushed_tuner_comes_back_from_the_hub(on_the_hub: Json) -> None:
    assert on_the_hub["main"] is True
    assert on_the_hub["address"].startswith(f"{on_the_hub['endpoint']}/acme/tuner/commit/")


def test_a_revision_is_a_branch_or_a_commit(on_the_hub: Json) -> None:
    assert on_the_hub["differ"] is True
    assert on_the_hub["next"] is True
    assert on_the_hub["commit"] is True


def test_a_push_uploads_the_three_files(on_the_hub: Json) -> None:
    assert set(on_the_hub["files"]) == {WEIGHTS, DESCRIPTION, CARD}
    assert front_matter(on_the_hub["files"][CARD])["base_model"] == "acme/base"


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("no repository", ["acme/none", "no such tuner"]),
        ("no revision", ["acme/tuner", "none"]),
        ("no tuner", [DESCRIPTION, "missing"]),
    ],
)
def test_what_the_hub_has_not_is_refused_in_one_line(on_the_hub: Json, what: str, parts: list[str]) -> None:
    message = on_the_hub[what]
    assert isinstance(message, str)
    assert "\n" not in message
    for part in parts:
        assert part in message
