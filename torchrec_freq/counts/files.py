"""A file of counts: safetensors, one tensor a table, with checksums."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchrec_freq.counts.state import check_counts
from torchrec_freq.output import writing

_FORMAT: Final = "torchrec_freq.counts"
_VERSION: Final = "2"
# The name under which the format itself keeps text.
_RESERVED: Final = "__metadata__"


class CountsFile(NamedTuple):
    """What a file of counts holds, in the order of :func:`torchrec_freq.load_row_counts`.

    Attributes:
        counts: table name -> int64 CPU tensor [num_embeddings].
        squares: table name -> sum over the past of the mean squares of its rows' gradients, of the
            tables where it is known.
    """

    counts: dict[str, Tensor]
    squares: dict[str, float]


def save_counts(
    path: str | os.PathLike[str],
    counts: Mapping[str, Tensor],
    squares: Mapping[str, float] | None = None,
) -> None:
    """Writes counts to a safetensors file: int32 [num_embeddings] for each table.

    An existing file is replaced in one step, once the new one is safely on the disk; a link is
    written through. A writer that is killed leaves the old file as it was, and beside it a folder
    ``.writing-*.tmp`` to delete.

    With several ranks let one write, and the others wait where they read the file next:

    >>> counts = torchrec_freq.row_counts(model)  # all ranks  # doctest: +SKIP
    >>> if dist.get_rank() == 0:  # doctest: +SKIP
    ...     torchrec_freq.save_counts("counts.safetensors", counts)
    >>> dist.barrier()  # doctest: +SKIP

    Args:
        counts: table name -> [num_embeddings] whole numbers from 0 to
            ``torchrec_freq.COUNT_CEILING``, of any dtype, on any device. Contiguous int32 tensors
            on the CPU are written as they are, others copied (4 bytes a row).
        squares: table name -> sum over the past of the mean squares of its rows' gradients, finite
            and at least 0, for some or all of the tables.

    Raises:
        ValueError: no table, a name that the format cannot hold, counts that are not whole
            numbers in range, wrong squares; the message names the table. Nothing is written.
        OSError: the file cannot be written, or ``path`` is a folder, pipe or device.
    """
    squares = squares or {}
    if not counts:
        raise ValueError("No counts to save: give at least one table.")
    for name, value in squares.items():
        if name not in counts:
            raise ValueError(f"Table {name!r} has squares but no counts: give both.")
        if not _is_square(value):
            raise ValueError(
                f"Invalid squares of table {name!r}: {value!r}. Must be a finite number >= 0."
            )
    tensors: dict[str, Tensor] = {}
    checksums: dict[str, int] = {}
    storages: set[int] = set()
    for name, counts_R in counts.items():
        if not isinstance(name, str) or not name or name == _RESERVED:
            raise ValueError(f"A file of counts cannot hold a table of name {name!r}: rename it.")
        check_counts(name, counts_R)
        tensor_R = counts_R.detach().to("cpu", torch.int32).contiguous()
        # The library refuses tensors that share storage, even where they do not overlap.
        if tensor_R.numel() and tensor_R.untyped_storage().data_ptr() in storages:
            tensor_R = tensor_R.clone()
        storages.add(tensor_R.untyped_storage().data_ptr())
        tensors[name] = tensor_R
        start = _checksum_of_header(name, len(tensor_R), squares.get(name))
        checksums[name] = zlib.crc32(tensor_R.numpy().data, start)
    metadata = {"format": _FORMAT, "version": _VERSION, "crc32": json.dumps(checksums)}
    if squares:
        metadata["squares"] = json.dumps({name: float(squares[name]) for name in squares})
    # Here, so that training and benchmarks work where TorchRec does.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(path) as file:
        try:
            save_file(tensors, file, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot be written: {error}") from error


def load_counts(path: str | os.PathLike[str]) -> CountsFile:
    """Reads a file of :func:`save_counts`, or of ``python -m torchrec_freq count``.

    Every rank may read the same file:

    >>> torchrec_freq.load_row_counts(
    ...     model, *torchrec_freq.load_counts("counts.safetensors")
    ... )  # doctest: +SKIP

    Raises:
        ValueError: the file is truncated, not a safetensors file, not one of counts, of a later
            version, or holds other counts than were written, or what cannot be a count; the message
            names the file.
        OSError: the file is missing, cannot be read, or is no regular file.
    """
    reader = CountsReader(path)
    counts = {name: torch.empty(rows, dtype=torch.int64) for name, rows in reader.rows.items()}
    for name, counts_R in counts.items():
        for first, block_R in reader.blocks(name):
            counts_R[first : first + len(block_R)] = block_R
    return CountsFile(counts, reader.squares)


class CountsReader:
    """A file of counts, read block by block.

    Attributes:
        rows: table name -> number of rows.
        squares: of the tables where they are known.

    Raises:
        ValueError, OSError: as of :func:`load_counts`; from :meth:`blocks`, too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = Path(path)
        self._path.stat()  # what is not there is not damaged
        if not self._path.is_file():
            raise OSError(f"{path} is a folder, pipe or device. Name a file of counts.")
        try:
            self._file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({error}). Copy it again, or "
                "write it with torchrec_freq.save_counts."
            ) from error
        metadata = self._file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is a safetensors file, but not one of counts: its format is "
                f"{metadata.get('format')!r} instead of {_FORMAT!r}. Counts are written by "
                "torchrec_freq.save_counts and python -m torchrec_freq count."
            )
        if metadata.get("version") != _VERSION:
            raise ValueError(
                f"{path} holds counts in version {metadata.get('version')!r} of the format; this "
                f"torchrec_freq reads {_VERSION!r}. Count again, or upgrade torchrec_freq."
            )
        self.rows = {name: self._rows_of(name) for name in self._file.keys()}  # noqa: SIM118
        self.squares: dict[str, float] = self._by_table(metadata, "squares")
        if not all(name in self.rows and _is_square(x) for name, x in self.squares.items()):
            raise ValueError(f"{path} is damaged: its squares are {self.squares}.")
        self._checksums = self._by_table(metadata, "crc32")
        if self._checksums.keys() != self.rows.keys():
            raise ValueError(f"{path} is damaged: its checksums are not those of its tables.")

    def blocks(self, name: str, block_rows: int = 1 << 22) -> Iterator[tuple[int, Tensor]]:
        """A table's counts, ``block_rows`` rows after another.

        Yields:
            first row, and int32 [rows of the block]. The checksum is compared after the last one.
        """
        rows = self.rows[name]
        checksum = _checksum_of_header(name, rows, self.squares.get(name))
        for first in range(0, rows, block_rows):
            counts_R = self._file.get_slice(name)[first : first + block_rows]
            try:
                check_counts(name, counts_R)
            except ValueError as error:
                raise ValueError(
                    f"{self._path}: {error} The file is damaged, or was not written by "
                    "torchrec_freq."
                ) from error
            checksum = zlib.crc32(counts_R.numpy().data, checksum)
            yield first, counts_R.clone()
        if self._checksums[name] != checksum:
            raise ValueError(
                f"{self._path} is damaged: the counts of table {name!r} do not have the checksum "
                "that they were written with. Copy the file again."
            )

    def _by_table(self, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
        """A JSON object in the metadata; empty where there is none."""
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(metadata.get(key, "{}")), dict):
                return found
        raise ValueError(f"{self._path} is damaged: its {key} are no JSON object.")

    def _rows_of(self, name: str) -> int:
        """Rows of a table, whose type and shape are checked."""
        stored = self._file.get_slice(name)
        dtype, shape = stored.get_dtype(), stored.get_shape()
        if dtype != "I32" or len(shape) != 1:
            raise ValueError(
                f"{self._path}: table {name!r} must be I32 of shape [num_embeddings]; got {dtype} "
                f"of shape {shape}. Write the file with torchrec_freq.save_counts."
            )
        return int(shape[0])


def _is_square(value: Any) -> bool:
    """Whether this is a number that a float64 holds, at least 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max


def _checksum_of_header(name: str, rows: int, square: float | None) -> int:
    """CRC-32 of what a file says of a table besides the counts."""
    return zlib.crc32(json.dumps([name, rows, None if square is None else float(square)]).encode())
