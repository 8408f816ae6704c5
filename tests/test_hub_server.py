"""Tests of the local Hub server against the real clients.

``huggingface_hub`` runs in this process; ``datasets`` and ``transformers`` read ``HF_ENDPOINT`` when they are
imported, so each of them runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer, hub_env
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CARD = "---\nlicense: mit\nlibrary_name: transformers\ntags:\n- tiny\nbase_model: acme/base\n---\n# A model\n"
TABLES_CARD = """---
configs:
- config_name: first
  data_files:
  - split: train
    path: first/train-*.parquet
  - split: test
    path: first/test-*.parquet
- config_name: second
  data_files: second.parquet
---
# Some data
"""
LINES_CARD = "---\nconfigs:\n- config_name: all\n  data_files: lines/*.jsonl\n---\n# Some lines\n"
LOAD_DATA = """
import json
from datasets import get_dataset_config_names, load_dataset
print(json.dumps({
    "configs": get_dataset_config_names("acme/tables"),
    "train": load_dataset("acme/tables", "first", split="train")["x"][:],
    "test": load_dataset("acme/tables", "first", split="test")["x"][:],
    "second": load_dataset("acme/tables", "second", split="train")["x"][:],
    "streamed": [row["x"] for row in load_dataset("acme/tables", "first", split="train", streaming=True)],
    "lines": load_dataset("acme/lines", "all", split="train[:2]")["text"][:],
    "older": load_dataset("acme/lines", split="train", revision="v1")["text"][:],
}))
"""
MAKE_AND_LOAD_MODEL = """
import json, sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast
words = {word: number for number, word in enumerate(["<unk>", "<s>", "hello", "world"])}
inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(sys.argv[1])
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
made = LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes)).eval()
made.save_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained("acme/llama")("hello world hello", return_tensors="pt")["input_ids"]
loaded = AutoModelForCausalLM.from_pretrained("acme/llama").eval()
with torch.no_grad():
    same = torch.equal(made(tokens).logits, loaded(tokens).logits)
layers = AutoConfig.from_pretrained("acme/llama").num_hidden_layers
print(json.dumps({"tokens": tokens[0].tolist(), "same": same, "layers": layers}))
"""


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """A client of the server."""
    return HfApi(endpoint=hub.endpoint, token="hf_test")


def put(hub: HubServer, repo: str, files: dict[str, str]) -> Path:
    """Writes text files into a repository's folder, such as ``models/acme/tiny``, and returns the folder."""
    folder = hub.root / repo
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files below a folder by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(code: str, hub: HubServer, home: Path, *args: str) -> dict[str, object]:
    """Runs a script with the server's environment and returns the JSON of its last line."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=hub_env(hub, home), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_snapshot_download_follows_the_revision(hub: HubServer) -> None:
    put(hub, "models/acme/tiny", {"README.md": CARD, "sub/notes.txt": "new", "model.safetensors": "weights"})
    put(hub, "models/acme/tiny@v1.0", {"sub/notes.txt": "old"})
    put(hub, "models/acme/tiny@refs%2Fpr%2F1", {"pr.txt": "proposed"})
    main = Path(snapshot_download("acme/tiny", endpoint=hub.endpoint))
    assert contents(main) == contents(hub.root / "models/acme/tiny")
    assert contents(Path(snapshot_download("acme/tiny", revision="v1.0"))) == {"sub/notes.txt": b"old"}
    assert contents(Path(snapshot_download("acme/tiny", revision="refs/pr/1"))) == {"pr.txt": b"proposed"}


def test_snapshot_download_of_an_earlier_commit(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    folder = put(hub, "models/acme/tiny", {"a.txt": "first"})
    first = api.model_info("acme/tiny").sha
    (folder / "a.txt").write_text("again")
    second = api.model_info("acme/tiny").sha
    assert first != second
    for sha, text in ((first, b"first"), (second, b"again")):
        path = snapshot_download("acme/tiny", revision=sha, local_dir=tmp_path / text.decode())
        assert (Path(path) / "a.txt").read_bytes() == text


def test_hf_hub_download_uses_the_cache(hub: HubServer) -> None:
    put(hub, "datasets/acme/data", {"deep/er/a b.txt": "text"})
    for _ in range(2):
        path = hf_hub_download("acme/data", "deep/er/a b.txt", repo_type="dataset", endpoint=hub.endpoint)
        assert Path(path).read_text() == "text"
    assert [r.split()[0] for r in hub.requests if "/resolve/" in r] == ["HEAD", "GET", "HEAD"]


def test_range_requests(hub: HubServer) -> None:
    put(hub, "models/acme/tiny", {"a.bin": "0123456789"})
    files = HfFileSystem(endpoint=hub.endpoint, skip_instance_cache=True)
    assert files.ls("acme/tiny", detail=False) == ["acme/tiny/a.bin"]
    assert files.cat_file("acme/tiny/a.bin", start=4, end=7) == b"456"
    url = f"{hub.endpoint}/acme/tiny/resolve/main/a.bin"
    request = urllib.request.Request(url, headers={"Range": "bytes=8-"})
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.headers["Content-Range"], answer.read()) == (206, "bytes 8-9/10", b"89")


def test_repository_information(hub: HubServer, api: HfApi) -> None:
    put(hub, "models/acme/tiny", {"README.md": CARD, "sub/model.safetensors": "weights"})
    info = api.model_info("acme/tiny", files_metadata=True)
    assert (info.id, info.author, info.library_name) == ("acme/tiny", "acme", "transformers")
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert {"tiny", "license:mit", "base_model:acme/base", "safetensors"} <= set(info.tags or [])
    sizes = {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings or []}
    assert sizes == {"README.md": (len(CARD), False), "sub/model.safetensors": (7, True)}
    assert sorted(api.list_repo_files("acme/tiny")) == ["README.md", "sub/model.safetensors"]
    assert [entry.path for entry in api.list_repo_tree("acme/tiny")] == ["sub", "README.md"]
    assert [entry.path for entry in api.get_paths_info("acme/tiny", ["sub", "none"])] == ["sub"]
    assert api.repo_exists("acme/tiny")
    assert not api.repo_exists("acme/tiny", repo_type="dataset")


def test_list_models(hub: HubServer, api: HfApi) -> None:
    put(hub, "models/acme/one", {"README.md": CARD, "a.gguf": ""})
    put(hub, "models/acme/one@v1", {"a.gguf": ""})
    put(hub, "models/acme/two", {"README.md": CARD})
    put(hub, "models/other/three", {"a.txt": "a"})
    put(hub, "datasets/acme/data", {"a.txt": "a"})

    def names(**query: object) -> list[str]:
        return [info.id for info in api.list_models(**query)]

    assert names() == ["acme/one", "acme/two", "other/three"]
    assert names(author="acme") == ["acme/one", "acme/two"]
    assert names(author="acme", filter="gguf") == names(filter=["gguf", "tiny"], limit=1) == ["acme/one"]
    assert [info.id for info in api.list_datasets(author="acme")] == ["acme/data"]


def test_create_repo(hub: HubServer, api: HfApi) -> None:
    url = api.create_repo("acme/new", repo_type="dataset")
    assert (url.repo_id, url.repo_type) == ("acme/new", "dataset")
    assert (hub.root / "datasets/acme/new").is_dir()
    assert api.create_repo("acme/new", repo_type="dataset", exist_ok=True).repo_id == "acme/new"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("acme/new", repo_type="dataset")


def test_upload_folder_and_download_it_again(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = {"README.md": CARD, "sub/notes.txt": "notes", "empty.txt": "", "model.safetensors": "w" * 100_000}
    put(hub, str(source), files)
    api.create_repo("acme/tiny", exist_ok=True)
    commit = api.upload_folder(repo_id="acme/tiny", folder_path=source, commit_message="First")
    assert commit.oid == api.model_info("acme/tiny").sha
    assert contents(hub.root / "models/acme/tiny") == contents(source)
    assert "POST /acme/tiny.git/info/lfs/objects/batch" in hub.requests
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == 1
    assert contents(Path(snapshot_download("acme/tiny", revision=commit.oid))) == contents(source)
    again = api.upload_folder(repo_id="acme/tiny", folder_path=source)
    assert again.oid == commit.oid
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_upload_replaces_and_deletes(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    put(hub, "datasets/acme/data", {"old/a.parquet": "a", "old/b.parquet": "b", "keep.txt": "keep"})
    put(hub, "datasets/acme/data@next", {"a.parquet": "next"})
    source = put(hub, str(tmp_path / "source"), {"old/a.parquet": "new"})
    api.upload_folder(repo_id="acme/data", repo_type="dataset", folder_path=source, delete_patterns="old/*")
    assert contents(hub.root / "datasets/acme/data") == {"old/a.parquet": b"new", "keep.txt": b"keep"}
    api.upload_folder(repo_id="acme/data", repo_type="dataset", folder_path=source, revision="next")
    assert (hub.root / "datasets/acme/data@next/old/a.parquet").read_text() == "new"
    api.delete_file("keep.txt", "acme/data", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.bin", repo_id="acme/data", repo_type="dataset")
    assert set(contents(hub.root / "datasets/acme/data")) == {"old/a.parquet", "x.bin"}


def test_uploads_that_are_refused(hub: HubServer, api: HfApi) -> None:
    put(hub, "models/acme/tiny", {"a.txt": "a"})
    upload = {"path_or_fileobj": b"x", "path_in_repo": "x.txt"}
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(**upload, repo_id="acme/none")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(**upload, repo_id="acme/tiny", revision="none")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(**upload, repo_id="acme/tiny", parent_commit="0" * 40)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id="acme/tiny")
    line = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    request = urllib.request.Request(
        f"{hub.endpoint}/api/models/acme/tiny/commit/main", json.dumps(line).encode(), method="POST"
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert contents(hub.root / "models/acme/tiny") == {"a.txt": b"a"}


@pytest.mark.parametrize(
    ("place", "code", "error"),
    [
        (("acme/none", "main", "a.txt"), "RepoNotFound", RepositoryNotFoundError),
        (("acme/tiny", "none", "a.txt"), "RevisionNotFound", RevisionNotFoundError),
        (("acme/tiny", "0" * 40, "a.txt"), "RevisionNotFound", RevisionNotFoundError),
        (("acme/tiny", "main", "none.txt"), "EntryNotFound", EntryNotFoundError),
    ],
)
def test_missing_things(hub: HubServer, place: tuple[str, str, str], code: str, error: type[Exception]) -> None:
    put(hub, "models/acme/tiny", {"a.txt": "a"})
    repo_id, revision, name = place
    with pytest.raises(error) as caught:
        hf_hub_download(repo_id, name, revision=revision, endpoint=hub.endpoint)
    assert caught.value.response.headers["X-Error-Code"] == code
    assert caught.value.response.status_code == 404
    if name == "a.txt":
        with pytest.raises(error):
            HfApi(endpoint=hub.endpoint).model_info(repo_id, revision=revision)
        with pytest.raises(error):
            snapshot_download(repo_id, revision=revision, endpoint=hub.endpoint)


def test_changes_are_seen_at_once(hub: HubServer, api: HfApi) -> None:
    folder = put(hub, "models/acme/tiny", {"a.txt": "0"})
    stamp, seen = time.time_ns(), set()
    for number in range(3):
        (folder / "a.txt").write_text(str(number))
        os.utime(folder / "a.txt", ns=(stamp, stamp))  # as on a file system with coarse time stamps
        seen.add(api.model_info("acme/tiny").sha)
    assert len(seen) == 3


def test_load_dataset(hub: HubServer, tmp_path: Path) -> None:
    tables = put(hub, "datasets/acme/tables", {"README.md": TABLES_CARD})
    (tables / "first").mkdir()
    for name, values in (
        ("first/train-0", [1, 2]),
        ("first/train-1", [3]),
        ("first/test-0", [4]),
        ("second", [5]),
    ):
        pq.write_table(pa.table({"x": values}), tables / f"{name}.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in "abc")
    put(hub, "datasets/acme/lines", {"README.md": LINES_CARD, "lines/a.jsonl": lines})
    put(hub, "datasets/acme/lines@v1", {"train.jsonl": '{"text": "older"}\n'})
    assert run(LOAD_DATA, hub, tmp_path / "home") == {
        "configs": ["first", "second"],
        "train": [1, 2, 3],
        "test": [4],
        "second": [5],
        "streamed": [1, 2, 3],
        "lines": ["a", "b"],
        "older": ["older"],
    }


def test_transformers_from_pretrained(hub: HubServer, tmp_path: Path) -> None:
    found = run(MAKE_AND_LOAD_MODEL, hub, tmp_path / "home", str(hub.root / "models/acme/llama"))
    assert found == {"tokens": [2, 3, 2], "same": True, "layers": 2}
    assert any(request.endswith("/model.safetensors") for request in hub.requests)
