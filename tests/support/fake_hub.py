"""A stand-in of the Hugging Face hub on 127.0.0.1: repositories of a few files, and the ways in which a hub fails."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
    "max_position_embeddings": 64,
}


@dataclass
class Repositories:
    """What the hub serves, and what happened to it.

    files: of org/model (org/gated is the same behind the token "good"). fault: how every request is answered, or
    requests for file `of` alone: a status ("429"), "html", "reset" (no answer), "cut" (after `cut_at` bytes, each
    time), "cut once". fetched: (file, its Range header or "") of every GET of a file.
    """

    files: dict[str, bytes]
    fault: str = ""
    of: str = ""
    cut_at: int = 50_000
    fetched: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The files that were fetched, each once."""
        return sorted({name for name, _ in self.fetched})


class _Handler(BaseHTTPRequestHandler):
    state: Repositories
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Silence."""

    def _reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        size = str(len(body) if length is None else length)
        for name, value in {"Content-Length": size, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, fault: str) -> None:
        if fault == "html":
            self._reply(200, b"<!DOCTYPE html><p>Please log in", Content_Type="text/html")
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        else:
            self._reply(int(fault), b"{}", Retry_After="0", Content_Type="application/json")

    def do_GET(self) -> None:
        state = self.state
        path = self.path.split("?")[0].removeprefix("/api/models")
        repository = "/".join(path.strip("/").split("/")[:2])
        if state.fault and not state.of and not state.fault.startswith("cut"):
            return self._fail(state.fault)
        if repository == "org/gated" and self.headers.get("Authorization") != "Bearer good":
            return self._reply(401, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
        if repository not in ("org/model", "org/gated"):
            return self._reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="not found")
        rest = path.split(repository, 1)[1]
        if rest.startswith("/tree/") or "recursive" in self.path:
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in state.files.items()]
            return self._reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        if rest.startswith("/resolve/"):
            return self._file(rest.split("/", 3)[3])
        if rest.startswith("/revision/") and not rest.endswith(("/main", COMMIT)):
            return self._reply(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="no revision")
        siblings = [{"rfilename": n, "size": len(c)} for n, c in state.files.items()]
        info = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "private": False}
        return self._reply(200, json.dumps(info).encode(), Content_Type="application/json")

    def _file(self, name: str) -> None:
        state, content = self.state, self.state.files[name]
        about = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": COMMIT, "Content_Type": "x/y"}
        if self.command == "HEAD":
            return self._reply(200, b"", len(content), **about)
        wanted = self.headers.get("Range", "")
        state.fetched.append((name, wanted))
        if state.fault and state.of == name and not state.fault.startswith("cut"):
            return self._fail(state.fault)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        body, status = content[start:], 206 if wanted else 200
        if wanted:
            about["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if state.of == name and (state.fault == "cut" or (state.fault == "cut once" and not start)):
            self._reply(status, body[: state.cut_at], len(body), **about)
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        return self._reply(status, body, None, **about)

    do_HEAD = do_GET


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[tuple[str, Repositories]]:
    """(its URL, what it serves)."""
    state = Repositories(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        server.shutdown()
        server.server_close()
