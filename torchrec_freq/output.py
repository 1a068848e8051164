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
    with _beside(Path(path)) as (trial, _):
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
    check_output(path / ".trial")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to fill, which takes the place of ``path`` in one step, once it is on the disk.

    Nothing changes where the body fails, or is interrupted. Where the process is killed, a folder
    ``.writing-*`` is left beside the file. A link is written through; an old file's mode is kept.

    Raises:
        OSError: ``path`` is in no folder, or is a folder, pipe or device, or cannot be written. The
            body's own are taken for such.
    """
    with _beside(Path(path)) as (file, target):
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


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """An empty file, in a folder of its own beside the regular file that a path or link stands for.

    Errors have the name that the user gave, not that of another file.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, "Is a folder; name a file in it")
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, "Is a pipe or device; name a regular file")
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "No such folder; make it first")
        # The name of the target may be as long as names can be.
        with tempfile.TemporaryDirectory(".tmp", ".writing-", target.parent) as folder:
            file = Path(folder, "file")
            file.touch()
            yield file, target
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
