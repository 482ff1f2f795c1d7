"""The hub, without a network: a cache of its layout on disk, and a small server on this machine.

Everything on our side is the real huggingface_hub; only the far end is ours.
"""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from latentlm_core import hub, workflows
from latentlm_core.errors import ArtifactError
from latentlm_core.files import (
    read_json,
    read_safetensors,
    sha256_file,
    write_json,
    write_safetensors,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"format": "latentlm", "kind": "generator", "classes": ["zero", "one"]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache that huggingface_hub uses."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


def write_export(folder: Path) -> Path:
    for part in (folder, folder / "tokenizer"):
        write_json(part / "config.json", CONFIG)
        write_safetensors(part / "model.safetensors", {"weight": torch.arange(3.0)})
    (folder / "README.md").write_text("# digits\n")
    return folder


def cache_repository(cache: Path, name: str) -> Path:
    """The layout that huggingface_hub gives to a repository that it has fetched."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    return write_export(folder / "snapshots" / REVISION)


# --- names -----------------------------------------------------------------------------------


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    assert hub.is_hub_id("someone/digits")
    assert hub.is_hub_id("hf:runs/digits")
    assert not hub.is_hub_id("runs/digits")
    assert not hub.is_hub_id("runs/digitz"), "a misspelt run must not become a network request"
    for text in ("digits", "a/b/c", "/a/b", "../digits", "a/..", "./digits", "some one/digits", ""):
        assert not hub.is_hub_id(text), text


@pytest.mark.parametrize("name", ["hf:", "hf:digits", "hf:../digits", "hf:a/b/c", "a b/c"])
def test_names_that_are_none_are_refused_before_the_hub_is_asked(name: str) -> None:
    with pytest.raises(ArtifactError, match="such a name is ORG/NAME"):
        hub.download(name)


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_an_export_is_found_in_the_cache_without_a_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    expected = cache_repository(cache, "someone/digits")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    folder = hub.download("hf:someone/digits", offline=how == "argument")
    assert folder.resolve() == expected.resolve()
    assert read_json(folder / "config.json") == CONFIG
    weights = read_safetensors(folder / "tokenizer" / "model.safetensors")
    assert weights["weight"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.usefixtures("cache")
def test_what_is_not_cached_is_one_sentence_with_the_way_out() -> None:
    with pytest.raises(ArtifactError, match=r"someone/letters is not in the hub's local") as caught:
        hub.download("someone/letters", offline=True)
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)


def test_a_repository_without_a_config_is_no_export(cache: Path) -> None:
    (cache_repository(cache, "someone/digits") / "config.json").unlink()
    with pytest.raises(ArtifactError, match="holds no export"):
        hub.download("someone/digits", offline=True)


# --- the server ------------------------------------------------------------------------------


class TinyHub(ThreadingHTTPServer):
    """What of the hub's protocol an upload and a download need.

    Attributes:
        files: of the repository someone/digits, by path; what an upload commits ends up here.
        created: the last request to create a repository.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: TinyHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "forbidden" in self.path or b'"forbidden"' in body:
            self._answer(403, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer(200, {"url": f"{self.server.url}/someone/digits"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self._answer(200, {"files": modes})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            url = f"{self.server.url}/someone/digits/commit/{REVISION}"
            self._answer(200, {"commitUrl": url, "commitOid": REVISION})

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if "gated" in name:
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif "someone/digits" not in name:
            self._answer(401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in name:
            self._send_file(self.server.files[name.partition(f"/resolve/{REVISION}/")[2]])
        elif "/tree/" in name:
            sizes = {path: len(content) for path, content in self.server.files.items()}
            entries = [
                {"type": "file", "path": path, "size": size, "oid": f"{size:040d}"}
                for path, size in sizes.items()
            ]
            self._answer(200, entries)
        else:
            siblings = [{"rfilename": path} for path in self.server.files]
            self._answer(200, {"id": "someone/digits", "sha": REVISION, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self._send(status, content, {"Content-Type": "application/json", **(headers or {})})

    def _send_file(self, content: bytes) -> None:
        self._send(200, content, {"ETag": f'"{len(content):040d}"', "X-Repo-Commit": REVISION})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    with TinyHub() as tiny:
        thread = threading.Thread(target=tiny.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", tiny.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            tiny.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        yield tiny
        tiny.shutdown()
        thread.join()


@pytest.mark.usefixtures("cache")
def test_what_is_pushed_comes_back_as_it_was(server: TinyHub, export: Path) -> None:
    address = hub.upload(export, "hf:someone/digits", private=True)
    assert address == f"{server.url}/someone/digits"
    assert "private" in server.created.values() or server.created["private"]
    assert sorted(server.files) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer/config.json",
        "tokenizer/model.safetensors",
    ]
    server.files["weights.pkl"] = b"of somebody else's making"
    folder = hub.download("someone/digits")
    fetched = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert fetched == {p: c for p, c in server.files.items() if p != "weights.pkl"}


@pytest.mark.usefixtures("cache")
def test_of_a_published_model_weights_and_their_descriptions_are_fetched(server: TinyHub) -> None:
    wanted = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    others = ["modeling.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "vocab.json"]
    server.files = {name: b"x" * length for length, name in enumerate(wanted + others, start=1)}
    folder = hub.download("someone/digits")
    assert sorted(path.name for path in folder.iterdir()) == sorted(wanted)


@pytest.mark.usefixtures("cache", "server")
def test_gated_missing_and_forbidden_are_sentences(export: Path) -> None:
    with pytest.raises(ArtifactError, match="someone/gated is gated") as caught:
        hub.download("someone/gated")
    assert "huggingface.co/someone/gated" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match="no repository someone/nothing"):
        hub.download("someone/nothing")
    with pytest.raises(ArtifactError, match="refuses access to forbidden/digits") as caught:
        hub.upload(export, "forbidden/digits")
    assert "hf auth login" in str(caught.value.hint)


def test_no_network_is_a_sentence(
    cache: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="the hub cannot be reached"):
        hub.download("someone/digits")
    with pytest.raises(ArtifactError, match="cannot be used for someone/digits"):
        hub.upload(export, "someone/digits")


# --- what may travel -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "tokenizer/weights.pkl", "code.py", ".lock"])
@pytest.mark.usefixtures("server")
def test_an_export_with_other_kinds_of_files_is_not_pushed(
    server: TinyHub, export: Path, name: str
) -> None:
    (export / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=f"must not have: {name}"):
        hub.upload(export, "someone/digits")
    assert not server.files


def test_links_do_not_smuggle_files_out(export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (export / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=r"must not have: notes\.md"):
        hub.check_export(export)


def test_a_folder_that_is_no_export_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no export: it has no config\.json"):
        hub.upload(tmp_path, "someone/digits")


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The export of a run whose provenance names folders of this machine."""
    monkeypatch.setenv("LATENTLM_HOME", str(tmp_path))
    folder = write_export(tmp_path / "runs" / "digits" / "export")
    (folder.parent / "metrics.jsonl").touch()
    for part in (folder, folder / "tokenizer"):
        provenance = {"data": "cifar10:/home/me/x", "figures": {"log": ["seen in /home/me/log"]}}
        write_json(part / "config.json", CONFIG | {"provenance": provenance})
    return folder


def test_push_publishes_the_reports_of_these_weights_and_no_path(
    server: TinyHub, run: Path
) -> None:
    sha256 = sha256_file(run / "model.safetensors")
    for name, model, fid in (("fid", sha256, 12.25), ("sweep", "of before", 99.5)):
        report = {"values": {"fid": fid}, "model_sha256": model, "protocol": {"w": "/home/me/w"}}
        write_json(run.parent / "evaluation" / f"{name}.json", report)
    result = workflows.push(model=str(run), repo_id="someone/digits")
    assert result.figures["reports"] == 1
    card = server.files["README.md"].decode()
    assert "12.25" in card
    assert "99.5" not in card
    for name in ("config.json", "tokenizer/config.json"):
        published = json.loads(server.files[name])
        assert published["provenance"] == {"data": "cifar10:x", "figures": {"log": ["seen in log"]}}
        assert published["classes"] == CONFIG["classes"]
    assert not [name for name, content in server.files.items() if b"/home/me" in content]
    assert "/home/me" in (run / "config.json").read_text(), "ours stays as it is"


def test_the_text_tokenizer_of_a_model_travels_with_it(server: TinyHub, run: Path) -> None:
    (run / "text.json").write_text("{}")
    workflows.push(model=str(run), repo_id="someone/digits")
    assert server.files["text.json"] == b"{}"
    assert (hub.download("hf:someone/digits") / "text.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/model.safetensors"])
def test_an_export_without_weights_is_not_pushed(server: TinyHub, run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(ArtifactError, match=r"cannot be published: it has no model\.safetensors"):
        workflows.push(model=str(run), repo_id="someone/digits")
    assert not server.files
