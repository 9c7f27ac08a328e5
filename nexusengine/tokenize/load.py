"""Loads the tokenizer of a model from tokenizer.json or GGUF metadata."""

from __future__ import annotations

from typing import Any

import tokenizers

from nexusengine.errors import ModelLoadError
from nexusengine.loading import sampling_defaults
from nexusengine.loading.config_json import read_json
from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.resolve import ModelFiles
from nexusengine.tokenize import gguf_tokenizer, template_files
from nexusengine.tokenize.chat_template import ChatTemplate
from nexusengine.tokenize.tokenizer import Tokenizer


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Raises ModelLoadError naming the file and what is wrong with it."""
    if files.kind == "gguf":
        return _from_gguf(files)
    return _from_json(files)


def _from_gguf(files: ModelFiles) -> Tokenizer:
    metadata = GGUFFile(files.path).metadata
    backend = gguf_tokenizer.build(metadata, files.path)
    names = {
        f"{kind}_token": metadata["tokenizer.ggml.tokens"][i]
        for kind in ("bos", "eos")
        if isinstance(i := metadata.get(f"tokenizer.ggml.{kind}_token_id"), int) and i < backend.get_vocab_size()
    }
    templates = template_files.of_gguf(metadata, files.path)
    return Tokenizer(
        backend,
        bos_token_id=files.config.bos_token_id,
        eos_token_ids=files.config.eos_token_ids,
        chat_template=ChatTemplate(templates, names, str(files.path)) if templates else None,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        sampling_defaults=sampling_defaults.of_gguf(metadata, files.path),
    )


def _from_json(files: ModelFiles) -> Tokenizer:
    path = files.path / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(f"{path} is missing; a tokenizer in another format is not supported")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelLoadError(f"{path} is not a usable tokenizer: {error}") from None
    settings_path = files.path / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    names = {key: _token_text(value) for key, value in settings.items() if key in ("bos_token", "eos_token")}
    templates = template_files.of_folder(files.path, settings)
    eos = files.config.eos_token_ids
    if not eos and "eos_token" in names:
        eos = tuple(i for i in [backend.token_to_id(names["eos_token"])] if i is not None)
    return Tokenizer(
        backend,
        bos_token_id=files.config.bos_token_id,
        eos_token_ids=eos,
        chat_template=ChatTemplate(templates, names, str(files.path)) if templates else None,
        sampling_defaults=sampling_defaults.of_folder(files.path),
    )


def _token_text(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)
