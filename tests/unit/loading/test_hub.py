"""Downloading, against a stand-in of the hub on this machine.

Each case is in a process of its own, because the hub library reads its settings when it is imported, and without httpx,
which a plain install does not bring.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.fake_hub import CONFIG, Repositories, hub

WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS + bytes(200_000),
    "pytorch_model.bin": b"never fetched",
    "code.py": b"never fetched",
    "original/consolidated.safetensors": b"never fetched",
    "consolidated.safetensors": b"never fetched",
    "model.fp16.safetensors": b"never fetched",
    "adapter_model.safetensors": b"never fetched",
    "model-Q4_K_M.gguf": b"never fetched",
}
SHARDS = {f"model-0000{i}-of-00002.safetensors": WEIGHTS + bytes(i) for i in (1, 2)}
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
SHARDED = {
    **{name: content for name, content in FILES.items() if name != "model.safetensors"},
    **SHARDS,
    "model-00003-of-00003.safetensors": b"never fetched",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}


@pytest.fixture
def served() -> Iterator[tuple[str, Repositories]]:
    with hub(dict(FILES)) as found:
        yield found


def resolve(home: Path, endpoint: str, ref: str, limit: int = 0, **environ: str) -> tuple[str, str]:
    """What resolve_model says of `ref`: (kind, files and last progress, "") or ("", the error's message).

    limit: the size in bytes above which a file cannot grow, as on a full disk.
    """
    revision = environ.pop("revision", None)
    code = f"""
import resource, sys
sys.modules["httpx"] = None  # an import of it fails
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from nexusengine.loading.resolve import resolve_model
from nexusengine.errors import ModelLoadError
seen = []
try:
    files = resolve_model({ref!r}, revision={revision!r}, progress=lambda p, f: seen.append((p, f)))
    names = sorted(p.name for p in (files.path if files.path.is_dir() else files.path.parent).rglob("*") if p.is_file())
    print("OK", files.kind, *names, "FIRST", files.path.name, "PROGRESS", seen[-1])
except ModelLoadError as error:
    print("ERROR", repr(error.message))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            **environ,
        },
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("OK", "ERROR"))]
    assert len(lines) == 1, done.stdout + done.stderr
    kind, _, rest = lines[0].partition(" ")
    return (rest, "") if kind == "OK" else ("", rest)


def test_weights_configuration_and_tokenizer_are_downloaded_and_nothing_else(
    tmp_path: Path, served: tuple[str, Repositories]
) -> None:
    url, state = served
    found, error = resolve(tmp_path, url, "org/model")
    assert error == ""
    assert "safetensors config.json model.safetensors tokenizer.json FIRST" in found
    assert "('downloading org/model', 1.0)" in found
    assert state.names == ["config.json", "model.safetensors", "tokenizer.json"]
    again, error = resolve(tmp_path, url, "org/model", HF_HUB_OFFLINE="1")
    assert (error, again.startswith("safetensors")) == ("", True)


def test_further_chat_templates_are_downloaded_and_no_other_folder(tmp_path: Path) -> None:
    others = {"onnx/config.json": b"{}", "onnx/x.jinja": b"", "additional_chat_templates/notes.md": b""}
    with hub({**FILES, "additional_chat_templates/tool_use.jinja": b"x", **others}) as (url, state):
        found, error = resolve(tmp_path, url, "org/model")
        again, _ = resolve(tmp_path, url, "org/model", HF_HUB_OFFLINE="1")
    assert error == ""
    assert "tool_use.jinja" in found
    assert "tool_use.jinja" in again
    assert not {*others} & {*state.names}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", json.dumps({**CONFIG, "architectures": ["OtherForCausalLM"]}).encode(), "OtherForCausalLM"),
        ("tokenizer.json", None, "has no tokenizer.json"),
    ],
)
def test_weights_of_a_model_that_cannot_be_served_are_not_downloaded(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    files = {other: kept for other, kept in {**FILES, name: content}.items() if kept is not None}
    with hub(files) as (url, state):
        _, error = resolve(tmp_path, url, "org/model")
    assert reason in error
    assert "model.safetensors" not in state.names


def test_of_a_sharded_checkpoint_exactly_the_files_of_its_index_are_downloaded(tmp_path: Path) -> None:
    with hub(SHARDED) as (url, state):
        found, error = resolve(tmp_path, url, "org/model")
        assert (error, found.split()[0]) == ("", "safetensors")
        small = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
        assert state.names == sorted([*SHARDS, *small])
        assert [name for name, _ in state.fetched].count("model-00001-of-00002.safetensors") == 1
        again, error = resolve(tmp_path, url, "org/model", HF_HUB_OFFLINE="1")
        assert (error, again.startswith("safetensors")) == ("", True)


def test_of_a_whole_file_and_a_stale_index_the_file_is_taken(tmp_path: Path) -> None:
    with hub(FILES | {"model.safetensors.index.json": json.dumps(INDEX).encode()}) as (url, state):
        assert resolve(tmp_path, url, "org/model")[1] == ""
        assert [name for name in state.names if name.endswith(".safetensors")] == ["model.safetensors"]


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../x.safetensors"}}
    with hub(SHARDED | {"model.safetensors.index.json": json.dumps(index).encode()}) as (url, state):
        assert "not a safetensors file beside the index" in resolve(tmp_path, url, "org/model")[1]
        assert not [name for name in state.names if name.endswith(".safetensors")]


def test_weights_in_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    files = {name: FILES[name] for name in ("config.json", "pytorch_model.bin", "consolidated.safetensors")}
    with hub(files) as (url, state):
        found, error = resolve(tmp_path, url, "org/model")
        assert found == ""
        assert "neither model.safetensors nor" in error
        assert "consolidated.safetensors, pytorch_model.bin" in error
        assert state.names == ["config.json"]


@pytest.mark.parametrize(
    ("ref", "environ", "words"),
    [
        ("org/gated", {}, ["org/gated", "licence", "HF_TOKEN"]),
        ("org/nothing", {}, ["no repository org/nothing", "HF_TOKEN"]),
        ("org/-.-", {}, ["org/-.-", "OWNER/NAME"]),
        ("org/model", {"revision": "v9"}, ["org/model", "no revision 'v9'"]),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, ["org/model", "cannot be reached", "local directory"]),
    ],
)
def test_what_cannot_be_downloaded_is_one_sentence_that_says_what_to_do(
    tmp_path: Path, served: tuple[str, Repositories], ref: str, environ: dict[str, str], words: list[str]
) -> None:
    found, error = resolve(tmp_path, served[0], ref, 0, **environ)
    assert found == ""
    assert "\n" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("fault", "of", "words"),
    [
        ("html", "", "login page"),
        ("reset", "", "downloading org/model failed|cannot be reached"),
        ("429", "", "too many requests .*429.*try again after 0 s"),
        ("503", "", "internal error .*503.*later"),
        ("403", "", "HF_TOKEN is missing, wrong or expired"),
        ("404", "", "404|no repository"),
        ("reset", "model.safetensors", "downloading org/model failed.*files that arrived whole are kept"),
        ("html", "model.safetensors", "downloading org/model failed"),
        ("500", "model.safetensors", "internal error .*500"),
    ],
)
def test_a_hub_that_fails_is_one_sentence(
    tmp_path: Path, served: tuple[str, Repositories], fault: str, of: str, words: str
) -> None:
    served[1].fault, served[1].of = fault, of
    found, error = resolve(tmp_path, served[0], "org/model")
    assert found == ""
    assert "\n" not in error
    assert re.search(words, error), error


def test_a_download_that_is_cut_goes_on_where_it_was(tmp_path: Path, served: tuple[str, Repositories]) -> None:
    """The hub library writes 10 MiB at a time; what came after that is fetched again."""
    url, state = served
    state.fault, state.of, state.cut_at = "cut once", "model.safetensors", 15 * 2**20
    state.files["model.safetensors"] = WEIGHTS + bytes(range(256)) * (24 * 2**12)
    found, error = resolve(tmp_path, url, "org/model")
    assert (error, found.split()[0]) == ("", "safetensors")
    ranges = [wanted for name, wanted in state.fetched if name == "model.safetensors"]
    assert ranges[0] == ""
    assert ranges[1:] == [f"bytes={10 * 2**20}-"]
    whole = next(tmp_path.rglob("snapshots/*/model.safetensors")).read_bytes()
    assert whole == state.files["model.safetensors"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, served: tuple[str, Repositories]) -> None:
    found, error = resolve(tmp_path, served[0], "org/model", limit=100_000)
    assert found == ""
    assert "free some space, or set HF_HOME" in error


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, served: tuple[str, Repositories]) -> None:
    (tmp_path / "file").write_text("no folder")
    found, error = resolve(tmp_path / "file" / "home", served[0], "org/model")
    assert found == ""
    assert "set HF_HOME to a folder that can be written" in error


def test_a_download_that_was_cut_is_not_taken_for_whole_where_the_hub_cannot_be_reached(
    tmp_path: Path, served: tuple[str, Repositories]
) -> None:
    served[1].fault, served[1].of = "403", "model.safetensors"
    assert "HF_TOKEN" in resolve(tmp_path, served[0], "org/model")[1]
    found, error = resolve(tmp_path, served[0], "org/model", HF_HUB_OFFLINE="1")
    assert (found, "is not on this machine" in error) == ("", True), error


@pytest.mark.parametrize("fault", ["html", "429", "reset"])
def test_what_is_here_already_is_used_where_the_hub_fails(
    tmp_path: Path, served: tuple[str, Repositories], fault: str
) -> None:
    assert resolve(tmp_path, served[0], "org/model")[1] == ""
    served[1].fault = fault
    found, error = resolve(tmp_path, served[0], "org/model")
    assert (error, found.split()[0]) == ("", "safetensors")


def test_an_accepted_licence_and_a_token_open_a_gated_repository(
    tmp_path: Path, served: tuple[str, Repositories]
) -> None:
    found, error = resolve(tmp_path, served[0], "org/gated", HF_TOKEN="good")
    assert (error, found.startswith("safetensors")) == ("", True)


def test_a_hub_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    found, error = resolve(tmp_path, "http://127.0.0.1:9", "org/model")
    assert found == ""
    assert "org/model" in error
    assert "cannot be reached" in error


def gguf_file(path: Path) -> bytes:
    """A GGUF with a configuration and one tensor."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 8), ("feed_forward_length", 8)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((9, 8), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("ref", "wanted"),
    [
        ("org/model", "m-Q4_K_M.gguf"),
        ("org/model:Q4_K_M", "m-Q4_K_M.gguf"),
        ("org/model:q2_k", "m-Q2_K.gguf"),
        ("org/model:m-Q2_K.gguf", "m-Q2_K.gguf"),
    ],
)
def test_of_a_repository_of_gguf_files_the_one_that_is_meant_is_downloaded(
    tmp_path: Path, ref: str, wanted: str
) -> None:
    content = gguf_file(tmp_path / "x.gguf")
    names = ("m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-f16.gguf")
    with hub(dict.fromkeys(names, content) | {"README.md": b"", "m.py": b""}) as (url, state):
        found, error = resolve(tmp_path / "home", url, ref)
        assert error == ""
        assert f"gguf {wanted} FIRST {wanted}" in found
        assert state.names == [wanted]
        again, error = resolve(tmp_path / "home", url, ref, HF_HUB_OFFLINE="1")
        assert (error, again.split()[1]) == ("", wanted)


@pytest.mark.parametrize(
    ("names", "ref", "words"),
    [
        (["m-Q2_K.gguf", "m-Q8_0.gguf"], "org/model:Q3_K_S", "no GGUF file Q3_K_S; it has Q2_K, Q8_0"),
        (
            ["a-Q2_K.gguf", "b-Q2_K.gguf"],
            "org/model:Q2_K",
            "2 GGUF models of Q2_K: .*name one, as org/model:a-Q2_K.gguf",
        ),
        (["a-Q2_K.gguf", "b-Q3_K.gguf"], "org/model", "2 GGUF models: a-Q2_K.gguf, b-Q3_K.gguf"),
        (["m-Q2_K-00001-of-00002.gguf"], "org/model:Q2_K", "the part m-Q2_K-00002-of-00002.gguf is missing"),
        (["README.md"], "org/model", "no config.json and no .gguf file"),
        (["config.json", "m-Q4_K_M.gguf"], "org/model", "name one by its quantisation: org/model:Q4_K_M"),
    ],
)
def test_a_gguf_file_that_is_not_there_or_not_clear_is_named_with_the_choices(
    tmp_path: Path, names: list[str], ref: str, words: str
) -> None:
    with hub({name: FILES.get(name, b"x") for name in names}) as (url, state):
        found, error = resolve(tmp_path, url, ref)
        assert found == ""
        assert re.search(words, error), error
        assert not [name for name in state.names if name.endswith(".gguf")]
