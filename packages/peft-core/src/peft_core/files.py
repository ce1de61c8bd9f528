"""Writing files so that a crash leaves the old content or the new, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_fcntl: Any = None  # Windows: writers are not kept apart there; readers still see a mixture for what it is.
with contextlib.suppress(ImportError):
    _fcntl = importlib.import_module("fcntl")

_STALE = ".tmp"


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
    try:
        # Inside the `try`, so that an interrupt between creation and assignment still cleans up.
        write_new(temporary, data)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(target.parent)


def write_new(path: str | os.PathLike[str], data: bytes | bytearray | memoryview) -> None:
    """Create a file that is not there yet, and flush it to disk. Raises `OSError`; the file may remain."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        rest = memoryview(data)
        while rest:  # One call writes what fits: at most 2 GiB on Linux, less on a full disk.
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably: each new entry is flushed. Raises `OSError`."""
    missing = []
    parent = path
    while not parent.exists() and parent != parent.parent:
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)  # Another writer may be faster.
        sync_directory(directory.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))


@contextlib.contextmanager
def locked(directory: Path, *, shared: bool = False) -> Iterator[bool]:
    """Keep other writers (and, unless `shared`, readers that wait) out of a directory, across processes.

    The lock is the kernel's: it leaves no file, and it ends with its owner, however that dies. Yields whether
    there is a lock: some network file systems and Windows have none.
    """
    if _fcntl is None:
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        try:
            _fcntl.flock(descriptor, _fcntl.LOCK_SH if shared else _fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def replace_together(
    directory: Path, contents: Sequence[tuple[str, bytes]], check: Callable[[Sequence[Path]], None]
) -> None:
    """Replace several files of one directory, so that a reader who knows the order can tell old from new.

    All new files are on disk, under temporary names, before the first takes its place. That rename is the
    commit point. From then on the remaining temporary files are the journal: whoever finds them can finish
    the job (`journal`). `check` sees the temporary files before the commit and may raise.

    Raises `OSError`, or what `check` raises. Before the commit point no temporary file remains; after it,
    what can be finished is finished.
    """
    token = secrets.token_hex(8)
    pairs = [(directory / f".{name}.{token}{_STALE}", directory / name) for name, _ in contents]
    ready = False
    try:
        for (temporary, _), (_, data) in zip(pairs, contents, strict=True):
            write_new(temporary, data)
        check([temporary for temporary, _ in pairs])
        # The journal's entry must be on disk before the commit is, and each rename before the next.
        sync_directory(directory)
        ready = True
        for temporary, target in pairs:
            os.replace(temporary, target)
            sync_directory(directory)
    except BaseException:
        # Asked of the disk: an interrupt may come between the rename and anything that would note it.
        committed = ready and not os.path.lexists(pairs[0][0])
        for temporary, target in pairs:
            with contextlib.suppress(OSError):
                if not committed:
                    os.unlink(temporary)
                elif os.path.lexists(temporary):
                    os.replace(temporary, target)
        raise


def journal(directory: Path, name: str) -> list[Path]:
    """Temporary files of `name` that interrupted writers left in a directory."""
    start = f".{name}."
    with os.scandir(directory) as entries:
        found = [e.name for e in entries if e.name.startswith(start) and e.name.endswith(_STALE)]
    return [directory / entry for entry in sorted(found)]
