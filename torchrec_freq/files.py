"""A file of counts: safetensors, one tensor a table, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchrec_freq.engine.counters import check_counts

_FORMAT: Final = "torchrec_freq.counts"
_VERSION: Final = "1"
_DTYPES: Final = ("I32", "I64")
# The name under which the format itself keeps text.
_RESERVED: Final = "__metadata__"


class CountsFile(NamedTuple):
    """What a file of counts holds, in the order of :func:`torchrec_freq.load_row_counts`.

    Attributes:
        counts: table name -> int64 CPU tensor [num_embeddings].
        steps: the number of optimizer steps that the counts stand for; None where unknown.
    """

    counts: dict[str, Tensor]
    steps: int | None


def save_counts(
    path: str | os.PathLike[str], counts: Mapping[str, Tensor], steps: int | None = None
) -> None:
    """Writes counts to a safetensors file: int32 [num_embeddings] for each table.

    An existing file is replaced in one step, once the new one is safely on the disk. A writer that
    is killed leaves the old file as it was, and beside it a folder ``.NAME.*.tmp`` to delete.

    With several ranks let one write, and the others wait where they read the file next:

    >>> counts = torchrec_freq.row_counts(model)  # all ranks  # doctest: +SKIP
    >>> if dist.get_rank() == 0:  # doctest: +SKIP
    ...     torchrec_freq.save_counts("counts.safetensors", counts, steps=10_000)
    >>> dist.barrier()  # doctest: +SKIP

    Args:
        counts: table name -> [num_embeddings] whole numbers from 0 to
            ``torchrec_freq.COUNT_CEILING``, of any dtype, on any device. Contiguous int32 tensors
            on the CPU are written as they are, others copied (4 bytes a row).
        steps: the number of optimizer steps that the counts stand for, at least 1.

    Raises:
        ValueError: no table, a name that the format cannot hold, counts that are not whole
            numbers in range, wrong steps; the message names the table. Nothing is written.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"Invalid steps value: {steps!r}. Must be a whole number >= 1, or None.")
    if not counts:
        raise ValueError("No counts to save: give at least one table.")
    metadata = {"format": _FORMAT, "version": _VERSION}
    if steps is not None:
        metadata["steps"] = str(steps)
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, counts_R in counts.items():
        tensor_R = _storable(name, counts_R)
        # The library refuses tensors that share storage, even where they do not overlap.
        if tensor_R.numel() and tensor_R.untyped_storage().data_ptr() in storages:
            tensor_R = tensor_R.clone()
        storages.add(tensor_R.untyped_storage().data_ptr())
        tensors[name] = tensor_R
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    ) as folder:
        temporary = Path(folder, path.name)
        # The library makes its file private to the user; this one has the mode of any new file.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
        # The replacement itself is on the disk once the folder is.
        _sync(path.parent)


def load_counts(path: str | os.PathLike[str]) -> CountsFile:
    """Reads a file of :func:`save_counts`, or of ``python -m torchrec_freq count``.

    Every rank may read the same file:

    >>> torchrec_freq.load_row_counts(
    ...     model, *torchrec_freq.load_counts("counts.safetensors")
    ... )  # doctest: +SKIP

    Raises:
        ValueError: the file is truncated, not a safetensors file, not one of counts, of a later
            version, or holds what cannot be a count; the message names the file.
        OSError: the file is missing or cannot be read.
    """
    path = Path(path)
    with _open(path) as file:
        steps = _check_metadata(path, file.metadata() or {})
        counts: dict[str, Tensor] = {}
        names = file.keys()
        for name in names:
            _rows(path, file, name)
            mapped_R = _checked(path, name, file.get_tensor(name))
            counts[name] = mapped_R.to(torch.int64, copy=True)  # nothing refers to the file
        return CountsFile(counts, steps)


def counts_layout(path: Path) -> tuple[dict[str, int], int | None]:
    """Rows of each table in a file of counts, and the steps; reads no count.

    Raises:
        ValueError, OSError: as of :func:`load_counts`.
    """
    with _open(path) as file:
        steps = _check_metadata(path, file.metadata() or {})
        names = file.keys()
        return {name: _rows(path, file, name) for name in names}, steps


def count_blocks(path: Path, name: str, block_rows: int) -> Iterator[Tensor]:
    """A table's counts from a file of them, ``block_rows`` rows after another.

    Yields:
        int32 or int64 [rows of the block].

    Raises:
        ValueError, OSError: as of :func:`load_counts`.
    """
    start, rows = 0, 1
    while start < rows:
        # Opened anew for each block, or what has been read stays mapped.
        with _open(path) as file:
            rows = _rows(path, file, name)
            block_R = file.get_slice(name)[start : start + block_rows]
        yield _checked(path, name, block_R)
        start += block_rows


def _storable(name: str, counts_R: Tensor) -> Tensor:
    """``counts_R`` as a contiguous int32 tensor on the CPU, itself where it is one."""
    if not isinstance(name, str) or not name or name == _RESERVED:
        raise ValueError(f"A file of counts cannot hold a table of name {name!r}: rename it.")
    check_counts(name, counts_R)
    return counts_R.detach().to("cpu", torch.int32).contiguous()


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> int | None:
    """The steps in the metadata of a file of counts."""
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not one of counts: its format is "
            f"{metadata.get('format')!r} instead of {_FORMAT!r}. Counts are written by "
            "torchrec_freq.save_counts and python -m torchrec_freq count."
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} holds counts in version {metadata.get('version')!r} of the format; this "
            f"torchrec_freq reads version {_VERSION!r}. Upgrade torchrec_freq."
        )
    steps = metadata.get("steps")
    if steps is None:
        return None
    if not (steps.isascii() and steps.isdecimal() and int(steps) >= 1):
        raise ValueError(f"{path}: steps must be a whole number >= 1; got {steps!r}.")
    return int(steps)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The library's view of a file, and its errors as ours."""
    with path.open("rb"):  # with Python's own errors; the library's name no file for a folder
        pass
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Copy it again, or write it "
            "with torchrec_freq.save_counts."
        ) from error


def _rows(path: Path, file: Any, name: str) -> int:
    """Rows of a table, whose type and shape are checked."""
    stored = file.get_slice(name)
    dtype, shape = stored.get_dtype(), stored.get_shape()
    if dtype not in _DTYPES or len(shape) != 1:
        raise ValueError(
            f"{path}: table {name!r} must be {' or '.join(_DTYPES)} of shape [num_embeddings]; got "
            f"{dtype} of shape {shape}. Write the file with torchrec_freq.save_counts."
        )
    return int(shape[0])


def _checked(path: Path, name: str, counts_R: Tensor) -> Tensor:
    try:
        check_counts(name, counts_R)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} The file is damaged, or was not written by torchrec_freq."
        ) from error
    return counts_R


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
