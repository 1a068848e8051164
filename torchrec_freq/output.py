"""Files and folders that are written whole or not at all, and can be checked before the work."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

_DATA: Final = "__0_0.distcp"


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


def check_new(path: Path) -> None:
    """Finds out whether :func:`writing_folder` could make a folder now; leaves all as it was.

    Raises:
        OSError: it could not; the message names the path and says why.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "Exists already; name a new folder", str(path))
    check_output(path)


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


@contextlib.contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes ``path`` in one step, once its files are on the disk.

    There is no ``path`` where the body fails, or is interrupted. Where the process is killed, a
    folder ``.writing-*`` is left beside it.

    Raises:
        OSError: ``path`` exists, is in no folder, or cannot be written. The body's own are taken
            for such.
    """
    check_new(path)
    with _beside(path) as (file, target):
        folder = file.with_name("folder")
        folder.mkdir()
        yield folder
        for name in sorted(folder.iterdir()):
            sync(name)
        sync(folder)
        os.rename(folder, target)
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


class CheckpointWriter:
    """Writes a checkpoint of ``torch.distributed.checkpoint``, part of a tensor by part.

    ``dcp.save`` would want whole tensors. Until this one is finished there is no ``.metadata``, and
    so no checkpoint.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / _DATA).open("xb")
        self._stored: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, part: Tensor, offsets: Sequence[int], size: Sequence[int]) -> None:
        """Writes a part of a tensor.

        Args:
            part: contiguous, in a storage of its own.
            offsets: place of the part in the tensor.
            size: of the whole tensor.
        """
        begin = self._file.tell()
        torch.save(part, self._file)
        chunk = ChunkStorageMetadata(torch.Size(offsets), part.shape)
        whole = TensorStorageMetadata(TensorProperties(part.dtype), torch.Size(size), [])
        self._stored.setdefault(key, whole).chunks.append(chunk)
        self._end(MetadataIndex(key, chunk.offsets), begin)

    def copy(self, key: str, stored: Any, parts: Iterable[tuple[MetadataIndex, IO[bytes]]]) -> None:
        """Writes all there is of a key, whatever it is, as another checkpoint holds it.

        Args:
            stored: what describes it there.
            parts: index there and bytes of each part.
        """
        self._stored[key] = stored
        for index, part in parts:
            begin = self._file.tell()
            shutil.copyfileobj(part, self._file, 1 << 20)
            self._end(MetadataIndex(key, index.offset), begin)

    def finish(self, planner_data: Any) -> None:
        """Makes it a whole checkpoint."""
        self._file.close()
        found = Metadata(self._stored, planner_data, self._places, StorageMeta())
        (self._folder / ".metadata").write_bytes(pickle.dumps(found))

    def _end(self, index: MetadataIndex, begin: int) -> None:
        self._places[index] = _StorageInfo(_DATA, begin, self._file.tell() - begin)


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
