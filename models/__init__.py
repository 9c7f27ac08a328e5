"""Architectures by the name in their config.json, and short names of models. One file a model family."""
