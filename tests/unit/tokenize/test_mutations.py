"""Defects of a tokenizer's files: each is a ModelLoadError of one sentence, or the tokenizer works.

By hand, for longer: `python -m tests.unit.tokenize.test_mutations 20000`.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from nexusengine.errors import InvalidRequest, ModelLoadError
from nexusengine.tokenize.load import gguf_tokenizer, json_tokenizer

pytestmark = pytest.mark.slow

VALUES: list[Any] = [
    None,
    {},
    [],
    "",
    "x",
    "<s>",
    "\ud800",
    0,
    -1,
    7,
    1 << 40,
    1.5,
    True,
    [1],
    ["a", "b"],
    {"content": 3},
]
NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>", "pad_token": None}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def byte_fallback() -> Any:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a", "<0x0A>", "<0xF0>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("a", "b"), ("\u2581", "a")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(tokenizer.to_str())


def byte_level() -> Any:
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {
        "<s>": 256,
        "</s>": 257,
    }
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return json.loads(tokenizer.to_str())


def files() -> dict[str, Any]:
    settings = {**NAMES, "chat_template": [{"name": "default", "template": TEMPLATE}], "add_bos_token": True}
    return {"tokenizer_config.json": settings, "special_tokens_map.json": NAMES}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated(rng: random.Random, value: Any) -> bytes:
    """A JSON text with one or two defects, in its values or in its bytes."""
    value = copy.deepcopy(value)
    if rng.random() < 0.8:
        for _ in range(rng.randint(1, 2)):
            container, key = rng.choice(list(places(value)) or [([None], 0)])
            if rng.random() < 0.3:
                del container[key]
            else:
                container[key] = copy.deepcopy(rng.choice(VALUES))
        return json.dumps(value).encode()
    data = bytearray(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    kind, at = rng.randrange(3), rng.randrange(len(data))
    if kind == 0:
        return bytes(data[:at])
    data[at : at + kind - 1] = bytes([rng.randrange(256)])
    return bytes(data)


def check(load: Any) -> bool:
    """Whether the tokenizer loads; then it has to work."""
    try:
        tokenizer = load()
    except ModelLoadError as error:
        told = error.message
    else:
        told = ""
    if told:
        assert "\n" not in told
        return False
    try:
        ids = tokenizer.encode("ab a\n\U0001f999 x<s>")
        tokenizer.decode(ids)
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    except InvalidRequest:  # by the template
        pass
    return True


def run(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """(those that load, those refused)."""
    rng, loaded = random.Random(seed), 0
    for _ in range(count):
        contents = {**files(), "tokenizer.json": rng.choice([byte_fallback, byte_level])()}
        victim = rng.choice(["tokenizer.json", "tokenizer.json", *contents])
        for name, value in contents.items():
            data = mutated(rng, value) if name == victim else json.dumps(value).encode()
            (folder / name).write_bytes(data)
        loaded += check(lambda: json_tokenizer(folder, None, (2,)))
    return loaded, count - loaded


def test_defects_of_tokenizer_files_are_told_in_one_sentence(tmp_path: Path) -> None:
    loaded, refused = run(tmp_path, 1, 300)
    assert loaded > 50
    assert refused > 50


def test_defects_of_gguf_metadata_are_told_in_one_sentence() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe: dict[str, Any] = {"model": "gpt2", "pre": "qwen2", "tokens": [*alphabet, "ab", "<s>"], "merges": ["a b"]}
    bpe |= {"token_type": [1] * 257 + [3], "bos_token_id": 257, "eos_token_id": 257, "add_bos_token": True}
    spm: dict[str, Any] = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "<0x0A>"]}
    spm |= {"token_type": [2, 3, 3, 1, 1, 1, 1, 6], "scores": [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, 0.0]}
    rng, loaded = random.Random(2), 0
    for _ in range(300):
        values: Any = copy.deepcopy(rng.choice([bpe, spm]))
        for _ in range(rng.randint(1, 2)):
            container, key = rng.choice(list(places(values)) if rng.random() < 0.5 else [(values, k) for k in values])
            container[key] = copy.deepcopy(rng.choice([v for v in VALUES if v != "\ud800"]))
        metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
        loaded += check_gguf(metadata)
    assert 10 < loaded < 290


def check_gguf(metadata: dict[str, Any]) -> bool:
    return check(lambda: gguf_tokenizer({**metadata, "tokenizer.chat_template": TEMPLATE}, "m.gguf"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", '{"bos_token": {}}', "bos_token is {}"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5"),
        ("tokenizer_config.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is 5"),
        ("tokenizer_config.json", '{"chat_template": [5, {"name": "default"}, {"name": []}]}', "holds 5"),
        ("special_tokens_map.json", '{"unk_token": ["<unk>"]}', "unk_token is"),
        ("special_tokens_map.json", "\xff", "is not valid JSON"),
        ("chat_template.jinja", "\xff", "is not valid UTF-8 at byte 0"),
    ],
)
def test_a_defect_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_fallback()))
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelLoadError, match=words):
        json_tokenizer(tmp_path, None, ())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print("loaded, refused:", run(Path(folder), 3, int(sys.argv[1])))
