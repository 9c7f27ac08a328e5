"""Loads the tokenizer of a model from tokenizer.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nexusengine.errors import ModelLoadError
from nexusengine.loading import sampling_defaults
from nexusengine.loading.files import read_json
from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.resolve import ModelFiles
from nexusengine.tokenize import template_files
from nexusengine.tokenize.backend import library_errors, try_out
from nexusengine.tokenize.chat_template import ChatTemplate
from nexusengine.tokenize.gguf_tokenizer import make_backend
from nexusengine.tokenize.gguf_vocab import read_vocabulary
from nexusengine.tokenize.tokenizer import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Raises ModelLoadError naming the file and what is wrong with it."""
    if files.kind == "gguf":
        return gguf_tokenizer(GGUFFile(files.path).metadata, files.path)
    return json_tokenizer(files.path, files.config.bos_token_id, files.config.eos_token_ids)


def end_ids(files: ModelFiles) -> tuple[int, ...]:
    """The tokens that end generation, as far as they are known without building a tokenizer. Raises ModelLoadError."""
    if files.kind == "gguf":
        return read_vocabulary(GGUFFile(files.path).metadata, files.path).end_ids
    return files.config.eos_token_ids


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path | str) -> Tokenizer:
    """The tokenizer that GGUF metadata describe. Raises ModelLoadError naming the key that is missing or wrong."""
    vocabulary = read_vocabulary(metadata, path)
    backend = make_backend(vocabulary, metadata, path)
    try_out(backend, str(path))
    texts = {name: vocabulary.text(name.removesuffix("_token")) for name in SPECIAL_TOKENS}
    names = {name: text for name, text in texts.items() if text is not None}
    templates = template_files.of_gguf(metadata, path)
    return Tokenizer(
        backend,
        bos_token_id=vocabulary.special.get("bos"),
        eos_token_ids=vocabulary.end_ids,
        chat_template=ChatTemplate(templates, names, str(path)) if templates else None,
        add_bos=vocabulary.add_bos,
        sampling_defaults=sampling_defaults.of_gguf(metadata, path),
    )


def json_tokenizer(folder: Path, bos_token_id: int | None, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer in `folder`/tokenizer.json and the files beside it.

    bos_token_id, eos_token_ids: what config.json and generation_config.json say; the tokenizer's own are added.
    Raises ModelLoadError naming the file and what is wrong with it.
    """
    backend = _read_backend(folder / "tokenizer.json")
    settings = _read_if_there(folder / "tokenizer_config.json")
    named, others = _named_tokens(folder, settings)
    names = special_token_texts(named, folder)
    _mark(backend, [*named.values(), *others], folder)
    try_out(backend, str(folder / "tokenizer.json"))
    ids = {key: backend.token_to_id(text) for key, text in names.items()}
    eos = [*eos_token_ids, *(i for i in [ids.get("eos_token")] if i is not None)]
    templates = template_files.of_folder(folder, settings)
    return Tokenizer(
        backend,
        bos_token_id=bos_token_id if ids.get("bos_token") is None else ids["bos_token"],
        eos_token_ids=tuple(dict.fromkeys(eos)),
        chat_template=ChatTemplate(templates, names, str(folder)) if templates else None,
        sampling_defaults=sampling_defaults.of_folder(folder),
    )


def special_token_texts(named: Mapping[str, Any], where: Path | str) -> dict[str, str]:
    """The texts of bos_token, eos_token and so on, those of them that a model has.

    named: as in tokenizer_config.json, where a token is a string, an object with a `content`, or null.
    Raises ModelLoadError naming the token that is none of these.
    """
    return {key: _text(named[key], key, where) for key in SPECIAL_TOKENS if named.get(key) is not None}


def _text(token: Any, what: str, where: Path | str) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
        raise ModelLoadError(f"{where}: {what} is {token!r}; a token is a string or an object with content")
    return text


def _named_tokens(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The special tokens by name, and the others, from tokenizer_config.json and special_tokens_map.json.

    As in transformers, the latter goes first only beside a tokenizer_config.json of the old form.
    """
    by_map = _read_if_there(folder / "special_tokens_map.json")
    known = settings.get("added_tokens_decoder")
    values = {**by_map, **settings} if known is not None else {**settings, **by_map}
    others = [] if known is None else _items(known, "added_tokens_decoder", folder)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        others += _items(values.get(key) or [], key, folder)
    return {key: values[key] for key in SPECIAL_TOKENS if values.get(key) is not None}, others


def _items(value: Any, what: str, where: Path) -> list[Any]:
    if not isinstance(value, list | dict):
        raise ModelLoadError(f"{where}: {what} is {value!r}, which is not a list or an object")
    return list(value.values() if isinstance(value, dict) else value)


def _mark(backend: tokenizers.Tokenizer, tokens: list[Any], where: Path) -> None:
    """Have these tokens of the vocabulary found in a text as a whole, where tokenizer.json does not say so."""
    marked = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        text = _text(token, "a special token", where)
        if text in marked or backend.token_to_id(text) is None:
            continue
        flags = token if isinstance(token, dict) else {}
        chosen = {key: flags[key] for key in _FLAGS if isinstance(flags.get(key), bool)}
        backend.add_tokens([AddedToken(text, **{"special": True, "normalized": False, **chosen})])


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """Reads tokenizer.json. Raises ModelLoadError."""
    if not path.is_file():
        found = next(
            (name for name in _OTHER_FORMATS if (path.parent / name).is_file()), "a tokenizer in another format"
        )
        raise ModelLoadError(
            f"{path} is missing, and {found} is not supported; transformers' AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...) writes a tokenizer.json"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path} is not a usable tokenizer: {error}") from None
    with library_errors(f"{path} is not a usable tokenizer"):
        return tokenizers.Tokenizer.from_str(text)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
