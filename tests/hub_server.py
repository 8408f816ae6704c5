"""A local HTTP server that speaks enough of the Hugging Face Hub's API to test the real clients offline.

Repositories are plain folders, ``root/{models,datasets}/<owner>/<name>/``; any branch or tag besides ``main``
is a folder ``<name>@<revision>`` beside it (percent-encoded). A commit's identifier is a hash of the content;
commits stay available once served. Contents are kept in memory. Xet is not spoken: clients that upload need
``HF_HUB_DISABLE_XET=1``, which :func:`hub_env` sets.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = {".arrow", ".bin", ".gguf", ".h5", ".onnx", ".parquet", ".pt", ".safetensors", ".zip"}
RACY_NS = 100_000_000  # a file written this recently may change again without its time stamp showing it
Json = dict[str, Any]


class HubError(Exception):
    """An error answer, made from its status, the value of ``X-Error-Code`` (may be empty) and a message."""


class Blob:
    """One file's content, with the identifiers that git and LFS give it."""

    def __init__(self, name: str, data: bytes) -> None:
        self.data, self.size = data, len(data)
        self.oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.sha256 = hashlib.sha256(data).hexdigest()
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 134}
        self.lfs = lfs if is_lfs(name, self.size) else None
        self.etag = self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """The content of a repository at one moment."""

    sha: str
    files: dict[str, Blob]

    def tree(self, path: str = "", recursive: bool = True) -> list[Json]:
        """Lists the files and folders below ``path``."""
        prefix = f"{path}/" if path else ""
        files = {name: blob for name, blob in self.files.items() if name.startswith(prefix)}
        if path and not files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {self.sha}")
        folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
        found: list[Json] = [{"type": "directory", "path": name, "oid": self.sha} for name in folders]
        for name, blob in files.items():
            found.append({"type": "file", "path": name, "oid": blob.oid, "size": blob.size, "lfs": blob.lfs})
        found = [entry for entry in found if entry["path"].startswith(prefix)]
        return [entry for entry in found if recursive or "/" not in entry["path"][len(prefix) :]]


class Store:
    """The repositories under a root folder, and the commits and LFS objects seen so far."""

    def __init__(self, root: Path) -> None:
        self.root, self.lock = root, threading.RLock()
        self.lfs: dict[str, bytes] = {}
        self._known: dict[tuple[Path, int, int], Blob] = {}
        self._history: dict[tuple[str, str, str], Commit] = {}

    def folder(self, kind: str, repo_id: str, revision: str = "main") -> Path:
        """Returns the folder of a branch or tag, which need not exist."""
        return self.root / kind / (repo_id if revision == "main" else f"{repo_id}@{quote(revision, safe='')}")

    def commit(self, kind: str, repo_id: str, revision: str = "main") -> Commit:
        """Returns the commit that a branch, tag or commit identifier names."""
        if not self.folder(kind, repo_id).is_dir():
            raise HubError(404, "RepoNotFound", f"Repository {kind}/{repo_id} not found")
        folder = self.folder(kind, repo_id, revision)
        if known := self._history.get((kind, repo_id, revision)):
            return known
        if not folder.is_dir():
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        files = {name: self._blob(name, paths[name]) for name in sorted(paths)}
        lines = [f"{kind}/{repo_id}", *(f"{blob.oid} {name}" for name, blob in files.items())]
        sha = hashlib.sha1("\n".join(lines).encode()).hexdigest()
        return self._history.setdefault((kind, repo_id, sha), Commit(sha, files))

    def _blob(self, name: str, path: Path) -> Blob:
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        blob = self._known.get(key) or Blob(name, path.read_bytes())
        if time.time_ns() - stat.st_mtime_ns > RACY_NS:
            self._known[key] = blob
        self.lfs[blob.sha256] = blob.data
        return blob

    def apply(self, kind: str, repo_id: str, revision: str, lines: Iterable[Json]) -> str:
        """Makes a commit from the decoded lines of the client's NDJSON and returns its identifier."""
        old = self.commit(kind, repo_id, revision)
        new = {name: blob.data for name, blob in old.files.items()}
        for key, value in ((line["key"], line["value"]) for line in lines):
            path = value.get("path", "").rstrip("/")
            if ".." in Path(path).parts or path.startswith("/"):
                raise HubError(400, "", f"Invalid path {path!r}")
            if key == "header" and not old.sha.startswith(value.get("parentCommit") or ""):
                raise HubError(412, "", "A commit has happened since")
            if key == "file":
                new[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, "", f"The LFS object of {path!r} was not uploaded")
                new[path] = self.lfs[value["oid"]]
            elif key != "header":
                new = {name: data for name, data in new.items() if not f"{name}/".startswith(f"{path}/")}
        folder = self.folder(kind, repo_id, revision)
        for name in old.files.keys() - new.keys():
            (folder / name).unlink()
        for name, data in new.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return self.commit(kind, repo_id, revision).sha

    def describe(self, kind: str, repo_id: str, revision: str = "main") -> Json:
        """Returns what the Hub's API says about a repository; its tags come from the README's metadata."""
        commit = self.commit(kind, repo_id, revision)
        card = read_card(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
        tags = {Path(name).suffix[1:] for name in commit.files} & {"gguf", "safetensors"}
        for key in ("tags", "language", "pipeline_tag", "library_name", "license", "base_model", "datasets"):
            values = card.get(key) or []
            prefix = f"{key.removesuffix('s')}:" if key in ("license", "base_model", "datasets") else ""
            tags |= {f"{prefix}{value}" for value in (values if isinstance(values, list) else [values])}
        facts = {key: card.get(key) for key in ("pipeline_tag", "library_name")}
        facts |= {"id": repo_id, "author": repo_id.partition("/")[0], "sha": commit.sha, "private": False}
        changed = time.gmtime(self.folder(kind, repo_id).stat().st_mtime)
        facts |= {"tags": sorted(tags), "lastModified": time.strftime("%Y-%m-%dT%H:%M:%SZ", changed)}
        files = commit.files.items()
        siblings = [{"rfilename": n, "size": b.size, "blobId": b.oid, "lfs": b.lfs} for n, b in files]
        return facts | {"cardData": card, "siblings": siblings}


def is_lfs(path: str, size: int) -> bool:
    """Tells whether the Hub would keep a file in LFS."""
    return size > 10_000_000 or Path(path).suffix in LFS_SUFFIXES


def read_card(text: str) -> Json:
    """Returns the YAML metadata at the head of a README (empty if there is none)."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        return (yaml.safe_load(match[1]) if match else None) or {}
    except yaml.YAMLError as error:
        raise HubError(400, "", f"Invalid metadata: {error}".replace("\n", " ")) from error


class Handler(BaseHTTPRequestHandler):
    """Answers one request (in HTTP/1.0, so that no connection outlives the server)."""

    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {url.path}")
        self.status, self.extra = 200, dict[str, str]()
        try:
            for repo_id, refusal in self.server.refused.items():
                if f"/{repo_id}/" in f"{url.path}/":
                    raise HubError(*refusal)
            with self.server.store.lock:
                answer = self._answer(parts, body)
        except HubError as error:
            self.status, code, message = error.args
            self.extra |= {"X-Error-Code": code, "X-Error-Message": message}
            answer = {"error": message, "errors": [{"message": message}]}
        content = answer if isinstance(answer, bytes) else json.dumps(answer, default=str).encode()
        self.send_response(self.status)
        for name, value in ({"Content-Length": str(len(content))} | self.extra).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _answer(self, parts: list[str], body: bytes) -> Any:
        answer: Any = b""
        match (self.command, parts):
            case ("GET", ["api", "models" | "datasets" as kind]):
                answer = self._list_repos(kind)
            case (_, ["api", "models" | "datasets" as kind, owner, name, *rest]):
                answer = self._repo_api(kind, f"{owner}/{name}", rest or ["revision", "main"], body)
            case ("POST", ["api", "repos", "create"]):
                answer = self._create_repo(json.loads(body))
            case ("POST", ["api", "validate-yaml"]):
                answer = {"valid": read_card(json.loads(body)["content"])}
            case ("POST", [*_, "info", "lfs", "objects", "batch"]):
                answer = self._lfs_batch(json.loads(body)["objects"])
            case ("PUT", ["lfs", oid]) if hashlib.sha256(body).hexdigest() == oid:
                self.server.store.lfs[oid] = body
            case ("GET" | "HEAD", ["datasets", owner, name, "resolve", revision, *path]):
                answer = self._resolve("datasets", f"{owner}/{name}", revision, "/".join(path))
            case ("GET" | "HEAD", [owner, name, "resolve", revision, *path]):
                answer = self._resolve("models", f"{owner}/{name}", revision, "/".join(path))
            case _:
                raise HubError(404, "", f"The test server has no answer to {self.command} {self.path}")
        return answer

    def _create_branch(self, start: Commit, folder: Path) -> Json:
        self.status = 409 if folder.exists() else 200
        if self.status == 200:
            for name, blob in start.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(blob.data)
        return {}

    def _repo_api(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> Any:
        store, query = self.server.store, urlsplit(self.path).query
        match (self.command, rest):
            case ("GET", ["revision", revision]):
                return store.describe(kind, repo_id, revision)
            case ("GET", ["tree", revision, *path]):
                return store.commit(kind, repo_id, revision).tree("/".join(path), "recursive=true" in query)
            case ("POST", ["paths-info", revision]):
                wanted = {path.strip("/") for path in parse_qs(body.decode())["paths"]}
                return [e for e in store.commit(kind, repo_id, revision).tree() if e["path"] in wanted]
            case ("POST", ["preupload", revision]):
                return self._preupload(store.commit(kind, repo_id, revision), json.loads(body)["files"])
            case ("POST", ["branch", branch]):
                return self._create_branch(store.commit(kind, repo_id), store.folder(kind, repo_id, branch))
            case ("POST", ["commit", revision]) if "create_pr" not in query:
                sha = store.apply(kind, repo_id, revision, map(json.loads, body.splitlines()))
                return {"commitOid": sha, "commitUrl": self.server.url(kind, repo_id) + f"/commit/{sha}"}
        raise HubError(404, "", f"The test server has no answer to {self.command} {self.path}")

    def _list_repos(self, kind: str) -> list[Json]:
        store, query = self.server.store, parse_qs(urlsplit(self.path).query)
        folders = sorted(path for path in store.root.glob(f"{kind}/*/*") if "@" not in path.name)
        infos = [store.describe(kind, f"{path.parent.name}/{path.name}") for path in folders]
        infos = [info | {"downloads": self.server.downloads.get(info["id"], 0)} for info in infos]
        if query.get("sort") == ["downloads"]:
            infos.sort(key=lambda info: -info["downloads"])
        infos = [info for info in infos if info["author"] in query.get("author", [info["author"]])]
        return [info for info in infos if set(query.get("filter", [])) <= set(info["tags"])]

    def _create_repo(self, wanted: Json) -> Json:
        kind, repo_id = f"{wanted.get('type') or 'model'}s", f"{wanted['organization']}/{wanted['name']}"
        folder = self.server.store.folder(kind, repo_id)
        if repo_id in self.server.refused:
            raise HubError(*self.server.refused[repo_id])
        self.status = 409 if folder.exists() else 200
        folder.mkdir(parents=True, exist_ok=True)
        return {"url": self.server.url(kind, repo_id)}

    def _preupload(self, commit: Commit, files: list[Json]) -> Json:
        for file in files:
            lfs, old = is_lfs(file["path"], file["size"]), commit.files.get(file["path"])
            file |= {"uploadMode": "lfs" if lfs else "regular", "oid": old.etag if old else None}
            file["shouldIgnore"] = False
        return {"files": files}

    def _lfs_batch(self, objects: list[Json]) -> Json:
        for item in objects:
            if item["oid"] not in self.server.store.lfs:
                item["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str) -> bytes:
        commit = self.server.store.commit(kind, repo_id, revision)
        self.extra = {"X-Repo-Commit": commit.sha}
        if (blob := commit.files.get(path)) is None:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        self.extra |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return blob.data
        part = blob.data[int(wanted[1]) : int(wanted[2] or blob.size) + 1]
        spread = f"{wanted[1]}-{int(wanted[1]) + len(part) - 1}" if part else "*"
        self.status, self.extra["Content-Range"] = 206 if part else 416, f"bytes {spread}/{blob.size}"
        return part


class HubServer(ThreadingHTTPServer):
    """Serves the repositories under ``root`` while its ``with`` block lasts.

    Args:
        root: Folder that holds ``models/`` and ``datasets/``; files may be added and changed at any time.

    Attributes:
        requests: The method and path of every request received, oldest first.
        refused: Repositories (``owner/name``) that this client may not have: status, error code and message.
        downloads: What ``list_models`` says of repositories; 0 of others.
    """

    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.store, self.requests = root, Store(root), list[str]()
        self.refused, self.downloads = dict[str, tuple[int, str, str]](), dict[str, int]()

    @property
    def endpoint(self) -> str:
        """The address to give the clients, such as ``http://127.0.0.1:43210``."""
        return f"http://127.0.0.1:{self.server_port}"

    def url(self, kind: str, repo_id: str) -> str:
        """Returns the address of a repository."""
        return f"{self.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()


def hub_env(server: HubServer, home: Path) -> dict[str, str]:
    """Returns the whole environment for a subprocess whose Hugging Face clients should use ``server``.

    Args:
        server: The running server.
        home: Folder for the clients' caches (``HF_HOME``).
    """
    ours = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    ours |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    ours |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("TELEMETRY", "XET", "PROGRESS_BARS", "UPDATE_CHECK")}
    foreign = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
    return {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | ours
