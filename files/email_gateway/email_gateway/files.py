"""Files that are complete or not there, whatever ends the program or the host; and those of others."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class Draft:
    """The next content of the file `path`: takes its space on the disk first.

    Where something comes only once (a rotated token), there must be space for it before
    it is asked for. Everything raises OSError.
    """

    def __init__(self, path: Path, size: int = 0, suffix: str = ".new") -> None:
        self._path = path
        self._draft = path.with_name(path.name + suffix)
        descriptor = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._file = open(descriptor, "wb")  # noqa: SIM115 - closed by the next method
        try:
            if size:
                os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError:
            self.discard()
            raise

    def replace(self, pieces: Iterable[bytes]) -> None:
        """Write the content, and put it into its place once it is on the disk."""
        try:
            for piece in pieces:
                self._file.write(piece)
            self._file.truncate()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._draft, self._path)
        except OSError:
            self.discard()  # or each new try would fill the disk further
            raise
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Forget the draft; the file stays as it is."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._draft.unlink()


def opened(path: Path) -> BinaryIO:
    """A file for reading that another user may have put there: a regular file, or OSError.

    A link would lead to a file that only we may read, a pipe would never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return open(descriptor, "rb")


def status_of(path: Path) -> os.stat_result:
    """Of a regular file, else OSError."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return status


def write(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace the file; raises OSError."""
    Draft(path).replace(pieces)


def sync_folder(folder: Path) -> None:
    """After this a power cut does not bring back what stood in the folder before."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
