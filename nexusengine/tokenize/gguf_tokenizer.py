"""A tokenizer rebuilt from the vocabulary, merges and pre-tokenizer name in GGUF metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nexusengine.errors import ModelLoadError

_SPECIAL, _USER_DEFINED = 3, 4
_LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "default": _byte_level,
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _split(_LLAMA3_SPLIT),
    "llama3": lambda: _split(_LLAMA3_SPLIT),
    "qwen2": lambda: _split(_QWEN2_SPLIT),
}


def build(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """Raises ModelLoadError naming what is missing or not supported."""

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise ModelLoadError(f"{path}: tokenizer.ggml.{key} is missing")
        return value

    model = get("model")
    if model != "gpt2":
        raise ModelLoadError(
            f"{path}: tokenizer model {model!r} is not supported in GGUF; known: gpt2 (byte-level BPE)"
        )
    pre = get("pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ModelLoadError(f"{path}: pre-tokenizer {pre!r} is not supported; known: {', '.join(_PRE_TOKENIZERS)}")
    tokens, merges = get("tokens"), get("merges")
    types = get("token_type", [1] * len(tokens))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if len(types) != len(tokens) or any(len(pair) != 2 for pair in pairs):
        raise ModelLoadError(f"{path}: the tokenizer's token types or merges are malformed")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in ("llama-bpe", "llama3")))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelLoadError(f"{path}: the tokenizer's vocabulary and merges do not agree: {error}") from None
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _SPECIAL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED]
    )
    return tokenizer
