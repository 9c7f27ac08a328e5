"""Small vocabularies of every kind that models are published with, and llama.cpp's as transformers reads them."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "cases" / "tokenizers"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁the", "▁a", "▁c", "a", "A", "w", "or", "ld", "the", "é", "🦙", "\n", "\ufffd", "."]


def _with_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<|end|>", "  日 ")])
    return backend


def sentencepiece(*, strip: bool = True) -> tokenizers.Tokenizer:
    """BPE with byte fallback, as Llama 2 and Mistral; without strip as Gemma."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *WORDS])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return _with_special(backend)


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind, with tokens that are parts of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["the", "Ġthe", "ĠðŁ", "ðŁĺ", "ĢĠa", "Ã©", "Ċ"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *merged]))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_special(backend)


def unigram(decoder: Any) -> tokenizers.Tokenizer:
    scored = [("<unk>", 0.0), *((token, -1.0) for token in WORDS), *((token, -2.0) for token in BYTES)]
    backend = tokenizers.Tokenizer(models.Unigram(scored, 0, byte_fallback=True))
    backend.decoder = decoder
    return _with_special(backend)


def word_piece() -> tokenizers.Tokenizer:
    words = ["<unk>", "the", "##s", "a", "'", "s", ".", "do", "n't", "##n", "é"]
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece()
    return _with_special(backend)


def end_of_word() -> tokenizers.Tokenizer:
    words = ["<unk>", "a", "b</w>", "c</w>", "d", "é</w>"]
    backend = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", end_of_word_suffix="</w>")
    )
    backend.decoder = decoders.BPEDecoder()
    return _with_special(backend)


def without_decoder() -> tokenizers.Tokenizer:
    backend = sentencepiece()
    backend.decoder = None
    return backend


def byte_level_and_more() -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, then strip": byte_level_and_more,
    "byte fallback": sentencepiece,
    "byte fallback without strip": lambda: sentencepiece(strip=False),
    "byte fallback, metaspace": lambda: unigram(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "metaspace": lambda: unigram(decoders.Metaspace()),
    "metaspace, never prepended": lambda: unigram(decoders.Metaspace(prepend_scheme="never")),
    "word piece": word_piece,
    "end of word": end_of_word,
    "no decoder": without_decoder,
}


def published(name: str, folder: Path) -> Any:
    """transformers' tokenizer of one of llama.cpp's vocabularies; skips where there is none."""
    packed = SHARED / f"{name}.gguf.gz"
    if not packed.is_file():
        pytest.skip(f"llama.cpp's vocabulary {name} is not at hand")
    transformers = pytest.importorskip("transformers")
    path = folder / f"{name}.gguf"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)


def random_ids(rng: random.Random, backend: tokenizers.Tokenizer, length: int) -> list[int]:
    """Ids of every sort, with many whole and broken characters made of several tokens."""
    count = backend.get_vocab_size()
    special = [i for t in ("<s>", "</s>", "<unk>", "<|end|>") if (i := backend.token_to_id(t)) is not None]
    pieces = [piece for text in ("😀", "\n", "é", "日本", "a") if (piece := in_bytes(backend, text))]
    ids: list[int] = []
    while len(ids) < length:
        kind = rng.random()
        if kind < 0.3 and pieces:
            ids += rng.choice(pieces)
        elif kind < 0.5 and pieces:
            whole = rng.choice(pieces)
            ids += whole[rng.randrange(len(whole)) :][: rng.randint(1, 2)]
        elif kind < 0.6 and special:
            ids.append(rng.choice(special))
        elif kind < 0.62:
            ids.append(count + rng.randrange(10))  # a model's embedding may have more rows than there are tokens
        else:
            ids.append(rng.randrange(count))
    return ids


def in_bytes(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """One token a byte, if the vocabulary has such tokens."""
    names = [f"<0x{byte:02X}>" for byte in text.encode()]
    if backend.token_to_id(names[0]) is None:
        (written,) = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)]
        names = list("".join(part for part, _ in written))
    ids = [i for name in names if (i := backend.token_to_id(name)) is not None]
    return ids if len(ids) == len(names) else []
