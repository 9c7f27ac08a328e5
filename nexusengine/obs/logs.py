"""Logging of every process: plain lines on stderr."""

from __future__ import annotations

import logging

_ROOT = "nexusengine"


def setup(level: str) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger(_ROOT).setLevel(level.upper())


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(f"{_ROOT}.{name}")
