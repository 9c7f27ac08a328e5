"""The tokenizer of a model: text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers

from nexusengine.errors import InvalidRequest
from nexusengine.loading.sampling_defaults import SamplingDefaults
from nexusengine.tokenize.chat_template import ChatTemplate, Message
from nexusengine.tokenize.incremental import ByteDetokenizer, IncrementalDetokenizer
from nexusengine.tokenize.vocabulary import Vocabulary

_MANY_TOKENS = 4096


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
        sampling_defaults: SamplingDefaults = SamplingDefaults(),  # noqa: B008 (frozen)
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_ids = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.bos_token_id, self.eos_token_ids = bos_token_id, eos_token_ids
        self.chat_template, self.sampling_defaults = chat_template, sampling_defaults
        self._add_bos = add_bos and bos_token_id is not None
        self._vocabulary = Vocabulary(backend)

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that is written `text`, or None if there is no such token."""
        return self._special_ids.get(text)

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
        if len(token_ids) > _MANY_TOKENS:  # the batch call lets other threads run meanwhile
            (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
            return str(text)
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_str(self, token_id: int) -> str:
        """A single token as text, with its leading space; bytes that are no UTF-8 as `\\xf0\\x9f`, as OpenAI does."""
        return self._vocabulary.token(token_id).text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text; those of the tokens of one character, joined, are its UTF-8."""
        return self._vocabulary.token(token_id).data

    def _bytes_shown(self, token_id: int) -> bytes:
        """`token_bytes`, none for special tokens."""
        token = self._vocabulary.token(token_id)
        return b"" if token.special else token.data

    def stream(
        self, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> ByteDetokenizer | IncrementalDetokenizer:
        """Turn ids that come one by one into text.

        Args:
            context: the ids before them, a prompt; its text does not come out, but the first word after it keeps its
                leading space.
        """
        if self._vocabulary.byte_level:
            return ByteDetokenizer(self._bytes_shown if skip_special_tokens else self.token_bytes, context)
        token = self._vocabulary.token

        def skipped(token_id: int) -> bool:
            found = token(token_id)
            return not found.exists or (skip_special_tokens and found.special)

        return IncrementalDetokenizer(
            lambda ids: self.decode(ids, skip_special_tokens), lambda i: token(i).byte, skipped, context
        )

    def render_chat(self, messages: Sequence[Message], /, **options: Any) -> str:
        """The text of a conversation, by the model's chat template.

        Args:
            options: see ChatTemplate.render.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return self.chat_template.render(messages, **options)

    def prepare(self) -> None:
        """Do now what the first chat would have to wait for. Raises InternalError if templates cannot be rendered."""
        if self.chat_template is not None:
            self.chat_template.prepare()

    def close(self) -> None:
        """End the processes that render the chat template; the next chat starts one again."""
        if self.chat_template is not None:
            self.chat_template.close()

    def encode_chat(self, messages: Sequence[Message], /, **options: Any) -> list[int]:
        """Token ids of the rendered template, which writes its special tokens itself."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)
