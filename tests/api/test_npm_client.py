"""OpenAI's JavaScript client against the server, unchanged."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.api.conftest import MODEL, FakeTokenizer, Running
from tests.support.fakes import continuation

PACKAGE = "openai@6"
SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const body = { model: "fake", messages, temperature: 0, max_tokens: 7 };
const reply = await client.chat.completions.create(body);
const stream = await client.chat.completions.create({ ...body, stream: true });
let streamed = "";
for await (const chunk of stream) streamed += chunk.choices[0]?.delta?.content ?? "";
let refused = null;
try { await client.completions.create({ model: "fake", prompt: "x", temperature: -1 }); }
catch (error) { refused = [error.constructor.name, error.status, error.param]; }
const models = (await client.models.list()).data.map((m) => m.id);
console.log(JSON.stringify({ text: reply.choices[0].message.content, streamed, refused, models }));
"""


@pytest.fixture(scope="module")
def node_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {PACKAGE}: {(done.stderr or done.stdout).strip()[-200:]}")
    (folder / "client.js").write_text(SCRIPT)
    return folder


def test_the_javascript_client_chats_streams_and_sees_errors(
    start_server: Callable[..., Running], node_project: Path
) -> None:
    server = start_server(real_s=0.1, sse_keepalive=0.02)  # its streams hold comments
    command = ["node", "client.js", f"{server.url}/v1"]
    done = subprocess.run(command, cwd=node_project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    tokenizer = FakeTokenizer()
    answer = tokenizer.decode(continuation(tokenizer.encode("user: hi\n"), 7))
    assert json.loads(done.stdout) == {
        "text": answer,
        "streamed": answer,
        "refused": ["BadRequestError", 400, "temperature"],
        "models": [MODEL],
    }
