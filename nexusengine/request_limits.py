"""What a request may ask of a model, wherever that is checked: before it is sent, where it is placed, where it runs."""

from __future__ import annotations

from collections.abc import Sequence

from nexusengine.errors import ContextTooLong, InvalidRequest


def check_fits(prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> None:
    """Raises ContextTooLong if prompt and output are too long together.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: output tokens that were asked for; None: as many as there is room for, at least one.
        max_model_len: the most that both may have.
    """
    if prompt_tokens + (max_tokens or 1) > max_model_len:
        message = too_long(prompt_tokens, max_tokens, max_model_len)
        raise ContextTooLong(message, param="prompt" if prompt_tokens >= max_model_len else "max_tokens")


def too_long(prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> str:
    """The message of a request that does not fit; see `check_fits`."""
    asked = f" and {max_tokens} output tokens were asked for" if max_tokens else ""
    return (
        f"the prompt has {prompt_tokens} tokens{asked}, but prompt and output together can have at most {max_model_len}"
    )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest naming an id that is not in the vocabulary, and the parameter that held it."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise InvalidRequest(f"token id {wrong} is not in the vocabulary of {vocab_size}", param=param)
