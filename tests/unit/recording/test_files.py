"""The files of a recording: rotated, bounded, never written over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nexusengine.errors import ConfigError
from nexusengine.recording.files import TraceFiles


def header(part: int) -> bytes:
    return b"part %d\n" % part


def opened(path: Path, most_bytes: int = 40, most_files: int = 3) -> TraceFiles:
    return TraceFiles(path, most_bytes, most_files, header)


def write(trace: TraceFiles, data: bytes) -> None:
    if trace.is_full(len(data)):
        trace.next_file()
    trace.write(data)


def test_a_full_file_is_rotated_and_the_oldest_removed(tmp_path: Path) -> None:
    trace = opened(tmp_path / "load.jsonl")
    for i in range(10):
        write(trace, b"%028d\n" % i)  # one fits
    trace.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["load.000008.jsonl", "load.000009.jsonl", "load.jsonl"]
    assert (tmp_path / "load.jsonl").read_bytes() == b"part 9\n" + b"%028d\n" % 9
    assert (tmp_path / "load.000008.jsonl").read_bytes() == b"part 7\n" + b"%028d\n" % 7


def test_one_file_is_kept_where_one_is_asked_for(tmp_path: Path) -> None:
    trace = opened(tmp_path / "load.jsonl", most_files=1)
    for i in range(3):
        write(trace, b"%028d\n" % i)
    assert [p.name for p in tmp_path.iterdir()] == ["load.jsonl"]


def test_a_line_larger_than_a_file_gets_one_of_its_own(tmp_path: Path) -> None:
    trace = opened(tmp_path / "load.jsonl")
    write(trace, b"x" * 100 + b"\n")
    write(trace, b"y\n")
    assert trace.path.read_bytes() == b"part 1\ny\n"


def test_a_file_from_before_is_kept_and_names_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "load.jsonl").write_bytes(b"old\n")
    for other in ("load.1.jsonl", "load.000001.jsonl.bak", "xload.000001.jsonl", "load.abcdef.jsonl"):
        (tmp_path / other).write_bytes(b"other\n")
    trace = opened(tmp_path / "load.jsonl", most_files=2)
    for i in range(5):
        write(trace, b"%028d\n" % i)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"load.1.jsonl", "load.000001.jsonl.bak", "xload.000001.jsonl", "load.abcdef.jsonl"} < names
    assert len(names) == 6


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = opened(tmp_path / "load.jsonl", 1000)
    trace.write(b"whole\n")
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if not bytes(data).startswith(b"never"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:4])

    with monkeypatch.context() as patched:
        patched.setattr("nexusengine.recording.files.os.write", full)
        with pytest.raises(OSError, match="No space"):
            trace.write(b"never whole\n")
    assert trace.path.read_bytes() == b"part 0\nwhole\n"
    trace.write(b"again\n")
    assert trace.path.read_bytes() == b"part 0\nwhole\nagain\n"


@pytest.mark.parametrize("kind", ["folder", "missing folder", "pipe", "in use"])
def test_what_cannot_be_written_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "load.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "missing folder":
        path = tmp_path / "none" / "load.jsonl"
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        opened(path)
    with pytest.raises(ConfigError) as caught:
        opened(path)
    assert str(path) in caught.value.message
    assert caught.value.param == "record_trace"
    assert kind != "in use" or "another server writes it" in caught.value.message


def test_a_file_that_was_moved_away_is_begun_anew_when_it_is_full(tmp_path: Path) -> None:
    trace = opened(tmp_path / "load.jsonl")
    write(trace, b"%028d\n" % 0)
    (tmp_path / "load.jsonl").rename(tmp_path / "mine")
    write(trace, b"%028d\n" % 1)
    assert trace.path.read_bytes() == b"part 1\n" + b"%028d\n" % 1
