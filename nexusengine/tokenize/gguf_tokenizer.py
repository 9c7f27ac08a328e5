"""A tokenizer of the tokenizers library, rebuilt from the vocabulary in GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nexusengine.tokenize.backend import library_errors
from nexusengine.tokenize.gguf_spm import SPACE, merges_of, never_crosses_words
from nexusengine.tokenize.gguf_vocab import CONTROL, UNKNOWN, USER_DEFINED, Metadata, Vocabulary, read_vocabulary


def build(metadata: Mapping[str, Any], path: Path | str) -> Tokenizer:
    """The tokenizer of a GGUF file, without BOS. Raises ModelLoadError naming what is missing or not supported."""
    return make_backend(read_vocabulary(metadata, path), metadata, path)


def make_backend(vocabulary: Vocabulary, metadata: Mapping[str, Any], path: Path | str) -> Tokenizer:
    """As `build`, for a vocabulary that is read already. It adds EOS where the file says so; BOS is the caller's."""
    if vocabulary.model == "llama":
        tokenizer = _sentencepiece(vocabulary, path)
    else:
        tokenizer = _bpe(vocabulary, Metadata(metadata, path))
    tokenizer.add_special_tokens(_added(vocabulary, CONTROL, UNKNOWN))
    tokenizer.add_tokens(_added(vocabulary, USER_DEFINED))
    if vocabulary.add_eos and (eos := vocabulary.text("eos")) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", eos], special_tokens=[(eos, vocabulary.special["eos"])]
        )
    return tokenizer


def _added(vocabulary: Vocabulary, *kinds: int) -> list[AddedToken]:
    """Tokens that are found in a text before anything else happens to it."""
    return [
        AddedToken(token, special=USER_DEFINED not in kinds, normalized=False, rstrip=token in vocabulary.rstrip)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in kinds
    ]


def _model(vocabulary: Vocabulary, merges: list[tuple[str, str]], path: Path | str, **options: Any) -> models.BPE:
    with library_errors(f"{path}: the tokenizer's vocabulary and merges do not agree"):
        return models.BPE(vocab=vocabulary.ids, merges=merges, **options)


def _bpe(vocabulary: Vocabulary, data: Metadata) -> Tokenizer:
    pre = vocabulary.pre
    pairs: dict[tuple[str, str], None] = {}
    for merge in data.items("merges", str):
        space = merge.find(" ", 1)
        if space < 0 or space == len(merge) - 1:
            raise data.fail(f"tokenizer.ggml.merges is malformed: {merge!r} is not two tokens")
        pairs.setdefault((merge[:space], merge[space + 1 :]))
    merges = list(pairs)
    if pre.raw:  # tokens of several spaces are stored with real spaces here, and their merges have no token
        merges = [pair for pair in merges if vocabulary.ids.keys() >= {*pair, "".join(pair)}]
    tokenizer = Tokenizer(_model(vocabulary, merges, data.path, ignore_merges=pre.ignore_merges, byte_fallback=pre.raw))
    tokenizer.pre_tokenizer = pre.build()
    if pre.raw:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = _text_decoder()
        return tokenizer
    tokenizer.decoder = _byte_decoder(vocabulary)
    return tokenizer


def _byte_decoder(vocabulary: Vocabulary) -> Any:
    """A decoder of bytes from GPT-2's characters for bytes.

    Tokens that are plain text but look like such bytes are written as bytes first, so that they come out as the text
    they are.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain = [
        decoders.Replace(Regex(rf"\A{_escaped(token)}\z"), to_bytes.pre_tokenize_str(token)[0][0])
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED) and not token.isascii() and alphabet.issuperset(token)
    ]
    return decoders.Sequence([*plain, decoders.ByteLevel()]) if plain else decoders.ByteLevel()


def _escaped(text: str) -> str:
    """A pattern that matches `text` alone."""
    return "".join(f"\\x{{{ord(char):X}}}" for char in text)


def _text_decoder(*last: Any) -> Any:
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last])


def _sentencepiece(vocabulary: Vocabulary, path: Path | str) -> Tokenizer:
    merges = merges_of(vocabulary)
    tokenizer = Tokenizer(
        _model(vocabulary, merges, path, byte_fallback=True, fuse_unk=True, unk_token=vocabulary.text("unk"))
    )
    spaces = normalizers.Replace(" ", SPACE)
    if vocabulary.add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        tokenizer.decoder = _text_decoder(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = _text_decoder()
    if never_crosses_words(merges):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
    return tokenizer
