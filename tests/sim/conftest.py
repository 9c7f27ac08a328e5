"""A trace that tests of workloads share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    """100 requests, one every two seconds, all of different lengths."""
    path = tmp_path / "conv.csv"
    rows = [f"{100 + 2 * i},{500 + i},{1 + i}" for i in range(100)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]))
    return path
