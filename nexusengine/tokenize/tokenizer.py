"""The tokenizer of a model, from tokenizer.json or GGUF metadata."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nexusengine.errors import InvalidRequest, ModelLoadError
from nexusengine.loading.config_json import read_json
from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.resolve import ModelFiles
from nexusengine.tokenize import gguf_tokenizer
from nexusengine.tokenize.chat_template import ChatTemplate, Message
from nexusengine.tokenize.incremental import IncrementalDetokenizer


class Tokenizer:
    """bos_token_id is put before a text when `add_bos` says so and the tokenizer itself does not."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None = None,
        add_bos: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token_id, self.eos_token_ids = bos_token_id, eos_token_ids
        self.chat_template = chat_template
        self._add_bos = add_bos and bos_token_id is not None

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest if the text is not Unicode (lone surrogates)."""
        try:
            # The batch call lets other threads run meanwhile, `encode` does not; "fast" leaves out character offsets.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequest("the text holds characters that are not valid Unicode", param="prompt") from None
        if add_special_tokens and self._add_bos and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)  # type: ignore[arg-type]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_str(self, token_id: int) -> str:
        """A single token as text; U+FFFD for bytes that are no whole character."""
        return self.decode([token_id], skip_special_tokens=False)

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(lambda ids: self.decode(ids, skip_special_tokens))

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """Raises InvalidRequest if the model has no chat template or the template refuses the messages."""
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **extra)

    def encode_chat(self, messages: Sequence[Message], **extra: Any) -> list[int]:
        """Token ids of the rendered template, which writes its special tokens itself."""
        return self.encode(self.render_chat(messages, **extra), add_special_tokens=False)


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
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_token_id=files.config.bos_token_id,
        eos_token_ids=files.config.eos_token_ids,
        chat_template=ChatTemplate(template, names, str(files.path)) if template else None,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
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
    template = _template(files.path, settings)
    eos = files.config.eos_token_ids
    if not eos and "eos_token" in names:
        eos = tuple(i for i in [backend.token_to_id(names["eos_token"])] if i is not None)
    return Tokenizer(
        backend,
        bos_token_id=files.config.bos_token_id,
        eos_token_ids=eos,
        chat_template=ChatTemplate(template, names, str(files.path)) if template else None,
    )


def _token_text(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value)


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else the key in tokenizer_config.json (its default if several)."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").is_file():
        settings = read_json(folder / "chat_template.json")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
