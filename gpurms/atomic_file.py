"""Files that are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]  # None stands for a module that is missing


@contextmanager
def replacing(path: str) -> Iterator[BufferedRandom]:
    """A new file that takes the path when it is whole and on disk; whatever fails leaves the path as it was.

    A process that is killed leaves its temporary file; the next call for the path removes it.
    """
    path = os.path.realpath(path)  # a link goes on pointing to the file
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "expected a regular file", path)
    folder, name = os.path.split(path)
    start = f".{name[:48]}."  # a file's name has at most 255 bytes
    _remove_abandoned(folder, start)
    file = _create(os.path.join(folder, start))
    temporary = str(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                shutil.copymode(path, temporary)
            if fcntl is not None:  # while it is locked
                os.replace(temporary, path)
        if fcntl is None:
            os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _sync_folder(folder)


def _create(start: str) -> BufferedRandom:
    """A new file, locked until it is closed, where the file system has locks."""
    while True:
        file = open(f"{start}{os.urandom(8).hex()}.tmp", "x+b")  # noqa: SIM115  (the caller closes it)
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):
            return file
        file.close()  # removed before it was locked: another process took it for abandoned


def _remove_abandoned(folder: str, start: str) -> None:
    """Remove temporary files that no process holds; where that cannot be told or done, they stay."""
    if fcntl is None:
        return
    with suppress(OSError):
        for name in os.listdir(folder):
            if re.fullmatch(re.escape(start) + r"[0-9a-f]{16}\.tmp", name):
                _remove_unlocked(os.path.join(folder, name))


def _remove_unlocked(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.remove(path)
        finally:
            os.close(descriptor)


def _sync_folder(folder: str) -> None:
    """Make the new name last. Where folders cannot be opened or synced there is nothing to be done."""
    if os.name != "posix":
        return
    with suppress(PermissionError):  # of a folder that may be written to and not read
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(descriptor)
