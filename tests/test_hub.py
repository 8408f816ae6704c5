"""Tuners listed, pulled, pushed, and found by a model's base, against a local Hub; those that ship with the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer, read_card
from huggingface_hub import ModelCard, constants
from test_cli import argv_of, assert_one_error_line, call, quick, tree
from tiny import tiny_llama

from zotuner.card import CARD, ORIGINALS, card
from zotuner.errors import ZotunerError
from zotuner.hub import AUTO, MOST_MODELS, find_tuner
from zotuner.ledger import read_ledger
from zotuner.models import PACKAGED, save_model
from zotuner.training import LEDGER
from zotuner.tuner import DESCRIPTION, WEIGHTS, Result, Tuner, shipped

ROOT = Path(__file__).parents[1]
SHIPPED = "smollm2-135m-instruct"
ORIGINAL = ORIGINALS[SHIPPED]


def on_hub(hub: HubServer, repo_id: str, base: str = "acme/base", seed: int = 0) -> str:
    """Puts a tuner of the tiny Llama into a repository."""
    Tuner.for_model(tiny_llama(), "abs", seed=seed, base_model=base).save_pretrained(hub.root / "models" / repo_id)
    return repo_id


def model_card(hub: HubServer, repo_id: str, base: object = None) -> None:
    """Makes a model's repository, whose card states a base model."""
    write_card(hub.root / "models" / repo_id, base)


def write_card(folder: Path, base: object) -> Path:
    folder.mkdir(parents=True)
    (folder / CARD).write_text("---\n" + yaml.safe_dump({"license": "mit", "base_model": base}) + "---\n# A model\n")
    return folder


def found(model: str | Path) -> tuple[str, str]:
    """Which tuner is taken for a model, without its commit, and the last line that is said of it."""
    said: list[str] = []
    tuner = find_tuner(str(model), said.append)
    return tuner.source.partition("@")[0], said[-1]


def refusal(model: str | Path) -> str:
    with pytest.raises(ZotunerError) as caught:
        find_tuner(str(model))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Pushed and pulled


def test_what_is_pushed_can_be_pulled_again(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    Tuner.for_model(tiny_llama(), "abs", base_model="acme/base").save_pretrained(mine)
    assert call("tuner", "push", mine, "me/tuner", "--private") == 0
    assert "pushed to me/tuner" in capsys.readouterr().out
    assert call("tuner", "pull", "me/tuner", "--out", tmp_path / "back") == 0
    assert "21 blocks of acme/base" in capsys.readouterr().out
    assert [path.read_bytes() for path in sorted((tmp_path / "back").iterdir())] == [
        path.read_bytes() for path in sorted(mine.iterdir())
    ]


def test_a_branch_is_made_by_pushing_to_it_and_main_stays(hub: HubServer, tmp_path: Path) -> None:
    for seed, revision in ((1, []), (2, ["--revision", "next"])):
        Tuner.for_model(tiny_llama(), "abs", seed=seed).save_pretrained(tmp_path / str(seed))
        assert call("tuner", "push", tmp_path / str(seed), "me/tuner", *revision) == 0
    for seed, revision in ((1, []), (2, ["--revision", "next"])):
        assert call("tuner", "pull", "me/tuner", *revision, "--out", tmp_path / f"back{seed}") == 0
        assert (tmp_path / f"back{seed}" / WEIGHTS).read_bytes() == (tmp_path / str(seed) / WEIGHTS).read_bytes()


def test_a_card_that_was_edited_on_the_hub_is_pulled_as_it_is(hub: HubServer, tmp_path: Path) -> None:
    on_hub(hub, "acme/tuner")
    path = hub.root / "models/acme/tuner" / CARD
    path.write_text(path.read_text() + "\nOne more remark.\n")
    assert call("tuner", "pull", "acme/tuner", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / CARD).read_text().endswith("One more remark.\n")


def test_a_folder_with_other_files_is_not_pulled_into(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub(hub, "acme/tuner")
    (tmp_path / "notes.txt").write_text("mine")
    assert call("tuner", "pull", "acme/tuner", "--out", tmp_path, "--overwrite") == 2
    assert "found other files" in assert_one_error_line(capsys.readouterr().err)
    assert [path for path in tmp_path.iterdir() if path.name == "notes.txt"]


def test_what_lies_beside_a_tuner_is_not_lost_by_pulling_another_there(
    hub: HubServer, tuner_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub(hub, "acme/tuner")
    shutil.copytree(tuner_dir, tmp_path / "out")
    words = ["tuner", "pull", "acme/tuner", "--out", tmp_path / "out", "--overwrite"]
    (tmp_path / "out" / "measurements.jsonl").write_text("dear")
    assert call(*words) == 2
    says = "holds a calibration (measurements.jsonl), which would be lost"
    assert says in assert_one_error_line(capsys.readouterr().err)
    (tmp_path / "out" / "measurements.jsonl").rename(tmp_path / "out" / "notes.txt")
    (tmp_path / "out" / "measured.json").write_text("of the tuner that was there")
    assert call(*words) == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"notes.txt", WEIGHTS, DESCRIPTION, CARD}


def test_a_damaged_tuner_is_not_pulled(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_hub(hub, "acme/tuner")
    (hub.root / "models/acme/tuner" / WEIGHTS).write_bytes(b"short")
    assert call("tuner", "pull", "acme/tuner", "--out", tmp_path / "out") == 2
    assert "expected a whole safetensors file" in assert_one_error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


GATED = (403, "GatedRepo", "Access to model acme/closed is restricted")
FORBIDDEN = (403, "", "You don't have the rights to create a model under this namespace")


@pytest.mark.parametrize(
    ("words", "refused", "parts"),
    [
        (("pull", "acme/none"), None, ["acme/none: no such tuner", "no such repository, or a private one", "log in"]),
        (("pull", "acme/tuner", "--revision", "v9"), None, ["acme/tuner (revision v9)", "no such revision"]),
        (("pull", "acme/closed"), (401, "RepoNotFound", "Invalid username or password."), ["or a private one"]),
        (("pull", "acme/closed"), GATED, ["acme/closed: no such tuner", "gated", "ask for access"]),
        (("pull", "a b"), None, ["a b: no such tuner", "alphanumeric"]),
        (
            ("push", SHIPPED, "acme/closed"),
            FORBIDDEN,
            ["acme/closed: cannot be pushed to", "a token that has the right"],
        ),
        (("push", "no/such/folder", "acme/x"), None, ["no/such/folder: no such tuner"]),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    refused: tuple[int, str, str] | None,
    parts: list[str],
) -> None:
    on_hub(hub, "acme/tuner")
    if refused is not None:
        hub.refused["acme/closed"] = refused
    out = ["--out", str(tmp_path / "out")] if words[0] == "pull" else []
    assert call("tuner", *words, *out) == 2
    line = assert_one_error_line(capsys.readouterr().err)
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_line_says_so(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for words in (["pull", "acme/tuner", "--out", tmp_path / "out"], ["push", SHIPPED, "acme/x"], ["list"]):
        assert call("tuner", *words) == 2
        assert "HF_HUB_OFFLINE is set" in assert_one_error_line(capsys.readouterr().err)


# Listed


def test_the_list_has_the_shipped_tuners_first_then_the_hubs_by_downloads(
    hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub(hub, "acme/rare")
    on_hub(hub, "acme/liked", base="acme/other")
    hub.downloads |= {"acme/liked": 7, "acme/rare": 2}
    model_card(hub, "acme/tuned", base="acme/base")  # no tuner
    assert call("tuner", "list") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][2:]
    assert [row[0] for row in rows] == [*shipped(), "acme/liked", "acme/rare"]
    assert rows[0][1:] == [SHIPPED, "this", "package"]
    assert rows[1][1:] == ["acme/other", "the", "Hub", "7"]


@pytest.mark.parametrize(
    ("base", "names"),
    [("acme/base", ["acme/tuner"]), (SHIPPED, [SHIPPED, "acme/small"]), (ORIGINAL, [SHIPPED, "acme/small"])],
)
def test_the_list_for_a_base_knows_its_other_name(
    hub: HubServer, capsys: pytest.CaptureFixture[str], base: str, names: list[str]
) -> None:
    on_hub(hub, "acme/tuner")
    on_hub(hub, "acme/small", base=SHIPPED)
    assert call("tuner", "list", "--base", base) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][2:]
    assert [row[0] for row in rows] == names


def test_a_base_without_tuners_is_said_to_have_none(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tuner", "list", "--base", "acme/unheard-of") == 0
    assert capsys.readouterr().out == "no tuner for acme/unheard-of, neither with this package nor on the Hub\n"


def test_without_a_network_the_shipped_tuners_are_listed_all_the_same(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert call("tuner", "list") == 2
    assert SHIPPED in capsys.readouterr().out


# Found by the model


@pytest.mark.parametrize("model", [SHIPPED, ORIGINAL])
def test_a_model_with_a_shipped_tuner_needs_no_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found(model) == (SHIPPED, f"tuner {SHIPPED}, of base {model}")


def test_a_tuner_on_the_hub_is_found_and_pinned_to_its_commit(hub: HubServer) -> None:
    on_hub(hub, "acme/tuner", seed=1)
    first = find_tuner("acme/base")
    assert first.source.startswith("acme/tuner@")
    on_hub(hub, "acme/tuner", seed=2)
    assert find_tuner("acme/base").sha256() != first.sha256()
    assert Tuner.from_pretrained(first.source).sha256() == first.sha256()


def test_of_several_tuners_the_owners_goes_first_then_the_most_downloaded(hub: HubServer) -> None:
    on_hub(hub, "bob/tuner")
    on_hub(hub, "ann/tuner")
    hub.downloads |= {"ann/tuner": 1, "bob/tuner": 5}
    assert found("acme/base") == (
        "bob/tuner",
        find_tuner("acme/base").source.join(("tuner ", " (one of 2), of base acme/base")),
    )
    on_hub(hub, "acme/tuner")
    assert found("acme/base")[0] == "acme/tuner"


def test_the_cards_lead_from_a_derivative_to_the_base_with_a_tuner(hub: HubServer, tmp_path: Path) -> None:
    on_hub(hub, "acme/tuner")
    model_card(hub, "acme/chat", base="acme/base")
    folder = write_card(tmp_path / "mine", base=["acme/chat"])
    name, said = found(folder)
    assert name == "acme/tuner"
    assert said.endswith(f", of base acme/base, which is the base of acme/chat, which is the base of {folder}")


def test_a_tuner_of_the_derivative_itself_goes_before_its_bases(hub: HubServer) -> None:
    on_hub(hub, "acme/tuner")
    model_card(hub, "acme/chat", base="acme/base")
    on_hub(hub, "acme/chat-tuner", base="acme/chat")
    assert found("acme/chat")[0] == "acme/chat-tuner"


def test_a_merge_leads_to_the_first_of_its_bases_that_has_a_tuner(hub: HubServer) -> None:
    on_hub(hub, "acme/tuner", base="acme/second")
    for name in ("first", "second", "third"):
        model_card(hub, f"acme/{name}")
    model_card(hub, "acme/merge", base=["acme/first", "acme/second", "acme/third"])
    assert found("acme/merge")[1].endswith("of base acme/second, which is the base of acme/merge")


def test_cards_that_lead_in_a_circle_end_in_one_line(hub: HubServer) -> None:
    for name, base in (("a", ["acme/b", "acme/a"]), ("b", "acme/c"), ("c", "acme/a")):
        model_card(hub, f"acme/{name}", base=base)
    assert "nor for what it comes from by its card, acme/b, acme/c; name one" in refusal("acme/a")


def test_a_card_that_names_the_whole_world_is_not_followed_for_ever(hub: HubServer) -> None:
    model_card(hub, "acme/greedy", base=[f"acme/m{i}" for i in range(3 * MOST_MODELS)])
    refusal("acme/greedy")
    assert sum(request == "GET /api/models" for request in hub.requests) == MOST_MODELS


@pytest.mark.parametrize("text", ["# No front matter\n", "---\nbase_model: 3\n---\n", "---\n---\n", None])
def test_a_card_without_a_base_ends_the_way(hub: HubServer, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / CARD).write_text(text)
    assert f"no tuner for {tmp_path}, neither with the package nor on the Hub; name one" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a\n---\n"])
def test_a_card_that_is_no_yaml_is_named(hub: HubServer, tmp_path: Path, text: str) -> None:
    (tmp_path / CARD).write_text(text)
    assert f"{tmp_path / CARD}: expected a model card with YAML in front" in refusal(tmp_path)


def test_a_model_that_the_hub_keeps_back_is_named_with_the_reason(hub: HubServer) -> None:
    hub.refused["acme/closed"] = GATED
    assert "acme/closed: its card cannot be read for its base model (a gated repository" in refusal("acme/closed")


def test_without_a_network_a_folder_still_leads_to_a_shipped_tuner(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found(write_card(tmp_path / "mine", base=["acme/unknown", ORIGINAL]))[0] == SHIPPED


def test_a_saved_adapter_leads_to_the_base_that_it_is_for(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "smollm2-135m-instruct"}))
    assert found(folder)[0] == SHIPPED


def test_a_model_that_was_saved_here_leads_to_its_base(hub: HubServer, tokenizer: Any, tmp_path: Path) -> None:
    save_model(tiny_llama(), tokenizer, tmp_path / "mine", "smollm2-135m-instruct")
    assert found(tmp_path / "mine")[0] == SHIPPED
    save_model(tiny_llama(), tokenizer, tmp_path / "another", str(tmp_path / "mine"))
    assert not (tmp_path / "another" / CARD).exists()


# Used by a run


@pytest.fixture
def derivative(hub: HubServer, model_dir: Path, tuner_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model whose card names a base with a tuner on the Hub."""
    tuner = Tuner.from_pretrained(tuner_dir)
    about = tuner.info.model_copy(update={"base_model": "acme/base"})
    Tuner(about, tuner.bank).save_pretrained(hub.root / "models/acme/tuner")
    shutil.copytree(model_dir, tmp_path / "derivative")
    (tmp_path / "derivative" / CARD).write_text("---\nbase_model: acme/base\n---\n")
    return tmp_path / "derivative"


def test_a_run_records_the_very_tuner_that_auto_found(
    hub: HubServer, derivative: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "run", {"method": "zo-finetuner", "tuner": AUTO}
    assert call("finetune", *argv_of(quick(derivative, out, **words))) == 0
    assert f"of base acme/base, which is the base of {derivative}" in capsys.readouterr().err
    recorded = yaml.safe_load((out / "config.yaml").read_text())["tuner"]
    header, _ = read_ledger(out / LEDGER)
    assert recorded == header["tuner"] == header["config"]["tuner"] == Tuner.from_pretrained("acme/tuner").source
    on_hub(hub, "acme/tuner", seed=9)  # a newer tuner of the same name
    assert call("replay", out, "--out", tmp_path / "again") == 0
    assert "as the run recorded" in capsys.readouterr().out


def test_a_tuner_named_by_its_hub_id_is_recorded_with_its_commit(
    hub: HubServer, derivative: Path, tmp_path: Path
) -> None:
    words = {"method": "zo-finetuner", "tuner": "acme/tuner"}
    assert call("finetune", *argv_of(quick(derivative, tmp_path / "run", **words))) == 0
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["tuner"]
    assert recorded == Tuner.from_pretrained("acme/tuner").source


def test_a_run_without_a_tuner_to_be_found_is_refused_and_leaves_nothing(
    hub: HubServer, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"method": "zo-finetuner", "tuner": AUTO}
    before = tree(tmp_path)
    assert call("finetune", *argv_of(quick(model_dir, tmp_path / "run", **words))) == 2
    assert "--tuner auto: no tuner for" in assert_one_error_line(capsys.readouterr().err)
    assert tree(tmp_path) == before


# Cards, and tuners that ship


def test_the_results_of_a_tuner_become_the_cards_model_index() -> None:
    results = (
        Result(task="text-classification", dataset="acme/films", metric="accuracy", value=0.9, how="1,000 steps"),
        Result(task="text-classification", dataset="acme/films", metric="f1", value=0.8),
    )
    info = Tuner.for_model(tiny_llama(), "abs", base_model="acme/base", results=results).info
    read = ModelCard(card(info.model_dump())).data.eval_results
    assert read is not None
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in read] == [
        ("acme/films", "accuracy", 0.9),
        ("acme/films", "f1", 0.8),
    ]
    assert read[0].metric_name == "accuracy (1,000 steps)"


def test_results_survive_saving_and_are_left_out_where_there_are_none(tmp_path: Path) -> None:
    results = (Result(task="text-classification", dataset="acme/films", metric="accuracy", value=0.9),)
    Tuner.for_model(tiny_llama(), "abs", results=results).save_pretrained(tmp_path / "with")
    assert Tuner.from_pretrained(tmp_path / "with").info.results == results
    Tuner.for_model(tiny_llama(), "abs").save_pretrained(tmp_path / "without")
    assert "results" not in json.loads((tmp_path / "without" / DESCRIPTION).read_text())


@pytest.mark.parametrize("name", list(shipped()))
def test_a_shipped_tuner_is_saved_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    Tuner.from_pretrained(name).save_pretrained(tmp_path / "again")
    for file in (DESCRIPTION, WEIGHTS, CARD):
        assert (tmp_path / "again" / file).read_bytes() == (ROOT / "tuners" / name / file).read_bytes()


def test_a_packaged_models_tuner_states_its_hub_id_and_which_weights_it_was_made_on() -> None:
    text = (ROOT / "tuners" / SHIPPED / CARD).read_text()
    assert read_card(text)["base_model"] == ORIGINAL
    assert "quantised to 4 bits and back" in text


def test_every_packaged_model_has_a_hub_id() -> None:
    assert set(ORIGINALS) == set(PACKAGED)


FROM_WHEEL = """
import sys, zotuner
from zotuner.tuner import Tuner, shipped
tuner = Tuner.from_pretrained("smollm2-135m-instruct")
print(zotuner.__file__, len(tuner.block_names), *shipped())
"""


def test_a_built_wheel_carries_the_shipped_tuners(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("zotuner", "tuners"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "unpacked"), "HF_HUB_OFFLINE": "1"}
    command: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", FROM_WHEEL], check=False, **command)
    assert done.stdout.split() == [str(tmp_path / "unpacked/zotuner/__init__.py"), "272", *shipped()], done.stderr
