"""Writing files so that a crash leaves the old content or the new, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """Replace the file at `path` by `data`, durably and in one step.

    The bytes go to a new file in the same directory (a rename is atomic within one file system only), are
    flushed to disk, and take the place of `path`; then the directory itself is flushed. A link at `path` is
    replaced, not written through. The mode follows the umask, as for any newly created file.

    Raises `OSError`; before the rename nothing of the old file has changed and no temporary file remains.
    """
    target = Path(path)
    # Not derived from the target's name: that may already be as long as the file system allows.
    temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        # Inside the `try`, so that an interrupt between creation and assignment still cleans up.
        descriptor = os.open(temporary, flags, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(target.parent)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory's entries to disk, where the platform can."""
    if os.name == "nt":  # Directories cannot be opened there; NTFS journals renames.
        return
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such operation; there the rename is as durable as it can be.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
