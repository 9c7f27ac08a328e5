"""The runtime folder: private to its user, never somebody else's file, and gone when its engine is."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nexusengine.errors import ConfigError
from nexusengine.supervisor.runtime_dir import RuntimeDir


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty and for this test alone."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_private_folder_is_for_this_user_alone_and_goes_with_its_engine(temporary: Path) -> None:
    made = RuntimeDir(None)
    assert made.path.parent == temporary
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((made.path / "lock").stat().st_mode) == 0o600
    made.close()
    assert list(temporary.iterdir()) == []


def test_a_given_folder_is_made_and_kept_without_its_sockets(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    made = RuntimeDir(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "front").touch()
    (folder / "other").touch()
    with pytest.raises(ConfigError, match="used by another engine"):
        RuntimeDir(str(folder))
    made.close()
    assert sorted(p.name for p in folder.iterdir()) == ["lock", "other"]
    RuntimeDir(str(folder)).close()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"other users may write to the runtime folder {folder} "):
        RuntimeDir(str(folder))
    assert list(folder.iterdir()) == []


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=f"the runtime folder {folder} belongs to another user"):
        RuntimeDir(str(folder))


def test_a_lock_that_is_a_link_is_refused_and_its_target_is_left_alone(tmp_path: Path) -> None:
    folder, target = tmp_path / "runtime", tmp_path / "precious"
    folder.mkdir(mode=0o700)
    target.write_text("precious")
    (folder / "lock").symlink_to(target)
    with pytest.raises(ConfigError, match=f"cannot use the runtime folder {folder}: its lock is a symbolic link"):
        RuntimeDir(str(folder))
    assert target.read_text() == "precious"


def test_a_lock_that_is_no_file_and_a_folder_that_is_none_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    os.mkfifo(folder / "lock")
    with pytest.raises(ConfigError, match="its lock is not a file"):
        RuntimeDir(str(folder))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot use the runtime folder .*/file: File exists"):
        RuntimeDir(str(tmp_path / "file"))


def test_what_stands_in_a_lock_is_not_cut_off_before_the_lock_is_had(tmp_path: Path) -> None:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    (folder / "lock").write_text("4711\n")
    with (folder / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="used by another engine"):
            RuntimeDir(str(folder))
    assert (folder / "lock").read_text() == "4711\n"


def test_without_a_temporary_folder_runtime_dir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_is_usable() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none_is_usable)
    with pytest.raises(
        ConfigError, match=r"no temporary folder .* give --runtime-dir a folder, or set TMPDIR"
    ) as raised:
        RuntimeDir(None)
    assert raised.value.param == "runtime_dir"


def test_a_temporary_folder_that_cannot_be_written_to_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(ConfigError, match="give --runtime-dir a folder"):
        RuntimeDir(None)


def test_the_folder_of_a_killed_engine_is_removed_by_the_next(temporary: Path) -> None:
    script = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from nexusengine.supervisor.runtime_dir import RuntimeDir\n"
        "made = RuntimeDir(None); (made.path / 'front').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(temporary)], check=False)
    assert killed.returncode == -9
    (left,) = temporary.iterdir()
    (temporary / "nexusengine-being-made").mkdir()
    (temporary / "nexusengine-just-locked").mkdir()
    (temporary / "nexusengine-just-locked" / "lock").touch()
    (temporary / "nexusengine-file").touch()
    alive = RuntimeDir(None)
    assert not left.exists()
    another = RuntimeDir(None)
    assert alive.path.exists()
    another.close()
    alive.close()
    kept = ["nexusengine-being-made", "nexusengine-file", "nexusengine-just-locked"]
    assert sorted(p.name for p in temporary.iterdir()) == kept
