"""Loads the tokenizer of a model from tokenizer.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nexusengine.errors import ModelLoadError
from nexusengine.loading.config_json import read_json
from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.resolve import ModelFiles
from nexusengine.tokenize.backend import library_errors, try_out
from nexusengine.tokenize.chat_template import ChatTemplate
from nexusengine.tokenize.gguf_tokenizer import make_backend
from nexusengine.tokenize.gguf_vocab import read_vocabulary
from nexusengine.tokenize.tokenizer import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Raises ModelLoadError naming the file and what is wrong with it."""
    if files.kind == "gguf":
        return gguf_tokenizer(GGUFFile(files.path).metadata, files.path)
    return json_tokenizer(files.path, files.config.bos_token_id, files.config.eos_token_ids)


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path | str) -> Tokenizer:
    """The tokenizer that GGUF metadata describe. Raises ModelLoadError naming the key that is missing or wrong."""
    vocabulary = read_vocabulary(metadata, path)
    backend = make_backend(vocabulary, metadata, path)
    try_out(backend, str(path))
    texts = {name: vocabulary.text(name.removesuffix("_token")) for name in SPECIAL_TOKENS}
    names = {name: text for name, text in texts.items() if text is not None}
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ModelLoadError(f"{path}: tokenizer.chat_template is {template!r}, which is not a string")
    return Tokenizer(
        backend,
        bos_token_id=vocabulary.special.get("bos"),
        eos_token_ids=vocabulary.end_ids,
        chat_template=ChatTemplate(template, names, str(path)) if template else None,
        add_bos=vocabulary.add_bos,
    )


def json_tokenizer(folder: Path, bos_token_id: int | None, eos_token_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer in `folder`/tokenizer.json and the files beside it.

    bos_token_id, eos_token_ids: what config.json and generation_config.json say; the tokenizer's own are added.
    Raises ModelLoadError naming the file and what is wrong with it.
    """
    backend = _read_backend(folder / "tokenizer.json")
    settings = _read_if_there(folder / "tokenizer_config.json")
    named = _named_tokens(folder, settings)
    names = special_token_texts(named, folder)
    backend.add_special_tokens([_added(named[key], text) for key, text in names.items() if _is_plain(backend, text)])
    try_out(backend, str(folder / "tokenizer.json"))
    ids = {key: backend.token_to_id(text) for key, text in names.items()}
    eos = [*eos_token_ids, *(i for i in [ids.get("eos_token")] if i is not None)]
    template = _template(folder, settings)
    return Tokenizer(
        backend,
        bos_token_id=bos_token_id if ids.get("bos_token") is None else ids["bos_token"],
        eos_token_ids=tuple(dict.fromkeys(eos)),
        chat_template=ChatTemplate(template, names, str(folder)) if template else None,
    )


def special_token_texts(named: Mapping[str, Any], where: Path | str) -> dict[str, str]:
    """The texts of bos_token, eos_token and so on, those of them that a model has.

    named: as in tokenizer_config.json, where a token is a string, an object with a `content`, or null.
    Raises ModelLoadError naming the token that is none of these.
    """
    texts = {}
    for key in SPECIAL_TOKENS:
        value = named.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
            raise ModelLoadError(f"{where}: {key} is {value!r}; a token is a string or an object with content")
        texts[key] = text
    return texts


def _named_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The special tokens by name, from tokenizer_config.json and special_tokens_map.json; as in transformers, the
    latter goes first only beside a tokenizer_config.json of the old form."""
    by_map = _read_if_there(folder / "special_tokens_map.json")
    named = {**by_map, **settings} if "added_tokens_decoder" in settings else {**settings, **by_map}
    return {key: named[key] for key in SPECIAL_TOKENS if key in named}


def _is_plain(backend: tokenizers.Tokenizer, text: str) -> bool:
    """Whether `text` is in the vocabulary, but not as a token that is found in a text as a whole."""
    token_id = backend.token_to_id(text)
    return token_id is not None and token_id not in backend.get_added_tokens_decoder()


def _added(value: Any, text: str) -> AddedToken:
    flags = value if isinstance(value, dict) else {}
    chosen = {key: flags[key] for key in ("lstrip", "rstrip", "single_word") if isinstance(flags.get(key), bool)}
    return AddedToken(text, special=True, normalized=False, **chosen)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """Reads tokenizer.json. Raises ModelLoadError."""
    if not path.is_file():
        raise ModelLoadError(f"{path} is missing; a tokenizer in another format is not supported")
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


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else the key in tokenizer_config.json (its default if several)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from None
    if (folder / "chat_template.json").is_file():
        settings = read_json(folder / "chat_template.json")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {
            t.get("name"): t.get("template") for t in template if isinstance(t, dict) and isinstance(t.get("name"), str)
        }
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ModelLoadError(f"{folder}: chat_template is {template!r}, which is not a string")
    return template
