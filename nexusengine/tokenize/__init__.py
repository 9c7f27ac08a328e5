"""Text to token ids and back, and chat templates. No torch."""

from nexusengine.tokenize.load import load_tokenizer
from nexusengine.tokenize.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
