"""Downloading, against a small stand-in of the hub on this machine; each case in a process of its own, because the hub
library reads its settings when it is imported."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c" * 40
FILES = {
    "config.json": json.dumps(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 9,
            "max_position_embeddings": 64,
        }
    ).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}" + bytes(200_000),
    "pytorch_model.bin": b"never fetched",
    "code.py": b"never fetched",
    "original/consolidated.safetensors": b"never fetched",
}


class Hub(BaseHTTPRequestHandler):
    """org/model is public; org/gated needs the token "good"; everything else does not exist."""

    fetched: list[str]

    def log_message(self, *args: object) -> None:
        """Silence."""

    def _reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models")
        repository = "/".join(path.strip("/").split("/")[:2])
        if repository == "org/gated" and self.headers.get("Authorization") != "Bearer good":
            return self._reply(401, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
        if repository not in ("org/model", "org/gated"):
            return self._reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="not found")
        rest = path.split(repository, 1)[1]
        if rest.startswith("/tree/") or "recursive" in self.path:
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES.items()]
            return self._reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        if rest.startswith("/resolve/"):
            _, _, _, name = rest.split("/", 3)
            content = FILES[name]
            if self.command == "GET":
                self.fetched.append(name)
            etag = hashlib.sha256(content).hexdigest()
            return self._reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Content_Type="x/y")
        if rest.startswith("/revision/") and not rest.endswith(("/main", COMMIT)):
            return self._reply(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="no revision")
        siblings = [{"rfilename": n, "size": len(c)} for n, c in FILES.items()]
        info = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "private": False}
        return self._reply(200, json.dumps(info).encode(), Content_Type="application/json")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """(its URL, the names of the files fetched from it)."""
    fetched: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"fetched": fetched}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", fetched
    server.shutdown()


def resolve(home: Path, endpoint: str, ref: str, **environ: str) -> tuple[str, str]:
    """What resolve_model says of `ref`: (kind and files, "") or ("", the error's message); progress is checked."""
    revision = environ.pop("revision", None)
    code = f"""
from nexusengine.loading.resolve import resolve_model
from nexusengine.errors import ModelLoadError
seen = []
try:
    files = resolve_model({ref!r}, revision={revision!r}, progress=lambda p, f: seen.append((p, f)))
    print("OK", files.kind, *sorted(p.name for p in files.path.rglob("*") if p.is_file()), "PROGRESS", seen[-1])
except ModelLoadError as error:
    print("ERROR", error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **environ},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("OK", "ERROR"))]
    assert len(lines) == 1, done.stdout + done.stderr
    kind, _, rest = lines[0].partition(" ")
    return (rest, "") if kind == "OK" else ("", rest)


def test_weights_configuration_and_tokenizer_are_downloaded_and_nothing_else(
    tmp_path: Path, hub: tuple[str, list[str]]
) -> None:
    url, fetched = hub
    found, error = resolve(tmp_path, url, "org/model")
    assert error == ""
    assert "safetensors config.json model.safetensors tokenizer.json" in found
    assert "('downloading org/model', 1.0)" in found
    assert sorted(set(fetched)) == ["config.json", "model.safetensors", "tokenizer.json"]
    again, error = resolve(tmp_path, url, "org/model", HF_HUB_OFFLINE="1")
    assert (error, again.startswith("safetensors")) == ("", True)


@pytest.mark.parametrize(
    ("ref", "environ", "words"),
    [
        ("org/gated", {}, ["org/gated", "licence", "HF_TOKEN"]),
        ("org/nothing", {}, ["no repository org/nothing", "HF_TOKEN"]),
        ("org/model", {"revision": "v9"}, ["org/model", "no revision 'v9'"]),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, ["org/model", "cannot be reached", "local directory"]),
    ],
)
def test_what_cannot_be_downloaded_is_one_sentence_that_says_what_to_do(
    tmp_path: Path, hub: tuple[str, list[str]], ref: str, environ: dict[str, str], words: list[str]
) -> None:
    found, error = resolve(tmp_path, hub[0], ref, **environ)
    assert found == ""
    assert "\n" not in error
    for word in words:
        assert word in error


def test_an_accepted_licence_and_a_token_open_a_gated_repository(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    found, error = resolve(tmp_path, hub[0], "org/gated", HF_TOKEN="good")
    assert (error, found.startswith("safetensors")) == ("", True)


def test_a_hub_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    found, error = resolve(tmp_path, "http://127.0.0.1:9", "org/model")
    assert found == ""
    assert "org/model" in error
    assert "cannot be reached" in error
