"""Files that are written whole or not at all, and can be checked before the work for them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_output(path: str | os.PathLike[str]) -> None:
    """Finds out whether :func:`writing` could write a file now; leaves everything as it was.

    Raises:
        OSError: it could not; the message names the path and says why.
    """
    path = Path(path)
    with _named(path), _beside(_target(path)) as trial:
        trial.write_bytes(b"\0")
        sync(trial)


def check_folder(path: Path) -> None:
    """Makes a folder unless there is one, and finds out whether files can be written there.

    Raises:
        OSError: no.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Is a file; give a folder", str(path))
    path.mkdir(parents=True, exist_ok=True)
    with _named(path), _beside(path / "file") as trial:
        trial.write_bytes(b"\0")
        sync(trial)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to fill, which takes the place of ``path`` in one step, once it is on the disk.

    Nothing changes where the body fails, or is interrupted. Where the process is killed, a folder
    ``.writing-*`` is left beside the file. A link is written through; an old file's mode is kept.

    Raises:
        OSError: ``path`` is in no folder, or is a folder, pipe or device, or cannot be written. The
            body's own are taken for such.
    """
    path = Path(path)
    with _named(path):
        target = _target(path)
        with _beside(target) as file:
            mode = (target if target.exists() else file).stat().st_mode
            yield file
            # A library may have made its file private to the user.
            file.chmod(stat.S_IMODE(mode))
            sync(file)
            os.replace(file, target)
            # The replacement itself is on the disk once the folder is.
            sync(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file of text in UTF-8 as :func:`writing` does.

    Raises:
        OSError: as of :func:`writing`.
    """
    with writing(path) as file:
        file.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target(path: Path) -> Path:
    """The regular file, there or not, that a path or link stands for."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a folder; name a file in it", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Is a pipe or device; name a regular file", str(path))
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder; make it first", str(path))
    return target


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """An empty file, as any new one, in a folder of its own on the same disk."""
    # The name of the target may be as long as names can be.
    with tempfile.TemporaryDirectory(
        prefix=".writing-", suffix=".tmp", dir=target.parent
    ) as folder:
        file = Path(folder, "file")
        file.touch()
        yield file


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors with the name that the user gave, not that of a file beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
