"""The folder for the sockets between the processes of one engine, and the lock that says whether the engine runs.

A private folder is removed when its engine ends; one whose engine was killed is removed at the start of the next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from nexusengine.errors import ConfigError

_PREFIX = "nexusengine-"
_SOCKETS = ("front", "back")
_LONGEST_SOCKET_PATH = 107
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class RuntimeDir:
    """Takes `wanted`, made if need be, or else a new private folder, and locks it.

    Raises ConfigError for a folder that cannot be used, that others may write to or own, or that is in use.
    """

    def __init__(self, wanted: str | None) -> None:
        self.is_private = wanted is None
        self.path = _private_folder() if wanted is None else Path(os.path.abspath(wanted))
        try:
            self._prepare(wanted)
            self._lock = _locked(self.path)
        except BaseException:
            if self.is_private:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def close(self) -> None:
        """Remove what the engine left in it; a private folder as a whole."""
        if self.is_private:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            for name in _SOCKETS:
                (self.path / name).unlink(missing_ok=True)
        os.close(self._lock)

    def _prepare(self, wanted: str | None) -> None:
        folder = self.path
        if len(os.fsencode(folder / "front")) > _LONGEST_SOCKET_PATH:
            hint = "set TMPDIR to a shorter one, or give --runtime-dir" if wanted is None else "take a shorter one"
            raise _error(f"the path of the runtime folder {folder} is too long for sockets; {hint}")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
        except OSError as error:
            raise _unusable(folder, error) from None
        new = "give --runtime-dir a folder that does not exist yet, or that only you can write to"
        if found.st_uid != os.geteuid():
            raise _error(f"the runtime folder {folder} belongs to another user; {new}")
        if found.st_mode & _OTHERS_MAY_WRITE:
            raise _error(f"other users may write to the runtime folder {folder} (chmod go-w would end that); {new}")


def _private_folder() -> Path:
    """A new one. Raises ConfigError."""
    try:
        parent = Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise _error(
            "there is no temporary folder for the sockets between processes that can be written to "
            f"({error.strerror}); give --runtime-dir a folder, or set TMPDIR"
        ) from None


def _remove_abandoned(parent: Path) -> None:
    """Remove the private folders of engines of this user that were killed: the lock is free although it was held.

    A folder that is being made has an empty lock file, or none.
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = _open_lock(folder, os.O_RDONLY)
        except OSError:
            continue  # removed meanwhile, or not made by an engine
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_size:
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _locked(folder: Path) -> int:
    """The descriptor of its lock, held until it is closed. Raises ConfigError."""
    try:
        lock = _open_lock(folder, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise _unusable(folder, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(lock, f"{os.getpid():<10}\n".encode(), 0)
    except BlockingIOError:
        os.close(lock)
        raise _error(f"the runtime folder {folder} is used by another engine") from None
    except OSError as error:
        os.close(lock)
        raise _unusable(folder, error) from None
    return lock


def _open_lock(folder: Path, flags: int) -> int:
    """Open the file named "lock" in a folder, never what a link of that name points to. Raises OSError."""
    lock = os.open(folder / "lock", flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise OSError(errno.EINVAL, "its lock is not a file")
    return lock


def _unusable(folder: Path, error: OSError) -> ConfigError:
    why = "its lock is a symbolic link" if error.errno == errno.ELOOP else error.strerror
    return _error(f"cannot use the runtime folder {folder}: {why}")


def _error(message: str) -> ConfigError:
    return ConfigError(message, param="runtime_dir")
