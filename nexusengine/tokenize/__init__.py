"""Text to token ids and back, and chat templates. No torch."""

from nexusengine.tokenize.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
